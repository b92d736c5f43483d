//! The vocabulary in a GGUF file's metadata.
//!
//! A file names its pre-tokeniser instead of spelling it out, and leaves some settings to the
//! reader; the names and defaults here are llama.cpp's (`llama-vocab.cpp`), the patterns those of the
//! models' own `tokenizer.json`.

use std::collections::HashMap;

use tokenizers::normalizers::NFC;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::bpe::{Bpe, BpeSettings};
use super::byte_level::Spelling;
use super::json::split_merge;
use super::sentencepiece::{self, Algorithm, Description, Kind, Piece};
use super::{LeadingSpace, Parts, Pipeline, Segmentation, Tokenizer, TokenizerError};
use crate::error::Error;
use crate::formats::gguf::Metadata;

/// Size of the Llama-3 vocabulary. Microsoft's own GGUF of BitNet b1.58 2B4T has it and does not
/// name a pre-tokeniser (microsoft/BitNet#508).
const LLAMA_3_VOCABULARY: usize = 128_256;

/// The `tokenizer.ggml.*` entries of a GGUF file.
#[derive(Debug, Clone, Default)]
pub struct GgufVocabulary {
    /// `model`: `gpt2` is byte-level BPE, `llama` SentencePiece BPE.
    pub model: String,
    /// `pre`: which pre-tokeniser a `gpt2` vocabulary has.
    pub pre: Option<String>,
    /// `tokens`, by id.
    pub tokens: Vec<String>,
    /// `scores`, one for each token; `llama` needs them.
    pub scores: Vec<f32>,
    /// `token_type`, one for each token or none at all: 1 normal, 2 unknown, 3 control,
    /// 4 user-defined, 5 unused, 6 byte.
    pub token_types: Vec<i64>,
    /// `merges`, two tokens with a space between; `gpt2` needs them.
    pub merges: Vec<String>,
    /// `bos_token_id`.
    pub bos: Option<u32>,
    /// `eos_token_id`.
    pub eos: Option<u32>,
    /// `add_bos_token`.
    pub add_bos: Option<bool>,
    /// `add_eos_token`.
    pub add_eos: Option<bool>,
    /// `unknown_token_id`, which is written and not needed to read.
    pub unknown: Option<u32>,
    /// `add_space_prefix`.
    pub add_space_prefix: Option<bool>,
    /// `remove_extra_whitespaces`.
    pub remove_extra_whitespaces: Option<bool>,
}

impl GgufVocabulary {
    /// The vocabulary of a file.
    ///
    /// # Errors
    /// The file has no vocabulary, or an entry is of another type than it should be.
    pub fn from_metadata(metadata: &Metadata) -> Result<Self, Error> {
        let texts = |key: &str| -> Result<Vec<String>, Error> {
            let texts: Vec<&str> = metadata.get(key)?.unwrap_or_default();
            Ok(texts.into_iter().map(str::to_owned).collect())
        };
        let tokens: Vec<&str> = metadata.require("tokenizer.ggml.tokens")?;
        Ok(GgufVocabulary {
            model: metadata.require::<&str>("tokenizer.ggml.model")?.to_owned(),
            pre: metadata.get::<&str>("tokenizer.ggml.pre")?.map(str::to_owned),
            tokens: tokens.into_iter().map(str::to_owned).collect(),
            scores: metadata.get("tokenizer.ggml.scores")?.unwrap_or_default(),
            token_types: metadata.get("tokenizer.ggml.token_type")?.unwrap_or_default(),
            merges: texts("tokenizer.ggml.merges")?,
            bos: metadata.get("tokenizer.ggml.bos_token_id")?,
            eos: metadata.get("tokenizer.ggml.eos_token_id")?,
            add_bos: metadata.get("tokenizer.ggml.add_bos_token")?,
            add_eos: metadata.get("tokenizer.ggml.add_eos_token")?,
            unknown: metadata.get("tokenizer.ggml.unknown_token_id")?,
            add_space_prefix: metadata.get("tokenizer.ggml.add_space_prefix")?,
            remove_extra_whitespaces: metadata.get("tokenizer.ggml.remove_extra_whitespaces")?,
        })
    }

