//! Encodes texts with any tokenizer file, one JSON string per line in, one JSON object per line out:
//! `{"ids": [..], "text": ".."}`, where `text` is what the ids decode to.
//!
//! `cargo run -p bitnet-model --example encode -- tokenizer.model < texts.jsonl`

use std::error::Error;
use std::io::{BufRead, Write};
use std::path::Path;

use bitnet_model::formats::gguf;
use bitnet_model::tokenizer::{GgufVocabulary, Special, Tokenizer, TokenizerConfig};

fn main() -> Result<(), Box<dyn Error>> {
    let Some(path) = std::env::args().nth(1) else {
        return Err("usage: encode tokenizer.json|tokenizer.model|model.gguf".into());
    };
    let config = TokenizerConfig::default();
    let tokenizer = match Path::new(&path).extension().and_then(|extension| extension.to_str()) {
        Some("json") => Tokenizer::from_json(&std::fs::read(&path)?, &config)?,
        Some("gguf") => {
            let file = gguf::read(Path::new(&path))?;
            let vocabulary = GgufVocabulary::from_metadata(&file.metadata)?;
            let (tokenizer, notes) = Tokenizer::from_gguf(vocabulary)?;
            notes.iter().for_each(|note| eprintln!("{note}"));
            tokenizer
        }
        _ => Tokenizer::from_sentencepiece(&std::fs::read(&path)?, &config)?,
    };
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let text: String = serde_json::from_str(&line?)?;
        let ids = tokenizer.encode(&text, false, Special::AsText)?;
        let text = tokenizer.decode(&ids, false)?;
        writeln!(output, "{}", serde_json::json!({"ids": ids, "text": text}))?;
    }
    Ok(())
}
