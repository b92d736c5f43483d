//! Storing keys and values, and attention over them.

use std::ops::Range;

use bitnet_core::backend::{AttentionShape, Span};
use bitnet_core::numerics::ATTENTION_SPLIT;
use bitnet_quant::packing::blocks::f32_to_f16_row;

use super::{Compute, at_least, lock};
use crate::arch::{Attention, Room, partial_len, room_len};
use crate::buffer::Buffer;
use crate::kv::{KvStore, LayerMut, Side, ask, scatter, scatter_pairs};
use crate::profile::Call;
use crate::threads::{Cut, Partition, Strips, ThreadPool};

/// Rows of scores (query heads of tokens) that share each load of a key or value: what they need
/// fits the second-level cache beside a panel.
const ROWS: usize = 64;

/// Products of attention below which waking other threads costs more than it saves.
const SMALL: usize = 100_000;

/// Numbers to be stored below which it does: a cache line for each keeps even few of them waiting.
const SMALL_WRITE: usize = 1024;

/// Takes one token of one head: its slab, its block there, its place in the block, and its key or value.
type Write<'a> = &'a mut dyn FnMut(usize, usize, usize, Side, &[f32]);

impl Compute {
    pub(crate) fn kv_write(
        &self,
        kv: &mut KvStore,
        layer: usize,
        k: &Buffer,
        v: &Buffer,
        spans: &[Span<'_>],
    ) {
        let start = self.profile.start();
        let layout = *kv.layout();
        let (kv_heads, head_size) = (layout.kv_heads, layout.head_size);
        if kv.is_empty() {
            return;
        }
        let slabs = kv.slabs;
        // Part `index` of a layer holds one side of one head, in a row for each slab.
        let each = |index: usize, write: Write<'_>| {
            let (side, x) = [(Side::Key, k), (Side::Value, v)][index % 2];
            let columns = index / 2 * head_size..(index / 2 + 1) * head_size;
            for span in spans {
                for (token, row) in (span.position..).zip(span.rows.clone()) {
                    let (slab, place) = slabs.place(span.blocks[token / layout.block_tokens]);
                    let values = &x.row(row)[columns.clone()];
                    write(slab, place, token % layout.block_tokens, side, values);
                }
            }
        };
        let rows: usize = spans.iter().map(|span| span.rows.len()).sum();
        let small = 2 * rows * kv_heads * head_size < SMALL_WRITE;
        let piece = layout.block_tokens * head_size;
        let strip = slabs.blocks * piece;
        let cut = |length: usize| (slabs.pieces * length, Cut::Even(slabs.blocks * length));
        match kv.layer_mut(layer) {
            LayerMut::F32(data) => {
                let (width, cut) = cut(piece);
                self.share(small, Strips::new(data, width, cut), |_, mut data| {
                    each(data.columns().start / strip, &mut |slab, place, token, side, values| {
                        let piece = &mut data.row(slab)[place * piece..][..piece];
                        ask(piece, &layout, side, token);
                        scatter(piece, &layout, side, token, values.iter().copied());
                    });
                });
            }
            LayerMut::F16(data) => {
                let scratch = self.scratch();
                let (width, cut) = cut(piece);
                self.share(small, Strips::new(data, width, cut), |thread, mut data| {
                    let mut own = lock(&scratch.threads[thread]);
                    let halves = at_least(&mut own.halves, head_size);
                    each(data.columns().start / strip, &mut |slab, place, token, side, values| {
                        let piece = &mut data.row(slab)[place * piece..][..piece];
                        ask(piece, &layout, side, token);
                        f32_to_f16_row(values, halves);
                        scatter(piece, &layout, side, token, halves.iter().copied());
                    });
                });
            }
            LayerMut::Int8(data, scales) => {
                let scratch = self.scratch();
                let threads = &scratch.threads;
                let ((width, of_data), (tokens, of_scales)) =
                    (cut(piece), cut(layout.block_tokens));
                let parts =
                    (Strips::new(data, width, of_data), Strips::new(scales, tokens, of_scales));
                self.share(small, parts, |thread, (mut data, mut scales)| {
                    let mut own = lock(&threads[thread]);
                    let quantized = at_least(&mut own.bytes, head_size);
                    each(data.columns().start / strip, &mut |slab, place, token, side, values| {
                        let piece = &mut data.row(slab)[place * piece..][..piece];
                        ask(piece, &layout, side, token);
                        scales.row(slab)[place * layout.block_tokens + token] =
                            self.kernels.quantize_head(values, quantized);
                        scatter_pairs(piece, &layout, side, token, quantized);
                    });
                });
            }
        }
        self.profile.note(start, || Call::of_rows("keys, values", rows));
    }

