//! From what a user calls a model to its tensors and description: the built-in model, a Hugging
//! Face directory, a GGUF file, or a native file; with the feature `hub` also the name of a model that is in
//! the cache of the Hugging Face hub.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_core::mmap::map_file;
use bytes::Bytes;
use serde_json::Value;

use crate::arch;
use crate::chat::ChatTemplate;
use crate::config::{Hyperparameters, ModelConfig, Pooling};
use crate::error::Error;
use crate::formats::gguf::{self, GgufFile};
use crate::formats::{self, Tensors, native, safetensors};
use crate::known;
use crate::tokenizer::{GgufVocabulary, Tokenizer, TokenizerConfig, token_ids_in_json};

/// The name of the model that is built into the program.
pub const TINY: &str = "tiny";

/// Everything about a model but its weights.
pub struct Description {
    /// Where it was read from.
    pub path: PathBuf,
    /// Format of the weights, for people.
    pub format: &'static str,
    /// Shape and rules of the decoder.
    pub config: ModelConfig,
    /// Text to tokens and back; shared with whatever outlives the description.
    pub tokenizer: Arc<Tokenizer>,
    /// The chat template, if there is one.
    pub template: Option<ChatTemplate>,
    /// Ids that end a text or a turn.
    pub end_ids: BTreeSet<u32>,
    /// What was corrected or decided because the files are wrong or silent, for people.
    pub notes: Vec<String>,
}

/// A model's description and its tensors, mapped and checked but not yet loaded.
pub struct Checkpoint {
    /// All but the weights.
    pub description: Description,
    /// The weights as they are stored.
    pub tensors: Tensors,
}

/// Opens `model`: `tiny`, a directory, or a file; with the feature `hub` also `org/name[@revision][:FILE]`, which
/// is looked up in the cache. Nothing is downloaded: [`hub::fetch`](crate::hub::fetch) does that.
pub fn open(model: &str) -> Result<Checkpoint, Error> {
    if model == TINY {
        return open_tiny();
    }
    let path = &the_file(model)?;
    if path.is_dir() { open_directory(path, path) } else { open_file(path) }
}

/// Compares the tensors of a native file, or of the one in a folder, with their checksums, and
/// returns how many there are. Opening does not: it would have to read all of them.
pub fn verify_checksums(model: &str) -> Result<usize, Error> {
    if model == TINY {
        return Err(Error::file(Path::new(TINY), "is built in and has no checksums"));
    }
    native::verify(&the_file(model)?)
}

/// The file of a model that is one file, else its folder.
fn the_file(model: &str) -> Result<PathBuf, Error> {
    let path = Path::new(model);
    if !path.exists() {
        #[cfg(feature = "hub")]
        if let Some(name) = crate::hub::HubName::parse(model) {
            return Ok(crate::hub::cached(&name)?);
        }
        return Err(Error::file(
            path,
            "no such file or directory; give the folder of a Hugging Face checkpoint, a .gguf \
             or .bitnet file, or `tiny` for the model that is built in",
        ));
    }
    if !path.is_dir() {
        return Ok(path.to_owned());
    }
    let mut files = native_files(path)?;
    match files.len() {
        1 => Ok(files.remove(0)),
        2.. if !path.join("config.json").exists() => {
            Err(Error::file(path, "has several .bitnet files: give the path of one of them"))
        }
        _ => Ok(path.to_owned()),
    }
}

/// The native files in a folder. One alone is the folder's model: it was made to be opened.
fn native_files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let unreadable =
        |error: std::io::Error| Error::file(folder, format!("cannot be read: {error}"));
    let mut files = Vec::new();
    for entry in fs::read_dir(folder).map_err(unreadable)? {
        let path = entry.map_err(unreadable)?.path();
        if path.extension().is_some_and(|extension| extension == native::EXTENSION)
            && path.is_file()
        {
            files.push(path);
        }
    }
    Ok(files)
}

