//! Measures how fast a model reads and writes: the times, and the work that they are held against.
//!
//! A [`Test`] is a prefill or a decode of some tokens, by some sequences at once, after a context
//! that is already filled. [`Bench::run`] does it once unmeasured and then as often as asked, and
//! counts the multiply-adds and the bytes of the very steps it took.

mod operations;
mod work;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bitnet_core::backend::{Activation, Backend, KvType, Span};
use bitnet_core::{Candidate, Keep, Pick, ShortcutCounts, Shortcuts};
use bitnet_cpu::CpuBackend;
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
            kv: self.decoder.kv_allocate(layout, blocks * batch)?,
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
        self.decoder.kv_copy(&mut sequences.kv, &pairs);
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