    /// Runs parts on all threads, or on the calling one if they are small.
    fn share<P: Partition>(&self, small: bool, parts: P, work: impl Fn(usize, P::Part) + Sync) {
        if small { ThreadPool::run_alone(parts, work) } else { self.pool.run(parts, work) }
    }

    pub(crate) fn attention(
        &self,
        shape: AttentionShape,
        layer: usize,
        q: &Buffer,
        kv: &KvStore,
        spans: &[Span<'_>],
        out: &mut Buffer,
    ) {
        let start = self.profile.start();
        let layout = *kv.layout();
        let (kv_heads, head_size) = (layout.kv_heads, layout.head_size);
        assert!(shape.heads.is_multiple_of(kv_heads), "query heads share key/value heads evenly");
        assert_eq!(q.cols(), shape.heads * head_size, "width of the queries");
        let shared = shape.heads / kv_heads;
        let width = shape.heads * head_size;
        let rows = spans.iter().map(|span| span.rows.end).max().unwrap_or(0);
        let out = out.shape(rows, width);

        // A tile is some tokens with the query heads of one key/value head.
        let longest_span = spans.iter().map(|span| span.rows.len()).max().unwrap_or(0);
        let height = (ROWS / shared).clamp(1, longest_span.max(1));
        // What the tokens of one sequence among rows see through one key/value head.
        let pieces = |rows: Range<usize>, head: usize| {
            spans.iter().filter_map(move |span| {
                let own = span.rows.start.max(rows.start)..span.rows.end.min(rows.end);
                let first = head * shared * head_size;
                (!own.is_empty()).then(|| {
                    let attention = Attention {
                        queries: &q.rows(own.end)[own.start * width + first..],
                        stride: width,
                        shared,
                        head_size,
                        position: span.position + own.start - span.rows.start,
                        tokens: own.len(),
                        window: shape.window,
                        scale: shape.scale,
                        data: &kv.data,
                        keys: kv.first_piece(layer, Side::Key, head),
                        values: kv.first_piece(layer, Side::Value, head),
                        slabs: kv.slabs,
                        block_tokens: layout.block_tokens,
                        blocks: span.blocks,
                    };
                    (own, attention)
                })
            })
        };
        let partial = shared * partial_len(head_size);
        let (floats, shorts) = room_len(height * shared, head_size);
        let mut scratch = self.scratch();
        let scratch = &mut *scratch;
        let threads = &scratch.threads;
        let tiles = rows.div_ceil(height);
        let jobs = tiles * kv_heads;
        let (mut splits, mut products) = (0, 0);
        for span in spans {
            let end = span.position + span.rows.len();
            splits = splits.max(end.div_ceil(ATTENTION_SPLIT));
            products += 2 * width * span.rows.len() * end.min(shape.window.unwrap_or(end));
        }
        let small = products < SMALL;

        if splits > 1 && jobs < 4 * threads.len() && threads.len() > 1 && !small {
            // Few tiles over a long context: the threads share the splits.
            let tile = height * partial;
            let partials = at_least(&mut scratch.partials, jobs * splits * tile);
            // All tiles of a split, then the next split, as they lie in memory. In parts that taper, because two
            // threads may take as long to agree on a part as to compute one.
            let cut = Cut::Tapered { unit: tile, least: 1, threads: threads.len() };
            let len = partials.len();
            self.pool.run(Strips::new(partials, len, cut), |thread, mut part| {
                let first = part.columns().start / tile;
                for (index, partials) in (first..).zip(part.row(0).chunks_exact_mut(tile)) {
                    let (split, job) = (index / jobs, index % jobs);
                    let first = job / kv_heads * height;
                    for (own, attention) in pieces(first..first + height, job % kv_heads) {
                        if attention.splits().contains(&split) {
                            let mut scratch = lock(&threads[thread]);
                            let scratch = &mut *scratch;
                            let room = Room {
                                floats: at_least(&mut scratch.floats, floats),
                                shorts: at_least(&mut scratch.shorts, shorts),
                            };
                            let partials = &mut partials[(own.start - first) * partial..];
                            self.kernels.attend(&attention, split, room, partials);
                        }
                    }
                }
            });
            // Then the query heads: each joins its parts of the splits, in their order.
            let (partials, len) = (&*partials, partial_len(head_size));
            let cut = Cut::Tapered { unit: head_size, least: 1, threads: threads.len() };
            let strips = Strips::new(out, width, cut).cut(height);
            self.pool.run(strips, |thread, mut out| {
                let (rows, columns) = (out.rows(), out.columns());
                let first = rows.start;
                for head in columns.start / head_size..columns.end / head_size {
                    let job = first / height * kv_heads + head / shared;
                    for (own, attention) in pieces(rows.clone(), head / shared) {
                        for row in own {
                            let part = |split: usize| {
                                let start = (split * jobs + job) * tile + (row - first) * partial;
                                &partials[start + head % shared * len..][..len]
                            };
                            let mut scratch = lock(&threads[thread]);
                            let total = at_least(&mut scratch.floats, len);
                            let splits = attention.splits();
                            total.copy_from_slice(part(splits.start));
                            for split in splits.skip(1) {
                                self.kernels.merge(head_size, total, part(split));
                            }
                            let out = &mut out.row(row)[head * head_size - columns.start..];
                            self.kernels.finish(head_size, total, &mut out[..head_size]);
                        }
                    }
                }
            });
        } else {
            let strips = Strips::new(out, width, Cut::Even(shared * head_size)).cut(height);
            self.share(small, strips, |thread, mut out| {
                let head = out.columns().start / (shared * head_size);
                for (own, attention) in pieces(out.rows(), head) {
                    let mut scratch = lock(&threads[thread]);
                    let scratch = &mut *scratch;
                    let tile = height * partial;
                    let (room, partials) =
                        at_least(&mut scratch.floats, floats + 2 * tile).split_at_mut(floats);
                    let (total, part) = partials.split_at_mut(tile);
                    let (total, part) =
                        (&mut total[..own.len() * partial], &mut part[..own.len() * partial]);
                    let mut attend = |split: usize, partials: &mut [f32]| {
                        let shorts = at_least(&mut scratch.shorts, shorts);
                        let room = Room { floats: room, shorts };
                        self.kernels.attend(&attention, split, room, partials);
                    };
                    let splits = attention.splits();
                    attend(splits.start, total);
                    for split in splits.skip(1) {
                        attend(split, part);
                        self.kernels.merge(head_size, total, part);
                    }
                    for (row, total) in own.zip(total.chunks_exact(partial)) {
                        self.kernels.finish(head_size, total, out.row(row));
                    }
                }
            });
        }
        self.profile.note(start, || {
            let seen = |end: usize| end.min(shape.window.unwrap_or(end));
            let (mut tokens, mut products) = (0, 0);
            for span in spans {
                let ends = span.position + 1..=span.position + span.rows.len();
                // Each row of a span sees what the one before it sees, and itself.
                tokens += seen(span.position + 1) + span.rows.len() - 1;
                products += ends.map(seen).sum::<usize>();
            }
            Call {
                bytes: tokens * layout.block_bytes() / layout.layers / layout.block_tokens,
                macs: 2 * width * products,
                ..Call::of_rows("attention", rows)
            }
        });
    }
}
