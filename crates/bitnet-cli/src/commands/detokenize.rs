//! `bitnet detokenize`: token ids to text.

use anyhow::Result;
use bitnet_model::source;
use serde_json::json;

use crate::args::DetokenizeArgs;
use crate::output::{self, Messages};

pub fn run(args: DetokenizeArgs, messages: &Messages) -> Result<()> {
    let description = source::open(&args.model.model)?.description;
    super::show_notes(&description, messages);
    let text = description.tokenizer.decode(&args.tokens, args.skip_special)?;
    if args.json {
        output::json(&json!({"text": text}))?;
    } else {
        output::piece(&text)?;
        output::end_of_text()?;
    }
    Ok(())
}
