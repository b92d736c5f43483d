//! `bitnet logits`: the model's scores for the next token.

use std::io::{self, BufWriter, Write};

use anyhow::{Result, bail};
use bitnet_inference::Model;

use crate::args::LogitsArgs;
use crate::output::{self, Messages};

/// Rows of the table after the last token.
const TOP: usize = 10;

pub fn run(args: LogitsArgs, messages: &Messages) -> Result<()> {
    let model = super::load_generator(
        &args.model.name.model,
        &super::model_options(&args.model),
        messages,
    )?;
    if args.json { print_json(&args, &model) } else { print_table(&args, &model) }
}

/// Shows each row of logits that was asked for, with its position, until one fails.
fn for_each_row(
    args: &LogitsArgs,
    model: &Model,
    mut show: impl FnMut(usize, &[f32]) -> Result<()>,
) -> Result<()> {
    let mut session = model.session(super::session_options(args.kv.kv_type))?;
    let mut checked = |position: usize, logits: &[f32]| {
        if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
            let logit = logits[id];
            bail!(
                "the logit of token {id} after position {position} is {logit}: the model's numbers \
                 overflowed, so the file is damaged or not what it says"
            );
        }
        show(position, logits)
    };
    if !args.all {
        let mut logits = Vec::new();
        session.feed(&args.tokens, &mut logits)?;
        return checked(args.tokens.len() - 1, &logits);
    }
    let mut result = Ok(());
    let mut position = 0;
    session.feed_showing_all(&args.tokens, |logits| {
        if result.is_ok() {
            result = checked(position, logits);
        }
        position += 1;
    })?;
    result
}

/// Row by row: all of them together can be larger than the model.
fn print_json(args: &LogitsArgs, model: &Model) -> Result<()> {
    let mut stdout = BufWriter::new(io::stdout().lock());
    let mut before: &[u8] = b"{\"logits\":[";
    for_each_row(args, model, |_, logits| {
        stdout.write_all(before)?;
        before = b",";
        // Shortest digits that read back as the same f32.
        Ok(serde_json::to_writer(&mut stdout, logits).map_err(io::Error::from)?)
    })?;
    stdout.write_all(b"]}\n")?;
    Ok(stdout.flush()?)
}

fn print_table(args: &LogitsArgs, model: &Model) -> Result<()> {
    let text = |id: u32| match model.tokenizer().token_bytes(id) {
        Ok(bytes) => output::quoted(bytes),
        // Some models have more logits than tokens.
        Err(_) => "-".to_owned(),
    };
    if args.all {
        let header = ["position", "token", "best next", "", "logit", "probability"];
        let mut rows = vec![header.map(String::from)];
        for_each_row(args, model, |position, logits| {
            let (id, logit, probability) = most_probable(logits, 1)[0];
            rows.push([
                position.to_string(),
                text(args.tokens[position]),
                id.to_string(),
                text(id),
                format!("{logit:.4}"),
                percent(probability),
            ]);
            Ok(())
        })?;
        output::lines(&output::table(&rows, [true, false, true, false, true, true]))?;
    } else {
        let mut rows = vec![["id", "token", "logit", "probability"].map(String::from)];
        for_each_row(args, model, |_, logits| {
            rows.extend(most_probable(logits, TOP).into_iter().map(|(id, logit, probability)| {
                [id.to_string(), text(id), format!("{logit:.4}"), percent(probability)]
            }));
            Ok(())
        })?;
        output::lines(&output::table(&rows, [true, false, true, true]))?;
    }
    Ok(())
}

/// The `count` tokens with the largest logits, of equal ones the lower ids first, with their
/// probabilities.
fn most_probable(logits: &[f32], count: usize) -> Vec<(u32, f32, f64)> {
    let largest = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let weight = |logit: f32| (f64::from(logit) - f64::from(largest)).exp();
    let sum: f64 = logits.iter().map(|&logit| weight(logit)).sum();
    let mut ids: Vec<u32> = (0..logits.len() as u32).collect();
    ids.sort_by(|&a, &b| logits[b as usize].total_cmp(&logits[a as usize]));
    ids.truncate(count);
    ids.into_iter()
        .map(|id| {
            let logit = logits[id as usize];
            (id, logit, weight(logit) / sum)
        })
        .collect()
}

fn percent(share: f64) -> String {
    format!("{:.2} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_most_probable_tokens_come_first_and_equal_ones_by_id() {
        let best = most_probable(&[0.0, 3.0f32.ln(), 0.0], 2);
        assert_eq!([best[0].0, best[1].0], [1, 0]);
        assert!((best[0].2 - 0.6).abs() < 1e-6 && (best[1].2 - 0.2).abs() < 1e-6);
        assert_eq!(most_probable(&[1.0], 10).len(), 1);
    }
}
