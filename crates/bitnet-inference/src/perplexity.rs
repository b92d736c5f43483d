//! How well a model foretells texts: [`perplexity`] of long ones, [`choice_logprobs`] of short ones
//! that continue a common text.

use std::ops::AddAssign;

use bitnet_model::tokenizer::{Special, Tokenizer};

use crate::error::Error;
use crate::model::Model;
use crate::sampler;
use crate::session::{Session, SessionOptions};

/// How a text is cut into windows that the model reads one by one, each without knowing the others.
///
/// The rule is that of transformers' documentation ("Perplexity of fixed-length models"): a window
/// begins every `stride` tokens, and each token is scored in the first window that it is in. So every
/// token but the first few has at least `context - stride` tokens before it. The first token of a
/// text is not scored; with a stride as long as the window, neither is the first of any other window.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Windows {
    /// Most tokens of a window.
    pub context: usize,
    /// Tokens from the beginning of a window to that of the next.
    pub stride: usize,
}

/// How well a model has foretold the tokens of a text.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Perplexity {
    /// Sum of `-ln p` over the tokens that were scored.
    pub nll: f64,
    /// Tokens that were scored.
    pub tokens: usize,
    /// Bytes of the text of these tokens.
    pub bytes: u64,
}

impl Perplexity {
    /// Mean of `-ln p` of a token. Not a number if none was scored.
    pub fn nll_per_token(&self) -> f64 {
        self.nll / self.tokens as f64
    }

    /// `exp` of that mean: between how many tokens the model hesitates.
    pub fn perplexity(&self) -> f64 {
        libm::exp(self.nll_per_token())
    }

    /// `-log2 p` of the text over its bytes, which compares models with different vocabularies.
    pub fn bits_per_byte(&self) -> f64 {
        self.nll / std::f64::consts::LN_2 / self.bytes as f64
    }
}

impl AddAssign for Perplexity {
    fn add_assign(&mut self, other: Self) {
        self.nll += other.nll;
        self.tokens += other.tokens;
        self.bytes += other.bytes;
    }
}

/// Reads a text in windows. `progress` gets the sums so far after each token that is scored. Only a
/// few rows of logits are in memory at once.
///
/// # Errors
/// [`Error::Windows`] for windows that the model cannot have, a token that it does not have, and logits
/// that are no numbers.
///
/// ```
/// use bitnet_inference::perplexity::{Windows, perplexity};
/// use bitnet_inference::{Model, ModelOptions, SessionOptions};
/// use bitnet_model::tokenizer::Special;
///
/// let model = Model::open("tiny", &ModelOptions::default())?;
/// let text = "Once upon a time there was a little girl named Lily.";
/// let ids = model.tokenizer().encode(text, true, Special::Recognised)?;
/// let windows = Windows { context: 512, stride: 256 };
/// let result = perplexity(&model, &ids, windows, SessionOptions::default(), |_| ())?;
/// assert!(result.perplexity() < 20.0);
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
pub fn perplexity(
    model: &Model,
    tokens: &[u32],
    windows: Windows,
    options: SessionOptions,
    mut progress: impl FnMut(&Perplexity),
) -> Result<Perplexity, Error> {
    let Windows { context, stride } = windows;
    let context_length = model.config().context_length;
    if !(2..=context_length).contains(&context) || !(1..=context).contains(&stride) {
        return Err(Error::Windows { context, stride, context_length });
    }
    let mut sums = Perplexity::default();
    let mut session = model.session(options)?;
    let mut logits = Vec::new();
    let mut begin = 0;
    let mut scored_to = 0;
    while scored_to < tokens.len() {
        let end = (begin + context).min(tokens.len());
        // A token is foretold by those before it, so the first of a window cannot be scored.
        let first = scored_to.max(begin + 1);
        if first < end {
            session.truncate(0);
            session.feed(&tokens[begin..first], &mut logits)?;
            score(&mut session, &logits, &tokens[first..end], |token, logprob| {
                sums.nll -= logprob;
                sums.tokens += 1;
                sums.bytes += model.tokenizer().token_bytes(token).map_or(0, <[u8]>::len) as u64;
                progress(&sums);
            })?;
        }
        scored_to = end;
        begin += stride;
    }
    Ok(sums)
}

/// The tokens of a text and of several continuations, each with one space between. A token that
/// reaches across that place belongs to the continuations, so the text is what all of them begin with.
///
/// # Errors
/// [`Error::EmptyPrompt`] if there is nothing that all begin with, and text that cannot be encoded.
pub fn encode_choices<C: AsRef<str>>(
    tokenizer: &Tokenizer,
    text: &str,
    continuations: &[C],
) -> Result<(Vec<u32>, Vec<Vec<u32>>), Error> {
    let text = text.trim_end();
    let encode = |text: &str| tokenizer.encode(text, true, Special::Recognised);
    let mut prompt = encode(text)?;
    let mut wholes = Vec::with_capacity(continuations.len());
    for continuation in continuations {
        let whole = encode(&format!("{text} {}", continuation.as_ref().trim_start()))?;
        let common = prompt.iter().zip(&whole).take_while(|(a, b)| a == b).count();
        prompt.truncate(common);
        wholes.push(whole);
    }
    if prompt.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    wholes.iter_mut().for_each(|whole| drop(whole.drain(..prompt.len())));
    Ok((prompt, wholes))
}

/// `ln p` of each of several continuations after the same text, which is read once. The session
/// may hold anything before; afterwards it holds the text and one of them.
///
/// # Errors
/// [`Error::EmptyPrompt`] if the text or a continuation is empty, tokens that the model does not have or
/// has no room for, and logits that are no numbers.
pub fn choice_logprobs<C: AsRef<[u32]>>(
    session: &mut Session,
    text: &[u32],
    continuations: &[C],
) -> Result<Vec<f64>, Error> {
    let mut logits = Vec::new();
    session.truncate(0);
    session.feed(text, &mut logits)?;
    let mut logprobs = Vec::with_capacity(continuations.len());
    for continuation in continuations {
        session.truncate(text.len());
        let mut sum = 0.0;
        score(session, &logits, continuation.as_ref(), |_, logprob| sum += logprob)?;
        logprobs.push(sum);
    }
    Ok(logprobs)
}

/// Shows the tokens that follow, each with its `ln p`. `logits` are those after the last token of the
/// session, which then reads all of these but the last.
fn score(
    session: &mut Session,
    logits: &[f32],
    tokens: &[u32],
    mut show: impl FnMut(u32, f64),
) -> Result<(), Error> {
    session.check(tokens)?;
    let (&first, rest) = tokens.split_first().expect("the check refuses none at all");
    show(first, sampler::logprob(logits, first)?);
    if rest.is_empty() {
        return Ok(());
    }
    let mut next = rest.iter();
    let mut result = Ok(());
    session.feed_showing_all(&tokens[..rest.len()], |logits| {
        let &token = next.next().expect("one row for each token that is read");
        if result.is_ok() {
            result = sampler::logprob(logits, token).map(|logprob| show(token, logprob));
        }
    })?;
    Ok(result?)
}