    /// What each token is for.
    fn kinds(&self) -> Result<Vec<Kind>, TokenizerError> {
        if self.token_types.is_empty() {
            return Ok(vec![Kind::Normal; self.tokens.len()]);
        }
        if self.token_types.len() != self.tokens.len() {
            return Err(TokenizerError::vocabulary(format!(
                "tokenizer.ggml.token_type has {} entries for {} tokens",
                self.token_types.len(),
                self.tokens.len()
            )));
        }
        let kind = |(token, number): (&String, &i64)| {
            Kind::from_number(*number).ok_or_else(|| {
                TokenizerError::vocabulary(format!(
                    "tokenizer.ggml.token_type gives `{token}` the unknown type {number}"
                ))
            })
        };
        self.tokens.iter().zip(&self.token_types).map(kind).collect()
    }
}

impl Tokenizer {
    /// From the vocabulary of a GGUF file. Beside the tokenizer: one sentence for each fact of the
    /// file that had to be corrected.
    ///
    /// # Errors
    /// A sentence about the entry that is missing, broken or not supported.
    pub fn from_gguf(vocabulary: GgufVocabulary) -> Result<(Self, Vec<String>), TokenizerError> {
        match vocabulary.model.as_str() {
            "gpt2" => byte_level(vocabulary),
            "llama" => Ok((sentence_piece(vocabulary)?, Vec::new())),
            other => Err(TokenizerError::vocabulary(format!(
                "tokenizer.ggml.model is `{other}`, and only `gpt2` and `llama` are supported"
            ))),
        }
    }
}

/// What the name of a pre-tokeniser stands for.
pub(super) struct PreTokenizer {
    pub(super) pattern: &'static str,
    pub(super) ignore_merges: bool,
    pub(super) nfc: bool,
    /// Whether texts get a begin token where the file does not say.
    add_bos: bool,
}

impl PreTokenizer {
    const LLAMA_3: Self = PreTokenizer {
        pattern: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ignore_merges: true,
        nfc: false,
        add_bos: true,
    };
    /// As Llama-3, but one digit at a time, composed characters, and merges first.
    const QWEN_2: Self = PreTokenizer {
        pattern: r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        ignore_merges: false,
        nfc: true,
        add_bos: false,
    };
    const GPT_2: Self = PreTokenizer {
        pattern: r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        ignore_merges: false,
        nfc: false,
        add_bos: false,
    };

