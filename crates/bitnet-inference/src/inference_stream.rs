//! The text of a generation as it comes.

use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use futures_core::Stream;

use crate::engine::Engine;
use crate::error::Error;
use crate::generate::FinishReason;
use crate::model::Model;
use crate::request::{Event, Finish, Request, Token};
use crate::stream::{TokenStream, block_on};
use crate::transcript::Transcript;

/// How results come when they come in pieces.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StreamingConfig {
    /// Tokens that may wait to be read before the request pauses, at least 1.
    pub buffer: usize,
    /// Whether the results of several prompts come in the order of these, or as they are completed.
    pub ordered: bool,
    /// Longest time for which tokens are gathered into a piece; zero: each comes at once.
    pub max_latency: Duration,
}

impl Default for StreamingConfig {
    fn default() -> Self {
        StreamingConfig {
            buffer: Request::DEFAULT_BUFFER,
            ordered: true,
            max_latency: Duration::ZERO,
        }
    }
}

/// A piece of a generation.
#[derive(Debug, Clone, PartialEq)]
pub struct StreamEvent {
    /// Text that is certain now: never half a character, never a part of a stop string. Empty while
    /// more tokens are needed to be certain.
    pub text: String,
    /// The tokens that came, with their log-probabilities if asked for: one, unless they are
    /// [gathered](StreamingConfig::max_latency). The last event may have none.
    pub tokens: Vec<Token>,
    /// In the last event: why the generation ended and what it took.
    pub finish: Option<Finish>,
}

/// A generation as it comes: a [`Stream`] for `async` code, and an iterator by
/// [`blocking`](InferenceStream::blocking). The last event has a
/// [`finish`](StreamEvent::finish); an error ends the stream too. Dropping the stream cancels the
/// generation at the next step.
pub struct InferenceStream {
    tokens: TokenStream,
    /// Whether the last event has come.
    finished: bool,
    model: Arc<Model>,
    /// When it was submitted.
    start: Instant,
    transcript: Transcript,
    prompt_tokens: usize,
    output_tokens: usize,
    /// Whether tokens that are there together come as one piece.
    gathers: bool,
    /// What went wrong after the last piece.
    failed: Option<Error>,
}

impl InferenceStream {
    /// Submits a request and looks for stop strings in its text.
    pub(crate) fn start(
        engine: &Engine,
        model: &Arc<Model>,
        request: Request,
        stop: Vec<String>,
    ) -> Result<Self, Error> {
        Ok(InferenceStream {
            start: Instant::now(),
            transcript: Transcript::new(stop)?,
            prompt_tokens: request.prompt.len(),
            output_tokens: 0,
            gathers: !request.max_latency.is_zero(),
            failed: None,
            tokens: engine.submit(request)?,
            finished: false,
            model: Arc::clone(model),
        })
    }

    /// When it was submitted.
    pub(crate) fn start_time(&self) -> Instant {
        self.start
    }

    /// The same events for code without `async`: waits for each.
    pub fn blocking(mut self) -> impl Iterator<Item = Result<StreamEvent, Error>> {
        std::iter::from_fn(move || block_on(poll_fn(|context| self.poll_event(context))))
    }

    /// Waits until the engine has let go of the generation and its place is free.
    pub(crate) async fn closed(&mut self) {
        poll_fn(|context| self.tokens.poll_closed(context)).await;
    }

    fn poll_event(
        &mut self,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<StreamEvent, Error>>> {
        if self.finished {
            return Poll::Ready(None);
        }
        let event = match self.failed.take() {
            Some(error) => Err(error),
            None => match ready!(self.tokens.poll_event(context)) {
                Some(event) => event.and_then(|event| self.event(event)),
                None => return Poll::Ready(None),
            },
        };
        let event = event.map(|event| self.gather(event));
        if !matches!(event, Ok(StreamEvent { finish: None, .. })) {
            // Nothing comes after this, and what the engine still does for it is not needed.
            self.finished = true;
            self.tokens.cancel();
        }
        Poll::Ready(Some(event))
    }

    fn event(&mut self, event: Event) -> Result<StreamEvent, Error> {
        match event {
            Event::Token(token) => self.token(token),
            Event::Finished(finish) => Ok(self.finish(finish)),
        }
    }

    /// Adds what else is there to a piece.
    fn gather(&mut self, mut piece: StreamEvent) -> StreamEvent {
        while self.gathers && piece.finish.is_none() {
            let Some(event) = self.tokens.pop() else { break };
            match event.and_then(|event| self.event(event)) {
                Ok(StreamEvent { text, tokens, finish }) => {
                    piece.text.push_str(&text);
                    piece.tokens.extend(tokens);
                    piece.finish = finish;
                }
                Err(error) => {
                    self.failed = Some(error);
                    break;
                }
            }
        }
        piece
    }

    fn token(&mut self, token: Token) -> Result<StreamEvent, Error> {
        self.output_tokens += 1;
        let text = self.transcript.push(self.model.tokenizer(), token.id)?;
        let finish = self.transcript.is_stopped().then_some(Finish {
            reason: FinishReason::Stop,
            usage: self.tokens.usage(self.prompt_tokens, self.output_tokens),
        });
        Ok(StreamEvent { text, tokens: vec![token], finish })
    }

    fn finish(&mut self, mut finish: Finish) -> StreamEvent {
        let text = self.transcript.finish();
        if self.transcript.is_stopped() {
            finish.reason = FinishReason::Stop;
        }
        StreamEvent { text, tokens: Vec::new(), finish: Some(finish) }
    }
}

impl Stream for InferenceStream {
    type Item = Result<StreamEvent, Error>;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.get_mut().poll_event(context)
    }
}
