//! The name of a model on the hub.

use std::fmt;
use std::path::{Component, Path};

use crate::formats::native;

/// `org/name[@revision][:FILE]`: a model on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HubName {
    /// `org/name`.
    pub(super) repository: String,
    /// Branch, tag or commit, where it was given.
    pub(super) revision: Option<String>,
    /// The file with the weights, where it was given.
    pub(super) file: Option<String>,
}

/// Endings of files that are models: such a name is a path.
const FILE_ENDINGS: [&str; 5] = ["gguf", native::EXTENSION, "safetensors", "bin", "json"];

/// Longest `org/name`, as the hub has it.
const MAX_REPOSITORY_BYTES: usize = 96;

impl HubName {
    /// Reads a name; `None` if it cannot be one.
    pub fn parse(text: &str) -> Option<Self> {
        let (model, file) = match text.split_once(':') {
            Some((model, file)) => (model, Some(file)),
            None => (text, None),
        };
        let (repository, revision) = match model.split_once('@') {
            Some((repository, revision)) => (repository, Some(revision)),
            None => (model, None),
        };
        let (org, name) = repository.split_once('/')?;
        let is_path = Path::new(name).extension().is_some_and(|ending| {
            FILE_ENDINGS.iter().any(|known| ending.eq_ignore_ascii_case(known))
        });
        let is_whole = is_part(org)
            && is_part(name)
            && !is_path
            && repository.len() <= MAX_REPOSITORY_BYTES
            && revision.is_none_or(is_relative)
            && file.is_none_or(is_relative);
        is_whole.then(|| HubName {
            repository: repository.to_owned(),
            revision: revision.map(str::to_owned),
            file: file.map(str::to_owned),
        })
    }

    /// The same repository and revision, with the weights in this file.
    pub fn with_file(self, file: &str) -> Option<Self> {
        is_relative(file).then(|| HubName { file: Some(file.to_owned()), ..self })
    }

    /// `org/name`.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The revision that is meant.
    pub(super) fn revision(&self) -> &str {
        self.revision.as_deref().unwrap_or("main")
    }
}

impl fmt::Display for HubName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repository)?;
        if let Some(revision) = &self.revision {
            write!(f, "@{revision}")?;
        }
        match &self.file {
            Some(file) => write!(f, ":{file}"),
            None => Ok(()),
        }
    }
}

/// Whether this can be the name of an organisation or of a repository. `--` cannot be in it: it stands
/// between the two in the cache.
fn is_part(text: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
    !text.is_empty()
        && text.chars().all(allowed)
        && !text.starts_with(['-', '.'])
        && !text.ends_with(['-', '.'])
        && !text.contains("--")
        && !text.contains("..")
}

/// Whether joining `path` to a folder stays in this folder, on every system. The hub's answers are
/// checked with it too.
pub(super) fn is_relative(path: &str) -> bool {
    let plain = |component| matches!(component, Component::Normal(_));
    !path.is_empty()
        && Path::new(path).components().all(plain)
        && path.split('/').all(|part| !part.is_empty() && part != ".")
        && !path.contains(['\\', ':', '@'])
        && !path.contains(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_have_an_organisation_and_may_have_a_revision_and_a_file() {
        let name = HubName::parse("microsoft/bitnet-b1.58-2B-4T").unwrap();
        assert_eq!((name.repository(), name.revision()), ("microsoft/bitnet-b1.58-2B-4T", "main"));
        let whole = "org/name@refs/pr/1:folder/model.gguf";
        let name = HubName::parse(whole).unwrap();
        assert_eq!(name.to_string(), whole);
        assert_eq!(
            (name.revision(), name.file.as_deref()),
            ("refs/pr/1", Some("folder/model.gguf"))
        );
    }

    #[test]
    fn paths_and_what_could_leave_the_cache_are_no_names() {
        for text in [
            "tiny",
            "a/b/c",
            "/a/b",
            "./b",
            "../b",
            "a/..",
            "a/",
            "/b",
            "a/b@",
            "a/b:",
            "a/b@../c",
            "a/b:/c",
            "a/b:c/../d",
            "a/b:c\\d",
            "a--b/c",
            "a/b--c",
            "a/b c",
            "C:/b",
            "models/x.gguf",
            "models/x.bitnet",
            "a/model.SAFETENSORS",
            "a/b@c\u{7}",
        ] {
            assert_eq!(HubName::parse(text), None, "{text}");
        }
        assert_eq!(HubName::parse(&format!("a/{}", "b".repeat(95))), None);
    }
}
