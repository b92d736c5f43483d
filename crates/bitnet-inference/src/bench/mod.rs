//! Measures how fast a model reads and writes: the times, and the work that they are held against.
//!
//! A [`Test`] is a prefill or a decode of some tokens, by some sequences at once, after a context
//! that is already filled. [`Bench::run`] does each of its tests once unmeasured and then all of them in
//! turn, as often as asked, and counts the multiply-adds and the bytes of the very steps it took.

mod operations;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnet_core::backend::{Activation, Backend, KvType, Span};
use bitnet_core::{Candidate, Keep, Pick, ShortcutCounts, Shortcuts};
use bitnet_cpu::CpuBackend;
use bitnet_cpu::ceilings::ReadRate;
use bitnet_model::config::ModelConfig;
use bitnet_model::decoder::{Decoder, Kv, Step, Workspace};
use bitnet_model::formats::Tensors;
use bitnet_model::shapes::Shape;
use bitnet_model::source;
use bitnet_model::weights::{self, LoadOptions};

use crate::engine::{Engine, EngineOptions};
use crate::error::Error;
use crate::grammar::Vocabulary;
use crate::model::{ModelOptions, cpu_backend};
use crate::sampler::{Sampler, SamplingParams};
use crate::session::{BLOCK_TOKENS, DEFAULT_CHUNK};

pub use operations::{Operation, OperationMeasurement, instruction_set};
use work::PlannedStep;
pub use work::{Costs, Kind, Savings, Test, Work};

/// Tokens of the unmeasured step that looks at the gates.
const GATE_TOKENS: usize = 32;

/// Most tokens of the warm-up of a decode.
const WARM_UP_TOKENS: usize = 8;

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
    /// Time of each repetition, in the order of the rounds.
    pub times: Vec<Duration>,
    /// What memory gave right before and after each repetition, in their mean, in 10^9 bytes per second; empty
    /// where that was not asked for.
    pub read_rates: Vec<f64>,
    /// What shortcuts left out.
    pub savings: Savings,
    /// Work per token.
    pub work: Work,
}

impl Measurement {
    /// Tokens per second, of all sequences together: the median (of an even number of repetitions,
    /// the slower of the middle two), the slowest and the fastest.
    pub fn tokens_per_s(&self) -> (f64, f64, f64) {
        let speeds = sorted(self.seconds_per_token().map(|seconds| 1.0 / seconds));
        (lower_median(&speeds), speeds[0], speeds[speeds.len() - 1])
    }

    /// Of each repetition, for each token of any sequence.
    fn seconds_per_token(&self) -> impl Iterator<Item = f64> {
        let tokens = self.test.all_tokens() as f64;
        self.times.iter().map(move |time| time.as_secs_f64() / tokens)
    }

    /// 10^9 ternary multiply-adds per second, at the median.
    pub fn gmac_per_s(&self) -> f64 {
        self.tokens_per_s().0 * self.work.ternary_macs / 1e9
    }

    /// 10^9 bytes read per second, at the median.
    pub fn gb_per_s(&self) -> f64 {
        self.tokens_per_s().0 * self.work.bytes() / 1e9
    }

    /// Bytes read, as a share of what memory gave at the time: the median of the repetitions. `None`
    /// where that was not measured.
    pub fn read_share(&self) -> Option<f64> {
        let rates = self.seconds_per_token().zip(&self.read_rates);
        let shares =
            sorted(rates.map(|(seconds, rate)| self.work.bytes() / seconds / (1e9 * rate)));
        (!shares.is_empty()).then(|| lower_median(&shares))
    }

    /// What the deeper context of this test cost beyond that of another, which was measured in the same
    /// rounds.
    pub fn beyond(&self, other: &Measurement) -> Deeper {
        let kv_bytes = self.work.kv_bytes - other.work.kv_bytes;
        let rounds = self.seconds_per_token().zip(other.seconds_per_token());
        let more: Vec<f64> = rounds.map(|(this, other)| this - other).collect();
        let rates = self.read_rates.iter().zip(&other.read_rates);
        let shares = sorted(rates.zip(&more).map(|((this, other), seconds)| {
            // What takes no time reads faster than anything.
            let rate = 1e9 * (this + other) / 2.0;
            if *seconds > 0.0 { kv_bytes / seconds / rate } else { f64::INFINITY }
        }));
        let more = sorted(more.into_iter());
        Deeper {
            seconds: more[more.len() / 2],
            kv_bytes,
            read_share: (!shares.is_empty()).then(|| lower_median(&shares)),
        }
    }
}

