//! Files that appear under their name when they are whole: they grow as `NAME.part` and
//! are renamed when all of it is on the disk. Until then the name has what it had before.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Added to a name while the file or folder of that name grows.
const PART: &str = ".part";

/// An error about what could not be written.
pub(crate) fn failed(path: &Path, reason: impl std::fmt::Display) -> Error {
    Error::file(path, format!("cannot be written: {reason}"))
}

/// Where `path` grows.
pub(crate) fn part_of(path: &Path) -> Result<PathBuf, Error> {
    let name = path.file_name().ok_or_else(|| failed(path, "it is not the name of a file"))?;
    let mut name = name.to_owned();
    name.push(PART);
    Ok(path.with_file_name(name))
}

/// Opens a file that nobody else is writing, and empties it.
fn open_alone(path: &Path) -> io::Result<File> {
    // Not truncated before it is locked: it may be another conversion's.
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    if let Err(fs::TryLockError::WouldBlock) = file.try_lock() {
        return Err(io::Error::other("another conversion is writing it"));
    }
    file.set_len(0)?;
    Ok(file)
}

/// Where folders can be synced, the names in one are on the disk afterwards.
fn sync_names(folder: Option<&Path>) {
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty());
    if let Ok(folder) = File::open(folder.unwrap_or(Path::new("."))) {
        let _ = folder.sync_all();
    }
}

/// A file that is being written. Dropped before [`finish`](Self::finish), it leaves nothing.
pub(crate) struct OutputFile {
    /// Positioned where the next bytes go.
    pub(crate) file: File,
    path: PathBuf,
    part: PathBuf,
    finished: bool,
}

impl OutputFile {
    /// Begins the file `path`, empty.
    pub(crate) fn create(path: &Path) -> Result<Self, Error> {
        let part = part_of(path)?;
        let file = open_alone(&part).map_err(|error| failed(path, error))?;
        Ok(OutputFile { file, path: path.to_owned(), part, finished: false })
    }

    /// An error of writing this file.
    pub(crate) fn failed(&self, reason: impl std::fmt::Display) -> Error {
        failed(&self.path, reason)
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|error| failed(&self.path, error))
    }

    /// Puts all of it on the disk and gives it its name.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        let done = self.file.sync_all().and_then(|()| fs::rename(&self.part, &self.path));
        done.map_err(|error| self.failed(error))?;
        self.finished = true;
        sync_names(self.path.parent());
        Ok(())
    }
}

impl Drop for OutputFile {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.part);
        }
    }
}
