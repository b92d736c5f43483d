//! All files of a model into the cache.

use std::collections::BTreeSet;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;

use super::cache::Repository;
use super::client::Client;
use super::download::Download;
use super::error::HubError;
use super::name::HubName;
use super::selection::select;
use super::settings::Hub;
use super::snapshot::opened;
use super::{FetchProgress, FetchState, OnProgress};

/// A model that has been fetched, or was there already.
#[derive(Debug, Clone)]
pub struct Pulled {
    /// Where it lies: what `source::open` takes.
    pub path: PathBuf,
    /// Bytes of its files.
    pub bytes: u64,
    /// Bytes of them that were not there.
    pub fetched_bytes: u64,
    /// What should be known about it, for people.
    pub notes: Vec<String>,
}

impl Hub {
    /// Fetches what the hub has under this name by now: the files that are read and no others, and of them
    /// only what is not in the cache. What an interrupted download has left is gone on with. Every file is
    /// compared with its checksum, and the model can be opened when all of them are there, not before.
    /// Several programs can do this at the same time.
    ///
    /// `progress` is called on this thread and can end it. Offline, the model that is in the cache will do.
    ///
    /// # Errors
    /// If the hub does not have the model or does not give it, has nothing in it that can be read, or cannot
    /// be reached; if there is no room; if the model is not in the cache and the network must not be used.
    pub fn pull(&self, name: &HubName, progress: OnProgress<'_>) -> Result<Pulled, HubError> {
        if self.offline {
            return self.pull_offline(name);
        }
        let mut report =
            |file: &str, bytes, total_bytes, state: FetchState<'_>| match progress(FetchProgress {
                file,
                bytes,
                total_bytes,
                state,
            }) {
                ControlFlow::Continue(()) => Ok(()),
                ControlFlow::Break(()) => Err(HubError::Cancelled { name: name.to_string() }),
            };
        let client = &Client::new(self, name);
        let revision = client.revision(|reason| {
            report("the list of files", 0, 0, FetchState::Retrying { reason })
        })?;
        let repository = &Repository::new(self, name.repository());
        let commit = &revision.commit;
        let download = |file: &str| {
            let (file, remote) =
                revision.files.get_key_value(file).expect("it was chosen from them");
            Download { client, repository, commit, file, remote }
        };

        let files: BTreeSet<String> = revision.files.keys().cloned().collect();
        // The index says which files there are to fetch: it is fetched at once.
        let selection = select(name, &files, |index| {
            let index = download(index);
            let bytes = index.remote.bytes;
            index.run(&mut |there, state| report(index.file, there, bytes, state))?;
            let path = index.path_there();
            fs::read(&path).map_err(|error| HubError::read(&path, &error))
        })?;
        let downloads: Vec<_> = selection.files.iter().map(|file| download(file)).collect();
        let total: u64 = downloads.iter().map(|download| download.remote.bytes).sum();
        // Noted, because other programs fetch them too.
        let mut there: Vec<u64> = downloads.iter().map(Download::bytes_there).collect();
        let before: u64 = there.iter().sum();
        for (index, download) in downloads.iter().enumerate() {
            let others = there.iter().sum::<u64>() - there[index];
            download
                .run(&mut |bytes, state| report(download.file, others + bytes, total, state))?;
            there[index] = download.remote.bytes;
        }

        let _names = repository.lock_names()?;
        let mut missing: Vec<_> =
            downloads.iter().filter(|download| !download.is_linked()).collect();
        missing.reverse();
        while let Some(download) = missing.pop() {
            let checksum = download.remote.checksum.digits();
            let keep = missing.iter().any(|other| other.remote.checksum.digits() == checksum);
            repository.link(checksum, commit, download.file, keep)?;
        }
        repository.set_commit(name.revision(), commit)?;

        let mut notes = Vec::new();
        if !selection.has_tokenizer {
            notes.push(format!(
                "{name} has no tokenizer: to run it, put the tokenizer.json and tokenizer_config.json of \
                 the model it was made from into {}",
                repository.snapshot(commit).display()
            ));
        }
        let path = opened(repository, commit, &selection);
        Ok(Pulled { path, bytes: total, fetched_bytes: total - before, notes })
    }

    fn pull_offline(&self, name: &HubName) -> Result<Pulled, HubError> {
        let Some(path) = self.cached(name)? else {
            return Err(HubError::Offline { name: name.to_string(), cache: self.cache.clone() });
        };
        let model = self.list()?.into_iter().find(|model| path.starts_with(&model.path));
        let note = format!("HF_HUB_OFFLINE is set: {name} is taken from the cache, as it is there");
        let bytes = model.map_or(0, |model| model.bytes);
        Ok(Pulled { path, bytes, fetched_bytes: 0, notes: vec![note] })
    }
}
