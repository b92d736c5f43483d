//! [`InferenceEngine`]: a model and an engine behind one door, text in and text out.

mod answer;

use std::ops::ControlFlow;
use std::path::Path;
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex, OnceLock, PoisonError, Weak};
use std::time::{Duration, Instant};

use bitnet_core::Device;
use bitnet_model::chat::Message;
use bitnet_model::source::{self, Checkpoint, Description};
use bitnet_model::tokenizer::Special;
use bitnet_model::weights::{LoadProgress, least_bytes};
use futures_core::Stream;
use futures_util::stream::{self, StreamExt, TryStreamExt};

use crate::builder::{InferenceEngineBuilder, ProcessorFactory};
use crate::engine::{Engine, EngineStatistics};
use crate::error::Error;
use crate::generate::Generation;
use crate::grammar::Constraint;
use crate::inference_stream::{InferenceStream, StreamingConfig};
use crate::model::{Model, cpu_backend};
use crate::request::{Overflow, Request};
use crate::sampler::SamplingParams;
use crate::speculation::Speculation;
use crate::stream::block_on;
pub use answer::Answer;
use answer::whole;

/// For whoever wants the whole of a generation: nobody reads it meanwhile, and it need not pause.
const WHOLE: StreamingConfig =
    StreamingConfig { buffer: usize::MAX, ordered: true, max_latency: Duration::ZERO };

/// What to generate, when to stop, and how urgent it is.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerationParams {
    /// How each token is chosen; greedy, unless it is said.
    pub sampling: SamplingParams,
    /// Most tokens to generate; 128, unless it is said.
    pub max_tokens: usize,
    /// Texts that end the generation and are not part of it.
    pub stop: Vec<String>,
    /// Goes on after the model's own end tokens.
    pub ignore_end: bool,
    /// What the text must be: see [`Constraint`].
    pub constraint: Option<Constraint>,
    /// Higher ones come first; 0 is ordinary.
    pub priority: i32,
    /// Whom it is for: clients of the same priority get the same share of the engine.
    pub client: u64,
    /// Time after which the answer is of no use any more.
    pub time_limit: Option<Duration>,
    /// How the next tokens are guessed, which changes the speed and no token; not at all, unless it
    /// is said, and not with a constraint.
    pub speculation: Option<Speculation>,
    /// What becomes of it when the model's context is full; it ends, unless it is said.
    pub overflow: Overflow,
}

impl Default for GenerationParams {
    fn default() -> Self {
        GenerationParams {
            sampling: SamplingParams::default(),
            max_tokens: 128,
            stop: Vec::new(),
            ignore_end: false,
            constraint: None,
            priority: 0,
            client: 0,
            time_limit: None,
            speculation: None,
            overflow: Overflow::default(),
        }
    }
}

/// Runs a model for many requests at once. Everything it gives is what the request gets alone.
///
/// | preset | runs at once | waits | keys and values | second copies of weights |
/// |---|---|---|---|---|
/// | [`fast`](InferenceEngine::fast) | 32 | 512 | 4 GB | yes |
/// | [`balanced`](InferenceEngine::balanced), [`new`](InferenceEngine::new) | 16 | 256 | 2 GB | no |
/// | [`low_memory`](InferenceEngine::low_memory) | 4 | 64 | 256 MB | no |
///
/// No preset changes a token. The memory for keys and values is a limit, which is lowered to
/// half of the available memory; it is taken as it is used. Second copies make exact
/// shortcuts possible for models that bring none along. [`builder`](InferenceEngine::builder) sets
/// each of these.
///
/// ```
/// use bitnet_inference::{GenerationParams, InferenceEngine};
///
/// let mut engine = InferenceEngine::new();
/// engine.load_model("tiny")?;
/// let params = GenerationParams { max_tokens: 20, ..GenerationParams::default() };
/// let generation = engine.generate("Once upon a time", params).wait()?;
/// println!("{}", generation.text);
/// # assert_eq!(generation.tokens.len(), 20);
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
pub struct InferenceEngine {
    builder: InferenceEngineBuilder,
    loaded: Option<Lazy>,
}

