//! Generated tokens as text, as it becomes certain: never half a character, never a part of a stop
//! string.

use bitnet_model::tokenizer::{Detokenizer, Tokenizer, TokenizerError};

use crate::stop::{EmptyStopString, StopStrings};

/// The text of one generation.
#[derive(Debug)]
pub(crate) struct Transcript {
    detokenizer: Detokenizer,
    stop: StopStrings,
}

impl Transcript {
    /// An empty text that ends before any of these strings.
    pub(crate) fn new(stop: Vec<String>) -> Result<Self, EmptyStopString> {
        Ok(Transcript { detokenizer: Detokenizer::within(true), stop: StopStrings::new(stop)? })
    }

    /// The text that is certain now that a token has come.
    pub(crate) fn push(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
    ) -> Result<String, TokenizerError> {
        match self.detokenizer.push(tokenizer, token) {
            Ok(text) => Ok(self.stop.push(text)),
            // Some models have more logits than tokens: the rest is padding without text.
            Err(TokenizerError::UnknownId { .. }) => Ok(String::new()),
            Err(error) => Err(error),
        }
    }

    /// Whether a stop string has ended the text.
    pub(crate) fn is_stopped(&self) -> bool {
        self.stop.matched().is_some()
    }

    /// What is left when no more tokens come. The end of the text can complete a stop string that
    /// more text might have outdone.
    pub(crate) fn finish(&mut self) -> String {
        if self.is_stopped() {
            return String::new();
        }
        let mut rest = self.stop.push(self.detokenizer.finish());
        if !self.is_stopped() {
            rest.push_str(&self.stop.finish());
        }
        rest
    }
}
