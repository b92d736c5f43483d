//! The folders of a repository in the cache, as all programs have them:
//!
//! ```text
//! models--org--name/blobs/CHECKSUM        the files, by what is in them
//! models--org--name/snapshots/COMMIT/...  a revision: the files' names, as links to the blobs
//! models--org--name/refs/REVISION         the commit that a branch or tag was at
//! .locks/models--org--name/CHECKSUM.lock  held by whoever writes the blob
//! ```

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use super::error::HubError;
use super::name::{HubName, is_relative};
use super::settings::Hub;

/// What the folders of models begin with.
const PREFIX: &str = "models--";

/// A repository in the cache, there or not.
pub(super) struct Repository {
    /// `models--org--name`.
    pub folder: PathBuf,
    locks: PathBuf,
}

impl Repository {
    pub(super) fn new(hub: &Hub, repository: &str) -> Self {
        let name = format!("{PREFIX}{}", repository.replace('/', "--"));
        Repository { folder: hub.cache.join(&name), locks: hub.cache.join(".locks").join(name) }
    }

    /// `org/name` of all repositories in the cache, sorted.
    pub(super) fn all(hub: &Hub) -> Result<Vec<String>, HubError> {
        let mut names: Vec<String> = entries(&hub.cache)?
            .iter()
            .filter_map(|path| path.file_name()?.to_str()?.strip_prefix(PREFIX))
            .map(|name| name.replacen("--", "/", 1))
            .filter(|name| HubName::parse(name).is_some())
            .collect();
        names.sort();
        Ok(names)
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.folder.join("blobs")
    }

    pub(super) fn snapshots(&self) -> PathBuf {
        self.folder.join("snapshots")
    }

    pub(super) fn snapshot(&self, commit: &str) -> PathBuf {
        self.snapshots().join(commit)
    }

    fn references(&self) -> PathBuf {
        self.folder.join("refs")
    }

    pub(super) fn blob(&self, checksum: &str) -> PathBuf {
        self.blobs().join(checksum)
    }

    pub(super) fn lock(&self, checksum: &str) -> PathBuf {
        self.locks.join(format!("{checksum}.lock"))
    }

    /// The list of a revision's files, which the hub's own client keeps.
    pub(super) fn tree(&self, commit: &str) -> PathBuf {
        self.folder.join("trees").join(format!("{commit}.json"))
    }

    /// The commits that have a snapshot, sorted.
    pub(super) fn commits(&self) -> Result<Vec<String>, HubError> {
        let snapshots = entries(&self.snapshots())?;
        let names = snapshots.iter().filter_map(|path| path.file_name()?.to_str());
        let mut commits: Vec<_> = names.filter(|name| is_commit(name)).map(str::to_owned).collect();
        commits.sort();
        Ok(commits)
    }

    /// Branches and tags with their commits, sorted.
    pub(super) fn revisions(&self) -> Result<Vec<(String, String)>, HubError> {
        let names = files_below(&self.references())?;
        let with_commit = |name: String| Some((name.clone(), self.commit(&name)?));
        Ok(names.into_iter().filter_map(with_commit).collect())
    }

    /// The commit that a revision is, or was when it was fetched.
    pub(super) fn commit(&self, revision: &str) -> Option<String> {
        if is_commit(revision) {
            return Some(revision.to_owned());
        }
        let text = fs::read_to_string(self.references().join(revision)).ok()?;
        is_commit(text.trim()).then(|| text.trim().to_owned())
    }

    /// What is held while names are given to files and commits, so that programs do it in turn.
    pub(super) fn lock_names(&self) -> Result<File, HubError> {
        let path = self.lock("names");
        let lock = open_lock(&path)?;
        match lock.lock() {
            // Where there are no locks, two programs that do the same thing at once may fail.
            Err(error) if error.kind() != ErrorKind::Unsupported => {
                Err(HubError::write(&path, 0, &error))
            }
            _ => Ok(lock),
        }
    }

    /// Notes the commit of a revision: whole, or as it was. [`lock_names`](Self::lock_names) is held.
    pub(super) fn set_commit(&self, revision: &str, commit: &str) -> Result<(), HubError> {
        if is_commit(revision) || self.commit(revision).as_deref() == Some(commit) {
            return Ok(());
        }
        let path = self.references().join(revision);
        make_parent(&path)?;
        // Not among the references, where it would be taken for one.
        let draft = self.folder.join("ref.incomplete");
        fs::write(&draft, commit)
            .and_then(|()| fs::rename(&draft, &path))
            .map_err(|error| HubError::write(&path, commit.len() as u64, &error))
    }