/// A model that is loaded, or will be when it is first needed.
struct Lazy {
    /// Where it is loaded from.
    model: String,
    loaded: OnceLock<Loaded>,
    /// Held by whoever loads; the others wait.
    turn: Mutex<()>,
}

impl Lazy {
    fn new(model: &str) -> Self {
        Lazy { model: model.to_owned(), loaded: OnceLock::new(), turn: Mutex::new(()) }
    }

    fn get(&self, builder: &InferenceEngineBuilder) -> Result<&Loaded, Error> {
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        // It guards nothing that a panic could break.
        let _turn = self.turn.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = self.loaded.get() {
            return Ok(loaded);
        }
        let loaded = Loaded::new(builder, Model::open(&self.model, &builder.model_options())?)?;
        Ok(self.loaded.get_or_init(|| loaded))
    }
}

/// A model and the engine that runs it.
#[derive(Clone)]
struct Loaded {
    /// Dropped first: without the model its weights are gone.
    engine: Engine,
    model: Arc<Model>,
    processors: Vec<ProcessorFactory>,
    /// Requests of one batch that are submitted at once.
    at_once: usize,
}

impl Default for InferenceEngine {
    fn default() -> Self {
        Self::new()
    }
}

impl InferenceEngine {
    /// An engine with the [balanced](InferenceEngine::balanced) preset.
    pub fn new() -> Self {
        Self::balanced()
    }

    /// The same on a device.
    ///
    /// # Errors
    /// If this program was built without the device, or the machine lacks it.
    ///
    /// ```
    /// use bitnet_inference::{Device, InferenceEngine};
    /// assert!(InferenceEngine::with_device(Device::Cpu).is_ok());
    /// ```
    pub fn with_device(device: Device) -> Result<Self, Error> {
        Self::builder().device(device).build()
    }

    /// For many requests, where memory is no concern.
    pub fn fast() -> Self {
        Self::with_builder(InferenceEngineBuilder::fast())
    }

    /// For most uses.
    pub fn balanced() -> Self {
        Self::with_builder(InferenceEngineBuilder::balanced())
    }

    /// For small machines.
    pub fn low_memory() -> Self {
        Self::with_builder(InferenceEngineBuilder::low_memory())
    }

    /// A way to set up an engine, which starts from the balanced preset.
    pub fn builder() -> InferenceEngineBuilder {
        InferenceEngineBuilder::balanced()
    }

    pub(crate) fn with_builder(builder: InferenceEngineBuilder) -> Self {
        InferenceEngine { builder, loaded: None }
    }

    /// Loads a model: `tiny`, a directory or a file. It takes the place of the one before;
    /// generations that are running go on with that one.
    ///
    /// # Errors
    /// If the model or its draft model cannot be read, makes no text, or there is too little memory;
    /// or if the two have different vocabularies.
    pub fn load_model(&mut self, model: &str) -> Result<(), Error> {
        self.run(Model::open(model, &self.builder.model_options())?).map(drop)
    }

    /// As [`load_model`](InferenceEngine::load_model), for a `.bitnet` file, whose weights are used as
    /// they lie in it: see [`Model::open_mmap`].
    ///
    /// # Errors
    /// As [`load_model`](InferenceEngine::load_model), and [`Error::NotMapped`] for another format.
    pub fn load_mmap(&mut self, model: &str) -> Result<(), Error> {
        self.run(Model::open_mmap(model, &self.builder.model_options())?).map(drop)
    }

