//! Hugging Face's `tokenizer.json`.
//!
//! The normaliser and the pre-tokeniser run in the `tokenizers` crate; the file is read here, because
//! a hostile one can make that crate panic (merges longer than any token) and because it does not
//! keep the ids that the file gives to added tokens.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::{AddedToken, NormalizerWrapper, PreTokenizerWrapper};

use super::bpe::{Bpe, BpeSettings};
use super::byte_level::Spelling;
use super::config::{TokenizerConfig, added_token};
use super::{LeadingSpace, Parts, Pipeline, Segmentation, Tokenizer, TokenizerError};

pub(super) const NORMALIZERS: &[&str] =
    &["Sequence", "NFC", "NFD", "NFKC", "NFKD", "Lowercase", "Prepend", "Replace", "Strip"];
pub(super) const PRE_TOKENIZERS: &[&str] = &[
    "Sequence",
    "Split",
    "ByteLevel",
    "Metaspace",
    "Digits",
    "Punctuation",
    "Whitespace",
    "WhitespaceSplit",
];

#[derive(Deserialize)]
struct File {
    #[serde(default)]
    added_tokens: Vec<Value>,
    normalizer: Option<Value>,
    pre_tokenizer: Option<Value>,
    post_processor: Option<Value>,
    decoder: Option<Value>,
    model: FileModel,
}

#[derive(Deserialize)]
struct FileModel {
    /// Files from before the entry existed hold BPE if they hold merges.
    r#type: Option<String>,
    #[serde(default)]
    vocab: Value,
    #[serde(default)]
    merges: Vec<Merge>,
    dropout: Option<f32>,
    unk_token: Option<String>,
    continuing_subword_prefix: Option<String>,
    end_of_word_suffix: Option<String>,
    #[serde(default)]
    fuse_unk: bool,
    #[serde(default)]
    byte_fallback: bool,
    #[serde(default)]
    ignore_merges: bool,
}

/// Newer files write a merge as a pair, older ones as one string with a space.
#[derive(Deserialize)]
#[serde(untagged)]
enum Merge {
    Pair(String, String),
    Joined(String),
}

