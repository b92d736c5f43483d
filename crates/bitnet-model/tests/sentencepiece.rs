//! SentencePiece models, written byte by byte. `scripts/check_sentencepiece.py` compares trained
//! ones with Google's program.

use bitnet_model::tokenizer::{Special, Tokenizer, TokenizerConfig, TokenizerError};
use proptest::prelude::*;
use serde_json::{Value, json};

const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

const UNIGRAM: u64 = 1;
const BPE: u64 = 2;

fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn number(field: u64, value: u64, out: &mut Vec<u8>) {
    varint(field << 3, out);
    varint(value, out);
}

fn bytes(field: u64, value: &[u8], out: &mut Vec<u8>) {
    varint(field << 3 | 2, out);
    varint(value.len() as u64, out);
    out.extend_from_slice(value);
}

/// A model with `<unk>`, `<s>`, `</s>` and then `pieces`: text, score, type (0: normal).
struct Model {
    pieces: Vec<(String, f32, u64)>,
    trainer: Vec<(u64, u64)>,
    normalizer: Vec<(u64, u64)>,
    charsmap: Vec<u8>,
}

impl Model {
    fn new(algorithm: u64, pieces: &[(&str, f32, u64)]) -> Self {
        let special = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)];
        let all = special.iter().chain(pieces);
        Model {
            pieces: all.map(|(text, score, kind)| (text.to_string(), *score, *kind)).collect(),
            trainer: vec![(3, algorithm)],
            // No collapsing of spaces, as in Llama's.
            normalizer: vec![(4, 0)],
            charsmap: Vec::new(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        let mut model = Vec::new();
        for (text, score, kind) in &self.pieces {
            let mut piece = Vec::new();
            bytes(1, text.as_bytes(), &mut piece);
            varint(2 << 3 | 5, &mut piece);
            piece.extend(score.to_le_bytes());
            if *kind != 0 {
                number(3, *kind, &mut piece);
            }
            bytes(1, &piece, &mut model);
        }
        let mut trainer = Vec::new();
        self.trainer.iter().for_each(|(field, value)| number(*field, *value, &mut trainer));
        bytes(2, &trainer, &mut model);
        let mut normalizer = Vec::new();
        bytes(2, &self.charsmap, &mut normalizer);
        self.normalizer.iter().for_each(|(field, value)| number(*field, *value, &mut normalizer));
        bytes(3, &normalizer, &mut model);
        model
    }

    fn tokenizer(&self, config: Value) -> Result<Tokenizer, TokenizerError> {
        let config = serde_json::to_vec(&config).unwrap();
        let config = TokenizerConfig::from_json(Some(&config), None).unwrap();
        Tokenizer::from_sentencepiece(&self.bytes(), &config)
    }

    /// The names of the tokens of a text, with the begin token.
    fn names(&self, text: &str) -> Vec<&str> {
        let tokenizer = self.tokenizer(json!({})).unwrap();
        let ids = tokenizer.encode(text, true, Special::Recognised).unwrap();
        ids.iter().map(|id| self.pieces[*id as usize].0.as_str()).collect()
    }
}

const LETTERS: [(&str, f32, u64); 4] =
    [("▁", -10.0, 0), ("a", -11.0, 0), ("b", -12.0, 0), ("c", -13.0, 0)];

