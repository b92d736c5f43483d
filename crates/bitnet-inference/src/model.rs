//! A model ready to run: where it came from, its tokenizer, and its decoder on some device.

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use bitnet_core::Error as CoreError;
use bitnet_core::{Device, OperationProfile, ShortcutCounts, Shortcuts, WeightBytes};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_model::chat::ChatTemplate;
use bitnet_model::config::{ModelConfig, Pooling, WeightRule};
use bitnet_model::source::{self, Checkpoint, Description};
use bitnet_model::tokenizer::Tokenizer;
use bitnet_model::weights::{self, LoadOptions, LoadProgress};

use crate::engine::{Engine, EngineOptions};
use crate::error::Error;
use crate::grammar::Vocabulary;
use crate::inference_engine::must_generate;
use crate::session::{AnyDecoder, Session, SessionOptions};
use crate::telemetry;

/// Where and how to load a model.
#[derive(Debug, Clone, Default)]
pub struct ModelOptions {
    /// Device; `None` takes the best there is.
    pub device: Option<Device>,
    /// Threads; `None` takes one per physical core.
    pub threads: Option<usize>,
    /// See [`CpuOptions::pinned`].
    pub pinned: bool,
    /// Instruction set of the processor; `None` takes what `BITNET_ISA` says, or the best.
    pub isa: Option<Isa>,
    /// Exact shortcuts that may be taken; `None` takes what `BITNET_SHORTCUTS` says, or all.
    pub shortcuts: Option<Shortcuts>,
    /// See [`CpuOptions::copies`].
    pub copies: bool,
    /// See [`CpuOptions::profile`].
    pub profile: bool,
    /// What a file cannot say about itself.
    pub load: LoadOptions,
}

/// Why a device cannot be used; `None` if it can.
pub fn device_reason(device: Device) -> Option<String> {
    match device {
        Device::Cpu => None,
        _ => Some("this program is built without it; use --device cpu".to_owned()),
    }
}

/// The shortcuts that the options or the environment leave on.
fn shortcuts(options: &ModelOptions) -> Result<Shortcuts, Error> {
    match options.shortcuts {
        Some(shortcuts) => Ok(shortcuts),
        None => Ok(Shortcuts::from_env().map_err(|error| CoreError::DeviceUnavailable {
            device: options.device.unwrap_or(Device::Cpu),
            reason: error.to_string(),
        })?),
    }
}

/// The backend that the options ask for.
pub(crate) fn cpu_backend(options: &ModelOptions) -> Result<CpuBackend, Error> {
    let device = options.device.unwrap_or(Device::Cpu);
    if let Some(reason) = device_reason(device) {
        return Err(CoreError::DeviceUnavailable { device, reason }.into());
    }
    let isa = match options.isa {
        Some(isa) => Some(isa),
        None => Isa::from_env()?,
    };
    Ok(CpuBackend::new(CpuOptions {
        threads: options.threads,
        isa,
        pinned: options.pinned,
        shortcuts: shortcuts(options)?,
        copies: options.copies,
        profile: options.profile,
    })?)
}

/// The device that the options ask for, or the best there is.
pub(crate) fn one_device(options: &ModelOptions) -> [Device; 1] {
    [options.device.unwrap_or(Device::Cpu)]
}

/// For whoever does not watch the loading.
pub(crate) fn go_on(_: LoadProgress) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

/// A loaded model. Cheap to share: sessions keep the weights alive.
pub struct Model {
    description: Description,
    decoder: Box<dyn AnyDecoder>,
    vocabulary: Arc<Vocabulary>,
    shortcuts: Shortcuts,
}

impl Model {
    /// Loads a model: `tiny`, a directory or a file. What can be used where it lies in the files stays
    /// mapped: everything of a `.bitnet` file, the embedding and the head of others.
    pub fn open(model: &str, options: &ModelOptions) -> Result<Self, Error> {
        Self::load(source::open(model)?, &one_device(options), options, &mut go_on)
    }

    /// As [`open`](Model::open), for a model whose weights are used as they lie in its file: a
    /// `.bitnet` file for the CPU. Loading reads next to nothing of it; memory is taken as it is used,
    /// and given back when the system is short of it. While it is loaded, the file must not be rewritten or
    /// cut short in place; replacing it by renaming and deleting it are safe where the system keeps
    /// files that are open (not on Windows, which refuses).
    ///
    /// # Errors
    /// As [`open`](Model::open), and [`Error::NotMapped`] for any other format: there every ternary
    /// matrix is laid out anew at load, and only embedding and head stay in the file.
    pub fn open_mmap(model: &str, options: &ModelOptions) -> Result<Self, Error> {
        let checkpoint = source::open(model)?;
        let Description { path, format, config, .. } = &checkpoint.description;
        if config.weights != WeightRule::Tiled {
            return Err(Error::NotMapped { path: path.clone(), format });
        }
        Self::load(checkpoint, &one_device(options), options, &mut go_on)
    }

