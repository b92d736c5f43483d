//! Measures how fast a model reads and writes: the times, and the work that they are held against.
//!
//! A [`Test`] is a prefill or a decode of some tokens, by some sequences at once, after a context
//! that is already filled. [`Bench::run`] does it once unmeasured and then as often as asked, and
//! counts the multiply-adds and the bytes of the very steps it took.

use std::ops::Range;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use bitnet_core::backend::{Activation, Backend, KvType, Span};
use bitnet_core::{Candidate, Keep, Pick, ShortcutCounts, screen};
use bitnet_cpu::CpuBackend;
use bitnet_model::config::ModelConfig;
use bitnet_model::decoder::{Decoder, Step, Workspace};
use bitnet_model::formats::Tensors;
use bitnet_model::shapes::Shape;
use bitnet_model::source;
use bitnet_model::weights::{self, LoadOptions};

use crate::error::Error;
use crate::model::{ModelOptions, cpu_backend};
use crate::sampler::{Sampler, SamplingParams};
use crate::session::{BLOCK_TOKENS, DEFAULT_CHUNK};

/// Tokens of the unmeasured step that looks at the gates.
const GATE_TOKENS: usize = 32;

/// Most tokens of the warm-up of a decode.
const WARM_UP_TOKENS: usize = 8;

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
    fn steps(&self) -> Vec<PlannedStep> {
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
struct PlannedStep {
    spans: Vec<(usize, Range<usize>)>,
    picks: Vec<usize>,
}

impl PlannedStep {
    fn rows(&self) -> usize {
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
    /// The costs of a model with such a head (rows, bytes per row) and such a KV store.
    pub fn new(config: &ModelConfig, head: (u64, u64), kv_type: KvType) -> Self {
        let layers = config.layers.len() as u64;
        let (head_rows, head_row_bytes) = if config.pooling.is_some() { (0, 0) } else { head };
        Costs {
            ternary_weights: weights::ternary_weights(config),
            up_weights: layers * config.hidden_size as u64 * config.intermediate_size as u64,
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
        bytes.unwrap_or(0) as f64 / self.head_rows as f64
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
        let head_rows = self.head_rows as f64;
        let skipped = [savings.up_rows_skipped, savings.down_columns_skipped];
        for step in test.steps() {
            let rows = step.rows() as f64;
            work.ternary_macs += rows * (weights - part * (skipped[0] + skipped[1]));
            let unread = skipped.map(|skipped| 1.0 - (rows * (1.0 - skipped)).min(1.0));
            // Four weights to a byte.
            work.ternary_bytes += (weights - part * (unread[0] + unread[1])) / 4.0;
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
    fn savings(&self, counts: &ShortcutCounts, test: &Test, repetitions: usize) -> Savings {
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

/// Weights to measure with: of a model, or random ones of a known shape.
pub struct Weights {
    /// The model's path or the shape's name.
    pub path: PathBuf,
    /// Shape and rules of the decoder.
    pub config: ModelConfig,
    /// What was decided for want of a word in the files.
    pub notes: Vec<String>,
    tensors: Tensors,
}

impl Weights {
    /// Of a model: `tiny`, a directory or a file.
    ///
    /// # Errors
    /// If it cannot be read.
    pub fn of_model(model: &str) -> Result<Self, Error> {
        let source::Checkpoint { description, tensors } = source::open(model)?;
        let source::Description { path, config, notes, .. } = description;
        Ok(Weights { path, config, notes, tensors })
    }

    /// Random ones; see [`Shape::checkpoint`].
    ///
    /// # Errors
    /// If the gate sparsity cannot be had, or there is not enough memory.
    pub fn of_shape(shape: &Shape, gate_sparsity: Option<f64>) -> Result<Self, Error> {
        let checkpoint = shape.checkpoint(gate_sparsity)?;
        let (path, config) = (checkpoint.path, checkpoint.config);
        Ok(Weights { path, config, notes: Vec::new(), tensors: checkpoint.tensors })
    }

    /// Rows of the output head and bytes of each.
    fn head(&self) -> Result<(u64, u64), Error> {
        let tables = weights::tables(&self.path, &self.config, &self.tensors)?;
        let head = tables.head.unwrap_or(tables.embedding);
        Ok((head.rows() as u64, (head.data().len() / head.rows()) as u64))
    }
}

/// The times of a test, and its work.
#[derive(Debug, Clone, PartialEq)]
pub struct Measurement {
    /// What was measured.
    pub test: Test,
    /// Time of each repetition, the shortest first.
    pub times: Vec<Duration>,
    /// What shortcuts left out.
    pub savings: Savings,
    /// Work per token.
    pub work: Work,
}

impl Measurement {
    /// Tokens per second, of all sequences together: the median (of an even number of repetitions,
    /// the slower of the middle two), the slowest and the fastest.
    pub fn tokens_per_s(&self) -> (f64, f64, f64) {
        let speed = |time: &Duration| self.test.all_tokens() as f64 / time.as_secs_f64();
        let (first, last) = (&self.times[0], &self.times[self.times.len() - 1]);
        (speed(&self.times[self.times.len() / 2]), speed(last), speed(first))
    }

    /// 10^9 ternary multiply-adds per second, at the median.
    pub fn gmac_per_s(&self) -> f64 {
        self.tokens_per_s().0 * self.work.ternary_macs / 1e9
    }

    /// 10^9 bytes read per second, at the median.
    pub fn gb_per_s(&self) -> f64 {
        self.tokens_per_s().0 * self.work.bytes() / 1e9
    }
}

/// A loaded model that is measured.
pub struct Bench<B: Backend> {
    decoder: Decoder<B>,
    costs: Costs,
    kv_type: KvType,
}

impl Bench<CpuBackend> {
    /// Loads weights on the CPU with so many threads, second copies for shortcuts included.
    ///
    /// # Errors
    /// If they cannot be loaded.
    pub fn load(weights: &Weights, threads: usize, kv_type: KvType) -> Result<Self, Error> {
        let options =
            ModelOptions { threads: Some(threads), copies: true, ..ModelOptions::default() };
        let Weights { path, config, tensors, .. } = weights;
        let backend = cpu_backend(&options)?;
        let load = LoadOptions::default();
        let decoder = weights::load(backend, path, config, tensors, load, &mut Vec::new())?;
        Ok(Bench { decoder, costs: Costs::new(config, weights.head()?, kv_type), kv_type })
    }
}

impl<B: Backend> Bench<B> {
    /// Name of the backend.
    pub fn backend_name(&self) -> String {
        self.decoder.backend().name()
    }

    /// What decides the work.
    pub fn costs(&self) -> &Costs {
        &self.costs
    }

    /// Share of gates that are zero or less, by looking at all gates of one unmeasured step; `None`
    /// for a model whose gates are never exactly zero.
    ///
    /// # Errors
    /// If there is not enough memory, or the device is lost.
    pub fn gate_sparsity(&self) -> Result<Option<f64>, Error> {
        if self.decoder.config().activation != Activation::Relu2 {
            return Ok(None);
        }
        let rows = GATE_TOKENS.min(self.decoder.config().context_length);
        let mut sequences = self.sequences(1, rows)?;
        let tokens: Vec<u32> = (0..rows).map(|i| self.token(0, i)).collect();
        let Sequences { kv, workspace, tables } = &mut sequences;
        let spans = [Span { rows: 0..rows, position: 0, blocks: &tables[0] }];
        let step = Step { tokens: &tokens, spans: &spans };
        Ok(Some(self.decoder.closed_gates(&step, kv, workspace)?))
    }

    /// Room for sequences of so many tokens each.
    ///
    /// # Errors
    /// If they do not fit the model's context, or the memory.
    pub fn sequences(&self, batch: usize, tokens: usize) -> Result<Sequences<B>, Error> {
        let context_length = self.decoder.config().context_length;
        if tokens > context_length {
            return Err(Error::ContextExceeded { length: tokens, context_length });
        }
        let blocks = tokens.div_ceil(BLOCK_TOKENS);
        let layout = self.decoder.kv_layout(self.kv_type, BLOCK_TOKENS);
        bitnet_core::budget::require(
            &format!("a context of {tokens} tokens for each of {batch} sequences"),
            (layout.block_bytes() as u64).saturating_mul((blocks * batch) as u64),
        )?;
        let table = |sequence: usize| {
            let first = (sequence * blocks) as u32;
            (first..first + blocks as u32).collect()
        };
        Ok(Sequences {
            kv: self.decoder.backend().kv_allocate(layout, blocks * batch)?,
            workspace: self.decoder.workspace(DEFAULT_CHUNK.max(batch), batch)?,
            tables: (0..batch).map(table).collect(),
        })
    }

    /// Fills the first `depth` tokens of all sequences, all with the same.
    ///
    /// # Errors
    /// If the device is lost.
    pub fn fill(&self, sequences: &mut Sequences<B>, depth: usize) -> Result<(), Error> {
        if depth == 0 {
            return Ok(());
        }
        let test = Test { kind: Kind::Prefill, tokens: depth, depth: 0, batch: 1 };
        for mut step in test.steps() {
            step.picks.clear();
            self.step(&step, sequences, &mut Generated::new(1)?, Kind::Prefill)?;
        }
        let used = depth.div_ceil(BLOCK_TOKENS);
        let (first, others) = sequences.tables.split_first().expect("there is a sequence");
        let pairs: Vec<(u32, u32)> = others
            .iter()
            .flat_map(|table| first.iter().copied().zip(table.iter().copied()).take(used))
            .collect();
        self.decoder.backend().kv_copy(&mut sequences.kv, &pairs);
        Ok(())
    }

    /// Does a test once to warm up, then `repetitions` times by the clock. The sequences must be
    /// filled to its depth and are so again after it.
    ///
    /// # Errors
    /// If the device is lost, or the model gives no usable logits.
    ///
    /// # Panics
    /// If there are no repetitions, or the sequences lack the room for the test.
    pub fn run(
        &self,
        test: Test,
        sequences: &mut Sequences<B>,
        repetitions: usize,
    ) -> Result<Measurement, Error> {
        assert!(repetitions > 0);
        let warm_up = match test.kind {
            Kind::Prefill => test,
            Kind::Decode => Test { tokens: test.tokens.min(WARM_UP_TOKENS), ..test },
        };
        self.once(warm_up, sequences)?;
        let before = self.decoder.backend().shortcut_counts();
        let mut times = Vec::with_capacity(repetitions);
        for _ in 0..repetitions {
            times.push(self.once(test, sequences)?);
        }
        let after = self.decoder.backend().shortcut_counts();
        times.sort();
        let counts = difference(&after, &before);
        let savings = self.costs.savings(&counts, &test, repetitions);
        Ok(Measurement { test, times, savings, work: self.costs.work(&test, &savings) })
    }

    fn once(&self, test: Test, sequences: &mut Sequences<B>) -> Result<Duration, Error> {
        let steps = test.steps();
        let mut generated = Generated::new(test.batch)?;
        for (sequence, token) in generated.tokens.iter_mut().enumerate() {
            *token = self.token(sequence, test.depth);
        }
        let start = Instant::now();
        for step in &steps {
            self.step(step, sequences, &mut generated, test.kind)?;
        }
        Ok(start.elapsed())
    }

    /// One step, and the next tokens of the rows whose logits it makes.
    fn step(
        &self,
        step: &PlannedStep,
        sequences: &mut Sequences<B>,
        generated: &mut Generated,
        kind: Kind,
    ) -> Result<(), Error> {
        let Sequences { kv, workspace, tables } = sequences;
        let mut tokens = Vec::with_capacity(step.rows());
        let mut spans = Vec::with_capacity(step.spans.len());
        for (sequence, positions) in &step.spans {
            let first = tokens.len();
            match kind {
                Kind::Decode => tokens.push(generated.tokens[*sequence]),
                Kind::Prefill => tokens.extend(positions.clone().map(|i| self.token(*sequence, i))),
            }
            let blocks = &tables[*sequence][..];
            spans.push(Span { rows: first..tokens.len(), position: positions.start, blocks });
        }
        self.decoder.forward(&Step { tokens: &tokens, spans: &spans }, kv, workspace);
        if self.costs.head_rows == 0 {
            // An embedding model's result is the hidden state.
            return Ok(self.decoder.final_states(workspace, &mut generated.logits)?);
        }
        generated.choose(&self.decoder, workspace, &step.picks)
    }

    /// The token at a place of a prompt: any, but always the same.
    fn token(&self, sequence: usize, position: usize) -> u32 {
        let mixed = (position as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15)
            ^ (sequence as u64 + 1).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        ((mixed >> 20) % self.decoder.vocab_size() as u64) as u32
    }
}

/// Sequences with keys and values of their own.
pub struct Sequences<B: Backend> {
    kv: B::Kv,
    workspace: Workspace<B>,
    /// Each sequence's blocks.
    tables: Vec<Vec<u32>>,
}

/// What was generated last by each sequence.
struct Generated {
    sampler: Sampler,
    tokens: Vec<u32>,
    candidates: Vec<Vec<Candidate>>,
    logits: Vec<f32>,
}

impl Generated {
    fn new(batch: usize) -> Result<Self, Error> {
        let sampler = Sampler::new(&SamplingParams::default())?;
        Ok(Generated {
            sampler,
            tokens: vec![0; batch],
            candidates: vec![Vec::new(); batch],
            logits: Vec::new(),
        })
    }

    /// The most probable tokens after some rows, chosen as generation chooses them.
    fn choose<B: Backend>(
        &mut self,
        decoder: &Decoder<B>,
        workspace: &mut Workspace<B>,
        picks: &[usize],
    ) -> Result<(), Error> {
        if picks.is_empty() {
            return Ok(());
        }
        let Self { sampler, tokens, candidates, logits } = self;
        // Greedy sampling without penalties asks for no ids by name.
        let pick = |&row: &usize| Pick { row, keep: Keep::Largest(1), exact_ids: &[] };
        let screened: Vec<Pick<'_>> = picks.iter().map(pick).collect();
        if decoder.candidates(workspace, &screened, &mut candidates[..picks.len()])? {
            for (token, candidates) in tokens.iter_mut().zip(candidates) {
                *token = sampler.sample_candidates(candidates, &[], 0)?.token;
            }
            return Ok(());
        }
        decoder.logits(workspace, picks, logits)?;
        let rows = logits.chunks_exact(decoder.vocab_size());
        for (token, logits) in tokens.iter_mut().zip(rows) {
            *token = sampler.sample(logits, &[], 0)?.token;
        }
        Ok(())
    }
}

fn difference(after: &ShortcutCounts, before: &ShortcutCounts) -> ShortcutCounts {
    ShortcutCounts {
        up_rows: after.up_rows - before.up_rows,
        up_rows_skipped: after.up_rows_skipped - before.up_rows_skipped,
        down_columns: after.down_columns - before.down_columns,
        down_columns_skipped: after.down_columns_skipped - before.down_columns_skipped,
        head_rows: after.head_rows - before.head_rows,
        head_rows_rescored: after.head_rows_rescored - before.head_rows_rescored,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// BitNet b1.58 2B-4T: per layer 69 468 160 ternary weights, of which 6912 x 2560 =
    /// 17 694 720 are `up`'s; a bf16 head of 128 256 x 2560; 5 heads of 128 in f32 for keys and as
    /// many for values.
    fn costs_of_2b() -> Costs {
        Costs {
            ternary_weights: 2_084_044_800,
            up_weights: 530_841_600,
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
