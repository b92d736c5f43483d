//! Models by their name on the Hugging Face hub: `org/name[@revision][:FILE]`.
//!
//! Models lie in the cache that the hub's own client and other programs use, in its layout, so that a
//! model fetched by one is found by all. Looking there never uses the network; [`fetch`] and
//! [`Hub::pull`] do. Nothing else of this crate downloads.
//!
//! * `name.rs`: what a name may be. `settings.rs`: what the environment says.
//! * `cache.rs`: the folders of a repository in the cache. `snapshot.rs`: what is in one of them.
//! * `selection.rs`: which files of a repository are a model.
//! * `client.rs`: questions to the hub. `download.rs`: one file. `pull.rs`: all files of a model.
//! * `listing.rs`, `removal.rs`: what is there, and what goes away.
//!
//! The client is ours because no library has all of it: resuming, checksums, retries, locks that the
//! other programs know, and the offline switch, without an asynchronous runtime.

mod cache;
mod client;
mod download;
mod error;
mod listing;
mod name;
mod pull;
mod removal;
mod selection;
mod settings;
mod snapshot;

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

pub use error::HubError;
pub use listing::CachedModel;
pub use name::HubName;
pub use pull::Pulled;
pub use removal::Removal;
pub use settings::Hub;

use crate::source::TINY;

/// How far a download is.
#[derive(Debug, Clone, Copy)]
pub struct FetchProgress<'a> {
    /// The file that is being fetched, by its name in the repository.
    pub file: &'a str,
    /// Bytes of the whole model that are there. It can shrink: what turns out to be wrong is thrown
    /// away.
    pub bytes: u64,
    /// Bytes of the whole model.
    pub total_bytes: u64,
    /// What is going on.
    pub state: FetchState<'a>,
}

/// What a download is doing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FetchState<'a> {
    /// Bytes are coming.
    Downloading,
    /// Another program is downloading the file: this one waits for it.
    Waiting,
    /// Something went wrong, and the request is made again after a pause.
    Retrying {
        /// What went wrong.
        reason: &'a str,
    },
}

/// Whoever watches a download, and can end it.
pub type OnProgress<'a> = &'a mut dyn FnMut(FetchProgress<'_>) -> ControlFlow<()>;

/// Makes sure that `model` can be opened without the network: downloads it as [`Hub::pull`] does if it is
/// the name of a model on the hub that is not in the cache. Nothing is done for `tiny`, for a path that
/// exists, for what is no such name, and for a model that is in the cache, whatever the hub has by now.
///
/// # Errors
/// As [`Hub::pull`].
///
/// ```no_run
/// use std::ops::ControlFlow;
/// use bitnet_model::{hub, source};
///
/// let name = "microsoft/bitnet-b1.58-2B-4T";
/// hub::fetch(name, &mut |now| {
///     eprintln!("{} of {} bytes", now.bytes, now.total_bytes);
///     ControlFlow::Continue(())
/// })?;
/// let checkpoint = source::open(name)?;
/// # Ok::<(), bitnet_model::Error>(())
/// ```
pub fn fetch(model: &str, progress: OnProgress<'_>) -> Result<Option<Pulled>, HubError> {
    if model == TINY || Path::new(model).exists() {
        return Ok(None);
    }
    let Some(name) = HubName::parse(model) else { return Ok(None) };
    let hub = Hub::from_env()?;
    match hub.cached(&name)? {
        Some(_) => Ok(None),
        None => hub.pull(&name, progress).map(Some),
    }
}

/// Where the model of this name lies in the cache.
///
/// # Errors
/// If it is not there, or not whole.
pub(crate) fn cached(name: &HubName) -> Result<PathBuf, HubError> {
    let hub = Hub::from_env()?;
    hub.cached(name)?.ok_or_else(|| match hub.offline {
        true => HubError::Offline { name: name.to_string(), cache: hub.cache },
        false => HubError::NotCached { name: name.to_string(), cache: hub.cache },
    })
}
