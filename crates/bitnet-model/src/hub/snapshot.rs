//! What is in a revision's folder in the cache, whoever put it there.

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

use super::cache::{Repository, files_below};
use super::error::HubError;
use super::name::HubName;
use super::selection::{Selection, select};
use super::settings::Hub;
use crate::source::SIDECAR_FILES;

impl Hub {
    /// Where a model lies in the cache, if all of it is there: what `source::open` takes. The network is
    /// not used, and the hub may have a newer one of the name.
    ///
    /// # Errors
    /// If the cache cannot be read, or the name leaves open which file is meant.
    pub fn cached(&self, name: &HubName) -> Result<Option<PathBuf>, HubError> {
        let repository = Repository::new(self, name.repository());
        let Some(commit) = repository.commit(name.revision()) else { return Ok(None) };
        let Some(selection) = whole(&repository, name, &commit)? else { return Ok(None) };
        Ok(Some(opened(&repository, &commit, &selection)))
    }
}

/// The path that is opened: the snapshot, or one file in it.
pub(super) fn opened(repository: &Repository, commit: &str, selection: &Selection) -> PathBuf {
    let folder = repository.snapshot(commit);
    selection.opened.as_ref().map_or(folder.clone(), |file| folder.join(file))
}

/// The model in a snapshot, if there is one and nothing of it is missing.
///
/// # Errors
/// If there are several, or the cache cannot be read.
pub(super) fn whole(
    repository: &Repository,
    name: &HubName,
    commit: &str,
) -> Result<Option<Selection>, HubError> {
    let folder = repository.snapshot(commit);
    let files = files_below(&folder)?;
    let read = |file: &str| {
        let path = folder.join(file);
        fs::read(&path).map_err(|error| HubError::read(&path, &error))
    };
    let selection = match select(name, &files, read) {
        Ok(selection) => selection,
        Err(error @ HubError::Files { .. }) => {
            // Something is missing, unless there is too much.
            let weights = files.iter().filter(|f| f.ends_with(".gguf") || f.ends_with(".bitnet"));
            return if name.file.is_none() && weights.count() > 1 { Err(error) } else { Ok(None) };
        }
        Err(error) => return Err(error),
    };
    let lacks_sidecar = || {
        let known = tree(repository, commit);
        SIDECAR_FILES.iter().any(|file| {
            // The readers prefer `tokenizer.json`.
            let is_second = *file == "tokenizer.model" && files.contains("tokenizer.json");
            known.contains(*file) && !files.contains(*file) && !is_second
        })
    };
    let is_checkpoint = selection.files.len() > 1 || selection.opened.is_none();
    let is_whole = selection.has_tokenizer && !(is_checkpoint && lacks_sidecar());
    Ok(is_whole.then_some(selection))
}

/// The files that a revision has on the hub, where the hub's own client has noted them: it fetches them
/// in any order, and may have been interrupted.
fn tree(repository: &Repository, commit: &str) -> BTreeSet<String> {
    let read = || {
        let tree: Value = serde_json::from_slice(&fs::read(repository.tree(commit)).ok()?).ok()?;
        Some(tree.get("files")?.as_object()?.keys().cloned().collect())
    };
    read().unwrap_or_default()
}
