//! What there is to measure, and its work: multiply-adds and bytes, counted from the steps of a test.

use std::ops::Range;

use bitnet_core::backend::{Backend, KvType};
use bitnet_core::{ShortcutCounts, screen};
use bitnet_model::decoder::Decoder;
use bitnet_model::weights;

use crate::session::DEFAULT_CHUNK;

/// What a test does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads a prompt, up to the first token after it.
    Prefill,
    /// Generates greedily, token by token.
    Decode,
}

/// One thing to measure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Test {
    /// What is done.
    pub kind: Kind,
    /// Tokens that each sequence reads or generates.
    pub tokens: usize,
    /// Tokens that each sequence holds before.
    pub depth: usize,
    /// Sequences at once.
    pub batch: usize,
}

impl Test {
    /// Its name: `pp512`, `tg128`, with a batch `tg128x4`, at a depth `tg128@4096`.
    pub fn name(&self) -> String {
        let kind = if self.kind == Kind::Prefill { "pp" } else { "tg" };
        let batch = if self.batch > 1 { format!("x{}", self.batch) } else { String::new() };
        let depth = if self.depth > 0 { format!("@{}", self.depth) } else { String::new() };
        format!("{kind}{}{batch}{depth}", self.tokens)
    }

    /// Tokens of all sequences.
    pub fn all_tokens(&self) -> usize {
        self.tokens * self.batch
    }

    /// The steps, as they are taken and counted.
    pub(super) fn steps(&self) -> Vec<PlannedStep> {
        let rows_of = |sequence: usize, range: Range<usize>| (sequence, range);
        match self.kind {
            Kind::Decode => (self.depth..self.depth + self.tokens)
                .map(|position| {
                    let row = |sequence| rows_of(sequence, position..position + 1);
                    let spans = (0..self.batch).map(row).collect();
                    PlannedStep { spans, picks: (0..self.batch).collect() }
                })
                .collect(),
            Kind::Prefill => {
                // The prompts one after another, cut as a session cuts one.
                let mut steps = Vec::new();
                let all = self.all_tokens();
                for first in (0..all).step_by(DEFAULT_CHUNK) {
                    let end = all.min(first + DEFAULT_CHUNK);
                    let mut step = PlannedStep { spans: Vec::new(), picks: Vec::new() };
                    let mut token = first;
                    while token < end {
                        let (sequence, offset) = (token / self.tokens, token % self.tokens);
                        let len = (self.tokens - offset).min(end - token);
                        let position = self.depth + offset;
                        step.spans.push(rows_of(sequence, position..position + len));
                        token += len;
                        if token.is_multiple_of(self.tokens) {
                            step.picks.push(token - first - 1);
                        }
                    }
                    steps.push(step);
                }
                steps
            }
        }
    }
}

/// The rows of one step: positions of sequences, and the rows whose logits are needed.
pub(super) struct PlannedStep {
    pub(super) spans: Vec<(usize, Range<usize>)>,
    pub(super) picks: Vec<usize>,
}

impl PlannedStep {
    pub(super) fn rows(&self) -> usize {
        self.spans.iter().map(|(_, positions)| positions.len()).sum()
    }
}

/// What shortcuts left out while a test ran, as shares of the whole; 0 where none was taken.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Savings {
    /// Rows of `up` that met a closed gate and were skipped.
    pub up_rows_skipped: f64,
    /// Columns of `down` that met a zero and were skipped.
    pub down_columns_skipped: f64,
    /// Rows of the output head that were looked at in reduced precision first.
    pub head_rows_screened: f64,
    /// Rows of the output head that survived that and were computed in full.
    pub head_rows_rescored: f64,
}

/// Work per token: of one sequence's token, also where a step has tokens of several.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Work {
    /// Multiply-adds of ternary weights, without those that were skipped.
    pub ternary_macs: f64,
    /// Multiply-adds of the output head in full precision.
    pub head_macs: f64,
    /// Bytes of ternary weights.
    pub ternary_bytes: f64,
    /// Bytes of the output head.
    pub head_bytes: f64,
    /// Bytes of keys and values.
    pub kv_bytes: f64,
}

impl Work {
    /// All bytes that are read.
    pub fn bytes(&self) -> f64 {
        self.ternary_bytes + self.head_bytes + self.kv_bytes
    }
}

/// What decides the work of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Costs {
    /// Ternary weights of all layers.
    pub ternary_weights: u64,
    /// Of those, weights of all `up` matrices, and as many of all `down` matrices.
    pub up_weights: u64,
    /// Bits per weight of matrices that are read whole.
    pub bits_per_weight: f64,
    /// Bits per weight of `up`.
    pub up_bits_per_weight: f64,
    /// Rows of the output head; 0 for a model that makes embeddings and has none.
    pub head_rows: u64,
    /// Elements of a row of the head.
    pub hidden: u64,
    /// Bytes of a row of the head as it is stored.
    pub head_row_bytes: u64,
    /// Bytes of one token's keys and values in one layer.
    pub kv_layer_bytes: u64,
    /// How far each layer sees, where it does not see everything.
    pub windows: Vec<Option<usize>>,
}