/// The names of the files that [`Sidecars`] holds. Of the two vocabularies the first that is there is read.
#[cfg(feature = "hub")]
pub(crate) const SIDECAR_FILES: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    POOLING_FILE,
];

/// The files of a Hugging Face checkpoint besides its weights, as bytes.
#[derive(Debug, Clone, Copy)]
pub struct Sidecars<'a> {
    /// The model's path, for error messages.
    pub path: &'a Path,
    /// `config.json`.
    pub config: &'a [u8],
    /// `generation_config.json`.
    pub generation_config: Option<&'a [u8]>,
    /// The vocabulary.
    pub vocabulary: Vocabulary<'a>,
    /// `tokenizer_config.json`.
    pub tokenizer_config: Option<&'a [u8]>,
    /// `special_tokens_map.json`.
    pub special_tokens_map: Option<&'a [u8]>,
    /// `chat_template.jinja`, which stands before the entry in `tokenizer_config.json`.
    pub chat_template: Option<&'a [u8]>,
    /// `1_Pooling/config.json` of an embedding model.
    pub pooling: Option<&'a [u8]>,
}

/// The file that has the vocabulary.
#[derive(Debug, Clone, Copy)]
pub enum Vocabulary<'a> {
    /// `tokenizer.json`.
    Json(&'a [u8]),
    /// SentencePiece's `tokenizer.model`, where there is no `tokenizer.json`.
    SentencePiece(&'a [u8]),
}

impl Vocabulary<'_> {
    fn file_name(&self) -> &'static str {
        match self {
            Vocabulary::Json(_) => "tokenizer.json",
            Vocabulary::SentencePiece(_) => "tokenizer.model",
        }
    }
}

fn open_tiny() -> Result<Checkpoint, Error> {
    macro_rules! tiny {
        ($name:literal) => {
            include_bytes!(concat!("../../../models/tiny/", $name)).as_slice()
        };
    }
    let path = Path::new(TINY);
    let mut tensors = Tensors::default();
    let weights = Bytes::from_static(tiny!("model.safetensors"));
    safetensors::from_bytes(weights, path, &mut tensors)?;
    let sidecars = Sidecars {
        path,
        config: tiny!("config.json"),
        generation_config: Some(tiny!("generation_config.json")),
        vocabulary: Vocabulary::Json(tiny!("tokenizer.json")),
        tokenizer_config: Some(tiny!("tokenizer_config.json")),
        special_tokens_map: Some(tiny!("special_tokens_map.json")),
        chat_template: None,
        pooling: None,
    };
    describe(sidecars, tensors, "built in (safetensors)")
}

/// Opens a Hugging Face directory with the weights in `weights`: the directory itself, or one file.
fn open_directory(path: &Path, weights: &Path) -> Result<Checkpoint, Error> {
    let read = |name: &str| match fs::read(path.join(name)) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::file(&path.join(name), format!("cannot be read: {error}"))),
    };
    let missing = |name: &str| {
        Error::file(path, format!("has no {name}: it is not a whole Hugging Face checkpoint"))
    };
    let config = read("config.json")?.ok_or_else(|| missing("config.json"))?;
    let json = read("tokenizer.json")?;
    let pieces = if json.is_some() { None } else { read("tokenizer.model")? };
    let vocabulary = match (&json, &pieces) {
        (Some(json), _) => Vocabulary::Json(json),
        (None, Some(pieces)) => Vocabulary::SentencePiece(pieces),
        (None, None) => return Err(missing("tokenizer.json or tokenizer.model")),
    };
    let generation_config = read("generation_config.json")?;
    let tokenizer_config = read("tokenizer_config.json")?;
    let special_tokens_map = read("special_tokens_map.json")?;
    let chat_template = read("chat_template.jinja")?;
    let pooling = read(POOLING_FILE)?;
    let tensors = formats::read_checkpoint(weights)?;
    let sidecars = Sidecars {
        path,
        config: &config,
        generation_config: generation_config.as_deref(),
        vocabulary,
        tokenizer_config: tokenizer_config.as_deref(),
        special_tokens_map: special_tokens_map.as_deref(),
        chat_template: chat_template.as_deref(),
        pooling: pooling.as_deref(),
    };
    describe(sidecars, tensors, "Hugging Face")
}