/// What a deeper context costs, per token.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Deeper {
    /// Seconds more: the median of the rounds.
    pub seconds: f64,
    /// Bytes of keys and values more.
    pub kv_bytes: f64,
    /// The rate at which that time reads those bytes, as a share of what memory gave at the time: the median
    /// of the rounds. `None` where that was not measured.
    pub read_share: Option<f64>,
}

fn sorted(values: impl Iterator<Item = f64>) -> Vec<f64> {
    let mut values: Vec<f64> = values.collect();
    values.sort_by(f64::total_cmp);
    values
}

/// The median of sorted values; of an even number the lower of the middle two.
fn lower_median(sorted: &[f64]) -> f64 {
    sorted[(sorted.len() - 1) / 2]
}

/// A loaded model that is measured.
pub struct Bench<B: Backend> {
    decoder: Arc<Decoder<B>>,
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
        let costs = Costs::new(&decoder, weights.head()?, kv_type);
        Ok(Bench { decoder: Arc::new(decoder), costs, kv_type })
    }
}

impl<B: Backend> Bench<B> {
    /// Name of the backend.
    pub fn backend_name(&self) -> String {
        self.decoder.backend().name()
    }

    /// An engine on the same weights, with every shortcut and this bench's storage of keys and values. It
    /// knows no text, and refuses constraints.
    ///
    /// # Errors
    /// As [`Model::engine`](crate::Model::engine).
    pub fn engine(&self, options: EngineOptions) -> Result<Engine, Error> {
        let options = EngineOptions { kv_type: self.kv_type, ..options };
        let vocabulary = Vocabulary::without_text(self.decoder.vocab_size());
        Engine::start(&self.decoder, None, options, Shortcuts::ALL, vocabulary)
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
        let test = Test { kind: Kind::Prefill, tokens: rows, depth: 0, batch: 1 };
        let Sequences { mut kv, mut workspace, free, .. } = self.sequences(&[test])?;
        let tokens: Vec<u32> = (0..rows).map(|i| self.token(0, i)).collect();
        let spans = [Span { rows: 0..rows, position: 0, blocks: &free[0] }];
        let step = Step { tokens: &tokens, spans: &spans };
        Ok(Some(self.decoder.closed_gates(&step, &mut kv, &mut workspace)?))
    }

    /// Sequences for some tests, filled to the greatest of their depths, all with the same tokens.
    ///
    /// # Errors
    /// If they do not fit the model's context, or the memory, or the device is lost.
    pub fn sequences(&self, tests: &[Test]) -> Result<Sequences<B>, Error> {
        let most = |of: fn(&Test) -> usize| tests.iter().map(of).max().unwrap_or(0);
        let (batch, depth) = (most(|test| test.batch), most(|test| test.depth));
        let length = most(|test| test.depth + test.tokens);
        let context_length = self.decoder.config().context_length;
        if length > context_length {
            return Err(Error::ContextExceeded { length, context_length });
        }
        // A test writes to the free blocks: its first is a copy of the one that its depth ends in.
        let filled = depth.div_ceil(BLOCK_TOKENS);
        let free = most(|test| (test.depth % BLOCK_TOKENS + test.tokens).div_ceil(BLOCK_TOKENS));
        let blocks = filled + free;
        let layout = self.decoder.kv_layout(self.kv_type, BLOCK_TOKENS);
        bitnet_core::budget::require(
            &format!("a context of {length} tokens for each of {batch} sequences"),
            (layout.block_bytes() as u64).saturating_mul((blocks * batch) as u64),
        )?;
        let tables = |offset: usize, len: usize| -> Vec<Vec<u32>> {
            let first = |sequence| (sequence * blocks + offset) as u32;
            (0..batch).map(|i| (first(i)..first(i) + len as u32).collect()).collect()
        };
        let mut sequences = Sequences {
            kv: self.decoder.kv_allocate(layout, blocks * batch)?,
            workspace: self.decoder.workspace(DEFAULT_CHUNK.max(batch), batch)?,
            filled: tables(0, filled),
            free: tables(filled, free),
        };
        if depth > 0 {
            self.fill(&mut sequences, depth)?;
        }
        Ok(sequences)
    }

