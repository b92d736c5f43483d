//! Which files of a repository are a model: what the readers read, in one form.

use std::collections::BTreeSet;
use std::path::Path;

use super::error::HubError;
use super::name::HubName;
use crate::formats::index::ShardIndex;
use crate::formats::{self, native};
use crate::source::SIDECAR_FILES;

/// The files of one model.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Selection {
    /// All of them, the weights last.
    pub files: Vec<String>,
    /// The file to open; `None` for the folder.
    pub opened: Option<String>,
    /// Format of the weights, for people.
    pub format: &'static str,
    /// Whether the model can be used with these files alone.
    pub has_tokenizer: bool,
}

/// What the names of GGUF files with ternary weights usually have in them.
const TERNARY_TYPES: [&str; 4] = ["i2_s", "tq1_0", "tq2_0", "q2_0"];

/// Most file names in a message.
const MAX_NAMED: usize = 12;

/// Chooses from the `files` of a repository: the file that `name` asks for; or a `.bitnet` file, a
/// checkpoint in the order in which a folder is read, a GGUF file. `read` gets the contents of an index.
///
/// # Errors
/// If there is nothing to read, or several things and no reason to prefer one; if `read` fails.
pub(super) fn select(
    name: &HubName,
    files: &BTreeSet<String>,
    mut read: impl FnMut(&str) -> Result<Vec<u8>, HubError>,
) -> Result<Selection, HubError> {
    let refuse = |reason: String| Err(HubError::Files { name: name.to_string(), reason });
    let ending_in = |ending: &str| -> Vec<&String> {
        files.iter().filter(|file| ends_in(file, ending)).collect()
    };
    let (natives, ggufs) = (ending_in(native::EXTENSION), ending_in("gguf"));
    if let Some(file) = &name.file {
        if !files.contains(file) {
            let known: Vec<_> = natives.into_iter().chain(ggufs).collect();
            let has = if known.is_empty() {
                String::new()
            } else {
                format!("; it has {}", listed(&known))
            };
            return refuse(format!("has no file `{file}`{has}"));
        }
        if ends_in(file, native::EXTENSION) {
            return Ok(Selection::of_one(file, "native"));
        }
        if ends_in(file, "gguf") {
            return Ok(Selection::of_one(file, "GGUF"));
        }
        return checkpoint(name, files, file, Some(file), &mut read);
    }

    let is_checkpoint = files.contains("config.json");
    match natives.as_slice() {
        [file] => return Ok(Selection::of_one(file, "native")),
        [_, ..] if !is_checkpoint => return refuse(several(name, &natives)),
        _ => {}
    }
    if is_checkpoint
        && let Some(weights) = formats::checkpoint_files().find(|weights| files.contains(*weights))
    {
        return checkpoint(name, files, weights, None, &mut read);
    }
    let ternary: Vec<_> = ggufs
        .iter()
        .copied()
        .filter(|file| {
            let file = file.to_ascii_lowercase();
            TERNARY_TYPES.iter().any(|name| file.contains(name))
        })
        .collect();
    match (ggufs.as_slice(), ternary.as_slice()) {
        ([file], _) | (_, [file]) => Ok(Selection::of_one(file, "GGUF")),
        ([], _) => refuse(
            "has no model that can be read: neither config.json with model.safetensors or \
             pytorch_model.bin, nor a .gguf or .bitnet file"
                .to_owned(),
        ),
        (_, []) => refuse(several(name, &ggufs)),
        _ => refuse(several(name, &ternary)),
    }
}

impl Selection {
    fn of_one(file: &str, format: &'static str) -> Self {
        let file = file.to_owned();
        Selection { files: vec![file.clone()], opened: Some(file), format, has_tokenizer: true }
    }
}

/// A Hugging Face checkpoint with these weights, or this index of weights, and what lies beside them.
fn checkpoint(
    name: &HubName,
    files: &BTreeSet<String>,
    weights: &str,
    opened: Option<&str>,
    read: &mut impl FnMut(&str) -> Result<Vec<u8>, HubError>,
) -> Result<Selection, HubError> {
    let folder = weights.rfind('/').map_or("", |slash| &weights[..=slash]);
    let beside = |file: &str| format!("{folder}{file}");
    let has_json = files.contains(&beside("tokenizer.json"));
    let mut chosen: Vec<String> = SIDECAR_FILES
        .into_iter()
        .filter(|file| !(has_json && *file == "tokenizer.model"))
        .map(beside)
        .filter(|file| files.contains(file))
        .collect();
    let has_tokenizer = has_json || files.contains(&beside("tokenizer.model"));
    if ends_in(weights, "json") {
        let index =
            ShardIndex::from_bytes(&read(weights)?, Path::new(weights)).map_err(|error| {
                HubError::Files { name: name.to_string(), reason: error.to_string() }
            })?;
        let shards: Vec<String> = index.shards().map(|(shard, _)| beside(shard)).collect();
        if let Some(missing) = shards.iter().find(|shard| !files.contains(*shard)) {
            let reason = format!("has no file `{missing}`, which {weights} names");
            return Err(HubError::Files { name: name.to_string(), reason });
        }
        chosen.extend(shards);
    }
    chosen.push(weights.to_owned());
    let format = if weights.contains(".bin") { "PyTorch" } else { "safetensors" };
    Ok(Selection { files: chosen, opened: opened.map(str::to_owned), format, has_tokenizer })
}