/// Opens a native or GGUF file, or the weights of the Hugging Face checkpoint in whose directory they lie.
fn open_file(path: &Path) -> Result<Checkpoint, Error> {
    let bytes = map_file(path)?;
    if bytes.starts_with(gguf::MAGIC) {
        return describe_gguf(gguf::from_bytes(bytes, path)?, path);
    }
    let is_called =
        |name: &str| path.extension().is_some_and(|extension| extension.eq_ignore_ascii_case(name));
    if native::is_native(&bytes) || is_called(native::EXTENSION) {
        return native::from_bytes(bytes, path);
    }
    if is_called("gguf") {
        return Err(Error::file(
            path,
            "is not a GGUF file: it does not begin with `GGUF`; download the file again",
        ));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty());
    open_directory(directory.unwrap_or(Path::new(".")), path)
}

/// Puts a GGUF file together. `path` is for error messages.
pub fn describe_gguf(file: GgufFile, path: &Path) -> Result<Checkpoint, Error> {
    let GgufFile { metadata, tensors } = file;
    let mut notes = Vec::new();
    let name: &str = metadata.require("general.architecture")?;
    let Some(architecture) = arch::for_gguf(name) else {
        return Err(Error::file(
            path,
            format!(
                "`general.architecture` is `{}`, which is not supported; known are {}",
                name.escape_debug(),
                arch::known_names()
            ),
        ));
    };
    let h = Hyperparameters::from_gguf(path, &metadata, name, &tensors);
    let config = (architecture.describe)(&h, &mut notes)?;

    let vocabulary = GgufVocabulary::from_metadata(&metadata)?;
    let (tokenizer, tokenizer_notes) =
        Tokenizer::from_gguf(vocabulary).map_err(|error| Error::file(path, error))?;
    notes.extend(tokenizer_notes);
    let mut named = Vec::new();
    for key in ["eos", "eot", "eom"] {
        named.extend(metadata.get::<u32>(&format!("tokenizer.ggml.{key}_token_id"))?);
    }
    let end_ids = tokenizer.end_ids(&named).into_iter().collect();
    let template = known::template(name, metadata.get("tokenizer.chat_template")?, &mut notes)
        .map(ChatTemplate::new)
        .transpose()
        .map_err(|error| Error::file(path, error))?;
    let (path, tokenizer) = (path.to_owned(), Arc::new(tokenizer));
    let format = "GGUF";
    let description = Description { path, format, config, tokenizer, template, end_ids, notes };
    Ok(Checkpoint { description, tensors })
}

/// Where sentence-transformers keeps the pooling of an embedding model.
const POOLING_FILE: &str = "1_Pooling/config.json";

fn stated_pooling(path: &Path, bytes: &[u8]) -> Result<Pooling, Error> {
    let json = parse_json(path, bytes)?;
    let on = |key: &str| json.get(key) == Some(&Value::Bool(true));
    match (on("pooling_mode_lasttoken"), on("pooling_mode_mean_tokens")) {
        (true, false) => Ok(Pooling::Last),
        (false, true) => Ok(Pooling::Mean),
        _ => Err(Error::file(path, "asks for neither last-token nor mean pooling alone")),
    }
}

/// Parses a JSON file of a checkpoint.
fn parse_json(path: &Path, bytes: &[u8]) -> Result<Value, Error> {
    serde_json::from_slice(bytes)
        .map_err(|error| Error::file(path, format!("is not valid JSON: {error}")))
}

/// `architectures` of a `config.json`.
fn classes(config: &Value) -> Vec<&str> {
    let classes = config.get("architectures").and_then(Value::as_array);
    classes.into_iter().flatten().filter_map(Value::as_str).collect()
}