    /// As [`open`](Model::open), layer by layer into memory: nothing stays mapped, so that the file may
    /// be changed or go away afterwards. `progress` is called on this thread after each layer and when
    /// everything is done, and can end the loading.
    ///
    /// # Errors
    /// As [`open`](Model::open), and [`bitnet_model::Error::Cancelled`] if `progress` said so.
    ///
    /// ```
    /// use std::ops::ControlFlow;
    /// use bitnet_inference::{Model, ModelOptions};
    ///
    /// let model = Model::open_streaming("tiny", &ModelOptions::default(), |now| {
    ///     println!("{} of {} bytes", now.bytes, now.total_bytes);
    ///     ControlFlow::Continue(())
    /// })?;
    /// assert_eq!(model.weight_bytes().mapped, 0);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn open_streaming(
        model: &str,
        options: &ModelOptions,
        mut progress: impl FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        let load = LoadOptions { in_memory: true, ..options.load };
        let options = &ModelOptions { load, ..options.clone() };
        Self::load(source::open(model)?, &one_device(options), options, &mut progress)
    }

    /// As [`open`](Model::open), with the layers spread over several devices, in their order, in place
    /// of the one in `options`: a pipeline. Each device has threads, and the keys and values of its
    /// layers, of its own. The cut makes the bytes of the fullest device as few as can be; the
    /// embedding is on the first, the output head on the last. A device named several times is as
    /// many devices.
    ///
    /// The stages of a step take turns: this divides the memory that a model needs, not the time.
    /// The tokens are those of one device.
    ///
    /// # Errors
    /// As [`open`](Model::open); [`bitnet_model::Error::Devices`] if there are no devices or more of
    /// them than layers; and if a device is not there.
    ///
    /// ```
    /// use bitnet_inference::{Device, Model, ModelOptions};
    ///
    /// let devices = [Device::Cpu, Device::Cpu];
    /// let model = Model::open_distributed("tiny", &devices, &ModelOptions::default())?;
    /// assert_eq!(model.stages().len(), 2);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn open_distributed(
        model: &str,
        devices: &[Device],
        options: &ModelOptions,
    ) -> Result<Self, Error> {
        if options.pinned && devices.len() > 1 {
            let reason = "threads can be pinned to processors for one device only".to_owned();
            return Err(CoreError::DeviceUnavailable { device: devices[1], reason }.into());
        }
        Self::load(source::open(model)?, devices, options, &mut go_on)
    }

    /// Loads the weights of a checkpoint, a stage on each device.
    pub(crate) fn load(
        checkpoint: Checkpoint,
        devices: &[Device],
        options: &ModelOptions,
        progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
    ) -> Result<Self, Error> {
        let _span = telemetry::load_span(&checkpoint.description.path, devices.len());
        let backends = devices
            .iter()
            .map(|&device| cpu_backend(&ModelOptions { device: Some(device), ..options.clone() }));
        let backends = backends.collect::<Result<_, _>>()?;
        let Checkpoint { mut description, tensors } = checkpoint;
        let decoder = weights::load_stages(
            backends,
            &description.path,
            &description.config,
            &tensors,
            options.load,
            &mut description.notes,
            progress,
        )?;
        if options.load.in_memory {
            let tokenizer = Arc::get_mut(&mut description.tokenizer);
            tokenizer.expect("nobody shares it before it is loaded").unmap()?;
        }
        let vocabulary = Vocabulary::new(description.tokenizer.clone(), decoder.vocab_size());
        let decoder = Box::new(Arc::new(decoder));
        Ok(Model { description, decoder, vocabulary, shortcuts: shortcuts(options)? })
    }

    /// Everything about the model but its weights.
    pub fn description(&self) -> &Description {
        &self.description
    }

    /// Shape and rules of the decoder.
    pub fn config(&self) -> &ModelConfig {
        self.decoder.config()
    }

    /// The tokenizer.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.description.tokenizer
    }

    /// The chat template.
    ///
    /// # Errors
    /// [`Error::WrongKind`] for a base model, which has none.
    pub fn chat_template(&self) -> Result<&ChatTemplate, Error> {
        self.description.template.as_ref().ok_or_else(|| {
            Error::WrongKind(format!(
                "{} is a base model without a chat template: continue a text with it, or choose a \
                 chat model",
                self.description.path.display()
            ))
        })
    }

    /// Lets conversations be put in another form than the model's own, or in one at all.
    ///
    /// ```
    /// use bitnet_inference::{Model, ModelOptions};
    /// use bitnet_model::chat::ChatTemplate;
    ///
    /// let mut model = Model::open("tiny", &ModelOptions::default())?;
    /// let lines = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
    /// model.set_chat_template(ChatTemplate::new(lines)?);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn set_chat_template(&mut self, template: ChatTemplate) {
        self.description.template = Some(template);
    }

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.decoder.vocab_size()
    }

    /// Name of the backend the model runs on.
    pub fn backend_name(&self) -> String {
        self.decoder.backend_name()
    }

    /// Memory that the weights take, in mapped files and of their own. The vocabulary, and what
    /// sessions and engines need, are not in it.
    pub fn weight_bytes(&self) -> WeightBytes {
        self.decoder.weight_bytes()
    }

    /// The layers of each device: one range, unless the model was
    /// [distributed](Model::open_distributed).
    pub fn stages(&self) -> &[Range<usize>] {
        self.decoder.stages()
    }

    /// What exact shortcuts have saved since the model was loaded.
    pub fn shortcut_counts(&self) -> ShortcutCounts {
        self.decoder.shortcut_counts()
    }

    /// What each kind of operation has cost since the model was loaded, where [`ModelOptions::profile`]
    /// asked for it.
    pub fn profile(&self) -> Vec<OperationProfile> {
        self.decoder.profile()
    }

    /// A new, empty sequence.
    pub fn session(&self, options: SessionOptions) -> Result<Session, Error> {
        self.decoder.session(options, self.vocabulary.clone())
    }

    /// An engine that runs many requests on this model at once, on threads of its own.
    ///
    /// # Errors
    /// If its memory is not there, or an option has a number that no engine can have.
    ///
    /// ```
    /// use bitnet_inference::{
    ///     EngineOptions, Event, Model, ModelOptions, Request, SamplingParams,
    /// };
    ///
    /// let model = Model::open("tiny", &ModelOptions::default())?;
    /// let engine = model.engine(EngineOptions::default())?;
    /// let request = |prompt: &[u32]| Request::new(prompt.to_vec(), SamplingParams::default(), 8);
    /// let streams = [engine.submit(request(&[1, 2, 3]))?, engine.submit(request(&[4, 5]))?];
    /// for mut stream in streams {
    ///     while let Some(event) = stream.next() {
    ///         match event? {
    ///             Event::Token(token) => print!("{} ", token.id),
    ///             Event::Finished(finish) => println!("{}", finish.reason.as_str()),
    ///         }
    ///     }
    /// }
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn engine(&self, options: EngineOptions) -> Result<Engine, Error> {
        let vocabulary = self.vocabulary.clone();
        Engine::start(&*self.decoder, None, options, self.shortcuts, vocabulary)
    }

    /// An engine as [`engine`](Model::engine) gives it, in which a smaller model guesses for requests that
    /// ask for it by [`Speculation::draft_model`](crate::Speculation::draft_model).
    ///
    /// # Errors
    /// As [`engine`](Model::engine), and if the two models have different vocabularies or the draft
    /// model writes no text.
    pub fn engine_with_draft(
        &self,
        draft: &Model,
        options: EngineOptions,
    ) -> Result<Engine, Error> {
        must_generate(&draft.description)?;
        if let Some(difference) = self.vocabulary_difference(draft) {
            let path = |model: &Model| model.description().path.display().to_string();
            let (draft, model) = (path(draft), path(self));
            return Err(Error::DraftVocabulary { draft, model, difference });
        }
        let (draft, vocabulary) = (Some(&*draft.decoder), self.vocabulary.clone());
        Engine::start(&*self.decoder, draft, options, self.shortcuts, vocabulary)
    }

    /// The first difference between the vocabularies of this model and another.
    fn vocabulary_difference(&self, other: &Model) -> Option<String> {
        let (own, others) = (self.vocab_size(), other.vocab_size());
        if own != others {
            return Some(format!("which has {own} tokens and not {others}"));
        }
        let (tokenizer, other) = (self.tokenizer(), other.tokenizer());
        let differs = |&id: &u32| {
            tokenizer.token_bytes(id).ok() != other.token_bytes(id).ok()
                || tokenizer.is_special(id) != other.is_special(id)
        };
        (0..own as u32).find(differs).map(|id| format!("in which token {id} is another"))
    }

    /// The embedding of a text: hidden states pooled as the model says, scaled to length 1.
    pub fn embed(&self, tokens: &[u32], options: SessionOptions) -> Result<Vec<f32>, Error> {
        let config = self.config();
        let Some(pooling) = config.pooling else {
            return Err(Error::WrongKind(format!(
                "{} generates text and makes no embeddings: choose an embedding model",
                self.description.path.display()
            )));
        };
        let hidden = config.hidden_size;
        let mut pooled = vec![0.0f64; hidden];
        self.session(options)?.feed_showing_states(tokens, |states| {
            for state in states.chunks_exact(hidden) {
                for (sum, value) in pooled.iter_mut().zip(state) {
                    let before = if pooling == Pooling::Mean { *sum } else { 0.0 };
                    *sum = before + f64::from(*value);
                }
            }
        })?;
        // The mean's divisor goes away with the length.
        let length = pooled.iter().map(|v| v * v).sum::<f64>().sqrt().max(1e-12);
        Ok(pooled.iter().map(|v| (v / length) as f32).collect())
    }
}