fn ends_in(file: &str, ending: &str) -> bool {
    Path::new(file).extension().is_some_and(|extension| extension.eq_ignore_ascii_case(ending))
}

fn listed(files: &[&String]) -> String {
    let mut text: Vec<&str> = files.iter().take(MAX_NAMED).map(|file| file.as_str()).collect();
    if files.len() > MAX_NAMED {
        text.push("...");
    }
    text.join(", ")
}

fn several(name: &HubName, files: &[&String]) -> String {
    format!(
        "has several models: {}; choose one, such as {name}:{}",
        listed(files),
        files.first().expect("there are several")
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX: &str = r#"{"weight_map":{"a":"model-2.safetensors","b":"model-1.safetensors"}}"#;

    fn selected(name: &str, files: &[&str]) -> Result<Selection, String> {
        let files = files.iter().map(|file| file.to_string()).collect();
        let read = |file: &str| {
            assert!(file.ends_with("model.safetensors.index.json"));
            Ok(INDEX.as_bytes().to_vec())
        };
        select(&HubName::parse(name).unwrap(), &files, read).map_err(|error| error.to_string())
    }

    fn files(name: &str, files: &[&str]) -> String {
        selected(name, files).map_or_else(|error| error, |selection| selection.files.join(" "))
    }

    #[test]
    fn one_form_of_the_weights_and_what_is_read_beside_it() {
        let all = [
            "README.md",
            ".gitattributes",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
            "model.safetensors",
            "pytorch_model.bin",
            "model-Q4_K.gguf",
            "model.onnx",
            "1_Pooling/config.json",
            "original/consolidated.pth",
        ];
        assert_eq!(
            files("a/b", &all),
            "config.json generation_config.json tokenizer.json tokenizer_config.json \
             1_Pooling/config.json model.safetensors"
        );
        let pytorch = ["config.json", "tokenizer.model", "pytorch_model.bin", "x.md"];
        let selection = selected("a/b", &pytorch).unwrap();
        assert_eq!(selection.files.join(" "), "config.json tokenizer.model pytorch_model.bin");
        assert_eq!(
            (selection.format, selection.opened, selection.has_tokenizer),
            ("PyTorch", None, true)
        );
        let bare = selected("a/b", &["config.json", "model.safetensors"]).unwrap();
        assert!(!bare.has_tokenizer);
    }

    #[test]
    fn the_shards_are_those_of_the_index() {
        let index = "model.safetensors.index.json";
        let all = [
            "config.json",
            index,
            "model-1.safetensors",
            "model-2.safetensors",
            "extra.safetensors",
        ];
        assert_eq!(
            files("a/b", &all),
            format!("config.json model-1.safetensors model-2.safetensors {index}")
        );
        assert_eq!(
            files("a/b", &all[..3]),
            format!("a/b: has no file `model-2.safetensors`, which {index} names")
        );
    }

    #[test]
    fn a_gguf_file_alone_or_the_only_ternary_one_is_the_model() {
        assert_eq!(files("a/b", &["ggml-model.gguf", "README.md"]), "ggml-model.gguf");
        assert_eq!(files("a/b", &["x-F16.gguf", "x-TQ2_0.gguf", "x-Q8_0.gguf"]), "x-TQ2_0.gguf");
        let several = ["x-I2_S.gguf", "x-TQ1_0.gguf", "x-f16.gguf"];
        assert_eq!(
            files("a/b@c", &several),
            "a/b@c: has several models: x-I2_S.gguf, x-TQ1_0.gguf; choose one, such as a/b@c:x-I2_S.gguf"
        );
        assert_eq!(files("a/b:x-f16.gguf", &several), "x-f16.gguf");
        assert!(
            files("a/b:y.gguf", &several)
                .starts_with("a/b:y.gguf: has no file `y.gguf`; it has x-I2_S")
        );
    }

    #[test]
    fn a_native_file_comes_first_and_a_file_brings_what_is_beside_it() {
        assert_eq!(files("a/b", &["config.json", "model.safetensors", "m.bitnet"]), "m.bitnet");
        assert!(
            files("a/b", &["m.bitnet", "n.bitnet"]).contains("several models: m.bitnet, n.bitnet")
        );
        let nested = ["config.json", "f/config.json", "f/tokenizer.json", "f/x.safetensors"];
        let selection = selected("a/b:f/x.safetensors", &nested).unwrap();
        assert_eq!(selection.files, ["f/config.json", "f/tokenizer.json", "f/x.safetensors"]);
        assert_eq!(selection.opened.as_deref(), Some("f/x.safetensors"));
    }

    #[test]
    fn a_repository_without_a_model_says_what_was_looked_for() {
        for nothing in [&["README.md"][..], &["config.json"], &["model.safetensors"]] {
            assert!(files("a/b", nothing).contains("neither config.json with"), "{nothing:?}");
        }
    }
}