    /// As [`load_model`](InferenceEngine::load_model), layer by layer into memory, with a `progress`
    /// that is told how far it has come and can end it: see [`Model::open_streaming`].
    ///
    /// # Errors
    /// As [`load_model`](InferenceEngine::load_model), and [`bitnet_model::Error::Cancelled`] if
    /// `progress` said so. Then the model before is still loaded.
    pub fn load_streaming(
        &mut self,
        model: &str,
        progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<(), Error> {
        let options = self.builder.model_options();
        self.run(Model::open_streaming(model, &options, progress)?).map(drop)
    }

    /// As [`load_model`](InferenceEngine::load_model), but the weights are loaded by whoever first
    /// needs them: a request, or [`model`](InferenceEngine::model). That call waits for them, and so
    /// do others that come meanwhile. What is checked now are the names, types and shapes of the
    /// tensors, the description, the vocabulary and the device; nothing of it is kept.
    ///
    /// # Errors
    /// If a check fails. What is wrong with the weights, or with a file that has changed since, is the
    /// error of the request that loads them; the next one tries again.
    ///
    /// ```
    /// use bitnet_inference::{GenerationParams, InferenceEngine};
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_lazy("tiny")?;
    /// // The weights are loaded here.
    /// let text = engine.generate("Once upon a time", GenerationParams::default()).wait()?.text;
    /// # assert!(!text.is_empty());
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn load_lazy(&mut self, model: &str) -> Result<(), Error> {
        let Checkpoint { description, tensors } = source::open(model)?;
        must_generate(&description)?;
        cpu_backend(&self.builder.model_options())?;
        least_bytes(&description.path, &description.config, &tensors)?;
        self.loaded = Some(Lazy::new(model));
        Ok(())
    }

    /// As [`load_model`](InferenceEngine::load_model), with the layers spread over several devices:
    /// see [`Model::open_distributed`].
    ///
    /// # Errors
    /// As [`load_model`](InferenceEngine::load_model); [`bitnet_model::Error::Devices`] if there are
    /// no devices or more of them than layers; and if a device is not there.
    pub fn load_distributed(&mut self, model: &str, devices: &[Device]) -> Result<(), Error> {
        let options = self.builder.model_options();
        self.run(Model::open_distributed(model, devices, &options)?).map(drop)
    }

    /// Runs a model that was opened with options of its own, in the place of the one before. The
    /// builder's settings for loading a model do not touch it.
    ///
    /// # Errors
    /// If it makes no text, or there is too little memory; and as
    /// [`load_model`](InferenceEngine::load_model) for the draft model.
    ///
    /// ```
    /// use bitnet_inference::{InferenceEngine, Model, ModelOptions};
    ///
    /// let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    /// let mut engine = InferenceEngine::new();
    /// engine.use_model(Model::open("tiny", &options)?)?;
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn use_model(&mut self, model: Model) -> Result<(), Error> {
        self.run(model).map(drop)
    }

    /// Lets a model take the place of the one before. It is in use by more than this engine if it
    /// has more than one owner.
    pub(crate) fn run(&mut self, model: Model) -> Result<Weak<Model>, Error> {
        let lazy = Lazy::new(&model.description().path.to_string_lossy());
        let loaded = Loaded::new(&self.builder, model)?;
        let model = Arc::downgrade(&loaded.model);
        self.loaded = Some(Lazy { loaded: loaded.into(), ..lazy });
        Ok(model)
    }

    /// The model.
    ///
    /// # Errors
    /// [`Error::NoModel`] before one is loaded; after [`load_lazy`](InferenceEngine::load_lazy), if
    /// its weights cannot be loaded.
    pub fn model(&self) -> Result<&Model, Error> {
        Ok(&self.loaded()?.model)
    }

    pub(crate) fn engine(&self) -> Result<&Engine, Error> {
        Ok(&self.loaded()?.engine)
    }

    fn loaded(&self) -> Result<&Loaded, Error> {
        self.loaded.as_ref().ok_or(Error::NoModel)?.get(&self.builder)
    }

    /// Continues a text. The request is submitted at once. The time to its first token includes the
    /// time it waited.
    ///
    /// The answer is an error if no model is loaded, the prompt is empty or too long, a parameter
    /// has a value that it cannot have, the engine is full, or the time limit passes.
    pub fn generate(&self, prompt: &str, params: GenerationParams) -> Answer<Generation> {
        Answer::from(self.stream(prompt, params, WHOLE))
    }

    /// Answers a conversation by the model's chat template. The request is submitted at once.
    ///
    /// The answer is an error as for [`generate`](InferenceEngine::generate), and if the model has no
    /// chat template or its template refuses the conversation.
    ///
    /// ```
    /// use bitnet_inference::{GenerationParams, InferenceEngine, Message};
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let messages = [Message::new("user", "Tell me a story.")];
    /// println!("{}", engine.chat(&messages, GenerationParams::default()).wait()?.text);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn chat(&self, messages: &[Message], params: GenerationParams) -> Answer<Generation> {
        Answer::from(self.stream_chat(messages, params, WHOLE))
    }

