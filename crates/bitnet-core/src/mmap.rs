//! Read-only memory mapping of model files: the only unsafe code of this crate.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;

use crate::error::Error;

/// Maps `path` read-only. An empty file gives empty bytes.
///
/// The mapping must not be truncated or rewritten by another process while it is in use; model
/// files are replaced by renaming, which leaves the mapped contents alone.
#[allow(unsafe_code)]
pub fn map_file(path: &Path) -> Result<Bytes, Error> {
    let io = |source| Error::Io { path: path.to_owned(), source };
    // Asked before opening, because opening a pipe waits for its writer.
    let metadata = std::fs::metadata(path).map_err(io)?;
    if metadata.is_dir() {
        return Err(io(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    if !metadata.is_file() {
        return Err(io(std::io::Error::other("it is a pipe or a device, not a file")));
    }
    let file = File::open(path).map_err(io)?;
    // SAFETY: the mapping is private and read-only and keeps the file open for its lifetime; the
    // one remaining hazard, another process shrinking the file in place, is part of this
    // function's contract.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[cfg(unix)]
    #[test]
    fn what_is_not_a_file_is_refused_at_once() {
        for (path, word) in [("/dev/null", "device"), ("/", "directory")] {
            let error = map_file(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
