//! Embeddings and output heads.

use bitnet_core::backend::Backend;
use bitnet_core::{DType, Keep, Pick, Tensor};
use bitnet_quant::screen;

use super::Pair;
use crate::random::Random;

impl<B: Backend> Pair<'_, B> {
    /// Embeddings and heads of every type that they come in.
    pub(super) fn tables(&self) {
        let mut random = Random::new(7);
        let cases = [
            (DType::F32, 37, 100),
            (DType::F32, 1000, 64),
            (DType::F16, 37, 1),
            (DType::F16, 37, 100),
            (DType::F16, 1000, 127),
            (DType::BF16, 37, 99),
            (DType::BF16, 1000, 64),
            (DType::Q8_0, 37, 96),
            (DType::Q4K, 19, 512),
            (DType::Q6K, 19, 768),
        ];
        for (dtype, vocabulary, hidden) in cases {
            let table = table(&mut random, dtype, vocabulary, hidden);
            let ours = self.backend.load_table(&table).expect("a table");
            let theirs = self.reference.load_table(&table).expect("a table");
            for scale in [1.0, 8.062_258] {
                let tokens: Vec<u32> = (0..5).map(|_| random.below(vocabulary) as u32).collect();
                let mut out = self.unwritten(6, hidden);
                self.backend.embed(&ours, &tokens, scale, &mut out.ours);
                self.reference.embed(&theirs, &tokens, scale, &mut out.theirs);
                self.compare(&out, 5, &format!("embed from {dtype}, scale {scale}"));
            }
            let x = self.buffer(40, hidden, &random.activations(40 * hidden));
            let (our_norm, their_norm) = self.norm(&mut random, hidden);
            let all: Vec<usize> = (0..40).collect();
            for picks in [&[2usize][..], &[4, 0, 4], &all[3..39]] {
                let mut out = self.unwritten(picks.len(), vocabulary);
                self.backend.head(&x.ours, picks, &our_norm, &ours, &mut out.ours);
                self.reference.head(&x.theirs, picks, &their_norm, &theirs, &mut out.theirs);
                let case = format!("head {dtype} {vocabulary} x {hidden}, {} picks", picks.len());
                self.compare(&out, picks.len(), &case);
            }
            let screen = screen::build(&table).expect("a screen");
            let Some(screen) = self.backend.load_screen(&screen).expect("a screen") else {
                continue;
            };
            for keep in [Keep::Largest(1), Keep::Largest(7), Keep::Within(2.0)] {
                let ids = [0, 5, vocabulary as u32 - 1, vocabulary as u32];
                for ids in [&[][..], &ids[..]] {
                    // Rows that ask for different things share a pass.
                    let picks = [
                        Pick { row: 3, keep, exact_ids: ids },
                        Pick { row: 0, keep: Keep::Largest(2), exact_ids: &[1] },
                        Pick { row: 3, keep: Keep::Largest(1), exact_ids: &[] },
                    ];
                    for picks in [&picks[..1], &picks] {
                        let mut found = vec![Vec::new(); picks.len()];
                        let mut expected = found.clone();
                        let (ours_x, norm) = (&x.ours, &our_norm);
                        self.backend
                            .screened_head(ours_x, picks, norm, &ours, &screen, &mut found)
                            .expect("a device");
                        let (their_x, norm) = (&x.theirs, &their_norm);
                        self.reference
                            .screened_head(their_x, picks, norm, &theirs, &(), &mut expected)
                            .expect("no device to lose");
                        // A screen may let more through, and all that it lets through is exact.
                        let case =
                            format!("screened head {dtype} {vocabulary} x {hidden}, {picks:?}");
                        for (expected, found) in expected.iter().zip(&found) {
                            let missing = expected.iter().find(|c| !found.contains(c));
                            assert_eq!(missing, None, "{case}");
                        }
                    }
                }
            }
        }
    }
}

/// A table of random values. Block formats take random bytes, with scales that stay finite.
fn table(random: &mut Random, dtype: DType, vocabulary: usize, hidden: usize) -> Tensor {
    let len = dtype.byte_len(&[vocabulary, hidden]).expect("a shape that the type can have");
    let mut data: Vec<u8> = match dtype {
        DType::F32 => {
            random.activations(vocabulary * hidden).iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        DType::BF16 => random
            .activations(vocabulary * hidden)
            .iter()
            .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
            .collect(),
        _ => (0..len).map(|_| random.bits() as u8).collect(),
    };
    // Where half-precision numbers stand: their exponent must not be all ones.
    let halves: &[usize] = match dtype {
        DType::F16 => &[0],
        DType::Q8_0 => &[0],
        DType::Q4K => &[0, 2],
        DType::Q6K => &[208],
        _ => &[],
    };
    for block in data.chunks_exact_mut(dtype.block_bytes()) {
        for &at in halves {
            block[at + 1] &= 0b1011_1111;
        }
    }
    Tensor::new(dtype, vec![vocabulary, hidden], data.into()).expect("bytes fill the shape")
}
