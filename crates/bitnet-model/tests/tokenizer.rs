//! The tokenizer against vectors made by Hugging Face's `tokenizers` and by llama.cpp.

use std::collections::HashMap;
use std::path::PathBuf;

use bitnet_model::formats::gguf;
use bitnet_model::tokenizer::{
    Detokenizer, GgufVocabulary, Special, Tokenizer, TokenizerConfig, TokenizerError,
    token_ids_in_json,
};
use bitnet_testing::golden::TRAINED_GGUF;
use bitnet_testing::{golden, shared_data};
use proptest::prelude::*;
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

/// A `tokenizer.json` with three tokens and a special one.
fn tiny_file() -> Value {
    json!({
        "version": "1.0",
        "added_tokens": [{"id": 5, "content": "<s>", "special": true, "normalized": false}],
        "normalizer": null,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true,
            "use_regex": true},
        "post_processor": null,
        "decoder": {"type": "ByteLevel"},
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": [["a", "b"]]}
    })
}

fn tiny_json(change: impl FnOnce(&mut Value)) -> Result<Tokenizer, TokenizerError> {
    let mut file = tiny_file();
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

/// The vocabulary of a golden GGUF file.
fn gguf_vocabulary(path: Option<PathBuf>) -> Option<GgufVocabulary> {
    let file = gguf::read(&path?).unwrap();
    Some(GgufVocabulary::from_metadata(&file.metadata).unwrap())
}

#[test]
fn the_vocabulary_in_a_gguf_encodes_as_its_tokenizer_json_does() {
    let Some(vocabulary) = gguf_vocabulary(golden("gguf/bitnet-packed-TQ2_0.gguf")) else { return };
    let Some(vectors) = encode_vectors() else { return };
    let (tokenizer, notes) = Tokenizer::from_gguf(vocabulary).unwrap();
    assert!(notes.is_empty());
    assert_encodes_all(&tokenizer, &vectors);
    assert_eq!((tokenizer.bos(), tokenizer.eos()), (Some(1012), Some(1013)));
    assert_eq!(tokenizer.end_ids(&[]), [1013, 1020, 1021]);
}

#[test]
fn the_trained_models_ggufs_encode_as_its_tokenizer_json_does() {
    let Some(path) = golden("tiny-trained/tokenizer.json") else { return };
    let config = TokenizerConfig::default();
    let expected = Tokenizer::from_json(&std::fs::read(path).unwrap(), &config).unwrap();
    let Some(vectors) = encode_vectors() else { return };
    for name in TRAINED_GGUF {
        let Some(vocabulary) = gguf_vocabulary(shared_data(name)) else { return };
        let (tokenizer, _) = Tokenizer::from_gguf(vocabulary).unwrap();
        assert_eq!(tokenizer.vocab_size(), 2048);
        for Encoded { text, .. } in &vectors {
            for special in [Special::Recognised, Special::AsText] {
                assert_eq!(
                    tokenizer.encode(text, true, special).unwrap(),
                    expected.encode(text, true, special).unwrap(),
                    "{name}: {text:?}"
                );
            }
        }
        for id in 0..2048 {
            assert_eq!(tokenizer.token_bytes(id), expected.token_bytes(id));
            assert_eq!(tokenizer.is_special(id), expected.is_special(id));
        }
    }
}

/// A byte-level vocabulary with all bytes and the merge of `1` and `2`, filled up to `size`.
fn byte_level_vocabulary(pre: Option<&str>, size: usize) -> GgufVocabulary {
    let mut tokens: Vec<String> = ('!'..='~').map(String::from).collect();
    tokens.extend(["Ġ", "Ċ", "Ì", "ģ", "Ã", "©", "12", "123", "Ġa"].map(String::from));
    tokens.extend((tokens.len()..size).map(|index| format!("<unused {index}>")));
    GgufVocabulary {
        model: "gpt2".into(),
        pre: pre.map(str::to_owned),
        tokens,
        merges: ["1 2", "Ġ a"].map(String::from).to_vec(),
        ..GgufVocabulary::default()
    }
}

#[test]
fn each_pre_tokeniser_splits_numbers_and_accents_in_its_own_way() {
    let pieces = |pre: &str, text: &str| -> Vec<String> {
        let (tokenizer, _) = Tokenizer::from_gguf(byte_level_vocabulary(Some(pre), 103)).unwrap();
        let ids = tokenizer.encode(text, false, Special::Recognised).unwrap();
        ids.iter()
            .map(|id| String::from_utf8_lossy(tokenizer.token_bytes(*id).unwrap()).into_owned())
            .collect()
    };
    for llama_3 in ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-e"] {
        assert_eq!(pieces(llama_3, "123412 a"), ["123", "4", "12", " a"], "{llama_3}");
    }
    // Without ignore_merges no merge makes `123`.
    assert_eq!(pieces("smaug-bpe", "123412"), ["12", "3", "4", "12"]);
    assert_eq!(pieces("qwen2", "12 a"), ["1", "2", " a"]);
    assert_eq!(pieces("gpt-2", "123412"), ["12", "3", "4", "12"]);
    // Qwen composes e and U+0301 to é.
    assert_eq!(pieces("qwen2", "e\u{301}").len(), 2);
    assert_eq!(pieces("gpt-2", "e\u{301}"), ["e", "\u{fffd}", "\u{fffd}"]);
}

