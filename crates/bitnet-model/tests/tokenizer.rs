//! The tokenizer against vectors made by Hugging Face's `tokenizers` and by llama.cpp.

use std::path::PathBuf;

use bitnet_model::tokenizer::{
    Detokenizer, Special, Tokenizer, TokenizerConfig, TokenizerError, token_ids_in_json,
};
use bitnet_testing::golden;
use serde::Deserialize;
use serde_json::{Value, json};

fn parse<T: for<'de> Deserialize<'de>>(path: PathBuf) -> T {
    let bytes = std::fs::read(&path).unwrap();
    serde_json::from_slice(&bytes).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The tokenizer of the random models.
fn golden_tokenizer() -> Option<Tokenizer> {
    let bytes = std::fs::read(golden("tokenizer/tokenizer.json")?).unwrap();
    let config = std::fs::read(golden("bitnet-bf16/tokenizer_config.json")?).unwrap();
    let config = TokenizerConfig::from_json(Some(&config), None).unwrap();
    Some(Tokenizer::from_json(&bytes, &config).unwrap())
}

#[derive(Deserialize)]
struct Vectors<T> {
    vectors: Vec<T>,
}

#[derive(Deserialize)]
struct Encoded {
    text: String,
    ids: Vec<u32>,
    ids_with_bos: Vec<u32>,
    ids_special_as_text: Option<Vec<u32>>,
    decode: String,
    decode_skip_special: String,
}

fn encode_vectors() -> Option<Vec<Encoded>> {
    let Vectors { vectors } = parse(golden("tokenizer/encode.json")?);
    assert_eq!(vectors.len(), 196);
    Some(vectors)
}

/// Checks a tokenizer against all 196 texts.
fn assert_encodes_all(tokenizer: &Tokenizer, vectors: &[Encoded]) {
    for vector in vectors {
        let text = vector.text.as_str();
        let ids = tokenizer.encode(text, false, Special::Recognised).unwrap();
        assert_eq!(ids, vector.ids, "{text:?}");
        let ids = tokenizer.encode(text, true, Special::Recognised).unwrap();
        assert_eq!(ids, vector.ids_with_bos, "{text:?} with the begin token");
        let as_text = vector.ids_special_as_text.as_ref().unwrap_or(&vector.ids);
        let ids = tokenizer.encode(text, false, Special::AsText).unwrap();
        assert_eq!(&ids, as_text, "{text:?} with special tokens as text");
    }
}

#[test]
fn every_golden_text_gets_its_ids_with_and_without_special_tokens() {
    let (Some(tokenizer), Some(vectors)) = (golden_tokenizer(), encode_vectors()) else { return };
    assert_encodes_all(&tokenizer, &vectors);
    assert!(vectors.iter().filter(|vector| vector.ids_special_as_text.is_some()).count() >= 13);
}

#[test]
fn every_golden_text_comes_back_from_its_ids() {
    let (Some(tokenizer), Some(vectors)) = (golden_tokenizer(), encode_vectors()) else { return };
    for vector in &vectors {
        assert_eq!(tokenizer.decode(&vector.ids, false).unwrap(), vector.decode);
        assert_eq!(tokenizer.decode(&vector.ids, true).unwrap(), vector.decode_skip_special);
    }
}

#[derive(Deserialize)]
struct Decoded {
    name: String,
    ids: Vec<u32>,
    skip_special_tokens: bool,
    bytes_hex: String,
    decode: String,
    utf8_lossy: String,
}

fn decode_vectors() -> Option<Vec<Decoded>> {
    let Vectors { vectors } = parse(golden("tokenizer/decode.json")?);
    assert_eq!(vectors.len(), 76);
    Some(vectors)
}

#[test]
fn cut_and_invalid_characters_decode_as_the_golden_bytes_say() {
    let (Some(tokenizer), Some(vectors)) = (golden_tokenizer(), decode_vectors()) else { return };
    for vector in &vectors {
        let skip = vector.skip_special_tokens;
        let text = tokenizer.decode(&vector.ids, skip).unwrap();
        assert_eq!(text, vector.decode, "{}", vector.name);
        assert_eq!(text, vector.utf8_lossy, "{}", vector.name);

        let shown = vector.ids.iter().filter(|id| !(skip && tokenizer.is_special(**id)));
        let bytes: String = shown
            .flat_map(|id| tokenizer.token_bytes(*id).unwrap())
            .map(|byte| format!("{byte:02x}"))
            .collect();
        assert_eq!(bytes, vector.bytes_hex, "{}", vector.name);
    }
}

#[test]
fn streamed_chunks_never_hold_half_a_character_and_join_to_the_whole_text() {
    let (Some(tokenizer), Some(vectors)) = (golden_tokenizer(), decode_vectors()) else { return };
    for vector in &vectors {
        let skip = vector.skip_special_tokens;
        let mut detokenizer = Detokenizer::from_start(&tokenizer, skip);
        let mut streamed = String::new();
        let mut bytes = Vec::new();
        for &id in &vector.ids {
            streamed.push_str(detokenizer.push(&tokenizer, id).unwrap());
            if !(skip && tokenizer.is_special(id)) {
                bytes.extend_from_slice(tokenizer.token_bytes(id).unwrap());
            }
            // Everything certain is out: at most one unfinished character is held back.
            let certain = String::from_utf8_lossy(&bytes);
            let held_back = certain.strip_prefix(streamed.as_str());
            assert!(
                matches!(held_back, Some("" | "\u{fffd}")),
                "{}: {streamed:?} of {certain:?}",
                vector.name
            );
        }
        streamed.push_str(detokenizer.finish());
        assert_eq!(streamed, vector.utf8_lossy, "{}", vector.name);
        assert_eq!(detokenizer.finish(), "", "{}: finish a second time", vector.name);
    }
}

#[test]
fn an_emoji_in_four_tokens_appears_with_the_fourth() {
    let Some(tokenizer) = golden_tokenizer() else { return };
    let mut detokenizer = Detokenizer::from_start(&tokenizer, true);
    let chunks: Vec<String> = [64, 172, 253, 246, 222, 65]
        .map(|id| detokenizer.push(&tokenizer, id).unwrap().to_owned())
        .to_vec();
    assert_eq!(chunks, ["a", "", "", "", "😀", "b"]);
}

#[test]
fn the_long_golden_text_gets_its_ids() {
    #[derive(Deserialize)]
    struct Long {
        text: String,
        ids: Vec<u32>,
    }
    let Some(tokenizer) = golden_tokenizer() else { return };
    let Some(path) = golden("tokenizer/long.json") else { return };
    let Long { text, ids } = parse(path);
    assert_eq!(tokenizer.encode(&text, false, Special::Recognised).unwrap(), ids);
    assert_eq!(tokenizer.decode(&ids, false).unwrap(), text);
}

#[test]
fn begin_and_end_tokens_come_from_the_configuration() {
    let Some(tokenizer) = golden_tokenizer() else { return };
    assert_eq!(tokenizer.bos(), Some(1012));
    assert_eq!(tokenizer.eos(), Some(1021));
    assert!(tokenizer.adds_bos());
    assert_eq!(tokenizer.vocab_size(), 1024);
    assert_eq!(tokenizer.id_of("<|eot_id|>"), Some(1021));
    assert_eq!(tokenizer.id_of("Ġ"), Some(220));
    assert_eq!(tokenizer.id_of("no such token"), None);
    assert!(tokenizer.is_special(1013) && !tokenizer.is_special(220));
    assert!(!tokenizer.is_special(u32::MAX));
}

#[test]
fn end_ids_unite_the_files_and_the_known_end_tokens() {
    let Some(tokenizer) = golden_tokenizer() else { return };
    // 1013 <|end_of_text|>, 1020 <|eom_id|>, 1021 <|eot_id|>.
    assert_eq!(tokenizer.end_ids(&[]), [1013, 1020, 1021]);
    assert_eq!(tokenizer.end_ids(&[1021, 7, 1013, 7]), [7, 1013, 1020, 1021]);
}

#[test]
fn eos_entries_are_a_number_a_list_or_nothing() {
    let read = |entry: Value| token_ids_in_json(Some(&entry));
    assert_eq!(read(json!(3)).unwrap(), [3]);
    assert_eq!(read(json!([3, 5])).unwrap(), [3, 5]);
    assert!(read(json!(null)).unwrap().is_empty());
    assert!(token_ids_in_json(None).unwrap().is_empty());
    for broken in [json!(-1), json!("3"), json!([1, 2.5]), json!(1u64 << 32)] {
        assert!(read(broken).is_err());
    }
}

#[test]
fn an_unknown_id_is_an_error_that_names_it() {
    let Some(tokenizer) = golden_tokenizer() else { return };
    let error = tokenizer.decode(&[64, 1024], true).unwrap_err();
    assert_eq!(error, TokenizerError::UnknownId { id: 1024, vocab_size: 1024 });
    assert_eq!(error.to_string(), "token id 1024 is not in the vocabulary of 1024 tokens");
    assert!(tokenizer.decode(&[u32::MAX], true).is_err());
}

/// A byte-level vocabulary of three letters, with `change` applied to the file.
fn tiny_json(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TokenizerError> {
    let mut file = json!({
        "version": "1.0",
        "added_tokens": [{"id": 5, "content": "<s>", "special": true, "normalized": false}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    });
    change(&mut file);
    let bytes = serde_json::to_vec(&file).unwrap();
    Tokenizer::from_json(&bytes, &TokenizerConfig::default())
}

#[test]
fn added_tokens_keep_the_ids_of_the_file_even_after_a_gap() {
    let tokenizer = tiny_json(|_| {}).unwrap();
    assert_eq!(tokenizer.encode("ab<s>b", false, Special::Recognised).unwrap(), [2, 5, 1]);
    assert_eq!(tokenizer.vocab_size(), 6);
    assert_eq!(
        tokenizer.decode(&[2, 4], false),
        Err(TokenizerError::UnknownId { id: 4, vocab_size: 6 })
    );
}

/// How to break the file, and words that the error must contain.
type Breakage = (fn(&mut Value), &'static str);

#[test]
fn a_broken_file_is_refused_with_a_sentence_about_the_broken_entry() {
    let cases: [Breakage; 16] = [
        (|file| *file = json!([]), "not a tokenizer.json"),
        (|file| file["model"]["type"] = json!("WordPiece"), "only BPE is read"),
        (|file| file["model"]["vocab"] = json!({"a": -1}), "`vocab` is broken"),
        (|file| file["model"]["vocab"] = json!(["a"]), "`vocab` is broken"),
        (|file| file["model"]["vocab"]["c"] = json!(1), "two tokens of the vocabulary have id 1"),
        (|file| file["model"]["vocab"]["c"] = json!(1u32 << 30), "beyond the limit"),
        (|file| file["model"]["merges"] = json!([["a", "zz"]]), "needs the token `zz`"),
        (|file| file["model"]["merges"] = json!([["ab", "ab"]]), "needs the token `abab`"),
        (|file| file["model"]["merges"] = json!(["a b c"]), "not two tokens"),
        (|file| file["model"]["dropout"] = json!(0.5), "`dropout`"),
        (|file| file["added_tokens"][0]["id"] = json!(-3), "is broken"),
        (|file| file["added_tokens"][0]["content"] = json!("a"), "and 0 in the vocabulary"),
        (|file| file["normalizer"] = json!({"type": "Precompiled"}), "normalizer is Precompiled"),
        (|file| file["pre_tokenizer"] = json!({"type": "Split"}), "pre_tokenizer is broken"),
        (|file| file["post_processor"] = json!({"type": "BertProcessing"}), "BertProcessing"),
        (|file| file["decoder"] = json!(null), "decoder is absent"),
    ];
    for (breakage, expected) in cases {
        match tiny_json(breakage) {
            Ok(_) => panic!("accepted where `{expected}` was expected"),
            Err(error) => assert!(error.to_string().contains(expected), "{expected}: {error}"),
        }
    }
    for bytes in [&b""[..], b"{", b"\xff\xfe", b"null"] {
        assert!(Tokenizer::from_json(bytes, &TokenizerConfig::default()).is_err());
    }
}

#[test]
fn the_configuration_says_whether_the_begin_token_is_added() {
    let Some(path) = golden("tokenizer/tokenizer.json") else { return };
    let bytes = std::fs::read(path).unwrap();
    let ids = |config: Value| {
        let config = serde_json::to_vec(&config).unwrap();
        let config = TokenizerConfig::from_json(Some(&config), None).unwrap();
        let tokenizer = Tokenizer::from_json(&bytes, &config).unwrap();
        tokenizer.encode("a", true, Special::Recognised).unwrap()
    };
    assert_eq!(ids(json!({})), [1012, 64], "as the post-processor says");
    let bos = "<|begin_of_text|>";
    assert_eq!(ids(json!({"bos_token": bos, "add_bos_token": true})), [1012, 64]);
    assert_eq!(ids(json!({"bos_token": {"content": bos}, "add_bos_token": false})), [64]);
    let eos = json!({"eos_token": "<|eot_id|>", "add_eos_token": true});
    assert_eq!(ids(eos), [1012, 64, 1021]);
}

#[test]
fn the_special_tokens_map_completes_the_configuration() {
    let config = br#"{"eos_token": "</s>"}"#;
    let map = br#"{"eos_token": "other", "bos_token": {"content": "<s>"}}"#;
    let config = TokenizerConfig::from_json(Some(config), Some(map)).unwrap();
    assert_eq!(config.eos_token.as_deref(), Some("</s>"));
    assert_eq!(config.bos_token.as_deref(), Some("<s>"));
    let error = TokenizerConfig::from_json(Some(br#"{"bos_token": 3}"#), None).unwrap_err();
    assert!(error.to_string().contains("`bos_token`"), "{error}");
}
