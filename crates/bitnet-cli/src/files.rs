//! Files that people find whole or not at all, and the folder for what the program remembers.

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::{env, io};

use anyhow::{Result, anyhow};

/// Writes a file beside its place and renames it once it is whole and on the disk: whatever goes
/// wrong, what was there before stays.
pub fn write_whole(path: &Path, write: impl FnOnce(&File) -> Result<()>) -> Result<()> {
    let beside = with_suffix(path, ".tmp");
    let written = File::create(&beside)
        .map_err(|error| cannot_be_written(path, &error))
        .and_then(|file| write(&file).and_then(|()| finish(&file, &beside, path)));
    written.inspect_err(|_| {
        let _ = fs::remove_file(&beside);
    })
}

fn finish(file: &File, beside: &Path, path: &Path) -> Result<()> {
    let renamed = file.sync_all().and_then(|()| fs::rename(beside, path));
    renamed.map_err(|error| cannot_be_written(path, &error))?;
    // The name is in the folder: without this a power failure could forget it.
    #[cfg(unix)]
    if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty())
        && let Ok(folder) = File::open(folder)
    {
        let _ = folder.sync_all();
    }
    Ok(())
}

pub fn cannot_be_written(path: &Path, error: &io::Error) -> anyhow::Error {
    let hint = match error.kind() {
        io::ErrorKind::StorageFull => ": make room and try again",
        io::ErrorKind::NotFound => ": make its folder first",
        io::ErrorKind::PermissionDenied => ": choose a place where you may write",
        _ => "",
    };
    anyhow!("{}: cannot be written: {error}{hint}", path.display())
}

/// `news.csv` and `.part` make `news.csv.part`.
pub fn with_suffix(path: &Path, suffix: &str) -> PathBuf {
    let mut name = OsString::from(path);
    name.push(suffix);
    name.into()
}

/// The folder for what the program remembers from one run to the next, in this user's home.
pub fn state_folder() -> Option<PathBuf> {
    let variable = |name| env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    let base = if cfg!(windows) {
        variable("LOCALAPPDATA")
    } else if cfg!(target_os = "macos") {
        env::home_dir().map(|home| home.join("Library/Application Support"))
    } else {
        // The specification has relative paths ignored.
        let state = variable("XDG_STATE_HOME").filter(|path| path.is_absolute());
        state.or_else(|| env::home_dir().map(|home| home.join(".local/state")))
    };
    base.map(|base| base.join("bitnet"))
}