impl Costs {
    /// The costs of a loaded model with such a head (rows, bytes per row) and such a KV store.
    pub fn new<B: Backend>(decoder: &Decoder<B>, head: (u64, u64), kv_type: KvType) -> Self {
        let config = decoder.config();
        let layers = config.layers.len() as u64;
        let up_weights = layers * config.hidden_size as u64 * config.intermediate_size as u64;
        let [bits_per_weight, up_bits_per_weight] =
            decoder.gate_and_up_bytes().map(|bytes| 8.0 * bytes as f64 / up_weights as f64);
        let (head_rows, head_row_bytes) = if config.pooling.is_some() { (0, 0) } else { head };
        Costs {
            ternary_weights: weights::ternary_weights(config),
            up_weights,
            bits_per_weight,
            up_bits_per_weight,
            head_rows,
            hidden: config.hidden_size as u64,
            head_row_bytes,
            kv_layer_bytes: config.kv_layout(kv_type, 1).block_bytes() as u64 / layers,
            windows: config.layers.iter().map(|layer| layer.window).collect(),
        }
    }

    /// Bytes of a row of the screen of the head.
    fn screened_row_bytes(&self) -> f64 {
        let bytes = screen::byte_len(self.head_rows as usize, self.hidden as usize);
        bytes.unwrap_or(0) as f64 / self.head_rows.max(1) as f64
    }

    /// Work per token of a test with these savings.
    ///
    /// Each step reads the weights once, the head once if it makes any logits, and the keys and
    /// values of each of its sequences once. What a step of several tokens skips for one of them
    /// it may read for another: at worst, each reads others.
    pub fn work(&self, test: &Test, savings: &Savings) -> Work {
        let mut work = Work {
            ternary_macs: 0.0,
            head_macs: 0.0,
            ternary_bytes: 0.0,
            head_bytes: 0.0,
            kv_bytes: 0.0,
        };
        let (weights, part) = (self.ternary_weights as f64, self.up_weights as f64);
        let (head_rows, whole) = (self.head_rows as f64, self.bits_per_weight);
        let skipped = [savings.up_rows_skipped, savings.down_columns_skipped];
        for step in test.steps() {
            let rows = step.rows() as f64;
            work.ternary_macs += rows * (weights - part * (skipped[0] + skipped[1]));
            let unread = skipped.map(|skipped| 1.0 - (rows * (1.0 - skipped)).min(1.0));
            let runs = self.up_bits_per_weight;
            let up_bits = runs * (1.0 - unread[0]);
            // A step that leaves any columns out reads the copy by columns, which lie as rows of `up`.
            let down_bits = if unread[1] > 0.0 { runs * (1.0 - unread[1]) } else { whole };
            let bits = (weights - 2.0 * part) * whole + part * (up_bits + down_bits);
            work.ternary_bytes += bits / 8.0;
            let picks = step.picks.len() as f64;
            let screened = savings.head_rows_screened;
            let in_full = 1.0 - screened + savings.head_rows_rescored;
            work.head_macs += picks * head_rows * in_full * self.hidden as f64;
            if picks > 0.0 {
                let rescored = (picks * savings.head_rows_rescored).min(1.0);
                let in_full = (1.0 - screened + rescored) * self.head_row_bytes as f64;
                work.head_bytes += head_rows * (in_full + screened * self.screened_row_bytes());
            }
            for (_, positions) in &step.spans {
                let seen = |window: &Option<usize>| {
                    let first =
                        window.map_or(0, |window| (positions.start + 1).saturating_sub(window));
                    (positions.end - first) as u64
                };
                let tokens: u64 = self.windows.iter().map(seen).sum();
                work.kv_bytes += (tokens * self.kv_layer_bytes) as f64;
            }
        }
        let tokens = test.all_tokens() as f64;
        Work {
            ternary_macs: work.ternary_macs / tokens,
            head_macs: work.head_macs / tokens,
            ternary_bytes: work.ternary_bytes / tokens,
            head_bytes: work.head_bytes / tokens,
            kv_bytes: work.kv_bytes / tokens,
        }
    }

