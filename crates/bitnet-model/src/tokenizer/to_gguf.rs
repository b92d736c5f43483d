//! A tokenizer as the entries of a GGUF file's metadata.

use std::collections::BTreeSet;

use serde_json::Value;
use tokenizers::NormalizerWrapper;

use super::byte_level::alphabet;
use super::gguf::PreTokenizer;
use super::sentencepiece::{Algorithm, Kind, SentencePiece};
use super::{GgufVocabulary, Pipeline, Segmentation, Tokenizer, TokenizerError};

impl Tokenizer {
    /// The entries that [`from_gguf`](Self::from_gguf) makes a tokenizer of that encodes and decodes
    /// the same. There are at least `tokens` of them; ids that no token has become unused ones.
    ///
    /// # Errors
    /// A sentence about the rule that the format has no entry for, or no name.
    pub fn to_gguf(&self, tokens: usize) -> Result<GgufVocabulary, TokenizerError> {
        let refused = |what: &str| {
            TokenizerError::vocabulary(format!("a GGUF file cannot hold this tokenizer: {what}"))
        };
        let mut vocabulary = match &self.segmentation {
            Segmentation::Pipeline(pipeline) => byte_level(pipeline),
            Segmentation::SentencePiece(rules) => sentence_piece(rules),
        }
        .map_err(|what| refused(&what))?;

        let count = tokens.max(self.vocab_size());
        let named = vocabulary.tokens.len();
        vocabulary.tokens.resize(count.max(named), String::new());
        vocabulary.token_types.resize(count.max(named), Kind::Unused.number());
        if !vocabulary.scores.is_empty() {
            vocabulary.scores.resize(count.max(named), 0.0);
        }
        for (id, token) in &self.added_tokens {
            if token.lstrip || token.rstrip || token.single_word {
                return Err(refused(&format!(
                    "the token `{}` takes spaces around it, or is one only as a whole word",
                    token.content
                )));
            }
            let id = *id as usize;
            vocabulary.tokens[id].clone_from(&token.content);
            // The unknown token is the only one that is special in another way.
            if vocabulary.token_types[id] != Kind::Unknown.number() {
                let kind = if token.special { Kind::Control } else { Kind::UserDefined };
                vocabulary.token_types[id] = kind.number();
            }
        }
        let names: BTreeSet<&str> = vocabulary.tokens.iter().map(String::as_str).collect();
        let mut fillers =
            (0..).map(|n| format!("[PAD{n}]")).filter(|name| !names.contains(&**name));
        let fillers: Vec<String> = fillers
            .by_ref()
            .take(vocabulary.tokens.iter().filter(|token| token.is_empty()).count())
            .collect();
        let empty = vocabulary.tokens.iter_mut().filter(|token| token.is_empty());
        empty.zip(fillers).for_each(|(token, filler)| *token = filler);

        vocabulary.bos = self.ends.bos;
        vocabulary.eos = self.ends.eos;
        for (around, token, flag) in [
            (&self.ends.prefix, self.ends.bos, &mut vocabulary.add_bos),
            (&self.ends.suffix, self.ends.eos, &mut vocabulary.add_eos),
        ] {
            if !(around.is_empty() || around.len() == 1 && around.first().copied() == token) {
                return Err(refused("it puts other tokens around texts than begin and end"));
            }
            *flag = Some(!around.is_empty());
        }
        Ok(vocabulary)
    }
}

