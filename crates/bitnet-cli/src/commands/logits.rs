//! `bitnet logits`: the model's scores for the next token.

use std::io::{self, BufWriter, Write};

use anyhow::{Result, anyhow};
use bitnet_inference::Model;

use crate::args::LogitsArgs;
use crate::output::{self, Messages};

/// Rows of the table that people see.
const TOP: usize = 10;

pub fn run(args: LogitsArgs, messages: &Messages) -> Result<()> {
    let model = super::load_generator(&args.model, messages)?;
    let mut session = model.session(super::session_options(&args.model))?;
    let mut rows = Rows::begin(&args, &model);
    let mut result = Ok(());
    if args.all {
        session.feed_showing_all(&args.tokens, |logits| {
            if result.is_ok() {
                result = rows.push(logits);
            }
        })?;
    } else {
        let mut logits = Vec::new();
        session.feed(&args.tokens, &mut logits)?;
        result = rows.push(&logits);
    }
    result?;
    rows.end()
}

/// The output as it grows: all rows together can be larger than the model.
struct Rows<'a> {
    args: &'a LogitsArgs,
    model: &'a Model,
    position: usize,
    json: BufWriter<io::Stdout>,
    table: Vec<[String; 6]>,
}

impl<'a> Rows<'a> {
    fn begin(args: &'a LogitsArgs, model: &'a Model) -> Self {
        let position = if args.all { 0 } else { args.tokens.len() - 1 };
        Rows { args, model, position, json: BufWriter::new(io::stdout()), table: Vec::new() }
    }

    fn push(&mut self, logits: &[f32]) -> Result<()> {
        if let Some(id) = logits.iter().position(|logit| !logit.is_finite()) {
            return Err(anyhow!(
                "the logit of token {id} at position {} is {}: the model's numbers overflowed",
                self.position,
                logits[id]
            ));
        }
        if self.args.json {
            let open: &[u8] = if self.is_first() { b"{\"logits\":[" } else { b"," };
            self.json.write_all(open)?;
            serde_json::to_writer(&mut self.json, logits).map_err(io::Error::from)?;
        } else if self.args.all {
            let (id, logit, share) = best(logits, 1)[0];
            let token = self.args.tokens[self.position];
            self.table.push([
                self.position.to_string(),
                self.quoted(token),
                id.to_string(),
                self.quoted(id),
                format!("{logit:.4}"),
                percent(share),
            ]);
        } else {
            for (id, logit, share) in best(logits, TOP) {
                let logit = format!("{logit:.4}");
                let row = [id.to_string(), self.quoted(id), logit, percent(share)];
                let [id, token, logit, share] = row;
                self.table.push([String::new(), String::new(), id, token, logit, share]);
            }
        }
        self.position += 1;
        Ok(())
    }
}

impl Rows<'_> {
    fn is_first(&self) -> bool {
        self.position == 0 || !self.args.all
    }

    /// The token's text between quotes; ids without a token have none.
    fn quoted(&self, id: u32) -> String {
        self.model.tokenizer().token_bytes(id).map(output::quoted).unwrap_or_default()
    }

    fn end(mut self) -> Result<()> {
        if self.args.json {
            self.json.write_all(b"]}\n")?;
            self.json.flush()?;
            return Ok(());
        }
        let header = ["position", "token", "next id", "next token", "logit", "share"];
        self.table.insert(0, header.map(str::to_owned));
        if self.args.all {
            let right = [true, false, true, false, true, true];
            output::lines(&output::table(&self.table, right))?;
        } else {
            let rows: Vec<[String; 4]> = self
                .table
                .into_iter()
                .map(|[_, _, id, token, logit, share]| [id, token, logit, share])
                .collect();
            output::lines(&output::table(&rows, [true, false, true, true]))?;
        }
        Ok(())
    }
}

/// The largest logits, each with its id and its probability.
fn best(logits: &[f32], count: usize) -> Vec<(u32, f32, f64)> {
    let largest = f64::from(logits.iter().copied().fold(f32::NEG_INFINITY, f32::max));
    let total: f64 = logits.iter().map(|&logit| (f64::from(logit) - largest).exp()).sum();
    let mut order: Vec<u32> = (0..logits.len() as u32).collect();
    order.sort_by(|&a, &b| {
        logits[b as usize].total_cmp(&logits[a as usize]).then_with(|| a.cmp(&b))
    });
    order.truncate(count);
    order
        .into_iter()
        .map(|id| {
            let logit = logits[id as usize];
            (id, logit, (f64::from(logit) - largest).exp() / total)
        })
        .collect()
}

fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_come_first_and_the_lower_id_of_equals() {
        let rows = best(&[0.0, 2.0, -1.0, 2.0], 3);
        let ids: Vec<u32> = rows.iter().map(|(id, ..)| *id).collect();
        assert_eq!(ids, [1, 3, 0]);
        assert!((rows[0].2 - rows[1].2).abs() < 1e-12 && rows[0].2 < 0.5);
    }
}
