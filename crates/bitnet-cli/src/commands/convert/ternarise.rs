//! What `--ternarise` says about the model that it ruins.

use std::path::Path;

use anyhow::{Result, bail};
use bitnet_inference::perplexity::{Windows, perplexity};
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::dense::{self, DenseReport};
use bitnet_model::source::Checkpoint;
use bitnet_model::tokenizer::Special;

use crate::output::Messages;

/// What is read by default: a story from the validation part of TinyStories.
const PASSAGE: &str = include_str!("passage.txt");

/// Most tokens that are read.
const MOST_TOKENS: usize = 512;

/// A text, and what was measured on it before the model was ternarised.
pub struct Measured {
    tokens: Vec<u32>,
    report: DenseReport,
}

impl Measured {
    /// Reads the text in a file, or a story, by the dense weights.
    pub fn of(checkpoint: &Checkpoint, text: Option<&Path>, messages: &Messages) -> Result<Self> {
        let text = text.map_or_else(|| Ok(PASSAGE.to_owned()), super::super::read_text)?;
        let description = &checkpoint.description;
        if description.config.pooling.is_some() {
            bail!("{} makes embeddings, which have no perplexity", description.path.display());
        }
        let mut tokens = description.tokenizer.encode(&text, true, Special::AsText)?;
        tokens.truncate(MOST_TOKENS.min(description.config.context_length));
        let report = dense::report(checkpoint, &tokens, |done, all| {
            messages.progress(&format!("measured {done} of {all} layers"));
        });
        messages.progress("");
        let report = report?;
        messages.note(
            "ternarising keeps the sign of each weight and one size per matrix: without training \
             afterwards the model is ruined",
        );
        Ok(Measured { tokens, report })
    }

    /// Says what the weights lost, and how much likelier the text was before.
    pub fn report(&self, output: &str, messages: &Messages) -> Result<()> {
        let kinds = self.report.weight_errors.iter();
        let kinds: Vec<String> =
            kinds.map(|(kind, error)| format!("{kind} {:.0} %", 100.0 * error)).collect();
        messages.summary(&format!("changed of the weights (relative norm): {}", kinds.join(", ")));
        let model = Model::open(output, &ModelOptions::default())?;
        let windows = Windows { context: self.tokens.len(), stride: self.tokens.len() };
        let options = SessionOptions::default();
        let after = perplexity(&model, &self.tokens, windows, options, |_| ())?;
        let losses = &self.report.losses;
        messages.summary(&format!(
            "perplexity of {} tokens: {:.4} before, {:.4} after",
            after.tokens,
            (losses.iter().sum::<f64>() / losses.len() as f64).exp(),
            after.perplexity()
        ));
        Ok(())
    }
}