    /// As [`generate`](InferenceEngine::generate), in pieces as they come.
    ///
    /// # Errors
    /// As [`generate`](InferenceEngine::generate).
    ///
    /// ```
    /// use bitnet_inference::{GenerationParams, InferenceEngine, StreamingConfig};
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let params = GenerationParams { max_tokens: 20, ..GenerationParams::default() };
    /// let stream = engine.stream("Once upon a time", params, StreamingConfig::default())?;
    /// for event in stream.blocking() {
    ///     print!("{}", event?.text);
    /// }
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn stream(
        &self,
        prompt: &str,
        params: GenerationParams,
        config: StreamingConfig,
    ) -> Result<InferenceStream, Error> {
        self.loaded()?.stream(prompt, params, config)
    }

    /// As [`chat`](InferenceEngine::chat), in pieces as they come.
    ///
    /// # Errors
    /// As [`chat`](InferenceEngine::chat).
    pub fn stream_chat(
        &self,
        messages: &[Message],
        params: GenerationParams,
        config: StreamingConfig,
    ) -> Result<InferenceStream, Error> {
        let loaded = self.loaded()?;
        let template = loaded.model.chat_template()?;
        let (_, prompt) = template.encode(loaded.model.tokenizer(), messages, true)?;
        loaded.stream_tokens(prompt, params, config)
    }

    /// Continues texts as they come: for each its number, from 0, and its generation, in the order of the
    /// prompts or as they are completed, as `config` says. At most as many run at once as the batch
    /// has room for, and no more prompts are taken in than that.
    ///
    /// # Errors
    /// [`Error::NoModel`]. What goes wrong with one prompt is the result of this one.
    ///
    /// ```
    /// use bitnet_inference::{GenerationParams, InferenceEngine, StreamingConfig};
    /// use futures_util::{StreamExt, stream};
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let prompts = stream::iter(["Once", "One day"]).map(str::to_owned);
    /// let config = StreamingConfig { ordered: false, ..StreamingConfig::default() };
    /// let mut results = engine.generate_stream(prompts, GenerationParams::default(), config)?;
    /// futures_executor::block_on(async {
    ///     while let Some((index, generation)) = results.next().await {
    ///         println!("{index}: {}", generation?.text);
    ///     }
    ///     Ok::<(), bitnet_inference::Error>(())
    /// })?;
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn generate_stream<S: Stream<Item = String> + Send>(
        &self,
        prompts: S,
        params: GenerationParams,
        config: StreamingConfig,
    ) -> Result<impl Stream<Item = (usize, Result<Generation, Error>)> + Send + use<S>, Error> {
        let loaded = self.loaded()?.clone();
        let at_once = loaded.at_once;
        let answers = prompts.enumerate().map(move |(index, prompt)| {
            let stream = loaded.stream(&prompt, params.clone(), config);
            async move {
                let mut stream = match stream {
                    Ok(stream) => stream,
                    Err(error) => return (index, Err(error)),
                };
                let generation = whole(&mut stream).await;
                // Its place is that of a prompt after it.
                stream.closed().await;
                (index, generation)
            }
        });
        Ok(match config.ordered {
            true => answers.buffered(at_once).left_stream(),
            false => answers.buffer_unordered(at_once).right_stream(),
        })
    }

    /// The logits `[vocabulary]` of the token that follows `tokens`. The request is submitted at
    /// once.
    ///
    /// The answer is an error if no model is loaded, there are no tokens or too many, an id is
    /// unknown, or the engine is full.
    ///
    /// ```
    /// use bitnet_inference::InferenceEngine;
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let logits = engine.infer(&[1, 2, 3]).wait()?;
    /// assert_eq!(logits.len(), engine.model()?.vocab_size());
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn infer(&self, tokens: &[u32]) -> Answer<Vec<f32>> {
        match self.loaded() {
            Ok(loaded) => loaded.infer(tokens),
            Err(error) => Answer::failed(error),
        }
    }

