//! Text to token ids and back.
//!
//! One [`Tokenizer`], from three kinds of file: Hugging Face's `tokenizer.json`
//! ([`Tokenizer::from_json`]), the vocabulary in a GGUF file's metadata ([`Tokenizer::from_gguf`])
//! and SentencePiece's `tokenizer.model` ([`Tokenizer::from_sentencepiece`]). Each of them can be made
//! of it again ([`Tokenizer::to_gguf`], [`Tokenizer::to_hugging_face`]), if it has what the tokenizer
//! needs.
//!
//! Encoding has two halves. Special tokens are cut out of the text first; what lies between them
//! goes through a `Segmentation`. Decoding needs none of that: every id stands for fixed bytes,
//! written down once when the tokenizer is built, so decoding a stream costs the same per token
//! however long the text has grown.

mod bpe;
mod byte_level;
mod config;
mod detokenizer;
mod gguf;
mod json;
mod sentencepiece;
mod stored;
mod to_gguf;
mod to_hugging_face;

use std::collections::HashMap;

use bitnet_core::{DType, Tensor};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::{
    AddedToken, AddedVocabulary, NormalizerWrapper, OffsetReferential, OffsetType, PreTokenizer,
    PreTokenizerWrapper,
};

use bpe::Bpe;
pub use config::TokenizerConfig;
pub use detokenizer::Detokenizer;
pub use gguf::GgufVocabulary;
use sentencepiece::SentencePiece;
pub use stored::StoredTokenizer;
pub use to_hugging_face::HuggingFaceFiles;

/// Ids at or above this are refused: tables are indexed by id, and no known vocabulary comes near.
const MAX_VOCABULARY: usize = 1 << 24;

/// Longest run of white space that word patterns are trusted with. The regex engine gives up after a
/// million steps back, and the `tokenizers` crate then takes the rest of the text for one word.
const MAX_WHITE_SPACE: usize = 1 << 19;

/// Tokens that end a text or a turn wherever they occur as special tokens.
const END_TOKENS: [&str; 9] = [
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<｜end▁of▁sentence｜>",
    "</s>",
];

/// Why a tokenizer could not be built or used.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum TokenizerError {
    /// The vocabulary or its settings contradict themselves or ask for something we do not have.
    #[error("{0}")]
    Vocabulary(String),
    /// An id that no token has.
    #[error("token id {id} is not in the vocabulary of {vocab_size} tokens")]
    UnknownId {
        /// The id.
        id: u32,
        /// One more than the largest id that a token has.
        vocab_size: usize,
    },
    /// A text that the vocabulary cannot express.
    #[error("the text cannot be encoded: {0}")]
    Text(String),
}

impl TokenizerError {
    fn vocabulary(reason: impl Into<String>) -> Self {
        TokenizerError::Vocabulary(reason.into())
    }
}

/// What the spelling of a special token inside a text means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// `<|eot_id|>` in the text is the token of that name.
    Recognised,
    /// `<|eot_id|>` in the text is ten characters like any others.
    AsText,
}

/// How the text between special tokens becomes ids.
enum Segmentation {
    /// The stages of a `tokenizer.json`.
    Pipeline(Box<Pipeline>),
    /// SentencePiece's rules.
    SentencePiece(Box<SentencePiece>),
}

/// Normalise, split into words, segment each word.
struct Pipeline {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
    model: Bpe,
}

/// The bytes each id stands for, end to end, and where each begins. They may lie in a mapped file.
struct TokenBytes {
    bytes: Bytes,
    /// Little-endian `u32` `[vocab_size + 1]`; an id without a token has an empty range.
    starts: Bytes,
    /// `[vocab_size]`, of [`KNOWN`] and [`SPECIAL`].
    flags: Bytes,
}

/// Flag of an id that has a token.
const KNOWN: u8 = 1;
/// Flag of a special token.
const SPECIAL: u8 = 2;

