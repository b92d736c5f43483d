//! Any bytes as a SentencePiece `tokenizer.model`.
#![no_main]

use bitnet_model::tokenizer::{Special, Tokenizer, TokenizerConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_sentencepiece(data, &TokenizerConfig::default()) else {
        return;
    };
    if let Ok(ids) = tokenizer.encode("Once upon a  time, 12345 ñandú 🦀\n", true, Special::Recognised) {
        tokenizer.decode(&ids, false).expect("its own ids");
    }
});
