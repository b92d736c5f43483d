//! Conversations that outgrow the model's context: which of their messages still fit.

use bitnet_model::chat::Message;

use crate::error::Error;
use crate::inference_engine::InferenceEngine;

/// What of a conversation fits the model's context: see [`InferenceEngine::chat_window`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChatWindow {
    /// Messages to leave out, after the system messages at the beginning.
    pub dropped: usize,
    /// Tokens of the others, as the model's chat template puts them.
    pub prompt_tokens: usize,
    /// Tokens that they and the answer may have together.
    pub context_length: usize,
}

impl InferenceEngine {
    /// Tokens that the prompt and the output of one request may have: as many as the model's context, or
    /// fewer if the memory for keys and values holds fewer.
    ///
    /// # Errors
    /// If no model is loaded.
    pub fn context_length(&self) -> Result<usize, Error> {
        Ok(self.engine()?.most_tokens())
    }

    /// Which messages of a conversation to leave out so that the rest and an answer of `answer_tokens`
    /// fit the context. If all fit, that is none. Otherwise whole turns go, the oldest first, until the rest
    /// takes at most half of the context: what is left is computed anew at its new place, and so this
    /// has to happen rarely. A turn begins with a message of the user. System messages at the
    /// beginning stay, and so does the last turn.
    ///
    /// # Errors
    /// [`Error::ContextExceeded`] if not even the last turn fits; and as
    /// [`chat`](InferenceEngine::chat).
    ///
    /// ```
    /// use bitnet_inference::{InferenceEngine, Message};
    ///
    /// let mut engine = InferenceEngine::new();
    /// engine.load_model("tiny")?;
    /// let mut messages = vec![Message::new("system", "You tell stories.")];
    /// for _ in 0..100 {
    ///     messages.push(Message::new("user", "Tell me a story about a cat and a dog."));
    ///     messages.push(Message::new("assistant", "Once upon a time there was a cat."));
    /// }
    /// messages.push(Message::new("user", "Why?"));
    /// let window = engine.chat_window(&messages, 100)?;
    /// messages.drain(1..1 + window.dropped);
    /// assert_eq!(messages[1].role, "user");
    /// assert!(window.prompt_tokens <= window.context_length / 2);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn chat_window(
        &self,
        messages: &[Message],
        answer_tokens: usize,
    ) -> Result<ChatWindow, Error> {
        let context_length = self.context_length()?;
        let model = self.model()?;
        let template = model.chat_template()?;
        let prompt_tokens = |messages: &[Message]| {
            let (_, ids) = template.encode(model.tokenizer(), messages, true)?;
            Ok::<usize, Error>(ids.len())
        };
        let fits = |tokens: usize| tokens.saturating_add(answer_tokens) <= context_length;

        let all = prompt_tokens(messages)?;
        if fits(all) {
            return Ok(ChatWindow { dropped: 0, prompt_tokens: all, context_length });
        }
        let head = messages.iter().take_while(|message| message.role == "system").count();
        let (system, turns) = messages.split_at(head);
        let mut last = (0, all);
        let starts = turns.iter().enumerate().filter(|(_, message)| message.role == "user");
        for (dropped, _) in starts.filter(|(at, _)| *at > 0) {
            let tokens = prompt_tokens(&[system, &turns[dropped..]].concat())?;
            last = (dropped, tokens);
            if fits(tokens) && tokens <= context_length / 2 {
                break;
            }
        }
        let (dropped, prompt_tokens) = last;
        match fits(prompt_tokens) {
            true => Ok(ChatWindow { dropped, prompt_tokens, context_length }),
            false => Err(Error::ContextExceeded {
                length: prompt_tokens.saturating_add(answer_tokens),
                context_length,
            }),
        }
    }
}
