//! Any bytes as a `tokenizer.json`; what it makes of a text must decode again without panic.
#![no_main]

use bitnet_model::tokenizer::{Special, Tokenizer, TokenizerConfig};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Ok(tokenizer) = Tokenizer::from_json(data, &TokenizerConfig::default()) else { return };
    for special in [Special::Recognised, Special::AsText] {
        if let Ok(ids) = tokenizer.encode("Once upon <|eot_id|> a\ttime, 12345 ñandú 🦀\n\n", true, special) {
            tokenizer.decode(&ids, false).expect("its own ids");
        }
    }
});