impl TokenBytes {
    /// From `(id, bytes)` pairs in any order. `special` ids are among them.
    fn build(
        tokens: &HashMap<u32, Vec<u8>>,
        special: impl Iterator<Item = u32>,
    ) -> Result<Self, TokenizerError> {
        let vocab_size = tokens.keys().max().map_or(0, |&id| id as usize + 1);
        if vocab_size > MAX_VOCABULARY {
            return Err(TokenizerError::vocabulary(format!(
                "token id {} is beyond the limit of {MAX_VOCABULARY}",
                vocab_size - 1
            )));
        }
        let mut bytes = Vec::new();
        let mut starts = Vec::with_capacity(4 * (vocab_size + 1));
        let mut flags = vec![0; vocab_size];
        starts.extend([0; 4]);
        for id in 0..vocab_size as u32 {
            if let Some(token) = tokens.get(&id) {
                bytes.extend(token);
                flags[id as usize] = KNOWN;
            }
            let Ok(end) = u32::try_from(bytes.len()) else {
                return Err(TokenizerError::vocabulary("the vocabulary has more than 4 GB"));
            };
            starts.extend(end.to_le_bytes());
        }
        special.for_each(|id| flags[id as usize] |= SPECIAL);
        Ok(TokenBytes { bytes: bytes.into(), starts: starts.into(), flags: flags.into() })
    }

    /// One more than the largest id that a token has.
    fn vocab_size(&self) -> usize {
        self.flags.len()
    }

    fn has(&self, id: u32, flag: u8) -> bool {
        self.flags.get(id as usize).is_some_and(|flags| flags & flag != 0)
    }

    fn get(&self, id: u32) -> Option<&[u8]> {
        if !self.has(id, KNOWN) {
            return None;
        }
        let (starts, _) = self.starts.as_chunks::<4>();
        let at = |index: usize| starts.get(index).map(|start| u32::from_le_bytes(*start) as usize);
        // Of a file whose offsets lead nowhere, tokens are empty.
        let range = at(id as usize)?..at(id as usize + 1)?;
        Some(self.bytes.get(range).unwrap_or_default())
    }
}

/// What decoding does with the space that an encoder put before a text.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum LeadingSpace {
    /// It puts none there.
    Kept,
    /// The first token's is left out.
    Dropped,
    /// One is left out of every token until there is text.
    DroppedUntilText,
}

/// The parts a reader hands over to make a [`Tokenizer`].
struct Parts {
    segmentation: Segmentation,
    /// Tokens that are cut out of the text before it is segmented, with their ids.
    added: Vec<(u32, AddedToken)>,
    /// The bytes of each id, without those of `added`.
    bytes: HashMap<u32, Vec<u8>>,
    /// Ids put before and after a text that asks for it.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    leading_space: LeadingSpace,
}

/// A vocabulary with the rules to encode and decode by it.
pub struct Tokenizer {
    segmentation: Segmentation,
    added: AddedVocabulary,
    added_as_text: AddedVocabulary,
    /// What `added` was made of, by id.
    added_tokens: Vec<(u32, AddedToken)>,
    ids: HashMap<String, u32>,
    bytes: TokenBytes,
    ends: Ends,
}

/// What stands around texts.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Ends {
    /// Ids put before and after a text that asks for it.
    prefix: Vec<u32>,
    suffix: Vec<u32>,
    bos: Option<u32>,
    eos: Option<u32>,
    leading_space: LeadingSpace,
}

/// Bytes as a tensor of one row.
fn byte_tensor(bytes: &Bytes) -> Tensor {
    Tensor::new(DType::U8, vec![bytes.len()], bytes.clone()).expect("bytes fill their length")
}

impl Tokenizer {
    fn new(parts: Parts) -> Result<Self, TokenizerError> {
        let Parts { segmentation, mut added, mut bytes, prefix, suffix, bos, eos, .. } = parts;
        added.retain(|(_, token)| !token.content.is_empty());
        added.sort_by_key(|(id, _)| *id);
        bytes.extend(added.iter().map(|(id, token)| (*id, token.content.clone().into_bytes())));
        let special = added.iter().filter(|(_, token)| token.special).map(|(id, _)| *id);
        let bytes = TokenBytes::build(&bytes, special)?;
        let leading_space = parts.leading_space;
        Self::assemble(segmentation, added, bytes, Ends { prefix, suffix, bos, eos, leading_space })
    }

