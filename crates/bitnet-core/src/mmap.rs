//! Memory of whole pages: model files mapped read-only, and memory for weights that are laid out at
//! load. The only unsafe code of this crate.

use std::collections::BTreeMap;
use std::fs::File;
use std::iter::Sum;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use bytes::Bytes;

use crate::error::Error;

/// Where the files lie that are mapped now: the first address of each, and the one after its last.
static MAPPED: Mutex<BTreeMap<usize, usize>> = Mutex::new(BTreeMap::new());

fn mapped() -> MutexGuard<'static, BTreeMap<usize, usize>> {
    // Nothing panics while it is held.
    MAPPED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A mapped file, which [`is_mapped`] knows of.
struct Mapping(memmap2::Mmap);

impl Mapping {
    fn new(map: memmap2::Mmap) -> Self {
        if !map.is_empty() {
            let addresses = map.as_ptr_range();
            mapped().insert(addresses.start.addr(), addresses.end.addr());
        }
        Mapping(map)
    }
}

impl AsRef<[u8]> for Mapping {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if !self.0.is_empty() {
            mapped().remove(&self.0.as_ptr().addr());
        }
    }
}

/// Whether these bytes lie in a file that was mapped by [`map_file`].
pub fn is_mapped(bytes: &[u8]) -> bool {
    let address = bytes.as_ptr().addr();
    let mapped = mapped();
    let before = mapped.range(..=address).next_back();
    !bytes.is_empty() && before.is_some_and(|(_, &end)| address < end)
}

/// The same bytes in memory of their own, if they lie in a mapped file.
///
/// # Errors
/// If the memory cannot be had.
pub fn unmapped(bytes: &Bytes) -> Result<Bytes, Error> {
    match is_mapped(bytes) {
        true => filled(bytes.len(), |copy| copy.copy_from_slice(bytes)),
        false => Ok(bytes.clone()),
    }
}

/// Memory that weights take.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct WeightBytes {
    /// In files that are mapped: the system reads them as they are used, takes the memory back when
    /// it is short of it, and shares it among programs.
    pub mapped: u64,
    /// In memory of their own, on whichever device.
    pub own: u64,
}

impl WeightBytes {
    /// Of bytes in host memory.
    pub fn of(bytes: &[u8]) -> Self {
        let len = bytes.len() as u64;
        match is_mapped(bytes) {
            true => WeightBytes { mapped: len, own: 0 },
            false => WeightBytes { mapped: 0, own: len },
        }
    }

    /// Mapped or not.
    pub fn total(self) -> u64 {
        self.mapped + self.own
    }
}

impl Sum for WeightBytes {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(WeightBytes::default(), |sum, more| WeightBytes {
            mapped: sum.mapped + more.mapped,
            own: sum.own + more.own,
        })
    }
}

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
    Ok(Bytes::from_owner(Mapping::new(map)))
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

    #[test]
    fn what_is_mapped_is_told_from_what_is_not() {
        let path = std::env::temp_dir().join(format!("bitnet-mapped-{}", std::process::id()));
        std::fs::write(&path, [7; 10_000]).unwrap();
        let bytes = map_file(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        assert!(is_mapped(&bytes) && is_mapped(&bytes[9_999..]) && !is_mapped(&bytes[..0]));
        assert_eq!(WeightBytes::of(&bytes[1..]), WeightBytes { mapped: 9_999, own: 0 });
        let copy = unmapped(&bytes).unwrap();
        assert!(copy == bytes && !is_mapped(&copy));
        assert_eq!(WeightBytes::of(&copy), WeightBytes { mapped: 0, own: 10_000 });
        assert_eq!(unmapped(&copy).unwrap().as_ptr(), copy.as_ptr(), "one copy is enough");
        let address = bytes.as_ptr().addr();
        drop(bytes);
        assert!(!mapped().contains_key(&address));
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
