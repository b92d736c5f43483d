//! Attention, and the stores of keys and values.

use bitnet_core::backend::{AttentionShape, Backend, KvLayout, KvType, Span};
use bitnet_core::numerics::ATTENTION_SPLIT;
use bitnet_quant::reference::ReferenceBackend;

use super::{Both, Pair};
use crate::random::Random;

/// Key/value stores of the same contents on both backends.
struct Stores<B: Backend> {
    ours: B::Kv,
    theirs: <ReferenceBackend as Backend>::Kv,
}

impl<B: Backend> Pair<'_, B> {
    fn kv(&self, layout: KvLayout, blocks: usize) -> Stores<B> {
        Stores {
            ours: self.backend.kv_allocate(layout, blocks).expect("room for keys and values"),
            theirs: self.reference.kv_allocate(layout, blocks).expect("room for keys and values"),
        }
    }

    /// Stores keys and values of a step and attends in one layer.
    fn step(
        &self,
        random: &mut Random,
        shape: AttentionShape,
        layout: KvLayout,
        layer: usize,
        kv: &mut Stores<B>,
        spans: &[Span<'_>],
    ) -> Both<B> {
        let rows = spans.iter().map(|span| span.rows.end).max().unwrap_or(0);
        let width = layout.kv_heads * layout.head_size;
        let k = self.buffer(rows, width, &random.activations(rows * width));
        let v = self.buffer(rows, width, &random.near_ties(rows * width, layout.head_size));
        self.backend.kv_write(&mut kv.ours, layer, &k.ours, &v.ours, spans);
        self.reference.kv_write(&mut kv.theirs, layer, &k.theirs, &v.theirs, spans);
        let width = shape.heads * layout.head_size;
        let q = self.buffer(rows, width, &random.activations(rows * width));
        let mut out = self.unwritten(rows, width);
        self.backend.attention(shape, layer, &q.ours, &kv.ours, spans, &mut out.ours);
        self.reference.attention(shape, layer, &q.theirs, &kv.theirs, spans, &mut out.theirs);
        out
    }

    /// Steps of a batch: three sequences of different ages, blocks out of order, both layers.
    pub(super) fn attention(&self) {
        let mut random = Random::new(8);
        for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
            for (heads, kv_heads, head_size) in [(4, 2, 16), (3, 1, 100), (2, 2, 6), (20, 5, 128)] {
                let layout = KvLayout { layers: 2, kv_heads, head_size, block_tokens: 4, kv_type };
                let scale = 1.0 / (head_size as f32).sqrt();
                for window in [None, Some(1), Some(5)] {
                    let shape = AttentionShape { heads, scale, window };
                    let mut kv = self.kv(layout, 12);
                    let (a, b, c) = ([7, 2, 11, 0], [5, 9, 1], [3, 10]);
                    for layer in 0..2 {
                        let case = |step: &str| {
                            format!(
                                "attention, {step}, {kv_type:?}, {heads}/{kv_heads} heads of \
                                 {head_size}, window {window:?}, layer {layer}"
                            )
                        };
                        let prompts = [
                            Span { rows: 0..9, position: 0, blocks: &a },
                            Span { rows: 9..12, position: 0, blocks: &b },
                            Span { rows: 12..13, position: 0, blocks: &c },
                        ];
                        let out = self.step(&mut random, shape, layout, layer, &mut kv, &prompts);
                        self.compare(&out, 13, &case("prompts"));
                        let next = [
                            Span { rows: 0..1, position: 9, blocks: &a },
                            Span { rows: 1..7, position: 3, blocks: &b },
                            Span { rows: 7..8, position: 1, blocks: &c },
                        ];
                        let out = self.step(&mut random, shape, layout, layer, &mut kv, &next);
                        self.compare(&out, 8, &case("next tokens"));
                    }
                }
            }
        }
    }

    /// Head sizes of models and around the width of a register, with every number of query heads that
    /// a register block may have, in blocks that are narrower than a register, as wide, and neither.
    pub(super) fn attention_shapes(&self) {
        let mut random = Random::new(11);
        let shapes = [(64, 1), (80, 2), (96, 3), (100, 4), (256, 5), (12, 6), (34, 7), (48, 9)];
        for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
            for (index, (head_size, shared)) in shapes.into_iter().enumerate() {
                let kv_heads = 1 + index % 3;
                let block_tokens = [1, 5, 16, 24, 40][index % 5];
                let layout = KvLayout { layers: 2, kv_heads, head_size, block_tokens, kv_type };
                let blocks: Vec<u32> = (0..90u32.div_ceil(block_tokens as u32)).rev().collect();
                let mut kv = self.kv(layout, blocks.len());
                let scale = 1.0 / (head_size as f32).sqrt();
                let mut position = 0;
                for (end, window) in [(37, None), (38, None), (41, Some(3)), (90, Some(20))] {
                    let spans = [Span { rows: 0..end - position, position, blocks: &blocks }];
                    let shape = AttentionShape { heads: kv_heads * shared, scale, window };
                    let out = self.step(&mut random, shape, layout, 1, &mut kv, &spans);
                    let case = format!(
                        "attention at {position}..{end}, {kv_type:?}, {shared} heads share each of \
                         {kv_heads} of {head_size}, blocks of {block_tokens}, window {window:?}"
                    );
                    self.compare(&out, end - position, &case);
                    position = end;
                }
            }
        }
    }

    /// Contexts that end just before, at and after the ends of splits, and steps that span several.
    pub(super) fn long_attention(&self) {
        const SPLIT: usize = ATTENTION_SPLIT;
        let mut random = Random::new(9);
        for (kv_type, head_size, block_tokens) in [
            (KvType::F32, 20, 16),
            (KvType::F16, 8, 16),
            (KvType::Int8, 12, 16),
            (KvType::F32, 6, 7),
            (KvType::Int8, 10, 24),
        ] {
            let layout = KvLayout { layers: 1, kv_heads: 2, head_size, block_tokens, kv_type };
            let tokens = 5 * SPLIT + 40;
            let blocks: Vec<u32> = (0..tokens.div_ceil(block_tokens) as u32).rev().collect();
            let shape = AttentionShape { heads: 4, scale: 0.3, window: None };
            let mut kv = self.kv(layout, blocks.len());
            let mut position = 0;
            let ends = [
                (SPLIT - 2, None),
                (SPLIT - 1, None),
                (SPLIT, None),
                (SPLIT + 1, Some(SPLIT + 7)),
                // Every row of a step sees more, and with a window less, than the one before.
                (2 * SPLIT - 1, Some(SPLIT / 2 + 3)),
                (2 * SPLIT, None),
                (2 * SPLIT + 6, Some(SPLIT + 7)),
                (4 * SPLIT + 3, None),
                // Rows of two tiles, whose splits threads share.
                (4 * SPLIT + 50, None),
                (5 * SPLIT + 30, Some(2 * SPLIT + 1)),
                (5 * SPLIT + 32, Some(3 * SPLIT)),
                (tokens, Some(5)),
            ];
            for (end, window) in ends {
                let spans = [Span { rows: 0..end - position, position, blocks: &blocks }];
                let shape = AttentionShape { window, ..shape };
                let out = self.step(&mut random, shape, layout, 0, &mut kv, &spans);
                let case = format!("attention at {position}..{end}, {kv_type:?}, {window:?}");
                self.compare(&out, end - position, &case);
                position = end;
            }
            // Two sequences, one long and one that shares its first blocks.
            let spans = [
                Span { rows: 0..1, position: position - 1, blocks: &blocks },
                Span {
                    rows: 1..3,
                    position: 30,
                    blocks: &blocks[..33usize.div_ceil(block_tokens)],
                },
            ];
            let out = self.step(&mut random, shape, layout, 0, &mut kv, &spans[..1]);
            self.compare(&out, 1, &format!("one token far on, {kv_type:?}"));
            let out = self.step(&mut random, shape, layout, 0, &mut kv, &spans);
            self.compare(&out, 3, &format!("a long and a short sequence, {kv_type:?}"));
        }
    }

    /// Half-precision keys and values take the largest finite number in place of an infinity, so that
    /// a large value is large and not the end of the sequence.
    pub(super) fn large_values(&self) {
        let layout = KvLayout {
            layers: 1,
            kv_heads: 1,
            head_size: 4,
            block_tokens: 4,
            kv_type: KvType::F16,
        };
        let mut kv = self.kv(layout, 1);
        let values = [65_504.0, 65_519.0, 65_520.0, -1e9, 1e-7, -7e4, 3.0, f32::INFINITY];
        let (k, v) = (self.buffer(2, 4, &[0.0; 8]), self.buffer(2, 4, &values));
        let spans = [Span { rows: 0..2, position: 0, blocks: &[0] }];
        self.backend.kv_write(&mut kv.ours, 0, &k.ours, &v.ours, &spans);
        self.reference.kv_write(&mut kv.theirs, 0, &k.theirs, &v.theirs, &spans);
        let q = self.buffer(2, 4, &[1.0; 8]);
        let mut out = self.unwritten(2, 4);
        // A window of one token shows each value as it is stored.
        let shape = AttentionShape { heads: 1, scale: 1.0, window: Some(1) };
        self.backend.attention(shape, 0, &q.ours, &kv.ours, &spans, &mut out.ours);
        self.reference.attention(shape, 0, &q.theirs, &kv.theirs, &spans, &mut out.theirs);
        self.compare(&out, 2, "values beyond half precision");
        let mut read = Vec::new();
        self.reference.read(&out.theirs, 2, &mut read).expect("memory is there");
        let stored =
            [65_504.0, 65_504.0, 65_504.0, -65_504.0, 1.192_092_9e-7, -65_504.0, 3.0, 65_504.0];
        assert_eq!(read, stored);
    }

    /// Copied, exported and imported blocks hold what the original ones do.
    pub(super) fn blocks_move(&self) {
        let mut random = Random::new(10);
        for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
            let layout =
                KvLayout { layers: 2, kv_heads: 2, head_size: 10, block_tokens: 4, kv_type };
            let shape = AttentionShape { heads: 2, scale: 0.4, window: None };
            let mut kv = self.kv(layout, 8);
            for layer in 0..2 {
                let spans = [Span { rows: 0..8, position: 0, blocks: &[6, 1] }];
                self.step(&mut random, shape, layout, layer, &mut kv, &spans);
            }
            self.backend.kv_copy(&mut kv.ours, &[(6, 3), (1, 0)]);
            self.reference.kv_copy(&mut kv.theirs, &[(6, 3), (1, 0)]);
            let spans = [Span { rows: 0..1, position: 8, blocks: &[3, 0, 2] }];
            let out = self.step(&mut random, shape, layout, 1, &mut kv, &spans);
            self.compare(&out, 1, &format!("attention over copied blocks, {kv_type:?}"));

            let ours = self.backend.kv_export(&kv.ours, &[3, 0]).expect("an export");
            let theirs = self.reference.kv_export(&kv.theirs, &[3, 0]).expect("an export");
            assert_eq!(ours.len(), 2 * layout.block_bytes(), "bytes of two blocks, {kv_type:?}");
            let mut kv = self.kv(layout, 6);
            self.backend.kv_import(&mut kv.ours, &[5, 2], &ours).expect("an import");
            self.reference.kv_import(&mut kv.theirs, &[5, 2], &theirs).expect("an import");
            assert!(
                self.backend.kv_import(&mut kv.ours, &[5, 2], &ours[1..]).is_err(),
                "an import of another size is refused"
            );
            for layer in 0..2 {
                let spans = [Span { rows: 0..1, position: 8, blocks: &[5, 2, 0] }];
                let out = self.step(&mut random, shape, layout, layer, &mut kv, &spans);
                self.compare(&out, 1, &format!("attention over imported blocks, {kv_type:?}"));
            }
        }
    }
}
