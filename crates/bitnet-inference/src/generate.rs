//! The loop from a prompt to a finished text, one sequence at a time.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bitnet_model::tokenizer::Tokenizer;

use crate::error::Error;
use crate::grammar::{Constraint, Grammar};
use crate::sampler::{Sampler, SamplingParams};
use crate::session::Session;
use crate::transcript::Transcript;

/// What to generate and when to stop.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// How each token is chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Texts that end the generation and are not part of it.
    pub stop: Vec<String>,
    /// Token ids that end the generation and are not part of it.
    pub end_ids: BTreeSet<u32>,
    /// What the text must be.
    pub constraint: Option<Constraint>,
}

/// Why a generation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FinishReason {
    /// An end token, a stop string, or a constraint after which nothing can come.
    Stop,
    /// The token limit, or the end of the model's context. A constrained output may be incomplete.
    Length,
    /// Whoever receives the text wanted no more.
    Cancelled,
}

impl FinishReason {
    /// The word used in machine-readable output.
    pub fn as_str(self) -> &'static str {
        match self {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "cancelled",
        }
    }
}

/// Log-probabilities of one generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct TokenLogprobs {
    /// Natural log of the token's probability under the model alone.
    pub logprob: f64,
    /// The most probable tokens with theirs.
    pub top: Vec<(u32, f64)>,
}

/// A finished generation.
#[derive(Debug, Clone, PartialEq)]
pub struct Generation {
    /// Generated ids, without the end token.
    pub tokens: Vec<u32>,
    /// Their text, up to a stop string.
    pub text: String,
    /// Why it ended.
    pub finish_reason: FinishReason,
    /// One entry per token, if log-probabilities were asked for.
    pub logprobs: Vec<TokenLogprobs>,
    /// Time to read the prompt, up to the first token.
    pub prompt_time: Duration,
    /// Time to generate the tokens after the first.
    pub decode_time: Duration,
}

impl Generation {
    /// Before the first token.
    pub(crate) fn empty() -> Self {
        Generation {
            tokens: Vec::new(),
            text: String::new(),
            finish_reason: FinishReason::Length,
            logprobs: Vec::new(),
            prompt_time: Duration::ZERO,
            decode_time: Duration::ZERO,
        }
    }
}

/// Reads `prompt` in `session` and generates. `show` gets the text as it becomes certain, never
/// half a character and never a part of a stop string, and can end the generation.
pub fn generate(
    session: &mut Session,
    tokenizer: &Tokenizer,
    prompt: &[u32],
    options: &GenerateOptions,
    mut show: impl FnMut(&str) -> ControlFlow<()>,
) -> Result<Generation, Error> {
    let mut sampler = Sampler::new(&options.sampling)?;
    let mut transcript = Transcript::new(options.stop.clone())?;
    let constraint = options.constraint.as_ref();
    let mut grammar =
        constraint.map(|constraint| session.grammar(constraint, &options.end_ids)).transpose()?;
    let is_complete =
        |grammar: &Option<Grammar>| grammar.as_ref().is_some_and(Grammar::is_complete);
    let mut history = prompt.to_vec();
    let (mut logits, mut candidates) = (Vec::new(), Vec::new());
    let mut generation = Generation::empty();

    let start = Instant::now();
    // A mask is looked up in all logits.
    let selection = if grammar.is_some() { None } else { sampler.selection(&history, 0) };
    let mut selected = session.feed_selected(prompt, selection, &mut candidates, &mut logits)?;
    generation.prompt_time = start.elapsed();
    let start = Instant::now();
    while generation.tokens.len() < options.max_tokens && !is_complete(&grammar) {
        let position = generation.tokens.len() as u64;
        let sampled = match &grammar {
            Some(grammar) => {
                sampler.sample_among(&logits, grammar.allowed().ids(), &history, position)?
            }
            None if selected => sampler.sample_candidates(&candidates, &history, position)?,
            None => sampler.sample(&logits, &history, position)?,
        };
        if options.end_ids.contains(&sampled.token) {
            generation.finish_reason = FinishReason::Stop;
            break;
        }
        generation.tokens.push(sampled.token);
        history.push(sampled.token);
        if let Some(logprob) = sampled.logprob {
            generation.logprobs.push(TokenLogprobs { logprob, top: sampled.top_logprobs });
        }
        let text = transcript.push(tokenizer, sampled.token)?;
        generation.text.push_str(&text);
        let flow = if text.is_empty() { ControlFlow::Continue(()) } else { show(&text) };
        if transcript.is_stopped() {
            generation.finish_reason = FinishReason::Stop;
            break;
        }
        if flow.is_break() {
            generation.finish_reason = FinishReason::Cancelled;
            break;
        }
        if let Some(grammar) = &mut grammar {
            grammar.advance(sampled.token)?;
        }
        if session.remaining() == 0 {
            break;
        }
        if generation.tokens.len() < options.max_tokens && !is_complete(&grammar) {
            let selection = match grammar {
                Some(_) => None,
                None => sampler.selection(&history, generation.tokens.len() as u64),
            };
            selected =
                session.feed_selected(&[sampled.token], selection, &mut candidates, &mut logits)?;
        }
    }
    generation.decode_time = start.elapsed();
    let rest = transcript.finish();
    let stopped = transcript.is_stopped() || is_complete(&grammar);
    if stopped && generation.finish_reason == FinishReason::Length {
        generation.finish_reason = FinishReason::Stop;
    }
    generation.text.push_str(&rest);
    if !rest.is_empty() && generation.finish_reason != FinishReason::Cancelled {
        // Nothing follows, so the answer does not matter.
        let _ = show(&rest);
    }
    Ok(generation)
}