    /// As [`infer`](InferenceEngine::infer) for several token lists, in their order. They are submitted
    /// when the answer is awaited, at most as many at once as the batch has room for.
    ///
    /// The answer is the first error, if there is one, and an error if the batch is empty.
    ///
    /// ```
    /// use bitnet_inference::InferenceEngine;
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let logits = engine.infer_batch(&[vec![1, 2, 3], vec![4, 5]]).wait()?;
    /// assert_eq!(logits.len(), 2);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn infer_batch(&self, batch: &[Vec<u32>]) -> Answer<Vec<Vec<f32>>> {
        let loaded = match self.loaded() {
            Ok(_) if batch.is_empty() => return Answer::failed(Error::EmptyBatch),
            Ok(loaded) => loaded.clone(),
            Err(error) => return Answer::failed(error),
        };
        let at_once = loaded.at_once;
        let answers = stream::iter(batch.to_vec()).map(move |tokens| loaded.infer(&tokens));
        Answer::new(answers.buffered(at_once).try_collect())
    }

    /// Writes what a prompt's keys and values are to a file, computed first where they are not there:
    /// see [`Engine::save`]. Waits.
    ///
    /// # Errors
    /// As [`generate`](InferenceEngine::generate) and [`Engine::save`].
    pub fn save(&self, prompt: &str, path: impl AsRef<Path>) -> Result<(), Error> {
        let Loaded { engine, model, .. } = self.loaded()?;
        engine.save(&model.tokenizer().encode(prompt, true, Special::Recognised)?, path)
    }

    /// As [`save`](InferenceEngine::save), for a conversation up to its last message.
    ///
    /// # Errors
    /// As [`chat`](InferenceEngine::chat) and [`Engine::save`].
    ///
    /// ```
    /// use bitnet_inference::{GenerationParams, InferenceEngine, Message};
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let mut messages = vec![Message::new("user", "Tell me a story about a cat and a dog.")];
    /// let folder = tempfile::tempdir().expect("a folder");
    /// engine.save_chat(&messages, folder.path().join("cat.kv"))?;
    ///
    /// // The program ends and comes back.
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// engine.restore(folder.path().join("cat.kv"))?;
    /// println!("{}", engine.chat(&messages, GenerationParams::default()).wait()?.text);
    /// # assert!(engine.statistics()?.kv.reused_tokens > 0);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn save_chat(&self, messages: &[Message], path: impl AsRef<Path>) -> Result<(), Error> {
        let Loaded { engine, model, .. } = self.loaded()?;
        let template = model.chat_template()?;
        engine.save(&template.encode(model.tokenizer(), messages, false)?.1, path)
    }

    /// Reads a file that [`save`](InferenceEngine::save) or
    /// [`save_chat`](InferenceEngine::save_chat) wrote: what begins with the same text starts with its
    /// keys and values. Returns the token ids. Waits.
    ///
    /// # Errors
    /// As [`Engine::restore`], and if no model is loaded.
    pub fn restore(&self, path: impl AsRef<Path>) -> Result<Vec<u32>, Error> {
        self.loaded()?.engine.restore(path)
    }

    /// What the engine has done until now.
    ///
    /// # Errors
    /// If no model is loaded, or the engine has stopped.
    pub fn statistics(&self) -> Result<EngineStatistics, Error> {
        self.loaded()?.engine.statistics()
    }
}

/// Refuses models that make no text.
pub(crate) fn must_generate(description: &Description) -> Result<(), Error> {
    if description.config.pooling.is_some() {
        return Err(Error::WrongKind(format!(
            "{} makes embeddings and does not write text: choose another model",
            description.path.display()
        )));
    }
    Ok(())
}

impl Loaded {
    fn new(builder: &InferenceEngineBuilder, model: Model) -> Result<Self, Error> {
        must_generate(model.description())?;
        let options = builder.engine_options();
        Ok(Loaded {
            engine: match &builder.draft_model {
                Some(draft) => {
                    let draft = Model::open(draft, &builder.model_options())?;
                    model.engine_with_draft(&draft, options)?
                }
                None => model.engine(options)?,
            },
            model: Arc::new(model),
            processors: builder.processors.clone(),
            at_once: options.max_sequences * options.replicas,
        })
    }