    /// From parts that fit each other; `added` is in ascending order.
    fn assemble(
        segmentation: Segmentation,
        added_tokens: Vec<(u32, AddedToken)>,
        bytes: TokenBytes,
        ends: Ends,
    ) -> Result<Self, TokenizerError> {
        let mut ids = HashMap::new();
        for (id, token) in &added_tokens {
            if let Some(other) = ids.insert(token.content.clone(), *id).filter(|other| other != id)
            {
                return Err(TokenizerError::vocabulary(format!(
                    "the added token `{}` has two ids, {other} and {id}",
                    token.content
                )));
            }
        }
        let added = added_vocabulary(&segmentation, &added_tokens)?;
        let mut added_as_text = added.clone();
        added_as_text.set_encode_special_tokens(true);
        let tokenizer =
            Tokenizer { segmentation, added, added_as_text, added_tokens, ids, bytes, ends };
        let Ends { prefix, suffix, bos, eos, .. } = &tokenizer.ends;
        for id in prefix.iter().chain(suffix).chain(bos).chain(eos) {
            tokenizer.token_bytes(*id)?;
        }
        Ok(tokenizer)
    }

    /// The ids of `text`. With `add_special`, the ids the tokenizer puts around every text are
    /// there too: for most models the begin token, for embedding models also an end token.
    ///
    /// # Errors
    /// A vocabulary without an unknown token may be unable to express the text; half a million
    /// white-space characters in a row are refused.
    pub fn encode(
        &self,
        text: &str,
        add_special: bool,
        special: Special,
    ) -> Result<Vec<u32>, TokenizerError> {
        let mut ids = if add_special { self.ends.prefix.clone() } else { Vec::new() };
        self.segment(text, special, &mut ids)?;
        if add_special {
            ids.extend(&self.ends.suffix);
        }
        Ok(ids)
    }

    fn segment(
        &self,
        text: &str,
        special: Special,
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let added = match special {
            Special::Recognised => &self.added,
            Special::AsText => &self.added_as_text,
        };
        let failed = |error: tokenizers::Error| TokenizerError::Text(error.to_string());
        let pieces = match &self.segmentation {
            Segmentation::Pipeline(pipeline) => {
                let Pipeline { normalizer, pre_tokenizer, .. } = &**pipeline;
                if longest_white_space(text) > MAX_WHITE_SPACE {
                    return Err(TokenizerError::Text(format!(
                        "it has more than {MAX_WHITE_SPACE} white-space characters in a row"
                    )));
                }
                let mut pieces = added.extract_and_normalize(normalizer.as_ref(), text);
                if let Some(pre_tokenizer) = pre_tokenizer {
                    pre_tokenizer.pre_tokenize(&mut pieces).map_err(failed)?;
                }
                pieces
            }
            Segmentation::SentencePiece(_) => {
                added.extract_and_normalize::<NormalizerWrapper>(None, text)
            }
        };
        let pieces = pieces.get_splits(OffsetReferential::Original, OffsetType::None);
        for (index, (piece, _, tokens)) in pieces.into_iter().enumerate() {
            match (tokens, &self.segmentation) {
                (Some(tokens), _) => ids.extend(tokens.iter().map(|token| token.id)),
                (None, Segmentation::SentencePiece(rules)) => {
                    rules.encode(piece, index == 0, ids)?
                }
                (None, Segmentation::Pipeline(pipeline)) => pipeline.model.encode(piece, ids)?,
            }
        }
        Ok(())
    }