/// Byte-level BPE; ids without a token have an empty name.
fn byte_level(pipeline: &Pipeline) -> Result<GgufVocabulary, String> {
    let Pipeline { normalizer, pre_tokenizer, model } = pipeline;
    let stages = serde_json::to_value(pre_tokenizer).expect("texts and flags");
    let pattern = byte_level_pattern(&stages)
        .ok_or("its words are not cut out by one pattern and spelled byte by byte")?;
    let nfc = match normalizer {
        None => false,
        Some(NormalizerWrapper::NFC(_)) => true,
        Some(_) => return Err("it changes texts before it cuts them".to_owned()),
    };
    let is_the_same = |name: &&&str| {
        let known = PreTokenizer::named(name).expect("each of them is known");
        (known.pattern, known.nfc, known.ignore_merges)
            == (pattern, nfc, model.settings.ignore_merges)
    };
    let pre = PreTokenizer::NAMES.iter().find(is_the_same).ok_or_else(|| {
        format!(
            "there is no name for how it cuts words, `{pattern}`{}",
            if nfc { " after NFC" } else { "" }
        )
    })?;
    // Then no text needs an unknown token or fallback to bytes, which the format does not have.
    if alphabet().iter().any(|byte| model.id_of(&byte.to_string()).is_none()) {
        return Err("its vocabulary lacks tokens of single bytes".to_owned());
    }
    let words = model.words();
    let count = words.keys().next_back().map_or(0, |&id| id as usize + 1);
    let mut tokens = vec![String::new(); count];
    let mut kinds = vec![Kind::Unused; count];
    for (&id, &word) in &words {
        word.clone_into(&mut tokens[id as usize]);
        kinds[id as usize] = Kind::Normal;
    }
    let merges = model.ranked_merges();
    let merges = merges.iter().map(|[left, right]| match (words.get(left), words.get(right)) {
        (Some(left), Some(right)) => Ok(format!("{left} {right}")),
        _ => Err("a merge has a token without a spelling".to_owned()),
    });
    Ok(GgufVocabulary {
        model: "gpt2".to_owned(),
        pre: Some((*pre).to_owned()),
        tokens,
        token_types: kinds.into_iter().map(Kind::number).collect(),
        merges: merges.collect::<Result<_, _>>()?,
        ..GgufVocabulary::default()
    })
}

/// The pattern of words in the stages of a byte-level pre-tokeniser.
fn byte_level_pattern(stages: &Value) -> Option<&str> {
    let is = |stage: &Value, key: &str, value: Value| stage.get(key) == Some(&value);
    let spells = |stage: &Value, cuts: bool| {
        is(stage, "type", "ByteLevel".into())
            && is(stage, "add_prefix_space", false.into())
            && is(stage, "use_regex", cuts.into())
    };
    let inner = stages.get("pretokenizers").and_then(Value::as_array);
    match inner.map_or(std::slice::from_ref(stages), Vec::as_slice) {
        // Its own pattern is GPT-2's.
        [stage] if spells(stage, true) => PreTokenizer::named("gpt-2").map(|known| known.pattern),
        [split, stage]
            if is(split, "type", "Split".into())
                && is(split, "behavior", "Isolated".into())
                && is(split, "invert", false.into())
                && spells(stage, false) =>
        {
            split.pointer("/pattern/Regex")?.as_str()
        }
        _ => None,
    }
}

fn sentence_piece(rules: &SentencePiece) -> Result<GgufVocabulary, String> {
    let description = rules.description();
    if description.algorithm != Algorithm::Bpe {
        return Err("it is a SentencePiece unigram model, and BPE is needed".to_owned());
    }
    if !description.charsmap.is_empty() || !description.prefix_every_fragment {
        return Err("it changes texts in a way that the format has no entry for".to_owned());
    }
    let pieces = &description.pieces;
    let unknown = pieces.iter().position(|piece| piece.kind == Kind::Unknown);
    Ok(GgufVocabulary {
        model: "llama".to_owned(),
        pre: Some("default".to_owned()),
        tokens: pieces.iter().map(|piece| piece.text.clone()).collect(),
        scores: pieces.iter().map(|piece| piece.score).collect(),
        token_types: pieces.iter().map(|piece| piece.kind.number()).collect(),
        unknown: unknown.map(|id| id as u32),
        add_space_prefix: Some(description.add_dummy_prefix),
        remove_extra_whitespaces: Some(description.remove_extra_whitespaces),
        ..GgufVocabulary::default()
    })
}