    fn stream(
        &self,
        prompt: &str,
        params: GenerationParams,
        config: StreamingConfig,
    ) -> Result<InferenceStream, Error> {
        let prompt = self.model.tokenizer().encode(prompt, true, Special::Recognised)?;
        self.stream_tokens(prompt, params, config)
    }

    fn stream_tokens(
        &self,
        prompt: Vec<u32>,
        params: GenerationParams,
        config: StreamingConfig,
    ) -> Result<InferenceStream, Error> {
        let GenerationParams { sampling, max_tokens, stop, ignore_end, .. } = params;
        let mut request = Request::new(prompt, sampling, max_tokens);
        if !ignore_end {
            request.end_ids.clone_from(&self.model.description().end_ids);
        }
        request.constraint = params.constraint;
        request.priority = params.priority;
        request.client = params.client;
        request.deadline = params.time_limit.and_then(|limit| Instant::now().checked_add(limit));
        request.processors = self.processors.iter().map(|make| make()).collect();
        request.buffer = config.buffer;
        request.speculation = params.speculation;
        request.overflow = params.overflow;
        request.max_latency = config.max_latency;
        InferenceStream::start(&self.engine, &self.model, request, stop)
    }

    fn infer(&self, tokens: &[u32]) -> Answer<Vec<f32>> {
        // One token whose logits are looked at on their way to the sampler.
        let mut request = Request::new(tokens.to_vec(), SamplingParams::default(), 1);
        let (sender, receiver) = channel();
        request.processors.push(Box::new(move |_: &[u32], _: usize, logits: &mut [f32]| {
            // Who has gone away does not need them.
            let _ = sender.send(logits.to_vec());
        }));
        let answer =
            Answer::from(InferenceStream::start(&self.engine, &self.model, request, Vec::new()));
        Answer::new(async move {
            answer.await?;
            let logits = receiver.try_recv();
            Ok(logits.expect("the sampler gets logits before a token comes"))
        })
    }
}

/// The greedy continuation of a text by a model, which is loaded for it: one line for scripts. Waits.
///
/// # Errors
/// As [`InferenceEngine::load_model`] and [`InferenceEngine::generate`].
///
/// ```
/// let text = bitnet_inference::quick_infer("tiny", "Once upon a time")?;
/// # assert!(!text.is_empty());
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
pub fn quick_infer(model: &str, prompt: &str) -> Result<String, Error> {
    smart_infer(model, &[prompt]).map(|mut texts| texts.remove(0))
}

/// The greedy continuations of several texts by a model, in their order, computed together. Waits.
///
/// # Errors
/// As [`quick_infer`], and if there are no prompts.
///
/// ```
/// let texts = bitnet_inference::smart_infer("tiny", &["Once upon a time", "The little dog"])?;
/// assert_eq!(texts.len(), 2);
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
pub fn smart_infer(model: &str, prompts: &[&str]) -> Result<Vec<String>, Error> {
    if prompts.is_empty() {
        return Err(Error::EmptyBatch);
    }
    let mut engine = InferenceEngine::new();
    engine.load_model(model)?;
    let prompts = stream::iter(prompts.iter().map(|prompt| (*prompt).to_owned()));
    let params = GenerationParams::default();
    let generations = engine.generate_stream(prompts, params, StreamingConfig::default())?;
    let texts = generations.map(|(_, generation)| generation.map(|generation| generation.text));
    block_on(texts.try_collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waited_for_a_lazy_model_does_not_load_it_again() {
        let builder = InferenceEngine::builder().threads(1);
        let lazy = Lazy::new("no such file");
        let turn = lazy.turn.lock().unwrap();
        std::thread::scope(|scope| {
            let waiting = scope.spawn(|| lazy.get(&builder).is_ok());
            std::thread::sleep(Duration::from_millis(20));
            let model = Model::open("tiny", &builder.model_options()).unwrap();
            let set = lazy.loaded.set(Loaded::new(&builder, model).unwrap());
            assert!(set.is_ok());
            drop(turn);
            assert!(waiting.join().unwrap());
        });
        assert!(Lazy::new("no such file").get(&builder).is_err());
    }
}