    /// Shares of the whole that `repetitions` of a test saved.
    pub(super) fn savings(
        &self,
        counts: &ShortcutCounts,
        test: &Test,
        repetitions: usize,
    ) -> Savings {
        let steps = test.steps();
        let tokens = (test.all_tokens() * repetitions) as f64;
        let picks: usize = steps.iter().map(|step| step.picks.len()).sum();
        let share = |part: u64, whole: f64| if whole > 0.0 { part as f64 / whole } else { 0.0 };
        let intermediate = (self.up_weights / self.hidden) as f64;
        let head = (picks * repetitions) as f64 * self.head_rows as f64;
        Savings {
            up_rows_skipped: share(counts.up_rows_skipped, tokens * intermediate),
            down_columns_skipped: share(counts.down_columns_skipped, tokens * intermediate),
            head_rows_screened: share(counts.head_rows, head),
            head_rows_rescored: share(counts.head_rows_rescored, head),
        }
    }
}

#[cfg(test)]
mod tests {
    use bitnet_model::shapes::Shape;

    use super::*;

    /// BitNet b1.58 2B-4T: per layer 69 468 160 ternary weights, of which 6912 x 2560 =
    /// 17 694 720 are `up`'s; a bf16 head of 128 256 x 2560; 5 heads of 128 in f32 for keys and as
    /// many for values.
    fn costs_of_2b() -> Costs {
        Costs {
            ternary_weights: 2_084_044_800,
            up_weights: 530_841_600,
            bits_per_weight: 2.0,
            up_bits_per_weight: 2.0,
            head_rows: 128_256,
            hidden: 2560,
            head_row_bytes: 5120,
            kv_layer_bytes: 5120,
            windows: vec![None; 30],
        }
    }

    fn test(kind: Kind, tokens: usize, depth: usize, batch: usize) -> Test {
        Test { kind, tokens, depth, batch }
    }

    #[test]
    fn a_decoded_token_of_2b_reads_every_weight_and_the_whole_head_once() {
        let work = costs_of_2b().work(&test(Kind::Decode, 1, 0, 1), &Savings::default());
        assert_eq!(work.ternary_macs, 2_084_044_800.0);
        assert_eq!(work.head_macs, 328_335_360.0);
        assert_eq!(work.ternary_bytes, 521_011_200.0);
        assert_eq!(work.head_bytes, 656_670_720.0);
        // One token's keys and values: 38 400 numbers of 4 bytes.
        assert_eq!(work.kv_bytes, 153_600.0);
        // Tokens 101 to 104 see 101 to 104 tokens, 102.5 in the mean.
        let deeper = costs_of_2b().work(&test(Kind::Decode, 4, 100, 1), &Savings::default());
        assert_eq!(deeper.kv_bytes, 102.5 * 153_600.0);
        assert_eq!(deeper.ternary_bytes, work.ternary_bytes);
    }

    #[test]
    fn rows_of_up_and_chosen_columns_of_down_have_bits_of_their_own() {
        let (all, up) = (2_084_044_800.0, 530_841_600.0);
        let one = test(Kind::Decode, 1, 0, 1);
        let costs = Costs { bits_per_weight: 1.7, up_bits_per_weight: 1.6, ..costs_of_2b() };
        let work = costs.work(&one, &Savings::default());
        assert_eq!(work.ternary_bytes, ((all - 2.0 * up) * 1.7 + up * (1.6 + 1.7)) / 8.0);
        let skipped = Savings { down_columns_skipped: 0.75, ..Savings::default() };
        let work = costs.work(&one, &skipped);
        assert_eq!(work.ternary_bytes, ((all - 2.0 * up) * 1.7 + up * (1.6 + 0.4)) / 8.0);
    }

    #[test]
    fn sequences_of_a_batch_share_the_weights_but_not_the_keys() {
        let work = costs_of_2b().work(&test(Kind::Decode, 8, 0, 4), &Savings::default());
        assert_eq!(work.ternary_macs, 2_084_044_800.0);
        assert_eq!(work.ternary_bytes, 521_011_200.0 / 4.0);
        assert_eq!(work.head_bytes, 656_670_720.0 / 4.0);
        assert_eq!(work.kv_bytes, 4.5 * 153_600.0);
    }

    #[test]
    fn a_prefill_reads_the_weights_once_per_step_and_the_head_once_per_prompt() {
        // 512 tokens are four steps of 128; the last one makes the logits of one row.
        let work = costs_of_2b().work(&test(Kind::Prefill, 512, 0, 1), &Savings::default());
        assert_eq!(work.ternary_macs, 2_084_044_800.0);
        assert_eq!(work.head_macs, 328_335_360.0 / 512.0);
        assert_eq!(work.ternary_bytes, 521_011_200.0 * 4.0 / 512.0);
        assert_eq!(work.head_bytes, 656_670_720.0 / 512.0);
        let keys = f64::from(128 + 256 + 384 + 512);
        assert_eq!(work.kv_bytes, keys * 153_600.0 / 512.0);
        // Two prompts of 96: the first step has all of one and 32 tokens of the other.
        let steps = test(Kind::Prefill, 96, 10, 2).steps();
        let spans: Vec<_> = steps.iter().map(|step| step.spans.clone()).collect();
        assert_eq!(spans, [vec![(0, 10..106), (1, 10..42)], vec![(1, 42..106)]]);
        assert_eq!([&steps[0].picks[..], &steps[1].picks[..]], [&[95], &[63]]);
    }

