//! A tokenizer as a native file holds it: settings as JSON, tables as tensors that are used where
//! they lie. What it was made from, a `tokenizer.json`, a GGUF file or a SentencePiece model, no
//! longer matters.

use bitnet_core::Tensor;
use bitnet_core::mmap::{is_mapped, unmapped};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokenizers::AddedToken;

use super::bpe::{Bpe, BpeSettings};
use super::json::{NORMALIZERS, PRE_TOKENIZERS, stage};
use super::sentencepiece::{Description, SentencePiece};
use super::{
    Ends, MAX_VOCABULARY, Pipeline, Segmentation, TokenBytes, Tokenizer, TokenizerError,
    byte_tensor,
};

/// The parts of a tokenizer in a file.
pub struct StoredTokenizer {
    /// JSON.
    pub settings: String,
    /// Tables by name.
    pub tables: Vec<(&'static str, Tensor)>,
}

const BYTES: &str = "bytes";
const STARTS: &str = "starts";
const FLAGS: &str = "flags";
const SPELLINGS: &str = "spellings";
const VOCABULARY: &str = "vocabulary";
const MERGES: &str = "merges";
const PIECES: &str = "pieces";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Settings {
    segmentation: SegmentationSettings,
    added: Vec<(u32, AddedToken)>,
    ends: Ends,
}

#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
enum SegmentationSettings {
    /// The stages as a `tokenizer.json` writes them; spellings, vocabulary and merges are tables.
    Bpe { normalizer: Option<Value>, pre_tokenizer: Option<Value>, model: BpeSettings },
    /// The table of pieces has it all.
    SentencePiece,
}

impl Tokenizer {
    /// The parts that [`from_stored`](Self::from_stored) makes the same tokenizer of.
    pub fn to_stored(&self) -> StoredTokenizer {
        let mut tables = vec![
            (BYTES, byte_tensor(&self.bytes.bytes)),
            (STARTS, byte_tensor(&self.bytes.starts)),
            (FLAGS, byte_tensor(&self.bytes.flags)),
        ];
        let segmentation = match &self.segmentation {
            Segmentation::Pipeline(pipeline) => {
                let Pipeline { normalizer, pre_tokenizer, model } = &**pipeline;
                tables.extend([SPELLINGS, VOCABULARY, MERGES].into_iter().zip(model.tables()));
                SegmentationSettings::Bpe {
                    normalizer: normalizer.as_ref().map(as_json),
                    pre_tokenizer: pre_tokenizer.as_ref().map(as_json),
                    model: model.settings.clone(),
                }
            }
            Segmentation::SentencePiece(rules) => {
                let pieces = as_json(rules.description()).to_string();
                tables.push((PIECES, byte_tensor(&pieces.into())));
                SegmentationSettings::SentencePiece
            }
        };
        let added = self.added_tokens.clone();
        let settings = Settings { segmentation, added, ends: self.ends.clone() };
        StoredTokenizer { settings: as_json(&settings).to_string(), tables }
    }

    /// Moves tables that lie in a mapped file into memory, so that the file is not needed any more.
    ///
    /// # Errors
    /// If the memory cannot be had.
    pub fn unmap(&mut self) -> Result<(), TokenizerError> {
        let StoredTokenizer { settings, mut tables } = self.to_stored();
        if !tables.iter().any(|(_, table)| is_mapped(table.data())) {
            return Ok(());
        }
        for (_, table) in &mut tables {
            let bytes = unmapped(table.data())
                .map_err(|error| TokenizerError::vocabulary(error.to_string()))?;
            *table = Tensor::new(table.dtype(), table.shape().to_vec(), bytes)
                .expect("a copy has the same length");
        }
        let table = |name: &str| {
            tables.iter().find(|(called, _)| *called == name).map(|(_, table)| table.clone())
        };
        *self = Self::from_stored(&settings, table)?;
        Ok(())
    }

    /// A tokenizer from its parts in a file. The tables are used where they lie, unread: numbers in
    /// them that make no sense give tokens that make none.
    ///
    /// # Errors
    /// A sentence about the setting or table that is missing or broken.
    pub fn from_stored(
        settings: &str,
        table: impl Fn(&str) -> Option<Tensor>,
    ) -> Result<Self, TokenizerError> {
        let settings: Settings = serde_json::from_str(settings).map_err(|error| {
            TokenizerError::vocabulary(format!("the tokenizer's settings are broken: {error}"))
        })?;
        let need = |name: &str| {
            table(name).ok_or_else(|| {
                TokenizerError::vocabulary(format!("the tokenizer's table `{name}` is missing"))
            })
        };
        let [bytes, starts, flags] = [need(BYTES)?, need(STARTS)?, need(FLAGS)?];
        let vocab_size = flags.data().len();
        if vocab_size > MAX_VOCABULARY || starts.data().len() != 4 * (vocab_size + 1) {
            return Err(TokenizerError::vocabulary(format!(
                "the tokenizer's tables contradict each other: {vocab_size} flags and {} bytes of \
                 offsets",
                starts.data().len()
            )));
        }
        let bytes = TokenBytes {
            bytes: bytes.data().clone(),
            starts: starts.data().clone(),
            flags: flags.data().clone(),
        };
        let segmentation = match settings.segmentation {
            SegmentationSettings::Bpe { normalizer, pre_tokenizer, model } => {
                let (spellings, merges) = (need(SPELLINGS)?, need(MERGES)?);
                Segmentation::Pipeline(Box::new(Pipeline {
                    normalizer: stage("normalizer", normalizer, NORMALIZERS)?,
                    pre_tokenizer: stage("pre_tokenizer", pre_tokenizer, PRE_TOKENIZERS)?,
                    model: Bpe::from_tables(model, &spellings, &need(VOCABULARY)?, &merges)?,
                }))
            }
            SegmentationSettings::SentencePiece => {
                let description: Description = serde_json::from_slice(need(PIECES)?.data())
                    .map_err(|error| {
                        TokenizerError::vocabulary(format!("the pieces are broken: {error}"))
                    })?;
                Segmentation::SentencePiece(Box::new(SentencePiece::new(description)?))
            }
        };
        let beyond = settings.added.iter().find(|(id, _)| *id as usize >= vocab_size);
        if let Some((id, _)) = beyond {
            return Err(TokenizerError::UnknownId { id: *id, vocab_size });
        }
        Self::assemble(segmentation, settings.added, bytes, settings.ends)
    }
}

fn as_json(value: &impl Serialize) -> Value {
    serde_json::to_value(value).expect("settings are texts, numbers and lists")
}