    /// One name of each that can be written.
    pub(super) const NAMES: [&'static str; 4] = ["llama-bpe", "smaug-bpe", "qwen2", "gpt-2"];

    pub(super) fn named(name: &str) -> Option<Self> {
        match name {
            "llama-bpe" | "llama3" | "llama-v3" | "falcon3" | "falcon-e" | "falcon_e" => {
                Some(Self::LLAMA_3)
            }
            "smaug-bpe" | "dbrx" => {
                Some(PreTokenizer { ignore_merges: false, add_bos: false, ..Self::LLAMA_3 })
            }
            "qwen2" | "deepseek-r1-qwen" => Some(Self::QWEN_2),
            "gpt-2" | "mpt" | "olmo" => Some(Self::GPT_2),
            _ => None,
        }
    }
}

fn byte_level(vocabulary: GgufVocabulary) -> Result<(Tokenizer, Vec<String>), TokenizerError> {
    let kinds = vocabulary.kinds()?;
    let mut notes = Vec::new();
    let pre = match vocabulary.pre.as_deref() {
        Some(name) => PreTokenizer::named(name).ok_or_else(|| {
            TokenizerError::vocabulary(format!(
                "tokenizer.ggml.pre names the pre-tokeniser `{name}`, which is not supported"
            ))
        })?,
        None if vocabulary.tokens.len() == LLAMA_3_VOCABULARY => {
            notes.push(format!(
                "the file does not name its pre-tokeniser (tokenizer.ggml.pre); with \
                 {LLAMA_3_VOCABULARY} tokens it is taken to be Llama 3's"
            ));
            PreTokenizer::LLAMA_3
        }
        None => {
            return Err(TokenizerError::vocabulary(
                "the file does not name its pre-tokeniser (tokenizer.ggml.pre); convert the model \
                 again with a converter that writes it",
            ));
        }
    };

    let spelling = Spelling::new();
    let mut added = Vec::new();
    let mut bytes = HashMap::with_capacity(vocabulary.tokens.len());
    let mut ids = HashMap::with_capacity(vocabulary.tokens.len());
    for ((id, token), kind) in (0u32..).zip(&vocabulary.tokens).zip(kinds) {
        match kind {
            Kind::Control | Kind::Unknown => {
                added.push((id, AddedToken::from(token.clone(), true)));
            }
            Kind::UserDefined => {
                added.push((id, AddedToken::from(token.clone(), false).normalized(false)));
            }
            // An unused id fills a gap: text never becomes it, and it is shown as it is named.
            Kind::Unused => {
                bytes.insert(id, token.clone().into_bytes());
            }
            Kind::Normal | Kind::Byte => {
                bytes.insert(id, spelling.bytes_of(token));
                if let Some(other) = ids.insert(token.clone(), id) {
                    return Err(TokenizerError::vocabulary(format!(
                        "tokenizer.ggml.tokens has `{token}` twice, as {other} and {id}"
                    )));
                }
            }
        }
    }
    let merges =
        vocabulary.merges.iter().map(|merge| split_merge(merge)).collect::<Result<Vec<_>, _>>()?;
    let settings = BpeSettings { ignore_merges: pre.ignore_merges, ..BpeSettings::default() };
    let model = Bpe::new(settings, &ids, &merges)?;

    let split = Split::new(
        SplitPattern::Regex(pre.pattern.to_owned()),
        SplitDelimiterBehavior::Isolated,
        false,
    );
    let split = PreTokenizerWrapper::Split(split.expect("the patterns above are valid"));
    let spell = PreTokenizerWrapper::ByteLevel(ByteLevel::new(false, true, false));
    let tokenizer = Tokenizer::new(Parts {
        segmentation: Segmentation::Pipeline(Box::new(Pipeline {
            normalizer: pre.nfc.then_some(NormalizerWrapper::NFC(NFC)),
            pre_tokenizer: Some(PreTokenizerWrapper::Sequence(Sequence::new(vec![split, spell]))),
            model,
        })),
        added,
        bytes,
        prefix: vocabulary
            .bos
            .filter(|_| vocabulary.add_bos.unwrap_or(pre.add_bos))
            .into_iter()
            .collect(),
        suffix: vocabulary
            .eos
            .filter(|_| vocabulary.add_eos.unwrap_or(false))
            .into_iter()
            .collect(),
        bos: vocabulary.bos,
        eos: vocabulary.eos,
        leading_space: LeadingSpace::Kept,
    })?;
    Ok((tokenizer, notes))
}

fn sentence_piece(vocabulary: GgufVocabulary) -> Result<Tokenizer, TokenizerError> {
    let kinds = vocabulary.kinds()?;
    if vocabulary.scores.len() != vocabulary.tokens.len() {
        return Err(TokenizerError::vocabulary(format!(
            "tokenizer.ggml.scores has {} entries for {} tokens",
            vocabulary.scores.len(),
            vocabulary.tokens.len()
        )));
    }
    let pieces: Vec<Piece> = vocabulary
        .tokens
        .into_iter()
        .zip(vocabulary.scores)
        .zip(kinds)
        .map(|((text, score), kind)| Piece { text, score, kind })
        .collect();
    let prefix = vocabulary.bos.filter(|_| vocabulary.add_bos.unwrap_or(true));
    let suffix = vocabulary.eos.filter(|_| vocabulary.add_eos.unwrap_or(false));
    let description = Description {
        byte_fallback: pieces.iter().any(|piece| piece.kind == Kind::Byte),
        pieces,
        algorithm: Algorithm::Bpe,
        add_dummy_prefix: vocabulary.add_space_prefix.unwrap_or(true),
        remove_extra_whitespaces: vocabulary.remove_extra_whitespaces.unwrap_or(false),
        prefix_every_fragment: true,
        charsmap: Vec::new(),
        bos: vocabulary.bos,
        eos: vocabulary.eos,
    };
    sentencepiece::tokenizer(
        description,
        vocabulary.bos,
        vocabulary.eos,
        prefix,
        suffix,
        Vec::new(),
    )
}
