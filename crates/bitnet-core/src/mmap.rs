//! Memory of whole pages: model files mapped read-only, and memory for weights that are laid out at
//! load. The only unsafe code of this crate.

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

/// Bytes of a huge page, on the systems that have them for the asking.
const HUGE_PAGE: usize = 2 << 20;

/// Bytes of a cache line.
const LINE: usize = 64;

/// `len` bytes that `fill` writes, zero before, starting on a cache line.
///
/// Many bytes get huge pages where the system gives them: reading weights at the speed of memory,
/// the processor spends much of its time on finding small ones.
///
/// # Errors
/// If the memory cannot be had.
pub fn filled(len: usize, fill: impl FnOnce(&mut [u8])) -> Result<Bytes, Error> {
    if len < HUGE_PAGE {
        let mut bytes = vec![0; len + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        fill(&mut bytes[start..start + len]);
        return Ok(Bytes::from(bytes).slice(start..start + len));
    }
    let mut map = memmap2::MmapMut::map_anon(len).map_err(|_| Error::Memory {
        what: "a weight matrix".to_owned(),
        needed: len as u64,
        available: crate::budget::available_memory().unwrap_or(0),
    })?;
    // A wish: without huge pages everything is the same but for the speed.
    #[cfg(target_os = "linux")]
    let _ = map.advise(memmap2::Advice::HugePage);
    fill(&mut map);
    Ok(Bytes::from_owner(map))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_size_starts_on_a_line_and_keeps_what_is_written() {
        for len in [0, 1, 100, HUGE_PAGE - 1, HUGE_PAGE, 3 * HUGE_PAGE + 7] {
            let bytes = filled(len, |bytes| {
                assert!(bytes.iter().all(|&byte| byte == 0));
                bytes.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i % 251) as u8);
            });
            let bytes = bytes.unwrap();
            assert_eq!(bytes.len(), len);
            assert!(len == 0 || bytes.as_ptr().addr().is_multiple_of(LINE));
            assert!(bytes.iter().enumerate().all(|(i, &byte)| byte == (i % 251) as u8));
        }
    }

    #[cfg(unix)]
    #[test]
    fn what_is_not_a_file_is_refused_at_once() {
        for (path, word) in [("/dev/null", "device"), ("/", "directory")] {
            let error = map_file(Path::new(path)).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
