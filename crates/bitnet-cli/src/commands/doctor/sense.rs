//! Whether what a model writes can be meant.
//!
//! A file that is read with another layout, activation or vocabulary than it was written with computes
//! numbers like any others, and the model writes gibberish. An easy text tells the two apart.

use std::ops::ControlFlow;

use anyhow::Result;
use bitnet_inference::perplexity::{Windows, perplexity};
use bitnet_inference::{
    FinishReason, GenerateOptions, Model, SamplingParams, SessionOptions, generate,
};
use bitnet_model::chat::Message;
use bitnet_model::tokenizer::Special;

use super::{Check, Report};
use crate::output;

/// Plain English: each model that writes text at all has read the like of it.
const PASSAGE: &str = "Once upon a time there was a little girl named Lily. She liked to play in the \
    garden with her dog. One day it began to rain, and they ran back into the house. Her mother gave \
    her a cup of warm milk. \"Thank you,\" said Lily. She looked out of the window and waited for the \
    sun to come back. When the rain stopped, she went outside again and saw a big rainbow in the sky.";

/// Share of the vocabulary that the perplexity of [`PASSAGE`] stays below. Guessing blindly gives the
/// whole vocabulary. Measured on the trained model of 2048 tokens: 10.5; read with another I2_S layout
/// 1048 and 1446; with a shuffled vocabulary 39546; random models, more than they have tokens. Another
/// activation leaves so small a model at 22.7, which no bound can tell from a poor model.
const LARGEST_SHARE: f64 = 0.1;

const PROMPT: &str = "Once upon a time";
const TOKENS: usize = 24;
/// Most tokens of the continuation that may be the same one.
const MOST_ALIKE: usize = TOKENS * 2 / 3;

/// Checks a model that writes text.
pub fn check(model: &Model, report: &mut Report) -> Result<()> {
    check_passage(model, report)?;
    check_continuation(model, report)?;
    check_ends(model, report);
    check_template(model, report);
    Ok(())
}

fn found(report: &mut Report, name: &str, finding: String, ok: Option<bool>) {
    let finding = if ok == Some(false) { format!("FAULT: {finding}") } else { finding };
    report.checks.push(Check { name: name.to_owned(), finding, ok });
}

fn check_passage(model: &Model, report: &mut Report) -> Result<()> {
    let ids = model.tokenizer().encode(PASSAGE, true, Special::Recognised)?;
    let context = model.config().context_length.min(ids.len().max(2));
    let windows = Windows { context, stride: context };
    let result = perplexity(model, &ids, windows, SessionOptions::default(), |_| ())?.perplexity();
    let sound = result < LARGEST_SHARE * model.vocab_size() as f64;
    let finding = match sound {
        true => format!("perplexity {result:.1}"),
        false => format!(
            "perplexity {result:.0} of {} tokens: little better than guessing",
            model.vocab_size()
        ),
    };
    found(report, "an easy text", finding, Some(sound));
    Ok(())
}

fn check_continuation(model: &Model, report: &mut Report) -> Result<()> {
    let ids = model.tokenizer().encode(PROMPT, true, Special::Recognised)?;
    let options = GenerateOptions {
        sampling: SamplingParams::default(),
        max_tokens: TOKENS,
        stop: Vec::new(),
        end_ids: model.description().end_ids.clone(),
        constraint: None,
    };
    let mut session = model.session(SessionOptions::default())?;
    let go_on = |_: &str| ControlFlow::Continue(());
    let generation = generate(&mut session, model.tokenizer(), &ids, &options, go_on)?;
    let tokens = &generation.tokens;
    let count = |token: &u32| tokens.iter().filter(|other| *other == token).count();
    let alike = tokens.iter().map(count).max().unwrap_or(0);
    let text = output::quoted(generation.text.as_bytes());
    let (finding, ok) = if tokens.is_empty() && generation.finish_reason == FinishReason::Stop {
        ("nothing: it ends at once".to_owned(), None)
    } else if alike > MOST_ALIKE {
        (format!("{text}: {alike} times the same token"), Some(false))
    } else {
        (text, None)
    };
    found(report, &format!("{PROMPT:?} goes on"), finding, ok);
    Ok(())
}

fn check_ends(model: &Model, report: &mut Report) {
    let name = |id: &u32| match model.tokenizer().token_bytes(*id) {
        Ok(bytes) => String::from_utf8_lossy(bytes).into_owned(),
        Err(_) => id.to_string(),
    };
    let names: Vec<String> = model.description().end_ids.iter().map(name).collect();
    let finding = match names.is_empty() {
        true => "nothing: it goes on up to the token limit".to_owned(),
        false => names.join(" "),
    };
    found(report, "texts end with", finding, None);
}

/// An answer that ends with a special token which ends no text never stops by itself.
fn check_template(model: &Model, report: &mut Report) {
    const NAME: &str = "chat template";
    const ANSWER: &str = "It is nine";
    let Some(template) = &model.description().template else {
        return found(report, NAME, "none: a base model, which continues texts".to_owned(), None);
    };
    let talk = [Message::new("user", "What time is it?"), Message::new("assistant", ANSWER)];
    let tokenizer = model.tokenizer();
    let text = match template.render(tokenizer, &talk, false) {
        Ok(text) => text,
        Err(error) => return found(report, NAME, error.to_string(), Some(false)),
    };
    let Some(end) = text.rfind(ANSWER).map(|start| &text[start + ANSWER.len()..]) else {
        let finding = "leaves out what the assistant has said".to_owned();
        return found(report, NAME, finding, Some(false));
    };
    let ids = tokenizer.encode(end, false, Special::Recognised).unwrap_or_default();
    let marks: Vec<u32> = ids.into_iter().filter(|&id| tokenizer.is_special(id)).collect();
    let ends = |id: &u32| model.description().end_ids.contains(id);
    let shown = output::quoted(end.trim().as_bytes());
    let (finding, ok) = match marks.is_empty() {
        true => ("renders; no token ends an answer".to_owned(), None),
        false if marks.iter().any(ends) => {
            (format!("renders; an answer ends with {shown}"), Some(true))
        }
        false => {
            (format!("an answer ends with {shown}, which ends no text: it goes on"), Some(false))
        }
    };
    found(report, NAME, finding, ok);
}
