//! [`Answer`]: a result that is on its way.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_util::stream::StreamExt;

use crate::error::Error;
use crate::generate::Generation;
use crate::inference_stream::InferenceStream;
use crate::stream::block_on;

/// A result that is on its way: `.await` it, or [`wait`](Answer::wait) for it. Dropping it cancels
/// what was asked.
#[must_use = "an answer that is dropped is cancelled"]
pub struct Answer<T>(Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>);

impl<T> Answer<T> {
    pub(super) fn new(future: impl Future<Output = Result<T, Error>> + Send + 'static) -> Self {
        Answer(Box::pin(future))
    }

    /// Waits for the result: for code without `async`.
    pub fn wait(self) -> Result<T, Error> {
        block_on(self)
    }
}

impl<T> Future for Answer<T> {
    type Output = Result<T, Error>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        self.0.as_mut().poll(context)
    }
}

impl<T: Send + 'static> Answer<T> {
    pub(super) fn failed(error: Error) -> Self {
        Answer::new(async { Err(error) })
    }
}

impl From<Result<InferenceStream, Error>> for Answer<Generation> {
    /// The whole of a stream.
    fn from(stream: Result<InferenceStream, Error>) -> Self {
        Answer::new(async move { whole(&mut stream?).await })
    }
}

/// The whole of a stream.
pub(super) async fn whole(stream: &mut InferenceStream) -> Result<Generation, Error> {
    let mut generation = Generation::empty();
    let mut first = None;
    while let Some(event) = stream.next().await {
        let event = event?;
        generation.text.push_str(&event.text);
        for token in event.tokens {
            let first = *first.get_or_insert(token.time);
            generation.prompt_time = first - stream.start_time();
            generation.decode_time = token.time - first;
            generation.tokens.push(token.id);
            generation.logprobs.extend(token.logprobs);
        }
        if let Some(finish) = event.finish {
            generation.finish_reason = finish.reason;
        }
    }
    Ok(generation)
}
