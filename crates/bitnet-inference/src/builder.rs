//! How an [`InferenceEngine`] is set up.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bitnet_core::backend::KvType;
use bitnet_core::machine::physical_cores;
use bitnet_core::{Device, Shortcuts, budget};
use bitnet_cpu::Isa;

use crate::engine::EngineOptions;
use crate::error::Error;
use crate::inference_engine::InferenceEngine;
use crate::model::{ModelOptions, device_reason};
use crate::request::LogitsProcessor;
use crate::scheduler::SchedulerPolicy;

/// An amount of memory, in powers of 1000.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MemorySize {
    /// Bytes.
    B(u64),
    /// Kilobytes.
    KB(u64),
    /// Megabytes.
    MB(u64),
    /// Gigabytes.
    GB(u64),
}

impl MemorySize {
    /// The same in bytes.
    ///
    /// ```
    /// use bitnet_inference::MemorySize;
    /// assert_eq!(MemorySize::GB(2).bytes(), 2_000_000_000);
    /// ```
    pub fn bytes(self) -> u64 {
        let (count, unit) = match self {
            MemorySize::B(count) => (count, 1),
            MemorySize::KB(count) => (count, 1_000),
            MemorySize::MB(count) => (count, 1_000_000),
            MemorySize::GB(count) => (count, 1_000_000_000),
        };
        count.saturating_mul(unit)
    }
}

/// How much is done for speed. No level changes a token.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum OptimizationLevel {
    /// Plain code, which is the reference, and no shortcuts.
    None,
    /// The best instructions of this CPU, and no shortcuts.
    Basic,
    /// Every exact shortcut as well: zeros left out, the screened head, prefixes used again, and
    /// speculation where a generation asks for it.
    #[default]
    Aggressive,
}

/// Makes the logits processor of one request.
pub(crate) type ProcessorFactory = Arc<dyn Fn() -> Box<dyn LogitsProcessor> + Send + Sync>;

/// A way to set up an [`InferenceEngine`], which starts as [`InferenceEngine::balanced`].
///
/// ```
/// use bitnet_inference::{GenerationParams, InferenceEngine, MemorySize, OptimizationLevel};
///
/// let mut engine = InferenceEngine::builder()
///     .threads(1)
///     .max_batch_size(8)
///     .memory_pool_size(MemorySize::MB(64))
///     .optimization_level(OptimizationLevel::Basic)
///     .build()?;
/// engine.load_model("tiny")?;
/// let text = engine.generate("Once upon a time", GenerationParams::default()).wait()?.text;
/// # assert!(!text.is_empty());
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
#[derive(Clone)]
pub struct InferenceEngineBuilder {
    device: Option<Device>,
    threads: Option<usize>,
    copies: bool,
    optimization: OptimizationLevel,
    /// `None`: what the preset says, or half of the available memory if that is less.
    memory_pool: Option<MemorySize>,
    options: EngineOptions,
    pub(crate) draft_model: Option<String>,
    pub(crate) processors: Vec<ProcessorFactory>,
}

impl InferenceEngineBuilder {
    /// The setting of [`InferenceEngine::fast`].
    pub(crate) fn fast() -> Self {
        Self::preset(32, MemorySize::GB(4), 512, true)
    }

    /// The setting of [`InferenceEngine::balanced`].
    pub(crate) fn balanced() -> Self {
        Self::preset(16, MemorySize::GB(2), 256, false)
    }

    /// The setting of [`InferenceEngine::low_memory`].
    pub(crate) fn low_memory() -> Self {
        Self::preset(4, MemorySize::MB(256), 64, false)
    }

    fn preset(max_sequences: usize, kv: MemorySize, queue: usize, copies: bool) -> Self {
        InferenceEngineBuilder {
            device: None,
            threads: None,
            copies,
            optimization: OptimizationLevel::default(),
            memory_pool: None,
            options: EngineOptions {
                max_sequences,
                kv_bytes: kv.bytes(),
                queue,
                ..EngineOptions::default()
            },
            draft_model: None,
            processors: Vec::new(),
        }
    }

    /// The device; the best there is, unless it is said.
    pub fn device(mut self, device: Device) -> Self {
        self.device = Some(device);
        self
    }

    /// Whether a GPU computes: with `true` there must be one, with `false` the CPU does. The last of this
    /// and [`device`](InferenceEngineBuilder::device) counts.
    pub fn gpu(self, gpu: bool) -> Self {
        self.device(if gpu { Device::Gpu } else { Device::Cpu })
    }

    /// Threads that compute, for each replica; unless it is said, the physical cores are shared out
    /// among the replicas.
    pub fn threads(mut self, threads: usize) -> Self {
        self.threads = Some(threads);
        self
    }

    /// Copies of the engine that work at the same time, each with threads and keys and values of its
    /// own, on the same weights; 1, unless it is said. A request goes to the one that has the fewest.
    pub fn replicas(mut self, replicas: usize) -> Self {
        self.options.replicas = replicas;
        self
    }

    /// Requests that run at once on each replica; more wait.
    pub fn max_batch_size(mut self, requests: usize) -> Self {
        self.options.max_sequences = requests;
        self
    }

    /// Requests that may wait; more are refused.
    pub fn max_queue_length(mut self, requests: usize) -> Self {
        self.options.queue = requests;
        self
    }