fn with_letters(pieces: &[(&'static str, f32, u64)]) -> Vec<(&'static str, f32, u64)> {
    pieces.iter().chain(&LETTERS).copied().collect()
}

#[test]
fn equal_scores_merge_from_the_left() {
    let model = Model::new(BPE, &with_letters(&[("aa", -1.0, 0), ("aaa", -2.0, 0)]));
    assert_eq!(model.names("aaaaa"), ["<s>", "▁", "aa", "aaa"]);
    let model = Model::new(BPE, &with_letters(&[("ab", -1.0, 0), ("ba", -1.0, 0)]));
    assert_eq!(model.names("bab"), ["<s>", "▁", "ba", "b"]);
}

#[test]
fn a_run_of_unknown_characters_is_one_unknown_token() {
    for algorithm in [BPE, UNIGRAM] {
        let model = Model::new(algorithm, &with_letters(&[]));
        assert_eq!(model.names("aéèb"), ["<s>", "▁", "a", "<unk>", "b"]);
    }
}

#[test]
fn user_defined_pieces_stand_whatever_merges_would_do() {
    let pieces = with_letters(&[("ab", -1.0, 0), ("bc", 0.0, USER_DEFINED)]);
    for algorithm in [BPE, UNIGRAM] {
        let model = Model::new(algorithm, &pieces);
        assert_eq!(model.names("abc"), ["<s>", "▁", "a", "bc"]);
    }
    let joined = with_letters(&[("bc", 0.0, USER_DEFINED), ("abc", -1.0, 0)]);
    assert_eq!(Model::new(BPE, &joined).names("abc"), ["<s>", "▁", "a", "bc"]);
}

#[test]
fn an_unused_piece_is_taken_apart_again() {
    let pieces = with_letters(&[("ab", -1.0, UNUSED), ("abc", -2.0, 0)]);
    let model = Model::new(BPE, &pieces);
    assert_eq!(model.names("abc ab"), ["<s>", "▁", "abc", "▁", "a", "b"]);
    let model = Model::new(UNIGRAM, &pieces);
    assert_eq!(model.names("abc ab"), ["<s>", "▁", "abc", "▁", "a", "b"]);
}

#[test]
fn a_unigram_model_takes_the_likeliest_path() {
    // -3 for `ab` and `c` against -4 for `a` and `bc`.
    let pieces = [("▁", -1.0, 0), ("ab", -1.0, 0), ("c", -2.0, 0), ("a", -1.0, 0), ("bc", -3.0, 0)];
    assert_eq!(Model::new(UNIGRAM, &pieces).names("abc"), ["<s>", "▁", "ab", "c"]);
}

#[test]
fn spaces_collapse_only_where_the_model_says_so() {
    let mut model = Model::new(BPE, &LETTERS);
    assert_eq!(model.names("  a  b "), ["<s>", "▁", "▁", "▁", "a", "▁", "▁", "b", "▁"]);
    model.normalizer = vec![];
    assert_eq!(model.names("  a  b "), ["<s>", "▁", "a", "▁", "b"]);
    assert_eq!(model.names("   "), ["<s>"]);
    model.normalizer = vec![(3, 0), (4, 0)];
    assert_eq!(model.names("a b"), ["<s>", "a", "▁", "b"]);
}

#[test]
fn the_configuration_says_what_stands_around_and_between() {
    let model = Model::new(BPE, &LETTERS);
    let ids = |config: Value| {
        let tokenizer = model.tokenizer(config).unwrap();
        tokenizer.encode("a</s>b", true, Special::Recognised).unwrap()
    };
    // 1 <s>, 2 </s>, 3 ▁, 4 a, 5 b.
    assert_eq!(ids(json!({})), [1, 3, 4, 2, 3, 5]);
    assert_eq!(ids(json!({"legacy": false})), [1, 3, 4, 2, 5]);
    assert_eq!(ids(json!({"add_bos_token": false, "add_eos_token": true})), [3, 4, 2, 3, 5, 2]);

    let pad = json!({"added_tokens_decoder": {"9": {"content": "<pad>", "special": true}}});
    let tokenizer = model.tokenizer(pad).unwrap();
    assert_eq!(tokenizer.encode("<pad>", false, Special::Recognised).unwrap(), [9]);
    assert_eq!(tokenizer.vocab_size(), 10);
    let clash = json!({"added_tokens_decoder": {"4": {"content": "<pad>", "special": true}}});
    assert!(model.tokenizer(clash).is_err());
}

/// A character map of one entry, `A` to `a`: the smallest double array of three units in use. The
/// root's offset is 1, so `A` (65) is at 64; its own offset 1 puts the value at 65.
fn upper_to_lower() -> Vec<u8> {
    let mut units = vec![0u32; 128];
    units[0] = 1 << 10;
    units[1 ^ 65] = u32::from(b'A') | 1 << 8 | 1 << 10;
    units[1 ^ 65 ^ 1] = 1 << 31;
    let mut map = (units.len() as u32 * 4).to_le_bytes().to_vec();
    map.extend(units.iter().flat_map(|unit| unit.to_le_bytes()));
    map.extend(b"a\0");
    map
}

#[test]
fn characters_are_rewritten_by_the_models_map() {
    let mut model = Model::new(BPE, &LETTERS);
    model.charsmap = upper_to_lower();
    assert_eq!(model.names("AbA"), ["<s>", "▁", "a", "b", "a"]);
}

#[test]
fn a_model_that_contradicts_itself_is_refused_with_a_sentence() {
    type Breakage = (fn(&mut Model), &'static str);
    let cases: [Breakage; 9] = [
        (|model| model.trainer = vec![(3, 4)], "of type 4"),
        (|model| model.trainer.push((24, 1)), "spaces as suffixes"),
        (|model| model.trainer.push((35, 1)), "all 256"),
        (|model| model.normalizer.push((5, 0)), "does not escape spaces"),
        (|model| model.pieces[4].1 = f32::NAN, "piece 4"),
        (|model| model.pieces[4].0.clear(), "piece 4"),
        (|model| model.pieces[4].0 = "b".into(), "`b` is in the vocabulary twice"),
        (|model| model.pieces[4].2 = 9, "not a SentencePiece model"),
        (|model| model.charsmap = vec![255, 0, 0, 0, 1], "precompiled_charsmap"),
    ];
    for (breakage, expected) in cases {
        let mut model = Model::new(BPE, &LETTERS);
        breakage(&mut model);
        match model.tokenizer(json!({})) {
            Ok(_) => panic!("accepted where `{expected}` was expected"),
            Err(error) => assert!(error.to_string().contains(expected), "{expected}: {error}"),
        }
    }
}

/// A model with all parts: byte fallback, a character map, every kind of piece.
fn whole_model() -> Vec<u8> {
    let names: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut pieces = with_letters(&[("ab", -1.0, 0), ("bc", 0.0, USER_DEFINED)]);
    pieces.push(("aab", -2.0, UNUSED));
    let mut model = Model::new(BPE, &pieces);
    model.pieces.extend(names.into_iter().map(|name| (name, 0.0, BYTE)));
    model.trainer.push((35, 1));
    model.charsmap = upper_to_lower();
    model.bytes()
}

#[test]
fn a_cut_model_is_refused_and_never_half_read() {
    let whole = whole_model();
    let config = TokenizerConfig::default();
    assert!(Tokenizer::from_sentencepiece(&whole, &config).is_ok());
    let refused =
        |length: &usize| Tokenizer::from_sentencepiece(&whole[..*length], &config).is_err();
    // A cut between two fields leaves a model of fewer parts; every other cut is noticed.
    let noticed = (0..whole.len()).filter(refused).count();
    assert!(noticed > whole.len() * 9 / 10, "{noticed} of {}", whole.len());
}

proptest! {
    #[test]
    fn no_change_of_bytes_makes_a_model_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6),
        text in "[abcA \u{e9}▁<>s/]{0,40}",
    ) {
        let mut model = whole_model();
        for (at, byte) in changes {
            let at = at.index(model.len());
            model[at] = byte;
        }
        if let Ok(tokenizer) = Tokenizer::from_sentencepiece(&model, &TokenizerConfig::default())
            && let Ok(ids) = tokenizer.encode(&text, true, Special::Recognised)
        {
            tokenizer.decode(&ids, false).unwrap();
        }
    }

    #[test]
    fn with_byte_fallback_every_text_comes_back(text in ".{0,60}") {
        let names: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        for algorithm in [BPE, UNIGRAM] {
            let mut model = Model::new(algorithm, &with_letters(&[("ab", -1.0, 0)]));
            model.pieces.extend(names.iter().map(|name| (name.clone(), 0.0, BYTE)));
            model.trainer.push((35, 1));
            let tokenizer = model.tokenizer(json!({})).unwrap();
            let ids = tokenizer.encode(&text, true, Special::AsText).unwrap();
            // The space symbol itself comes back as a space.
            prop_assert_eq!(tokenizer.decode(&ids, true).unwrap(), text.replace('▁', " "));
        }
    }
}