/// Whether a checkpoint in a folder, or the weights in a file, have an architecture that is read.
#[cfg(feature = "hub")]
pub(crate) fn has_known_architecture(path: &Path) -> bool {
    let is_called = |name: &str| path.extension().is_some_and(|e| e.eq_ignore_ascii_case(name));
    if is_called(native::EXTENSION) {
        return true;
    }
    if is_called("gguf") {
        let name = gguf::read(path).ok().and_then(|file| {
            let name: Option<&str> = file.metadata.get("general.architecture").ok()?;
            name.map(str::to_owned)
        });
        return name.is_some_and(|name| arch::for_gguf(&name).is_some());
    }
    let folder = if path.is_dir() { path } else { path.parent().unwrap_or(path) };
    let config = fs::read(folder.join("config.json")).ok();
    let json = config.and_then(|bytes| serde_json::from_slice::<Value>(&bytes).ok());
    json.is_some_and(|json| classes(&json).iter().any(|class| arch::for_class(class).is_some()))
}

/// Puts a Hugging Face checkpoint together. `format` is what people are told about its weights.
pub fn describe(
    files: Sidecars<'_>,
    tensors: Tensors,
    format: &'static str,
) -> Result<Checkpoint, Error> {
    let mut notes = Vec::new();
    let config_path = files.path.join("config.json");
    let json = parse_json(&config_path, files.config)?;
    let classes = classes(&json);
    let Some(architecture) = classes.iter().find_map(|class| arch::for_class(class)) else {
        return Err(Error::file(
            &config_path,
            format!(
                "`architectures` is {classes:?}, which is not supported; known are {}",
                arch::known_names()
            ),
        ));
    };
    let h = Hyperparameters::from_json(&config_path, &json, &tensors);
    let mut config = (architecture.describe)(&h, &mut notes)?;
    if config.pooling.is_some()
        && let Some(bytes) = files.pooling
    {
        config.pooling = Some(stated_pooling(&files.path.join(POOLING_FILE), bytes)?);
    }

    let tokenizer_config =
        TokenizerConfig::from_json(files.tokenizer_config, files.special_tokens_map)
            .map_err(|error| Error::file(files.path, error))?;
    let tokenizer = match files.vocabulary {
        Vocabulary::Json(bytes) => Tokenizer::from_json(bytes, &tokenizer_config),
        Vocabulary::SentencePiece(bytes) => Tokenizer::from_sentencepiece(bytes, &tokenizer_config),
    }
    .map_err(|error| Error::file(&files.path.join(files.vocabulary.file_name()), error))?;

    let template = match (files.chat_template, &tokenizer_config.chat_template) {
        (Some(source), _) => {
            let in_template =
                |reason: String| Error::file(&files.path.join("chat_template.jinja"), reason);
            let source = std::str::from_utf8(source)
                .map_err(|error| in_template(format!("is not UTF-8: {error}")))?;
            Some(ChatTemplate::new(source).map_err(|error| in_template(error.to_string()))?)
        }
        (None, Some(entry)) => {
            let path = files.path.join("tokenizer_config.json");
            Some(ChatTemplate::from_entry(entry).map_err(|error| Error::file(&path, error))?)
        }
        (None, None) => None,
    };

    let mut named = token_ids_in_json(json.get("eos_token_id"))
        .map_err(|error| Error::file(&config_path, error))?;
    if let Some(bytes) = files.generation_config {
        let path = files.path.join("generation_config.json");
        let json = parse_json(&path, bytes)?;
        named.extend(
            token_ids_in_json(json.get("eos_token_id"))
                .map_err(|error| Error::file(&path, error))?,
        );
    }
    let end_ids = tokenizer.end_ids(&named).into_iter().collect();
    let (path, tokenizer) = (files.path.to_owned(), Arc::new(tokenizer));
    let description = Description { path, format, config, tokenizer, template, end_ids, notes };
    Ok(Checkpoint { description, tensors })
}
