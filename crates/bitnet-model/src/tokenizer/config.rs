//! `tokenizer_config.json` and `special_tokens_map.json`: what the vocabulary file leaves out.

use std::collections::BTreeMap;

use serde_json::{Map, Value};
use tokenizers::AddedToken;

use super::TokenizerError;

/// The facts of `tokenizer_config.json`, completed by `special_tokens_map.json`. All are optional.
#[derive(Debug, Clone, Default)]
pub struct TokenizerConfig {
    /// The begin token's name.
    pub bos_token: Option<String>,
    /// The end token's name.
    pub eos_token: Option<String>,
    /// The name of the token that stands for what the vocabulary cannot express.
    pub unk_token: Option<String>,
    /// The padding token's name.
    pub pad_token: Option<String>,
    /// Whether texts begin with the begin token, where the file says so.
    pub add_bos: Option<bool>,
    /// Whether texts end with the end token, where the file says so.
    pub add_eos: Option<bool>,
    /// Whether each text between special tokens gets SentencePiece's first space (`true`, the
    /// default), or only one that begins the whole text.
    pub legacy: Option<bool>,
    /// The `chat_template` entry: a string, or a list of named templates.
    pub chat_template: Option<Value>,
    /// Tokens beside the vocabulary file's, by id.
    pub(super) added_tokens: BTreeMap<u32, AddedToken>,
}

impl TokenizerConfig {
    /// Reads the bytes of the two files; either may be absent.
    ///
    /// # Errors
    /// A sentence that names the file and entry that is not what it should be.
    pub fn from_json(
        tokenizer_config: Option<&[u8]>,
        special_tokens_map: Option<&[u8]>,
    ) -> Result<Self, TokenizerError> {
        let mut config = object("tokenizer_config.json", tokenizer_config)?;
        let map = object("special_tokens_map.json", special_tokens_map)?;
        let token = |key: &str| -> Result<Option<String>, TokenizerError> {
            match token_name("tokenizer_config.json", key, &config)? {
                Some(name) => Ok(Some(name)),
                None => token_name("special_tokens_map.json", key, &map),
            }
        };
        Ok(TokenizerConfig {
            bos_token: token("bos_token")?,
            eos_token: token("eos_token")?,
            unk_token: token("unk_token")?,
            pad_token: token("pad_token")?,
            add_bos: flag("add_bos_token", &config)?,
            add_eos: flag("add_eos_token", &config)?,
            legacy: flag("legacy", &config)?,
            added_tokens: added_tokens(&config)?,
            chat_template: config.remove("chat_template").filter(|entry| !entry.is_null()),
        })
    }
}

fn object(file: &str, bytes: Option<&[u8]>) -> Result<Map<String, Value>, TokenizerError> {
    let Some(bytes) = bytes else { return Ok(Map::new()) };
    serde_json::from_slice(bytes)
        .map_err(|error| TokenizerError::vocabulary(format!("{file} cannot be read: {error}")))
}

/// A token's name: a string, or an object with its `content`.
fn token_name(
    file: &str,
    key: &str,
    entries: &Map<String, Value>,
) -> Result<Option<String>, TokenizerError> {
    match entries.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(name)) => Ok(Some(name.clone())),
        Some(entry) => match entry.get("content").and_then(Value::as_str) {
            Some(name) => Ok(Some(name.to_owned())),
            None => Err(TokenizerError::vocabulary(format!(
                "{file}: `{key}` must be a token's name, not {entry}"
            ))),
        },
    }
}

fn flag(key: &str, entries: &Map<String, Value>) -> Result<Option<bool>, TokenizerError> {
    match entries.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(*value)),
        Some(entry) => Err(TokenizerError::vocabulary(format!(
            "tokenizer_config.json: `{key}` must be true or false, not {entry}"
        ))),
    }
}

/// The entry `added_tokens_decoder`: id as a string, to the token's properties.
fn added_tokens(entries: &Map<String, Value>) -> Result<BTreeMap<u32, AddedToken>, TokenizerError> {
    let Some(Value::Object(tokens)) = entries.get("added_tokens_decoder") else {
        return Ok(BTreeMap::new());
    };
    tokens
        .iter()
        .map(|(id, token)| {
            let parsed = id.parse::<u32>().ok().zip(added_token(token));
            parsed.ok_or_else(|| {
                TokenizerError::vocabulary(format!(
                    "tokenizer_config.json: `added_tokens_decoder` has a broken entry `{id}`"
                ))
            })
        })
        .collect()
}

/// A token with its properties, as `tokenizer.json` and `tokenizer_config.json` write it.
pub(super) fn added_token(entry: &Value) -> Option<AddedToken> {
    let property = |key: &str, absent: bool| entry.get(key).map_or(Some(absent), Value::as_bool);
    let special = property("special", false)?;
    Some(
        AddedToken::from(entry.get("content")?.as_str()?, special)
            .single_word(property("single_word", false)?)
            .lstrip(property("lstrip", false)?)
            .rstrip(property("rstrip", false)?)
            .normalized(property("normalized", !special)?),
    )
}
