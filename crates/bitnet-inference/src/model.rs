//! A model ready to run: where it came from, its tokenizer, and its decoder on some device.

use std::sync::Arc;

use bitnet_core::Error as CoreError;
use bitnet_core::{Device, ShortcutCounts, Shortcuts};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_model::chat::ChatTemplate;
use bitnet_model::config::{ModelConfig, Pooling};
use bitnet_model::source::{self, Description};
use bitnet_model::tokenizer::Tokenizer;
use bitnet_model::weights::{self, LoadOptions};

use crate::engine::{Engine, EngineOptions};
use crate::error::Error;
use crate::grammar::Vocabulary;
use crate::session::{AnyDecoder, Session, SessionOptions};

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
    })?)
}

/// A loaded model. Cheap to share: sessions keep the weights alive.
pub struct Model {
    description: Description,
    decoder: Box<dyn AnyDecoder>,
    vocabulary: Arc<Vocabulary>,
    shortcuts: Shortcuts,
}

impl Model {
    /// Loads a model: `tiny`, a directory or a file.
    pub fn open(model: &str, options: &ModelOptions) -> Result<Self, Error> {
        let checkpoint = source::open(model)?;
        let backend = cpu_backend(options)?;
        let mut description = checkpoint.description;
        let decoder = weights::load(
            backend,
            &description.path,
            &description.config,
            &checkpoint.tensors,
            options.load,
            &mut description.notes,
        )?;
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

    /// Number of token ids.
    pub fn vocab_size(&self) -> usize {
        self.decoder.vocab_size()
    }

    /// Name of the backend the model runs on.
    pub fn backend_name(&self) -> String {
        self.decoder.backend_name()
    }

    /// What exact shortcuts have saved since the model was loaded.
    pub fn shortcut_counts(&self) -> ShortcutCounts {
        self.decoder.shortcut_counts()
    }

    /// A new, empty sequence.
    pub fn session(&self, options: SessionOptions) -> Result<Session, Error> {
        self.decoder.session(options, self.vocabulary.clone())
    }

    /// An engine that runs many requests on this model at once, on a thread of its own.
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
        self.decoder.engine(options, self.shortcuts.prefix, self.vocabulary.clone())
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