    /// Fills the first `depth` tokens of all sequences.
    fn fill(&self, sequences: &mut Sequences<B>, depth: usize) -> Result<(), Error> {
        let test = Test { kind: Kind::Prefill, tokens: depth, depth: 0, batch: 1 };
        let tables = sequences.filled.clone();
        for mut step in test.steps() {
            step.picks.clear();
            let generated = &mut Generated::new(1)?;
            self.step(&step, sequences, &tables, generated, Kind::Prefill)?;
        }
        let (first, others) = tables.split_first().expect("there is a sequence");
        let pairs: Vec<(u32, u32)> = others
            .iter()
            .flat_map(|table| first.iter().copied().zip(table.iter().copied()))
            .collect();
        self.decoder.kv_copy(&mut sequences.kv, &pairs);
        Ok(())
    }

    /// Does each test once to warm up, then all of them in turn by the clock, in so many rounds, so that
    /// what slows the machine for a while does not meet one of them alone. With `reads`, what memory
    /// gives is measured between them. `progress` is told the number of each round before it begins.
    /// Measurements are in the order of the tests.
    ///
    /// # Errors
    /// If the device is lost, or the model gives no usable logits.
    ///
    /// # Panics
    /// If there are no rounds, or the sequences were not made for these tests.
    pub fn run(
        &self,
        tests: &[Test],
        sequences: &mut Sequences<B>,
        rounds: usize,
        reads: Option<&ReadRate>,
        mut progress: impl FnMut(usize),
    ) -> Result<Vec<Measurement>, Error> {
        assert!(rounds > 0);
        for &test in tests {
            let warm_up = match test.kind {
                Kind::Prefill => test,
                Kind::Decode => Test { tokens: test.tokens.min(WARM_UP_TOKENS), ..test },
            };
            self.once(warm_up, sequences)?;
        }
        let mut times = vec![Vec::with_capacity(rounds); tests.len()];
        let mut read_rates = vec![Vec::new(); tests.len()];
        let mut counts = vec![Vec::with_capacity(rounds); tests.len()];
        for round in 0..rounds {
            progress(round);
            let mut before = reads.map(ReadRate::measure);
            for (i, &test) in tests.iter().enumerate() {
                let counted = self.decoder.backend().shortcut_counts();
                times[i].push(self.once(test, sequences)?.0);
                counts[i].push(self.decoder.backend().shortcut_counts() - counted);
                let after = reads.map(ReadRate::measure);
                read_rates[i]
                    .extend(before.zip(after).map(|(before, after)| (before + after) / 2.0));
                before = after;
            }
        }
        let all = tests.iter().zip(counts).zip(times.into_iter().zip(read_rates));
        let measurements = all.map(|((&test, counts), (times, read_rates))| {
            let counts: ShortcutCounts = counts.into_iter().sum();
            let savings = self.costs.savings(&counts, &test, rounds);
            let work = self.costs.work(&test, &savings);
            Measurement { test, times, read_rates, savings, work }
        });
        Ok(measurements.collect())
    }

    /// The time of a test, and the tokens that it chose last.
    fn once(
        &self,
        test: Test,
        sequences: &mut Sequences<B>,
    ) -> Result<(Duration, Vec<u32>), Error> {
        let steps = test.steps();
        let whole = test.depth / BLOCK_TOKENS;
        let places = sequences.filled.iter().zip(&sequences.free).take(test.batch);
        let table = |(filled, free): (&Vec<u32>, &Vec<u32>)| [&filled[..whole], free].concat();
        let tables: Vec<Vec<u32>> = places.clone().map(table).collect();
        if !test.depth.is_multiple_of(BLOCK_TOKENS) {
            let pairs: Vec<_> = places.map(|(filled, free)| (filled[whole], free[0])).collect();
            self.decoder.kv_copy(&mut sequences.kv, &pairs);
        }
        let mut generated = Generated::new(test.batch)?;
        for (sequence, token) in generated.tokens.iter_mut().enumerate() {
            *token = self.token(sequence, test.depth);
        }
        let start = Instant::now();
        for step in &steps {
            self.step(step, sequences, &tables, &mut generated, test.kind)?;
        }
        Ok((start.elapsed(), generated.tokens))
    }