    pub(super) fn forget_revision(&self, revision: &str) -> Result<(), HubError> {
        let path = self.references().join(revision);
        fs::remove_file(&path).map_err(|error| HubError::remove(&path, &error))
    }

    /// Gives a blob its name in a snapshot. `keep` says whether the blob is going to be needed again.
    /// [`lock_names`](Self::lock_names) is held.
    pub(super) fn link(
        &self,
        checksum: &str,
        commit: &str,
        file: &str,
        keep: bool,
    ) -> Result<(), HubError> {
        let (blob, path) = (self.blob(checksum), self.snapshot(commit).join(file));
        make_parent(&path)?;
        // From `snapshots/COMMIT/`, and from each folder in it, one further up.
        let up = "../".repeat(2 + file.matches('/').count());
        // A link that leads nowhere is in the way.
        let result = remove_if_there(&path).and_then(|()| {
            match symbolic_link(Path::new(&format!("{up}blobs/{checksum}")), &path) {
                Ok(()) => Ok(()),
                // By a program that knows other locks.
                Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
                // Such a system has no links for us: the file itself lies in the snapshot.
                Err(_) if !keep => fs::rename(&blob, &path),
                Err(_) => fs::copy(&blob, &path).map(drop),
            }
        });
        result.map_err(|error| HubError::write(&path, 0, &error))
    }
}

/// Whether this is a whole commit number.
pub(super) fn is_commit(text: &str) -> bool {
    text.len() == 40 && is_hex(text)
}

/// Whether these are lower-case hexadecimal digits.
pub(super) fn is_hex(text: &str) -> bool {
    text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
}

/// Makes the folder of a file.
pub(super) fn make_parent(path: &Path) -> Result<(), HubError> {
    let folder = path.parent().expect("files of the cache lie in folders");
    fs::create_dir_all(folder).map_err(|error| HubError::write(folder, 0, &error))
}

/// The file of a lock. It is not emptied: another program may have written into it who holds it.
pub(super) fn open_lock(path: &Path) -> Result<File, HubError> {
    make_parent(path)?;
    let file = OpenOptions::new().create(true).append(true).open(path);
    file.map_err(|error| HubError::write(path, 0, &error))
}

/// What is in a folder; nothing if it is not there.
pub(super) fn entries(folder: &Path) -> Result<Vec<PathBuf>, HubError> {
    let read = || -> io::Result<Vec<PathBuf>> {
        fs::read_dir(folder)?.map(|entry| Ok(entry?.path())).collect()
    };
    match read() {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(Vec::new()),
        result => result.map_err(|error| HubError::read(folder, &error)),
    }
}

/// The files below a folder, links that lead to a file among them, as relative paths with `/`.
pub(super) fn files_below(folder: &Path) -> Result<BTreeSet<String>, HubError> {
    fn gather(folder: &Path, prefix: &str, into: &mut BTreeSet<String>) -> Result<(), HubError> {
        for path in entries(folder)? {
            let Some(name) = path.file_name().and_then(|name| name.to_str()) else { continue };
            let name = format!("{prefix}{name}");
            // A link to a folder is none of ours, and may lead in a circle.
            if path.is_dir() && !path.is_symlink() {
                gather(&path, &format!("{name}/"), into)?;
            } else if path.is_file() && is_relative(&name) {
                into.insert(name);
            }
        }
        Ok(())
    }
    let mut files = BTreeSet::new();
    gather(folder, "", &mut files)?;
    Ok(files)
}

fn remove_if_there(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

#[cfg(unix)]
fn symbolic_link(target: &Path, path: &Path) -> io::Result<()> {
    std::os::unix::fs::symlink(target, path)
}

#[cfg(windows)]
fn symbolic_link(target: &Path, path: &Path) -> io::Result<()> {
    let target: PathBuf = target.components().collect();
    std::os::windows::fs::symlink_file(target, path)
}

#[cfg(not(any(unix, windows)))]
fn symbolic_link(_: &Path, _: &Path) -> io::Result<()> {
    Err(ErrorKind::Unsupported.into())
}
