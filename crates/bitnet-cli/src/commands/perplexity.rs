//! `bitnet perplexity`: how well a model foretells texts.

use std::time::Instant;

use anyhow::{Result, bail};
use bitnet_inference::Model;
use bitnet_inference::perplexity::{Perplexity, Windows, perplexity};
use bitnet_model::tokenizer::Special;
use serde::Serialize;

use crate::args::PerplexityArgs;
use crate::output::{self, Messages, number};

/// Longest window unless another is asked for: attention to more costs much and tells little.
const LONGEST_CONTEXT: usize = 2048;

#[derive(Serialize)]
struct Report {
    model: String,
    context: usize,
    stride: usize,
    kv_type: &'static str,
    files: Vec<FileScore>,
    #[serde(flatten)]
    total: Score,
    seconds: f64,
    tokens_per_s: f64,
}

#[derive(Serialize)]
struct FileScore {
    file: String,
    #[serde(flatten)]
    score: Score,
}

#[derive(Serialize)]
struct Score {
    perplexity: f64,
    nll_per_token: f64,
    bits_per_byte: f64,
    tokens: usize,
}

impl Score {
    fn new(sums: &Perplexity) -> Self {
        Score {
            perplexity: sums.perplexity(),
            nll_per_token: sums.nll_per_token(),
            bits_per_byte: sums.bits_per_byte(),
            tokens: sums.tokens,
        }
    }

    fn row(&self, name: &str) -> [String; 5] {
        let Score { perplexity, nll_per_token, bits_per_byte, tokens } = self;
        let name = name.to_owned();
        [
            name,
            format!("{perplexity:.4}"),
            format!("{nll_per_token:.5}"),
            format!("{bits_per_byte:.4}"),
            tokens.to_string(),
        ]
    }
}

pub fn run(args: PerplexityArgs, messages: &Messages) -> Result<()> {
    let names: Vec<String> = args.files.iter().map(|path| path.display().to_string()).collect();
    let texts: Vec<String> =
        args.files.iter().map(|p| super::read_text(p)).collect::<Result<_>>()?;
    let model = super::load_generator(
        &args.model.name.model,
        &super::model_options(&args.model),
        messages,
    )?;
    let windows = windows(&args, &model);
    let options = super::session_options(args.kv.kv_type);
    let tokenizer = model.tokenizer();
    let mut encoded = Vec::new();
    for (name, text) in names.iter().zip(&texts) {
        let ids = tokenizer.encode(text, true, Special::Recognised)?;
        if ids.len() < 2 {
            bail!("{name}: has no token that could be scored: give a longer text");
        }
        encoded.push(ids);
    }

    let started = Instant::now();
    let all: usize = encoded.iter().map(Vec::len).sum();
    let bar = messages.bar(all as u64, "tokens");
    let mut total = Perplexity::default();
    let mut files = Vec::new();
    for (name, ids) in names.into_iter().zip(&encoded) {
        let before = total;
        let sums = perplexity(&model, ids, windows, options, |sums| {
            let mut running = before;
            running += *sums;
            bar.set_position(running.tokens as u64);
            // Text for a bar that nobody sees would cost more than the bar.
            if !bar.is_hidden() && running.tokens % 16 == 0 {
                bar.set_message(format!(", perplexity {}", number(running.perplexity())));
            }
        })?;
        total += sums;
        files.push(FileScore { file: name, score: Score::new(&sums) });
    }
    bar.finish_and_clear();
    let seconds = started.elapsed().as_secs_f64();
    let report = Report {
        model: args.model.name.model,
        context: windows.context,
        stride: windows.stride,
        kv_type: options.kv_type.name(),
        files,
        total: Score::new(&total),
        seconds,
        tokens_per_s: total.tokens as f64 / seconds,
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::lines(&report.table())?;
    }
    messages.summary(&format!(
        "{} tokens in {seconds:.1} s, {} tokens/s; windows of {}, every {}",
        total.tokens,
        number(report.tokens_per_s),
        windows.context,
        windows.stride
    ));
    Ok(())
}

fn windows(args: &PerplexityArgs, model: &Model) -> Windows {
    let longest = model.config().context_length.min(LONGEST_CONTEXT);
    let context = args.context.unwrap_or(longest);
    Windows { context, stride: args.stride.unwrap_or((context / 2).max(1)) }
}

impl Report {
    fn table(&self) -> String {
        let header = ["file", "perplexity", "nll/token", "bits/byte", "tokens"];
        let mut rows = vec![header.map(String::from)];
        rows.extend(self.files.iter().map(|file| file.score.row(&file.file)));
        if self.files.len() > 1 {
            rows.push(self.total.row("together"));
        }
        output::table(&rows, [false, true, true, true, true])
    }
}