impl Tokenizer {
    /// From the bytes of a `tokenizer.json`, with what `tokenizer_config.json` adds to it.
    ///
    /// # Errors
    /// A sentence about the first entry that is broken or asks for a stage we do not have. Only BPE
    /// vocabularies are read: every ternary model we know of has one.
    pub fn from_json(bytes: &[u8], config: &TokenizerConfig) -> Result<Self, TokenizerError> {
        let file: File = serde_json::from_slice(bytes).map_err(|error| {
            TokenizerError::vocabulary(format!("this is not a tokenizer.json: {error}"))
        })?;
        let normalizer: Option<NormalizerWrapper> =
            stage("normalizer", file.normalizer, NORMALIZERS)?;
        let pre_tokenizer: Option<PreTokenizerWrapper> =
            stage("pre_tokenizer", file.pre_tokenizer, PRE_TOKENIZERS)?;
        let decoding = Decoding::read(file.decoder.as_ref())?;

        let FileModel { r#type, vocab, merges, .. } = &file.model;
        let kind = r#type.as_deref().or((!merges.is_empty()).then_some("BPE"));
        if kind != Some("BPE") {
            return Err(TokenizerError::vocabulary(format!(
                "the tokenizer's model is {}, and only BPE is read",
                kind.unwrap_or("of no named type")
            )));
        }
        let refused = [
            ("dropout", file.model.dropout.is_some_and(|dropout| dropout != 0.0)),
            ("continuing_subword_prefix", is_text(&file.model.continuing_subword_prefix)),
            ("end_of_word_suffix", is_text(&file.model.end_of_word_suffix)),
        ];
        if let Some((entry, _)) = refused.iter().find(|(_, present)| *present) {
            return Err(TokenizerError::vocabulary(format!(
                "the tokenizer's model uses `{entry}`, which is not supported"
            )));
        }

        let vocab = HashMap::<String, u32>::deserialize(vocab).map_err(|error| {
            TokenizerError::vocabulary(format!("the tokenizer's `vocab` is broken: {error}"))
        })?;
        let merges = merges
            .iter()
            .map(|merge| match merge {
                Merge::Pair(left, right) => Ok((left.clone(), right.clone())),
                Merge::Joined(joined) => split_merge(joined),
            })
            .collect::<Result<Vec<_>, _>>()?;

        let mut added = file
            .added_tokens
            .iter()
            .map(|entry| {
                let id = entry.get("id").and_then(Value::as_u64);
                let id = id.and_then(|id| u32::try_from(id).ok());
                id.zip(added_token(entry)).ok_or_else(|| {
                    TokenizerError::vocabulary(format!("the added token {entry} is broken"))
                })
            })
            .collect::<Result<Vec<(u32, AddedToken)>, _>>()?;
        let in_file: HashSet<u32> = added.iter().map(|(id, _)| *id).collect();
        let beside = config.added_tokens.iter().filter(|(id, _)| !in_file.contains(*id));
        added.extend(beside.map(|(id, token)| (*id, token.clone())));
        for (id, token) in &added {
            if let Some(other) = vocab.get(&token.content).filter(|other| *other != id) {
                return Err(TokenizerError::vocabulary(format!(
                    "the token `{}` has id {id} as an added token and {other} in the vocabulary",
                    token.content
                )));
            }
        }
        let id_of = |name: &str| {
            let added = added.iter().find(|(_, token)| token.content == name);
            added.map(|(id, _)| *id).or_else(|| vocab.get(name).copied())
        };
        let named = |role: &str, name: &Option<String>| -> Result<Option<u32>, TokenizerError> {
            let Some(name) = name else { return Ok(None) };
            id_of(name).map(Some).ok_or_else(|| {
                TokenizerError::vocabulary(format!("the {role} token `{name}` has no id"))
            })
        };
        let mut around = Around::default();
        around.read(file.post_processor.as_ref(), &id_of)?;
        let bos = named("begin", &config.bos_token)?.or(around.prefix.first().copied());
        let eos = named("end", &config.eos_token)?;
        apply_flag(config.add_bos, bos, &mut around.prefix);
        apply_flag(config.add_eos, eos, &mut around.suffix);

        let mut bytes = HashMap::with_capacity(vocab.len());
        for (token, id) in &vocab {
            if bytes.insert(*id, decoding.bytes_of(token)).is_some() {
                return Err(TokenizerError::vocabulary(format!(
                    "two tokens of the vocabulary have id {id}"
                )));
            }
        }
        let settings = BpeSettings {
            unk_token: file.model.unk_token,
            fuse_unk: file.model.fuse_unk,
            byte_fallback: file.model.byte_fallback,
            ignore_merges: file.model.ignore_merges,
        };
        let model = Bpe::new(settings, &vocab, &merges)?;
        Tokenizer::new(Parts {
            segmentation: Segmentation::Pipeline(Box::new(Pipeline {
                normalizer,
                pre_tokenizer,
                model,
            })),
            added,
            bytes,
            prefix: around.prefix,
            suffix: around.suffix,
            bos,
            eos,
            leading_space: decoding.leading_space(),
        })
    }
}

fn is_text(entry: &Option<String>) -> bool {
    entry.as_ref().is_some_and(|text| !text.is_empty())
}

/// A stage of the `tokenizers` crate, if all its kinds are among those we let in.
pub(super) fn stage<T: for<'de> Deserialize<'de>>(
    what: &str,
    entry: Option<Value>,
    known: &[&str],
) -> Result<Option<T>, TokenizerError> {
    let Some(entry) = entry.filter(|entry| !entry.is_null()) else { return Ok(None) };
    let mut open = vec![&entry];
    while let Some(stage) = open.pop() {
        let kind = stage.get("type").and_then(Value::as_str).unwrap_or("of no type");
        if !known.contains(&kind) {
            return Err(TokenizerError::vocabulary(format!(
                "the tokenizer's {what} is {kind}, which is not supported"
            )));
        }
        let inner = stage.get("normalizers").or(stage.get("pretokenizers"));
        open.extend(inner.and_then(Value::as_array).into_iter().flatten());
    }
    T::deserialize(entry).map(Some).map_err(|error| {
        TokenizerError::vocabulary(format!("the tokenizer's {what} is broken: {error}"))
    })
}

/// A merge written as one string: `Ġ t`.
pub(super) fn split_merge(joined: &str) -> Result<(String, String), TokenizerError> {
    match joined.split_once(' ') {
        Some((left, right)) if !right.contains(' ') => Ok((left.to_owned(), right.to_owned())),
        _ => Err(TokenizerError::vocabulary(format!(
            "the merge `{joined}` is not two tokens with a space between them"
        ))),
    }
}

/// Adds or removes a token at the ends of texts where a configuration says so.
fn apply_flag(wanted: Option<bool>, token: Option<u32>, ids: &mut Vec<u32>) {
    let (Some(wanted), Some(token)) = (wanted, token) else { return };
    if !wanted {
        ids.retain(|id| *id != token);
    } else if !ids.contains(&token) {
        ids.insert(0, token);
    }
}

/// The ids that the post-processor puts around a text.
#[derive(Default)]
struct Around {
    prefix: Vec<u32>,
    suffix: Vec<u32>,
}

impl Around {
    fn read(
        &mut self,
        entry: Option<&Value>,
        id_of: &impl Fn(&str) -> Option<u32>,
    ) -> Result<(), TokenizerError> {
        let Some(entry) = entry.filter(|entry| !entry.is_null()) else { return Ok(()) };
        let broken = || TokenizerError::vocabulary("the tokenizer's TemplateProcessing is broken");
        match entry.get("type").and_then(Value::as_str) {
            // It moves offsets, which we do not keep.
            Some("ByteLevel") => Ok(()),
            Some("Sequence") => {
                let processors = entry.get("processors").and_then(Value::as_array);
                processors.into_iter().flatten().try_for_each(|inner| self.read(Some(inner), id_of))
            }
            Some("TemplateProcessing") => {
                let single = entry.get("single").and_then(Value::as_array).ok_or_else(broken)?;
                let mut seen_text = false;
                for piece in single {
                    if piece.get("Sequence").is_some() {
                        seen_text = true;
                        continue;
                    }
                    let name = piece.pointer("/SpecialToken/id").and_then(Value::as_str);
                    let name = name.ok_or_else(broken)?;
                    let id = id_of(name).ok_or_else(|| {
                        TokenizerError::vocabulary(format!(
                            "the tokenizer's TemplateProcessing uses `{name}`, which has no id"
                        ))
                    })?;
                    if seen_text { &mut self.suffix } else { &mut self.prefix }.push(id);
                }
                Ok(())
            }
            kind => Err(TokenizerError::vocabulary(format!(
                "the tokenizer's post_processor is {}, which is not supported",
                kind.unwrap_or("of no type")
            ))),
        }
    }
}

/// How the tokens of the vocabulary spell bytes.
enum Decoding {
    /// One character per byte.
    ByteLevel(Box<Spelling>),
    /// `▁` is a space; with byte fallback, `<0x0A>` is that byte.
    Metaspace { byte_fallback: bool, leading_space: LeadingSpace },
}

impl Decoding {
    fn read(entry: Option<&Value>) -> Result<Self, TokenizerError> {
        let refused = |kind: &str| {
            TokenizerError::vocabulary(format!(
                "the tokenizer's decoder is {kind}, which is not supported"
            ))
        };
        let entry = entry.filter(|entry| !entry.is_null()).ok_or_else(|| refused("absent"))?;
        let stages = match entry.get("decoders").and_then(Value::as_array) {
            Some(stages) => stages.iter().collect(),
            None => vec![entry],
        };
        let mut byte_fallback = false;
        let mut leading_space = LeadingSpace::Kept;
        for stage in &stages {
            match stage.get("type").and_then(Value::as_str) {
                Some("ByteLevel") if stages.len() == 1 => {
                    return Ok(Decoding::ByteLevel(Box::new(Spelling::new())));
                }
                Some("ByteFallback") => byte_fallback = true,
                Some("Fuse") => {}
                Some("Replace")
                    if stage.pointer("/pattern/String") == Some(&"▁".into())
                        && stage.get("content") == Some(&" ".into()) => {}
                Some("Strip")
                    if stage.get("content") == Some(&" ".into())
                        && stage.get("stop") == Some(&0.into()) =>
                {
                    if stage.get("start") == Some(&1.into()) {
                        leading_space = LeadingSpace::Dropped;
                    }
                }
                Some("Metaspace") if stage.get("replacement") == Some(&"▁".into()) => {
                    if stage.get("prepend_scheme") != Some(&"never".into())
                        && stage.get("add_prefix_space") != Some(&false.into())
                    {
                        leading_space = LeadingSpace::Dropped;
                    }
                }
                kind => return Err(refused(kind.unwrap_or("of no type"))),
            }
        }
        Ok(Decoding::Metaspace { byte_fallback, leading_space })
    }

    fn bytes_of(&self, token: &str) -> Vec<u8> {
        match self {
            Decoding::ByteLevel(spelling) => spelling.bytes_of(token),
            Decoding::Metaspace { byte_fallback, .. } => match byte_of_name(token) {
                Some(byte) if *byte_fallback => vec![byte],
                _ => token.replace('▁', " ").into_bytes(),
            },
        }
    }

    fn leading_space(&self) -> LeadingSpace {
        match self {
            Decoding::ByteLevel(_) => LeadingSpace::Kept,
            Decoding::Metaspace { leading_space, .. } => *leading_space,
        }
    }
}

/// The byte that a token named `<0x0A>` stands for.
pub(super) fn byte_of_name(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let is_hex = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    is_hex.then(|| u8::from_str_radix(digits, 16).expect("two hexadecimal digits"))
}
