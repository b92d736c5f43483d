//! Taking a model out of the cache.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::cache::{Repository, entries};
use super::error::HubError;
use super::name::HubName;
use super::settings::Hub;

/// What is going to be removed.
pub struct Removal {
    repository: Repository,
    /// References to it.
    revisions: Vec<String>,
    /// What goes besides, in this order.
    paths: Vec<PathBuf>,
    /// Bytes of the files that go away.
    pub bytes: u64,
    /// Bytes of files that lie in a store which models share: the hub's own client removes them.
    pub shared_bytes: u64,
}

impl Hub {
    /// Finds out what removing a model from the cache means: of a name with a revision the files that no
    /// other revision uses, else the whole repository.
    ///
    /// # Errors
    /// If it is not in the cache, or the name has a file: whole revisions are removed.
    pub fn removal(&self, name: &HubName) -> Result<Removal, HubError> {
        if name.file.is_some() {
            let reason = "whole revisions are removed, not files: leave out the file".to_owned();
            return Err(HubError::Files { name: name.to_string(), reason });
        }
        let repository = Repository::new(self, name.repository());
        let not_there = || HubError::Files {
            name: name.to_string(),
            reason: format!(
                "is not in the cache {}: `bitnet list` shows what is",
                self.cache.display()
            ),
        };
        if !repository.folder.is_dir() {
            return Err(not_there());
        }
        let commits = repository.commits()?;
        let references = repository.revisions()?;
        let (goes, stays): (Vec<String>, Vec<String>) = match &name.revision {
            None => (commits, Vec::new()),
            Some(revision) => {
                let commit = repository.commit(revision).filter(|commit| commits.contains(commit));
                let commit = commit.ok_or_else(not_there)?;
                commits.into_iter().partition(|other| *other == commit)
            }
        };
        let revisions = references.into_iter().filter(|(_, commit)| !stays.contains(commit));
        let revisions = revisions.map(|(revision, _)| revision).collect();
        let mut paths: Vec<PathBuf> =
            goes.iter().map(|commit| repository.snapshot(commit)).collect();
        if stays.is_empty() {
            paths.push(repository.folder.clone());
        } else {
            paths.extend(goes.iter().map(|commit| repository.tree(commit)));
            let mut used = BTreeSet::new();
            for commit in &stays {
                linked(&repository.snapshot(commit), &mut used)?;
            }
            let mut unused = BTreeSet::new();
            for commit in &goes {
                linked(&repository.snapshot(commit), &mut unused)?;
            }
            paths.extend(unused.difference(&used).map(|blob| repository.blobs().join(blob)));
        }
        let (mut bytes, mut shared_bytes) = (0, 0);
        // The repository holds the snapshots: it alone is counted.
        let counted = if stays.is_empty() { &paths[paths.len() - 1..] } else { &paths };
        for path in counted {
            count(path, &mut bytes, &mut shared_bytes)?;
        }
        Ok(Removal { repository, revisions, paths, bytes, shared_bytes })
    }
}

impl Removal {
    /// Does it: first what names the model, so that what is interrupted leaves nothing that looks whole.
    ///
    /// # Errors
    /// If something cannot be removed.
    pub fn execute(self) -> Result<(), HubError> {
        for revision in &self.revisions {
            self.repository.forget_revision(revision)?;
        }
        for path in &self.paths {
            let removed = match path.is_dir() && !path.is_symlink() {
                true => fs::remove_dir_all(path),
                false => fs::remove_file(path),
            };
            match removed {
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                result => result.map_err(|error| HubError::remove(path, &error))?,
            }
        }
        Ok(())
    }
}

/// The names of the blobs that the links below a folder lead to.
fn linked(folder: &Path, into: &mut BTreeSet<String>) -> Result<(), HubError> {
    for path in entries(folder)? {
        if let Ok(target) = fs::read_link(&path) {
            into.extend(target.file_name().and_then(|name| Some(name.to_str()?.to_owned())));
        } else if path.is_dir() {
            linked(&path, into)?;
        }
    }
    Ok(())
}

/// Adds up the files below a path, and apart from them those that links of the blobs lead to.
fn count(path: &Path, bytes: &mut u64, shared: &mut u64) -> Result<(), HubError> {
    let Ok(metadata) = path.symlink_metadata() else { return Ok(()) };
    if metadata.is_dir() {
        for entry in entries(path)? {
            count(&entry, bytes, shared)?;
        }
    } else if metadata.is_file() {
        *bytes += metadata.len();
    } else if path.parent().is_some_and(|parent| parent.ends_with("blobs")) {
        *shared += path.metadata().map_or(0, |target| target.len());
    }
    Ok(())
}