    /// Memory for keys and values. It is taken as it is used, and if it is not there, loading a
    /// model fails.
    pub fn memory_pool_size(mut self, size: MemorySize) -> Self {
        self.memory_pool = Some(size);
        self
    }

    /// How much is done for speed. No level changes a token.
    pub fn optimization_level(mut self, level: OptimizationLevel) -> Self {
        self.optimization = level;
        self
    }

    /// Storage of keys and values. All but [`KvType::F32`] are approximations.
    pub fn kv_type(mut self, kv_type: KvType) -> Self {
        self.options.kv_type = kv_type;
        self
    }

    /// Tokens per KV block: prefixes are shared in whole blocks.
    pub fn kv_block_tokens(mut self, tokens: usize) -> Self {
        self.options.block_tokens = tokens;
        self
    }

    /// Most tokens per step, or one for each request if that is more: with fewer, a long prompt delays others less and takes longer itself.
    pub fn step_tokens(mut self, tokens: usize) -> Self {
        self.options.step_tokens = tokens;
        self
    }

    /// How long a step is to take in which prompts are read while others write: those wait for it. Prompts
    /// get fewer tokens of such a step when steps take longer, and more again when they do not. Unless
    /// it is said, they get what is left of [`step_tokens`](InferenceEngineBuilder::step_tokens).
    ///
    /// ```
    /// use std::time::Duration;
    /// use bitnet_inference::{InferenceEngine, SchedulerPolicy};
    ///
    /// let engine = InferenceEngine::builder()
    ///     .target_step_time(Duration::from_millis(50))
    ///     .scheduler_policy(SchedulerPolicy::Fifo)
    ///     .build()?;
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn target_step_time(mut self, time: Duration) -> Self {
        self.options.target_step_time = Some(time);
        self
    }

    /// Who comes first among waiting requests of the same priority.
    pub fn scheduler_policy(mut self, policy: SchedulerPolicy) -> Self {
        self.options.policy = policy;
        self
    }

    /// A smaller model of the same vocabulary that guesses for generations whose
    /// [`speculation`](crate::GenerationParams::speculation) asks for it: `tiny`, a directory or a
    /// file. It is loaded as the model is, and shares the memory for keys and values.
    ///
    /// ```
    /// use bitnet_inference::{GenerationParams, InferenceEngine, Speculation};
    ///
    /// // A real draft is smaller than the model: this one is always right, and saves nothing.
    /// let mut engine = InferenceEngine::builder().draft_model("tiny").build()?;
    /// engine.load_model("tiny")?;
    /// let speculation = Some(Speculation::draft_model());
    /// let params = GenerationParams { speculation, ..GenerationParams::default() };
    /// engine.generate("Once upon a time", params).wait()?;
    /// let statistics = engine.statistics()?;
    /// assert_eq!(statistics.accepted_tokens, statistics.proposed_tokens);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn draft_model(mut self, model: impl Into<String>) -> Self {
        self.draft_model = Some(model.into());
        self
    }

    /// Applies a [`LogitsProcessor`] to every generation, after those that were added before. `make` makes one
    /// for each.
    pub fn logits_processor<P: LogitsProcessor + 'static>(
        mut self,
        make: impl Fn() -> P + Send + Sync + 'static,
    ) -> Self {
        self.processors.push(Arc::new(move || Box::new(make())));
        self
    }

    /// The engine, without a model.
    ///
    /// # Errors
    /// If the device is not there, or a number is one that no engine can have.
    pub fn build(self) -> Result<InferenceEngine, Error> {
        if let Some(device) = self.device
            && let Some(reason) = device_reason(device)
        {
            return Err(bitnet_core::Error::DeviceUnavailable { device, reason }.into());
        }
        self.options.validate()?;
        Ok(InferenceEngine::with_builder(self))
    }

    /// How the model is to be loaded.
    pub(crate) fn model_options(&self) -> ModelOptions {
        let isa = (self.optimization == OptimizationLevel::None).then_some(Isa::Scalar);
        let aggressive = self.optimization == OptimizationLevel::Aggressive;
        let replicas = self.options.replicas;
        let share = (replicas > 1).then(|| (physical_cores() / replicas).max(1));
        ModelOptions {
            device: self.device,
            threads: self.threads.or(share),
            isa,
            shortcuts: if aggressive { None } else { Some(Shortcuts::NONE) },
            copies: self.copies && aggressive,
            ..ModelOptions::default()
        }
    }

    /// How the engine is to run.
    pub(crate) fn engine_options(&self) -> EngineOptions {
        let kv_bytes = match self.memory_pool {
            Some(size) => size.bytes(),
            None => {
                let half = budget::available_memory().map_or(u64::MAX, |bytes| bytes / 2);
                self.options.kv_bytes.min(half)
            }
        };
        EngineOptions { kv_bytes, ..self.options }
    }
}

impl fmt::Debug for InferenceEngineBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("InferenceEngineBuilder")
            .field("device", &self.device)
            .field("threads", &self.threads)
            .field("copies", &self.copies)
            .field("optimization", &self.optimization)
            .field("memory_pool", &self.memory_pool)
            .field("options", &self.options)
            .field("draft_model", &self.draft_model)
            .field("processors", &self.processors.len())
            .finish()
    }
}
