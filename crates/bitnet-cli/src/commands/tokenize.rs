//! `bitnet tokenize`: text to token ids.

use std::io::{self, BufRead, Read};
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use bitnet_model::chat::Message;
use bitnet_model::source::{self, Description};
use bitnet_model::tokenizer::{Special, Tokenizer};
use serde::Serialize;
use serde_json::json;

use super::{MAX_TEXT_BYTES, WrongUsage};
use crate::args::TokenizeArgs;
use crate::output::{self, Messages};

/// What `--chat --json` prints.
#[derive(Serialize)]
struct Conversation<'a> {
    text: &'a str,
    ids: &'a [u32],
}

pub fn run(args: TokenizeArgs, messages: &Messages) -> Result<()> {
    if args.text.is_none() && args.chat.is_none() && !args.lines {
        return Err(WrongUsage(
            "there is nothing to tokenize: give a text, --chat MESSAGES.json or --lines".into(),
        )
        .into());
    }
    let description = source::open(&args.model.model)?.description;
    super::show_notes(&description, messages);
    let tokenizer = &description.tokenizer;
    let special = if args.special_as_text { Special::AsText } else { Special::Recognised };
    let encode = |text: &str| tokenizer.encode(text, !args.no_bos, special);
    if let Some(path) = &args.chat {
        let (text, ids) = conversation(path, &description, !args.no_generation_prompt)?;
        if args.json {
            output::json(&Conversation { text: &text, ids: &ids })?;
        } else {
            output::lines(&format!(
                "{}\n\n{}",
                text.trim_end_matches('\n'),
                table(tokenizer, &ids)
            ))?;
        }
    } else if args.lines {
        for_each_line(|text| Ok(output::json(&json!({"ids": encode(text)?}))?))?;
    } else if let Some(text) = &args.text {
        let ids = encode(text)?;
        if args.json {
            output::json(&json!({"ids": ids}))?;
        } else {
            output::lines(&table(tokenizer, &ids))?;
        }
    }
    Ok(())
}

fn conversation(
    path: &Path,
    description: &Description,
    add_generation_prompt: bool,
) -> Result<(String, Vec<u32>)> {
    let template = super::template(description)?;
    let messages: Vec<Message> =
        serde_json::from_str(&super::read_text(path)?).map_err(|error| {
            anyhow!(
                "{}: is not a list of messages with `role` and `content`: {error}",
                path.display()
            )
        })?;
    Ok(template.encode(&description.tokenizer, &messages, add_generation_prompt)?)
}

/// Reads stdin line by line, each a JSON string. Each is answered before the next is read, so that
/// another program can hold a conversation.
fn for_each_line(mut answer: impl FnMut(&str) -> Result<()>) -> Result<()> {
    let mut stdin = io::stdin().lock();
    let mut line = Vec::new();
    for number in 1.. {
        line.clear();
        let mut limited = stdin.by_ref().take(MAX_TEXT_BYTES + 1);
        if let Err(error) = limited.read_until(b'\n', &mut line) {
            bail!("stdin: cannot be read: {error}");
        }
        if line.is_empty() {
            break;
        }
        if line.len() as u64 > MAX_TEXT_BYTES {
            bail!("stdin, line {number}: is longer than {} MiB", MAX_TEXT_BYTES >> 20);
        }
        let text: String = serde_json::from_slice(&line).map_err(|error| {
            anyhow!("stdin, line {number}: is not a JSON string such as \"Hello\": {error}")
        })?;
        answer(&text)?;
    }
    Ok(())
}

fn table(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    let text = |id| tokenizer.token_bytes(id).map(output::quoted).unwrap_or_default();
    let rows: Vec<[String; 2]> = ids.iter().map(|&id| [id.to_string(), text(id)]).collect();
    output::table(&rows, [true, false])
}