#[test]
fn a_missing_pre_tokeniser_is_llama_3s_if_the_vocabulary_has_its_size_and_says_so() {
    let (tokenizer, notes) = Tokenizer::from_gguf(byte_level_vocabulary(None, 128_256)).unwrap();
    assert_eq!(notes.len(), 1);
    assert!(notes[0].contains("tokenizer.ggml.pre"), "{notes:?}");
    let ids = tokenizer.encode("1234", false, Special::Recognised).unwrap();
    assert_eq!(ids, [tokenizer.id_of("123").unwrap(), tokenizer.id_of("4").unwrap()]);
    let Err(error) = Tokenizer::from_gguf(byte_level_vocabulary(None, 103)) else { panic!() };
    assert!(error.to_string().contains("does not name its pre-tokeniser"), "{error}");
}

/// How to break a vocabulary, and words that the error must contain.
type VocabularyBreakage = (fn(&mut GgufVocabulary), &'static str);

#[test]
fn a_broken_gguf_vocabulary_is_refused_with_a_sentence_about_the_broken_entry() {
    let cases: [VocabularyBreakage; 9] = [
        (|v| v.model = "bert".into(), "`bert`"),
        (|v| v.pre = Some("tekken".into()), "`tekken`"),
        (|v| v.token_types = vec![1], "token_type has 1 entries for 103 tokens"),
        (|v| v.token_types = vec![7; 103], "unknown type 7"),
        (|v| v.merges[0] = "1 \u{1F999}".into(), "needs the token"),
        (|v| v.merges[0] = "12".into(), "not two tokens"),
        (|v| v.tokens[1] = "!".into(), "twice"),
        (|v| v.bos = Some(103), "token id 103 is not in the vocabulary"),
        (|v| v.model = "llama".into(), "scores has 0 entries for 103 tokens"),
    ];
    for (breakage, expected) in cases {
        let mut vocabulary = byte_level_vocabulary(Some("llama-bpe"), 103);
        breakage(&mut vocabulary);
        match Tokenizer::from_gguf(vocabulary) {
            Ok(_) => panic!("accepted where `{expected}` was expected"),
            Err(error) => assert!(error.to_string().contains(expected), "{expected}: {error}"),
        }
    }
}

/// Tokens with their scores and types, as a `llama` vocabulary.
fn llama_vocabulary(pieces: &[(&str, f32, i64)]) -> GgufVocabulary {
    let mut vocabulary = GgufVocabulary { model: "llama".into(), ..GgufVocabulary::default() };
    for &(token, score, token_type) in pieces {
        vocabulary.tokens.push(token.to_owned());
        vocabulary.scores.push(score);
        vocabulary.token_types.push(token_type);
    }
    vocabulary.bos = Some(1);
    vocabulary.eos = Some(2);
    vocabulary
}

#[test]
fn a_llama_vocabulary_merges_by_score_and_falls_back_to_bytes() {
    let mut pieces = vec![("<unk>", 0.0, 2), ("<s>", 0.0, 3), ("</s>", 0.0, 3)];
    let bytes: Vec<String> = (0..=255).map(|byte| format!("<0x{byte:02X}>")).collect();
    pieces.extend(bytes.iter().map(|name| (name.as_str(), 0.0, 6)));
    // "ab" before "bc" before "▁a"; then "abc" of either split.
    pieces.extend([("ab", -1.0, 1), ("bc", -2.0, 1), ("abc", -3.0, 1), ("▁a", -4.0, 1)]);
    pieces.extend([("▁", -5.0, 1), ("a", -6.0, 1), ("b", -7.0, 1), ("c", -8.0, 1)]);
    let (tokenizer, _) = Tokenizer::from_gguf(llama_vocabulary(&pieces)).unwrap();
    let names = |text: &str, special: Special| -> Vec<&str> {
        let ids = tokenizer.encode(text, true, special).unwrap();
        ids.iter().map(|id| pieces[*id as usize].0).collect()
    };
    let recognised = |text| names(text, Special::Recognised);
    assert_eq!(recognised("abc"), ["<s>", "▁", "abc"]);
    assert_eq!(recognised("a bcé"), ["<s>", "▁a", "▁", "bc", "<0xC3>", "<0xA9>"]);
    assert_eq!(recognised("a</s>a"), ["<s>", "▁a", "</s>", "▁a"]);
    assert_eq!(recognised(""), ["<s>"]);
    assert_eq!(names("</s>", Special::AsText).len(), 1 + 1 + 4);
    // Names of bytes in a text are text.
    assert_eq!(recognised("<0x41>").len(), 1 + 1 + 6);
    for text in ["abc", " a  bcé\n", "</s>", "<0x41>", "🦙"] {
        let ids = tokenizer.encode(text, true, Special::AsText).unwrap();
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
    // What continues a text keeps its space.
    let mut within = Detokenizer::within(true);
    assert_eq!(within.push(&tokenizer, tokenizer.id_of("▁a").unwrap()).unwrap(), " a");
}

/// A tokenizer on the Llama-3 ranks: base64 of a token's bytes, a space, its rank. A pair of tokens
/// merges if its bytes are a token, the lower rank first.
fn llama_3_tokenizer() -> Option<Tokenizer> {
    let ranks = std::fs::read_to_string(shared_data("llama-bpe/tokenizer.model")?).unwrap();
    let spelled = spelled_bytes();
    let tokens: Vec<String> = ranks
        .lines()
        .enumerate()
        .map(|(rank, line)| {
            let (token, number) = line.split_once(' ').unwrap();
            assert_eq!(number.parse(), Ok(rank));
            base64(token).iter().map(|byte| spelled[*byte as usize]).collect()
        })
        .collect();
    let rank_of: HashMap<&str, usize> =
        tokens.iter().enumerate().map(|(rank, token)| (token.as_str(), rank)).collect();
    let merges = tokens.iter().flat_map(|token| {
        let splits = token.char_indices().skip(1).map(|(at, _)| token.split_at(at));
        let known = splits.filter(|(a, b)| rank_of.contains_key(a) && rank_of.contains_key(b));
        known.map(|(a, b)| format!("{a} {b}")).collect::<Vec<_>>()
    });
    let vocabulary = GgufVocabulary {
        model: "gpt2".into(),
        pre: Some("llama-bpe".into()),
        merges: merges.collect(),
        tokens,
        ..GgufVocabulary::default()
    };
    Some(Tokenizer::from_gguf(vocabulary).unwrap().0)
}

/// Bytes to the characters of byte-level vocabularies, by the rule that GPT-2 published.
fn spelled_bytes() -> Vec<char> {
    let printable = |byte: &u8| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut rest = ('\u{100}'..).take(68);
    (0..=255u8)
        .map(|byte| if printable(&byte) { char::from(byte) } else { rest.next().unwrap() })
        .collect()
}

fn base64(text: &str) -> Vec<u8> {
    let digit = |byte: u8| match byte {
        b'A'..=b'Z' => byte - b'A',
        b'a'..=b'z' => byte - b'a' + 26,
        b'0'..=b'9' => byte - b'0' + 52,
        b'+' => 62,
        _ => 63,
    };
    let digits: Vec<u8> = text.trim_end_matches('=').bytes().map(digit).collect();
    let bits = digits.iter().flat_map(|digit| (0..6).rev().map(move |bit| digit >> bit & 1));
    let bits: Vec<u8> = bits.collect();
    bits.chunks_exact(8).map(|byte| byte.iter().fold(0, |value, bit| value << 1 | bit)).collect()
}

#[test]
fn the_llama_3_vocabulary_encodes_as_llama_cpp_and_hugging_face_do() {
    let Some(tokenizer) = llama_3_tokenizer() else { return };
    let encode = |text: &str| tokenizer.encode(text, false, Special::AsText).unwrap();

    let Some(inputs) = golden("llama-bpe/ggml-vocab-llama-bpe.gguf.inp") else { return };
    let Some(outputs) = golden("llama-bpe/ggml-vocab-llama-bpe.gguf.out") else { return };
    let inputs = std::fs::read_to_string(inputs).unwrap();
    let outputs = std::fs::read_to_string(outputs).unwrap();
    let texts: Vec<&str> = inputs.split("\n__ggml_vocab_test__\n").collect();
    let outputs: Vec<&str> = outputs.split('\n').collect();
    assert_eq!((texts.len(), outputs.len()), (47, 47));
    for (text, ids) in texts.iter().zip(outputs) {
        let ids: Vec<u32> = ids.split_whitespace().map(|id| id.parse().unwrap()).collect();
        assert_eq!(encode(text), ids, "{text:?}");
    }

    #[derive(Deserialize)]
    struct Pair {
        text: String,
        ids: Vec<u32>,
    }
    let Some(path) = golden("llama-bpe/encode.json") else { return };
    let Vectors { vectors } = parse::<Vectors<Pair>>(path);
    assert!(vectors.len() >= 190);
    for Pair { text, ids } in vectors {
        assert_eq!(encode(&text), ids, "{text:?}");
        assert_eq!(tokenizer.decode(&ids, true).unwrap(), text);
    }
}

#[test]
fn a_megabyte_of_one_word_is_encoded_and_comes_back() {
    let Some(tokenizer) = golden_tokenizer() else { return };
    let length = 1 << 20;
    for text in ["a".repeat(length), "12".repeat(length / 2), "😀".repeat(length / 4)] {
        let ids = tokenizer.encode(&text, false, Special::Recognised).unwrap();
        assert!(tokenizer.decode(&ids, false).unwrap() == text, "of {:?}", &text[..4]);
    }
}

#[test]
fn half_a_megabyte_of_spaces_is_split_as_a_few_are_and_more_is_refused() {
    let Some(tokenizer) = golden_tokenizer() else { return };
    let end = |spaces: usize| {
        let text = " ".repeat(spaces) + "x ternary";
        let ids = tokenizer.encode(&text, false, Special::Recognised)?;
        Ok::<_, TokenizerError>(ids[ids.len() - 2..].to_vec())
    };
    // ` ternary` is one token only if the word is cut off.
    let ternary = tokenizer.id_of("Ġternary").unwrap();
    assert_eq!(end(3).unwrap()[1], ternary);
    assert_eq!(end(1 << 19).unwrap(), end(3).unwrap());
    let error = end((1 << 19) + 1).unwrap_err();
    assert!(error.to_string().contains("524288 white-space characters"), "{error}");
}

proptest! {
    #[test]
    fn no_change_of_bytes_makes_a_tokenizer_json_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        text in "[ab<>s/ \u{e9}]{0,20}",
    ) {
        let mut bytes = serde_json::to_vec(&tiny_file()).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_json(&bytes, &TokenizerConfig::default())
            && let Ok(ids) = tokenizer.encode(&text, true, Special::Recognised)
        {
            tokenizer.decode(&ids, false).unwrap();
        }
    }
}
