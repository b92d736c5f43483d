//! An answer: shown as it comes, and what it took.

use std::time::{Duration, Instant};

use anyhow::Result;
use bitnet_inference::{FinishReason, InferenceStream, StreamEvent, Usage};
use futures_executor::block_on;
use futures_util::StreamExt;

use crate::interrupt::Watch;
use crate::output::{self, Messages, Wrapping, duration, number};

/// An answer and what it took.
pub struct Answer {
    pub text: String,
    /// Why it ended; `None`: somebody stopped it.
    pub reason: Option<FinishReason>,
    pub usage: Usage,
    to_first: Duration,
    after_first: Duration,
}

impl Answer {
    /// Shows an answer to a prompt of so many tokens, which was asked for at `asked`. At a terminal lines end between words, and
    /// Ctrl-C stops the answer.
    pub fn show(
        mut stream: InferenceStream,
        asked: Instant,
        prompt_tokens: usize,
        at_terminal: bool,
        messages: &Messages,
    ) -> Result<Self> {
        let watch = at_terminal.then(Watch::new);
        if at_terminal {
            messages.progress("reading ...");
        }
        let mut answer = Answer {
            text: String::new(),
            reason: None,
            usage: Usage { prompt_tokens, ..Usage::default() },
            to_first: Duration::ZERO,
            after_first: Duration::ZERO,
        };
        let mut display = Display { begun: false, wrapping: at_terminal.then(Wrapping::new) };
        let result = loop {
            let event = match &watch {
                Some(watch) => block_on(watch.until(stream.next())),
                None => Some(block_on(stream.next())),
            };
            // Nothing comes any more when it is stopped, and after the last event.
            let Some(event) = event.flatten() else { break Ok(()) };
            if at_terminal && !display.begun {
                messages.progress("");
            }
            let taken = event.map_err(Into::into).and_then(|event| {
                display.push(&event.text)?;
                answer.add(event, asked);
                Ok(())
            });
            if taken.is_err() || answer.reason.is_some() {
                break taken;
            }
        };
        if at_terminal && !display.begun {
            messages.progress("");
        }
        display.finish()?;
        result.map(|()| answer)
    }

    fn add(&mut self, event: StreamEvent, asked: Instant) {
        for token in &event.tokens {
            let since = token.time - asked;
            if self.usage.output_tokens == 0 {
                self.to_first = since;
            }
            self.after_first = since - self.to_first;
            self.usage.output_tokens += 1;
        }
        self.text += &event.text;
        if let Some(finish) = event.finish {
            self.usage = finish.usage;
            self.reason = Some(finish.reason);
        }
    }

    /// Tokens of the context that the conversation takes with it.
    pub fn context(&self) -> usize {
        self.usage.prompt_tokens + self.usage.output_tokens
    }

    /// Its length and its speed: that of the tokens after the first, which comes with the prompt.
    pub fn summary(&self) -> String {
        let tokens = self.usage.output_tokens;
        let plural = if tokens == 1 { "" } else { "s" };
        let seconds = self.after_first.as_secs_f64();
        let rate = match tokens > 1 && seconds > 0.0 {
            true => format!(", {} tokens/s", number((tokens - 1) as f64 / seconds)),
            false => String::new(),
        };
        let to_first = duration(1e3 * self.to_first.as_secs_f64());
        format!("{tokens} token{plural}{rate}, first after {to_first}")
    }
}

/// Text on its way to stdout, without the white space at its beginning.
struct Display {
    begun: bool,
    wrapping: Option<Wrapping>,
}

impl Display {
    fn push(&mut self, text: &str) -> Result<()> {
        let text = if self.begun { text } else { text.trim_start() };
        self.begun |= !text.is_empty();
        match &mut self.wrapping {
            Some(wrapping) => output::piece(&wrapping.push(text))?,
            None => output::piece(text)?,
        }
        Ok(())
    }

    fn finish(&mut self) -> Result<()> {
        if let Some(wrapping) = &mut self.wrapping {
            output::piece(&wrapping.finish())?;
        }
        if self.begun {
            output::end_of_text()?;
        }
        Ok(())
    }
}
