//! Errors of running a model: one sentence each.

use crate::sampler::{InvalidParameter, SampleError};
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
    /// Text and token ids.
    #[error(transparent)]
    Tokenizer(#[from] bitnet_model::tokenizer::TokenizerError),
    /// The model makes no embeddings, or makes nothing else.
    #[error("{0}")]
    WrongKind(String),
}
