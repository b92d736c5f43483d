//! `bitnet convert`: a model in another format.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bitnet_core::budget::human_bytes;
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::convert;
use bitnet_model::source;
use bitnet_model::weights::LoadOptions;

use crate::args::{ConvertArgs, TargetFormat};
use crate::output::Messages;

/// Tokens of the prompt that `--verify` reads.
const PROMPT: usize = 16;

pub fn run(args: ConvertArgs, messages: &Messages) -> Result<()> {
    let started = Instant::now();
    let load = super::load_options(&args.file);
    let path = Path::new(&args.output);
    super::pull::fetch(&args.input, messages)?;
    let checkpoint = source::open(&args.input)?;
    match args.to {
        TargetFormat::Bitnet => convert::to_native(&checkpoint, path, load, |done, all| {
            messages.progress(&format!("{done} of {all} parts"));
        }),
    }
    .inspect_err(|_| messages.progress(""))?;
    messages.progress("");
    drop(checkpoint);
    let bytes = path.metadata().with_context(|| path.display().to_string())?.len();
    let seconds = started.elapsed().as_secs_f64();
    messages.summary(&format!(
        "{}: {} written in {seconds:.1} s",
        path.display(),
        human_bytes(bytes)
    ));
    if args.verify {
        let before = results(&args.input, load)?;
        if results(&args.output, LoadOptions::default())? != before {
            bail!(
                "{} computes other numbers than {}: do not use it, and report this",
                args.output,
                args.input
            );
        }
        messages.summary("verified: the same results to the last bit");
    }
    Ok(())
}

/// The bits of what a model computes for a fixed prompt: the logits after each token, or of a model
/// that makes embeddings the final states.
fn results(model: &str, load: LoadOptions) -> Result<Vec<u32>> {
    let model = Model::open(model, &ModelOptions { load, ..ModelOptions::default() })?;
    let length = PROMPT.min(model.config().context_length);
    let step = (model.vocab_size() / length).max(1);
    let tokens: Vec<u32> = (0..length).map(|i| (i * step % model.vocab_size()) as u32).collect();
    let mut bits = Vec::new();
    let mut keep = |values: &[f32]| bits.extend(values.iter().map(|value| value.to_bits()));
    let mut session = model.session(SessionOptions::default())?;
    match model.config().pooling {
        None => session.feed_showing_all(&tokens, &mut keep)?,
        Some(_) => session.feed_showing_states(&tokens, &mut keep)?,
    }
    Ok(bits)
}
