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
    let file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(io(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
    }
    // SAFETY: the mapping is private and read-only and keeps the file open for its lifetime; the
    // one remaining hazard, another process shrinking the file in place, is part of this
    // function's contract.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io)?;
    Ok(Bytes::from_owner(map))
}
