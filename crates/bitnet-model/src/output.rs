//! Files and folders that appear under their name when they are whole: they grow as `NAME.part` and
//! are renamed when all of it is on the disk. Until then the name has what it had before.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::error::Error;

/// Added to a name while the file or folder of that name grows.
const PART: &str = ".part";

/// What is in a growing folder while somebody writes it.
const LOCK: &str = "lock";

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

/// A folder that is being written. Dropped before [`finish`](Self::finish), it leaves nothing.
pub(crate) struct OutputFolder {
    path: PathBuf,
    part: PathBuf,
    /// Locked. `None` when the folder has its name.
    lock: Option<File>,
}

impl OutputFolder {
    /// Begins the folder `path`, empty.
    ///
    /// # Errors
    /// It cannot be made, or there is something else than an empty folder of that name.
    pub(crate) fn create(path: &Path) -> Result<Self, Error> {
        let part = part_of(path)?;
        let begin = || -> io::Result<File> {
            if !part.is_dir() {
                fs::create_dir(&part)?;
            }
            let lock = open_alone(&part.join(LOCK))?;
            for entry in fs::read_dir(&part)? {
                let entry = entry?;
                if entry.file_type()?.is_dir() {
                    fs::remove_dir_all(entry.path())?;
                } else if entry.file_name() != LOCK {
                    fs::remove_file(entry.path())?;
                }
            }
            Ok(lock)
        };
        let lock = begin().map_err(|error| failed(path, error))?;
        Ok(OutputFolder { path: path.to_owned(), part, lock: Some(lock) })
    }

    /// Begins a file in the folder. An error of writing it names the file where it is to be.
    pub(crate) fn file(&self, name: &str) -> Result<FolderFile, Error> {
        let (path, part) = (self.path.join(name), self.part.join(name));
        let made = part.parent().map_or(Ok(()), fs::create_dir_all);
        let file = made.and_then(|()| File::create(part)).map_err(|error| failed(&path, error))?;
        Ok(FolderFile { file, path })
    }

    /// Writes a whole JSON file in the folder.
    pub(crate) fn write_json(&self, name: &str, json: &serde_json::Value) -> Result<(), Error> {
        let mut text = serde_json::to_string_pretty(json).expect("keys are texts");
        text.push('\n');
        self.write(name, text.as_bytes())
    }

    /// Where the folder is to be.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Gives a finished file another name.
    pub(crate) fn rename(&self, from: &str, to: &str) -> Result<(), Error> {
        let renamed = fs::rename(self.part.join(from), self.part.join(to));
        renamed.map_err(|error| failed(&self.path.join(to), error))
    }

    /// Writes a whole file in the folder.
    pub(crate) fn write(&self, name: &str, bytes: &[u8]) -> Result<(), Error> {
        let mut file = self.file(name)?;
        file.write(bytes)?;
        file.finish()
    }

    /// Gives the folder its name. Its files are on the disk: each was finished.
    pub(crate) fn finish(mut self) -> Result<(), Error> {
        sync_names(Some(&self.part));
        self.lock = None;
        let named = || -> io::Result<()> {
            fs::remove_file(self.part.join(LOCK))?;
            // Only an empty folder goes away, and not every system renames onto one.
            if self.path.is_dir() {
                fs::remove_dir(&self.path)?;
            }
            fs::rename(&self.part, &self.path)
        };
        if let Err(error) = named() {
            let _ = fs::remove_dir_all(&self.part);
            return Err(failed(&self.path, error));
        }
        sync_names(self.path.parent());
        Ok(())
    }
}

impl Drop for OutputFolder {
    fn drop(&mut self) {
        if self.lock.take().is_some() {
            let _ = fs::remove_dir_all(&self.part);
        }
    }
}

/// A file of a growing folder.
pub(crate) struct FolderFile {
    /// Positioned where the next bytes go.
    pub(crate) file: File,
    path: PathBuf,
}

impl FolderFile {
    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.file.write_all(bytes).map_err(|error| failed(&self.path, error))
    }

    /// An error of writing this file.
    pub(crate) fn failed(&self, reason: impl std::fmt::Display) -> Error {
        failed(&self.path, reason)
    }

    /// Puts all of it on the disk.
    pub(crate) fn finish(self) -> Result<(), Error> {
        self.file.sync_all().map_err(|error| failed(&self.path, error))
    }
}