    #[test]
    fn a_model_without_a_head_reads_none() {
        let costs = Costs { head_rows: 0, head_row_bytes: 0, ..costs_of_2b() };
        let work = costs.work(&test(Kind::Prefill, 128, 0, 1), &Savings::default());
        assert_eq!((work.head_bytes, work.head_macs), (0.0, 0.0));
        assert_eq!(work.ternary_bytes, 521_011_200.0 / 128.0);
    }

    #[test]
    fn what_is_skipped_is_neither_read_nor_multiplied() {
        let savings = Savings {
            up_rows_skipped: 0.5,
            down_columns_skipped: 0.75,
            head_rows_screened: 1.0,
            head_rows_rescored: 0.001,
        };
        let work = costs_of_2b().work(&test(Kind::Decode, 1, 0, 1), &savings);
        let macs = 2_084_044_800.0 - 1.25 * 530_841_600.0;
        assert_eq!(work.ternary_macs, macs);
        assert_eq!(work.ternary_bytes, macs / 4.0);
        // 5 bits per element, a byte per 32 of them, three numbers per row, one per column.
        let screen = 128_256.0 * (2560.0 * (5.0 / 8.0 + 1.0 / 32.0) + 12.0) + 2560.0 * 4.0;
        let head = screen + 128_256.0 * 0.001 * 5120.0;
        assert!((work.head_bytes - head).abs() < 1.0, "{}", work.head_bytes);
        assert!((work.head_macs - 328_335.36).abs() < 1.0, "{}", work.head_macs);
        // Two tokens may need different rows: half of them each, together all.
        let two = costs_of_2b().work(&test(Kind::Decode, 1, 0, 2), &savings);
        assert_eq!(two.ternary_macs, macs);
        assert_eq!(two.ternary_bytes, (2_084_044_800.0 - 0.5 * 530_841_600.0) / 4.0 / 2.0);
    }

    #[test]
    fn a_window_bounds_the_keys_that_are_read() {
        let costs = Costs { windows: vec![None, Some(16)], ..costs_of_2b() };
        let work = costs.work(&test(Kind::Decode, 1, 99, 1), &Savings::default());
        assert_eq!(work.kv_bytes, (100.0 + 16.0) * 5120.0);
    }

    #[test]
    fn counts_become_shares_of_all_that_there_was() {
        let counts = ShortcutCounts {
            up_rows: 3 * 5 * 207_360,
            up_rows_skipped: 3 * 5 * 207_360 / 2,
            down_columns: 3 * 5 * 207_360,
            down_columns_skipped: 3 * 5 * 207_360 / 4,
            head_rows: 3 * 5 * 128_256,
            head_rows_rescored: 15,
        };
        let savings = costs_of_2b().savings(&counts, &test(Kind::Decode, 5, 0, 1), 3);
        assert_eq!((savings.up_rows_skipped, savings.down_columns_skipped), (0.5, 0.25));
        assert_eq!(savings.head_rows_screened, 1.0);
        assert_eq!(savings.head_rows_rescored, 1.0 / 128_256.0);
    }

    #[test]
    fn every_shape_has_the_weights_of_its_model() {
        let weights_of = |name: &str| {
            let shape = Shape::named(name).unwrap();
            weights::ternary_weights(&shape.config())
        };
        assert_eq!(weights_of("bitnet-2b-4t"), 2_084_044_800);
        // 32 layers of 4096 x (2 x 4096 + 2 x 1024 + 3 x 14336).
        assert_eq!(weights_of("llama3-8b"), 6_979_321_856);
        // 28 layers of 3072 x (2 x 3072 + 2 x 1024 + 3 x 23040).
        assert_eq!(weights_of("falcon3-7b"), 6_650_068_992);
        // 26 layers of 3200 x (4 x 3200 + 3 x 8640).
        assert_eq!(weights_of("1bitllm-3b"), 3_221_504_000);
        // 28 layers of 1024 x (2 x 2048 + 2 x 1024 + 3 x 3072).
        assert_eq!(weights_of("bitnet-embedding-0.6b"), 440_401_920);
    }

    #[test]
    fn names_tell_what_was_measured() {
        assert_eq!(test(Kind::Prefill, 512, 0, 1).name(), "pp512");
        assert_eq!(test(Kind::Decode, 128, 4096, 4).name(), "tg128x4@4096");
    }
}
