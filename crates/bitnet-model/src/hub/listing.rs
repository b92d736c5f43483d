//! Which models are in the cache, whoever put them there.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use super::cache::{Repository, entries, files_below};
use super::error::HubError;
use super::name::HubName;
use super::selection::Selection;
use super::settings::Hub;
use super::snapshot::{opened, whole};
use crate::source;

/// A revision of a model in the cache.
#[derive(Debug, Clone)]
pub struct CachedModel {
    /// What is given as MODEL.
    pub name: String,
    /// Branches and tags that were at this commit when they were fetched.
    pub revisions: Vec<String>,
    /// The commit; empty where not even a list of the files has been fetched.
    pub commit: String,
    /// Where it lies: the folder of the revision, one file in it, or of what is not whole the repository.
    pub path: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Format of the weights, for people; `None` if something is missing.
    pub format: Option<&'static str>,
    /// When a file of it was last read, as far as the system notes it.
    pub last_used: Option<SystemTime>,
}

impl Hub {
    /// The models in the cache whose architecture is known, and downloads that were interrupted.
    ///
    /// # Errors
    /// If the cache cannot be read.
    pub fn list(&self) -> Result<Vec<CachedModel>, HubError> {
        let mut models = Vec::new();
        for repository in Repository::all(self)? {
            let name = HubName::parse(&repository).expect("all have names that are read");
            list_repository(&Repository::new(self, &repository), &name, &mut models)?;
        }
        Ok(models)
    }
}

fn list_repository(
    repository: &Repository,
    name: &HubName,
    into: &mut Vec<CachedModel>,
) -> Result<(), HubError> {
    let commits = repository.commits()?;
    let references = repository.revisions()?;
    for commit in &commits {
        let at_commit = references.iter().filter(|(_, at)| at == commit);
        let revisions: Vec<String> = at_commit.map(|(revision, _)| revision.clone()).collect();
        let revision = match revisions.iter().any(|revision| revision == "main") {
            true => None,
            false => Some(revisions.first().unwrap_or(commit).clone()),
        };
        let name = HubName { revision, ..name.clone() };
        let folder = repository.snapshot(commit);
        let mut add = |name: &HubName, path: PathBuf, files: &[PathBuf], format| {
            let (bytes, last_used) = size_and_use(files);
            let (name, revisions, commit) = (name.to_string(), revisions.clone(), commit.clone());
            into.push(CachedModel { name, revisions, commit, path, bytes, format, last_used });
        };
        let mut add_whole = |name: &HubName, selection: &Selection| {
            let path = opened(repository, commit, selection);
            if source::has_known_architecture(&path) {
                let files: Vec<_> = selection.files.iter().map(|file| folder.join(file)).collect();
                add(name, path, &files, Some(selection.format));
            }
        };
        match whole(repository, &name, commit) {
            Ok(Some(selection)) => add_whole(&name, &selection),
            Ok(None) if source::has_known_architecture(&folder) => {
                let files: Vec<_> =
                    files_below(&folder)?.iter().map(|file| folder.join(file)).collect();
                add(&name, folder, &files, None);
            }
            Ok(None) => {}
            // Several models in one revision.
            Err(HubError::Files { .. }) => {
                for file in files_below(&folder)? {
                    let name = HubName { file: Some(file), ..name.clone() };
                    if let Ok(Some(selection)) = whole(repository, &name, commit)
                        && selection.opened.is_some()
                    {
                        add_whole(&name, &selection);
                    }
                }
            }
            Err(error) => return Err(error),
        }
    }
    let blobs = entries(&repository.blobs())?;
    if commits.is_empty() && !blobs.is_empty() {
        let (bytes, last_used) = size_and_use(&blobs);
        into.push(CachedModel {
            name: name.to_string(),
            revisions: Vec::new(),
            commit: String::new(),
            path: repository.folder.clone(),
            bytes,
            format: None,
            last_used,
        });
    }
    Ok(())
}

fn size_and_use(files: &[impl AsRef<Path>]) -> (u64, Option<SystemTime>) {
    let metadata: Vec<_> = files.iter().filter_map(|file| fs::metadata(file).ok()).collect();
    let used = metadata.iter().filter_map(|file| file.accessed().or_else(|_| file.modified()).ok());
    (metadata.iter().map(fs::Metadata::len).sum(), used.max())
}
