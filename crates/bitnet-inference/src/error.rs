//! Errors of running a model: one sentence each.

use std::path::PathBuf;

use bitnet_core::budget::human_bytes;

use crate::conversation::ConversationError;
use crate::grammar::ConstraintError;
use crate::sampler::{InvalidParameter, SampleError};
use crate::scheduler::QueueFull;
use crate::stop::EmptyStopString;

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The model could not be read.
    #[error(transparent)]
    Model(#[from] bitnet_model::Error),
    /// Memory, device or backend.
    #[error(transparent)]
    Core(#[from] bitnet_core::Error),
    /// A token id that the model does not have.
    #[error("token id {token} does not exist: the model has {vocab_size} tokens, 0 to {}", vocab_size - 1)]
    TokenOutOfRange {
        /// The id.
        token: u32,
        /// Tokens of the model.
        vocab_size: usize,
    },
    /// More tokens than the model's context.
    #[error(
        "{length} tokens do not fit the model's context of {context_length}: shorten the prompt"
    )]
    ContextExceeded {
        /// Tokens in all.
        length: usize,
        /// Tokens the model can hold.
        context_length: usize,
    },
    /// A prompt without a single token.
    #[error("the prompt is empty: give at least one token")]
    EmptyPrompt,
    /// A sampling parameter with a value it cannot have.
    #[error(transparent)]
    Parameter(#[from] InvalidParameter),
    /// A stop string that stops before the first character.
    #[error(transparent)]
    Stop(#[from] EmptyStopString),
    /// No token could be sampled.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// A constraint that cannot be kept.
    #[error(transparent)]
    Constraint(#[from] ConstraintError),
    /// Text and token ids.
    #[error(transparent)]
    Tokenizer(#[from] bitnet_model::tokenizer::TokenizerError),
    /// More requests than there are places for.
    #[error(transparent)]
    QueueFull(#[from] QueueFull),
    /// A request that may need more keys and values than the engine's budget has room for.
    #[error(
        "the request may need keys and values of {needed} tokens but the KV cache has room for {room}: \
         lower the token limit, shorten the prompt or give the KV cache more memory"
    )]
    KvBudget {
        /// Tokens of prompt and output.
        needed: usize,
        /// Tokens that fit.
        room: usize,
    },
    /// A request asked for the guesses of a draft model, and the engine has none.
    #[error("the engine has no draft model: give it one, or guess by prompt lookup")]
    NoDraftModel,
    /// A draft model that speaks of other tokens than the model it is to guess for.
    #[error(
        "{draft} cannot guess for {model}, {difference}: choose a draft model with the same vocabulary"
    )]
    DraftVocabulary {
        /// Where the draft model is.
        draft: String,
        /// Where the model is.
        model: String,
        /// The first difference.
        difference: String,
    },
    /// The deadline of a request passed before it was finished.
    #[error(
        "the deadline of the request passed: allow more time or submit it when fewer are running"
    )]
    DeadlineExceeded,
    /// A logits processor panicked.
    #[error("a logits processor panicked: {message}")]
    ProcessorPanicked {
        /// What it said.
        message: String,
    },
    /// The engine's thread has ended, and every request with it.
    #[error("the engine has stopped: {reason}")]
    EngineStopped {
        /// Why.
        reason: String,
    },
    /// The system does not tell what was to be measured.
    #[error("this system does not tell {0}: leave it out")]
    NotMeasured(&'static str),
    /// Something was asked of an engine without a model.
    #[error("no model is loaded: call load_model first")]
    NoModel,
    /// A batch without a single prompt.
    #[error("the batch is empty: give at least one prompt")]
    EmptyBatch,
    /// A conversation that the model's template does not take.
    #[error(transparent)]
    Chat(#[from] bitnet_model::chat::ChatError),
    /// A model whose weights cannot be used as they lie in its file.
    #[error(
        "{}: {format} weights are not laid out for use in place: make a .bitnet file with \
         `bitnet convert`, or load the model without asking for a mapped one",
        path.display()
    )]
    NotMapped {
        /// The model.
        path: PathBuf,
        /// What it is.
        format: &'static str,
    },
    /// A name that the cache was not told of.
    #[error("no model is called `{name}`: insert it into the cache first")]
    UnknownModel {
        /// The name.
        name: String,
    },
    /// A model that is larger than the whole budget of the cache.
    #[error(
        "the model `{name}` takes {} but the cache may hold {}: give it a larger budget",
        human_bytes(*needed), human_bytes(*budget)
    )]
    ModelTooLarge {
        /// The model's name.
        name: String,
        /// Bytes of its weights, at least.
        needed: u64,
        /// Bytes the cache may hold.
        budget: u64,
    },
    /// A model for which there is no room while others are in use.
    #[error(
        "the model `{name}` takes {}, but models in use hold {} of the cache's {}: try again \
         when requests have ended",
        human_bytes(*needed), human_bytes(*in_use), human_bytes(*budget)
    )]
    CacheFull {
        /// The model's name.
        name: String,
        /// Bytes of its weights, at least.
        needed: u64,
        /// Bytes of models that are in use or being loaded.
        in_use: u64,
        /// Bytes the cache may hold.
        budget: u64,
    },
    /// A conversation that cannot be saved or restored.
    #[error("{}: {reason}", path.display())]
    Conversation {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        reason: ConversationError,
    },
    /// Windows of a text that the model cannot read, or that leave tokens out.
    #[error(
        "windows of {context} tokens that begin every {stride} are not possible: a window has 2 to \
         {context_length} tokens, the model's context, and the next one begins 1 to {context} later"
    )]
    Windows {
        /// Tokens of a window.
        context: usize,
        /// Tokens between two beginnings.
        stride: usize,
        /// Tokens the model can hold.
        context_length: usize,
    },
    /// The model makes no embeddings, or makes nothing else.
    #[error("{0}")]
    WrongKind(String),
}
