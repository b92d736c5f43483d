//! `bitnet embed`: a text as one vector.

use anyhow::Result;
use bitnet_model::tokenizer::Special;
use serde_json::json;

use crate::args::EmbedArgs;
use crate::output::{self, Messages};

pub fn run(args: EmbedArgs, messages: &Messages) -> Result<()> {
    let model = super::load(&args.model, messages)?;
    let tokens = model.tokenizer().encode(&args.text, true, Special::Recognised)?;
    let embedding = model.embed(&tokens, super::session_options(args.kv.kv_type))?;
    if args.json {
        output::json(&json!({"embedding": embedding}))?;
    } else {
        let numbers: Vec<String> = embedding.iter().map(f32::to_string).collect();
        output::lines(&format!("{}\n", numbers.join(" ")))?;
    }
    Ok(())
}