    /// One step, and the next tokens of the rows whose logits it makes.
    fn step(
        &self,
        step: &PlannedStep,
        sequences: &mut Sequences<B>,
        tables: &[Vec<u32>],
        generated: &mut Generated,
        kind: Kind,
    ) -> Result<(), Error> {
        let Sequences { kv, workspace, .. } = sequences;
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
        self.decoder.forward(&Step { tokens: &tokens, spans: &spans }, kv, workspace)?;
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
    kv: Kv<B>,
    workspace: Workspace<B>,
    /// Each sequence's blocks that hold a context, which tests of any depth share.
    filled: Vec<Vec<u32>>,
    /// Each sequence's blocks for what a test adds.
    free: Vec<Vec<u32>>,
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
        // A step of a prefill may end fewer prompts than there are sequences.
        let candidates = &mut candidates[..picks.len()];
        if decoder.candidates(workspace, &screened, candidates)? {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tests_of_several_depths_and_batches_do_not_meet_each_other() {
        let weights = Weights::of_model("tiny").unwrap();
        let bench = Bench::load(&weights, 1, KvType::F32).unwrap();
        let of = |kind, tokens, depth, batch| Test { kind, tokens, depth, batch };
        let (prefill, decode) = (Kind::Prefill, Kind::Decode);
        let tests = [
            of(decode, 70, 0, 1),
            of(decode, 3, 20, 2),
            of(prefill, 50, 64, 1),
            of(decode, 5, 130, 3),
            of(prefill, 9, 100, 2),
        ];
        let mut shared = bench.sequences(&tests).unwrap();
        for test in tests.iter().chain(tests.iter().rev()) {
            let mut own = bench.sequences(&[*test]).unwrap();
            let alone = bench.once(*test, &mut own).unwrap().1;
            assert_eq!(bench.once(*test, &mut shared).unwrap().1, alone, "{}", test.name());
        }
    }

    fn measured(depth: usize, ms: &[u64], read_rates: &[f64]) -> Measurement {
        let work = Work {
            ternary_macs: 1e9,
            head_macs: 0.0,
            ternary_bytes: 3e8,
            head_bytes: 1e8,
            kv_bytes: 1e4 * depth as f64,
        };
        Measurement {
            test: Test { kind: Kind::Decode, tokens: 2, depth, batch: 1 },
            times: ms.iter().map(|&ms| Duration::from_millis(ms)).collect(),
            read_rates: read_rates.to_vec(),
            savings: Savings::default(),
            work,
        }
    }

    #[test]
    fn medians_are_of_repetitions() {
        let measurement = measured(0, &[40, 10, 20], &[]);
        assert_eq!(measurement.tokens_per_s(), (100.0, 50.0, 200.0));
        assert_eq!((measurement.gmac_per_s(), measurement.gb_per_s()), (100.0, 40.0));
        assert_eq!(measurement.read_share(), None);
        assert_eq!(measured(0, &[40, 20], &[]).tokens_per_s().0, 50.0);
    }

    #[test]
    fn shares_are_of_what_memory_gave_beside_each_repetition() {
        // 400 MB in 20, 10 and 5 ms are 20, 40 and 80 GB/s.
        let measurement = measured(0, &[40, 20, 10], &[25.0, 80.0, 160.0]);
        assert_eq!(measurement.read_share(), Some(0.5));
    }

    #[test]
    fn a_deeper_context_is_held_against_the_same_rounds() {
        let shallow = measured(0, &[20, 40, 20], &[50.0, 25.0, 50.0]);
        // 40 MB more in 2, 4 and 1 ms: 20, 10 and 40 GB/s.
        let deep = measured(4000, &[24, 48, 22], &[30.0, 15.0, 50.0]);
        let Deeper { seconds, kv_bytes, read_share } = deep.beyond(&shallow);
        assert!((seconds - 0.002).abs() < 1e-12 && kv_bytes == 4e7, "{seconds} {kv_bytes}");
        assert!((read_share.unwrap() - 0.5).abs() < 1e-9, "{read_share:?}");
        // A context that seems to take no time does not take a negative share.
        let faster = measured(4000, &[18, 18, 18], &[30.0; 3]).beyond(&shallow);
        assert!(faster.seconds < 0.0 && faster.read_share == Some(f64::INFINITY), "{faster:?}");
        assert_eq!(measured(4000, &[24], &[]).beyond(&measured(0, &[20], &[])).read_share, None);
    }
}
