//! Why a model of the hub cannot be had: one sentence each.

use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use bitnet_core::budget::human_bytes;

/// Why a model of the hub cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum HubError {
    /// A variable of the environment that cannot be used.
    #[error("{name} {reason}")]
    Setting {
        /// The variable.
        name: &'static str,
        /// What is wrong.
        reason: String,
    },
    /// The cache does not have the model, or only a part of it.
    #[error(
        "{name}: is no path here, and not a whole model in the cache {}: check the name, or fetch it \
         with `bitnet pull {name}`",
        cache.display()
    )]
    NotCached {
        /// The model.
        name: String,
        /// The cache.
        cache: PathBuf,
    },
    /// As [`NotCached`](HubError::NotCached), and the network must not be used.
    #[error(
        "{name}: is no path here, and not a whole model in the cache {}, and HF_HUB_OFFLINE forbids to \
         fetch it: unset it, or choose a model that `bitnet list` shows",
        cache.display()
    )]
    Offline {
        /// The model.
        name: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The hub does not know the model, or does not admit that it does.
    #[error("{name}: {endpoint} has no such model{}", match token {
        false => ", or it is private: check the name, or set HF_TOKEN to a token that may read it",
        true => " that your token may read: check the name and HF_TOKEN",
    })]
    UnknownModel {
        /// The model.
        name: String,
        /// The hub.
        endpoint: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The hub knows the model, but not this revision of it.
    #[error(
        "{name}: {endpoint} has the model, but no revision `{revision}` of it: check the name after @"
    )]
    UnknownRevision {
        /// The model.
        name: String,
        /// The revision.
        revision: String,
        /// The hub.
        endpoint: String,
    },
    /// The model is given only to some.
    #[error("{name}: its owner gives it only to those who accept conditions: accept them on {page}{}", match token {
        false => " and set HF_TOKEN to your token",
        true => " with the account of your HF_TOKEN",
    })]
    Gated {
        /// The model.
        name: String,
        /// Where the conditions are.
        page: String,
        /// Whether a token was sent.
        token: bool,
    },
    /// The hub refuses.
    #[error("{name}: {endpoint} refuses access (status {status}): {}", match token {
        false => "set HF_TOKEN to a token that may read it",
        true => "your HF_TOKEN may have expired or may not read it; make a new one",
    })]
    Refused {
        /// The model.
        name: String,
        /// The hub.
        endpoint: String,
        /// The status of its answer.
        status: u16,
        /// Whether a token was sent.
        token: bool,
    },
    /// The hub cannot be reached, breaks off, or is too busy, however often it is asked.
    #[error(
        "{name}: {reason}; tried {attempts} times: check the connection and run the same command again, \
         it goes on where it stopped"
    )]
    Unreachable {
        /// The model, and the file where it is about one.
        name: String,
        /// What happened last.
        reason: String,
        /// How often it was tried.
        attempts: u32,
    },
    /// The hub answers what no hub should.
    #[error("{name}: {endpoint} {reason}: check HF_ENDPOINT")]
    Answer {
        /// The model.
        name: String,
        /// The hub.
        endpoint: String,
        /// What is wrong with it.
        reason: String,
    },
    /// A file that is not what the hub says it is.
    #[error(
        "{name}: {file}: what arrived is not what the hub has: its {digest} is {found} and not \
         {expected}; it was thrown away. Try again later, or through another network"
    )]
    Checksum {
        /// The model.
        name: String,
        /// The file.
        file: String,
        /// Name of the checksum.
        digest: &'static str,
        /// What arrived.
        found: String,
        /// What the hub has.
        expected: String,
    },
    /// The repository has nothing that can be read, or more than one thing.
    #[error("{name}: {reason}")]
    Files {
        /// The model.
        name: String,
        /// What is the matter, and what to do.
        reason: String,
    },
    /// There is no room.
    #[error(
        "{}: no room for the missing {} ({reason}): free some or set HF_HUB_CACHE to a folder on another \
         disk, then run the same command again, it goes on where it stopped",
        path.display(), human_bytes(*missing)
    )]
    NoSpace {
        /// The file that is being written.
        path: PathBuf,
        /// Bytes of it that are not there.
        missing: u64,
        /// What the system says.
        reason: String,
    },
    /// The cache cannot be read or written.
    #[error(
        "{}: {what}: {reason}; make it accessible, or set HF_HUB_CACHE to another folder",
        path.display()
    )]
    Cache {
        /// The file or folder.
        path: PathBuf,
        /// What cannot be done.
        what: &'static str,
        /// What the system says.
        reason: String,
    },
    /// Whoever watched the download has ended it.
    #[error("{name}: the download was cancelled; it can go on where it stopped")]
    Cancelled {
        /// The model.
        name: String,
    },
}

impl HubError {
    /// A failure of writing `path`, of which `missing` bytes are not there.
    pub(super) fn write(path: &Path, missing: u64, error: &io::Error) -> Self {
        let (path, reason) = (path.to_owned(), error.to_string());
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge
                if missing > 0 =>
            {
                HubError::NoSpace { path, missing, reason }
            }
            _ => HubError::Cache { path, what: "cannot be written", reason },
        }
    }

    /// A failure of reading `path`.
    pub(super) fn read(path: &Path, error: &io::Error) -> Self {
        let (path, reason) = (path.to_owned(), error.to_string());
        HubError::Cache { path, what: "cannot be read", reason }
    }

    /// A failure of removing `path`.
    pub(super) fn remove(path: &Path, error: &io::Error) -> Self {
        let (path, reason) = (path.to_owned(), error.to_string());
        HubError::Cache { path, what: "cannot be removed", reason }
    }
}