    /// The text of `ids`, from the beginning of a text. Bytes that are not UTF-8 become U+FFFD, one
    /// for each maximal part of a character (as `String::from_utf8_lossy` has it). With
    /// `skip_special`, special tokens leave no trace.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id that no token has.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> Result<String, TokenizerError> {
        let mut detokenizer = Detokenizer::from_start(self, skip_special);
        let mut text = String::new();
        for &id in ids {
            text.push_str(detokenizer.push(self, id)?);
        }
        text.push_str(detokenizer.finish());
        Ok(text)
    }

    /// One more than the largest id that a token has. A model's output may be wider (padding).
    pub fn vocab_size(&self) -> usize {
        self.bytes.vocab_size()
    }

    /// The bytes an id stands for: often whole characters, sometimes a part of one.
    ///
    /// # Errors
    /// [`TokenizerError::UnknownId`] for an id that no token has.
    pub fn token_bytes(&self, id: u32) -> Result<&[u8], TokenizerError> {
        self.bytes.get(id).ok_or(TokenizerError::UnknownId { id, vocab_size: self.vocab_size() })
    }

    /// The id of a token by its name in the vocabulary: `<|eot_id|>`, `Ġthe`, `▁the`, `<0x0A>`.
    pub fn id_of(&self, token: &str) -> Option<u32> {
        let in_model = || match &self.segmentation {
            Segmentation::Pipeline(pipeline) => pipeline.model.id_of(token),
            Segmentation::SentencePiece(rules) => rules.id_of(token),
        };
        self.ids.get(token).copied().or_else(in_model)
    }

    /// The name of a token in the vocabulary, by which [`id_of`](Self::id_of) finds it.
    fn name_of(&self, id: u32) -> Option<String> {
        let added = self.added_tokens.iter().find(|(other, _)| *other == id);
        added.map(|(_, token)| token.content.clone()).or_else(|| match &self.segmentation {
            Segmentation::Pipeline(pipeline) => {
                pipeline.model.words().get(&id).map(|&word| word.to_owned())
            }
            Segmentation::SentencePiece(rules) => {
                let piece = rules.description().pieces.get(id as usize)?;
                Some(piece.text.clone())
            }
        })
    }

    /// Whether `id` is a special token, which `skip_special` leaves out of decoded text.
    pub fn is_special(&self, id: u32) -> bool {
        self.bytes.has(id, SPECIAL)
    }

    /// The token that begins a text, where the vocabulary has one.
    pub fn bos(&self) -> Option<u32> {
        self.ends.bos
    }

    /// The token that the tokenizer's files call the end token, where they name one.
    pub fn eos(&self) -> Option<u32> {
        self.ends.eos
    }

    /// Whether `encode` with `add_special` begins with the begin token.
    pub fn adds_bos(&self) -> bool {
        self.ends.bos.is_some() && self.ends.prefix.first().copied() == self.ends.bos
    }

    /// Every id that ends a text or a turn, ascending: those that the model's files name
    /// (`config.json` and `generation_config.json` often disagree), this tokenizer's end token, and
    /// its special tokens that are known to end a turn.
    pub fn end_ids(&self, named_by_files: &[u32]) -> Vec<u32> {
        let known = END_TOKENS
            .iter()
            .filter_map(|token| self.id_of(token))
            .filter(|&id| self.is_special(id));
        let mut ids: Vec<u32> =
            named_by_files.iter().copied().chain(self.ends.eos).chain(known).collect();
        ids.sort_unstable();
        ids.dedup();
        ids
    }
}

/// The ids of an `eos_token_id` entry: a number, a list of numbers, or nothing (null or absent).
///
/// # Errors
/// A sentence that shows the entry when it is anything else.
pub fn token_ids_in_json(entry: Option<&serde_json::Value>) -> Result<Vec<u32>, TokenizerError> {
    let id = |value: &serde_json::Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    let ids = match entry {
        None | Some(serde_json::Value::Null) => Some(Vec::new()),
        Some(serde_json::Value::Array(values)) => values.iter().map(id).collect(),
        Some(value) => id(value).map(|id| vec![id]),
    };
    ids.ok_or_else(|| {
        TokenizerError::vocabulary(format!(
            "eos_token_id must be a token id or a list of them, not {}",
            entry.expect("absence is accepted above")
        ))
    })
}

/// Characters in the longest run of white space, or 0 in a text too short to matter.
fn longest_white_space(text: &str) -> usize {
    if text.len() <= MAX_WHITE_SPACE {
        return 0;
    }
    let runs = text.split(|character: char| !character.is_whitespace());
    // Characters have at least one byte: only long runs need counting.
    let long = runs.filter(|run| run.len() > MAX_WHITE_SPACE);
    long.map(|run| run.chars().count()).max().unwrap_or(0)
}

/// Hands the added tokens to the `tokenizers` crate. It takes their ids from a model, so it gets one
/// that knows nothing but these tokens under the ids of the file.
fn added_vocabulary(
    segmentation: &Segmentation,
    added: &[(u32, AddedToken)],
) -> Result<AddedVocabulary, TokenizerError> {
    let failed = |error: tokenizers::Error| {
        TokenizerError::vocabulary(format!("the added tokens cannot be used: {error}"))
    };
    let ids = added.iter().map(|(id, token)| (token.content.clone(), *id)).collect();
    let numbering = WordLevel::builder().vocab(ids).build().map_err(failed)?;
    let normalizer = match segmentation {
        Segmentation::Pipeline(pipeline) => pipeline.normalizer.as_ref(),
        Segmentation::SentencePiece(_) => None,
    };
    let mut vocabulary = AddedVocabulary::new();
    vocabulary
        .add_tokens(added.iter().map(|(_, token)| token.clone()), &numbering, normalizer)
        .map_err(failed)?;
    Ok(vocabulary)
}
