//! `bitnet tokenize`: text, or a conversation, to token ids.

use std::io::{self, BufRead};
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use bitnet_model::chat::Message;
use bitnet_model::source::{self, Description};
use bitnet_model::tokenizer::{Special, Tokenizer};
use serde::Deserialize;
use serde_json::json;

use super::WrongUsage;
use crate::args::TokenizeArgs;
use crate::output::{self, Messages};

pub fn run(args: TokenizeArgs, messages: &Messages) -> Result<()> {
    let description = source::open(&args.model.model)?.description;
    super::show_notes(&description, messages);
    if let Some(path) = &args.chat {
        return chat(&args, path, &description);
    }
    let special = if args.special_as_text { Special::AsText } else { Special::Recognised };
    if args.lines {
        return lines(&args, special, &description.tokenizer);
    }
    let Some(text) = &args.text else {
        return Err(WrongUsage(
            "there is nothing to tokenize: give a text, --lines or --chat FILE".to_owned(),
        )
        .into());
    };
    let ids = description.tokenizer.encode(text, !args.no_bos, special)?;
    show(&ids, args.json, &description.tokenizer)
}

/// Ids as JSON, or one per line with the token's text.
fn show(ids: &[u32], as_json: bool, tokenizer: &Tokenizer) -> Result<()> {
    if as_json {
        output::json(&json!({ "ids": ids }))?;
        return Ok(());
    }
    let mut rows = Vec::with_capacity(ids.len());
    for &id in ids {
        rows.push([id.to_string(), output::quoted(tokenizer.token_bytes(id)?)]);
    }
    output::lines(&output::table(&rows, [true, false]))?;
    Ok(())
}

/// One JSON string per line in, one JSON result per line out, each as soon as its line is there.
fn lines(args: &TokenizeArgs, special: Special, tokenizer: &Tokenizer) -> Result<()> {
    for (number, line) in io::stdin().lock().lines().enumerate() {
        let place = format!("stdin, line {}", number + 1);
        let line = line.map_err(|error| anyhow!("{place}: cannot be read: {error}"))?;
        let text: String = match serde_json::from_str(&line) {
            Ok(text) => text,
            Err(error) => bail!("{place}: is not one JSON string: {error}"),
        };
        let ids = tokenizer.encode(&text, !args.no_bos, special)?;
        output::json(&json!({ "ids": ids }))?;
    }
    Ok(())
}

#[derive(Deserialize)]
struct StoredMessage {
    role: String,
    content: String,
}

fn chat(args: &TokenizeArgs, path: &Path, description: &Description) -> Result<()> {
    let text = super::read_text(path)?;
    let stored: Vec<StoredMessage> = match serde_json::from_str(&text) {
        Ok(stored) => stored,
        Err(error) => bail!(
            "{}: is not a list of messages with `role` and `content`: {error}",
            path.display()
        ),
    };
    let conversation: Vec<Message> =
        stored.into_iter().map(|message| Message::new(message.role, message.content)).collect();
    let template = super::template(description)?;
    let (text, ids) =
        template.encode(&description.tokenizer, &conversation, !args.no_generation_prompt)?;
    if args.json {
        output::json(&json!({ "text": text, "ids": ids }))?;
        return Ok(());
    }
    show(&ids, false, &description.tokenizer)
}
