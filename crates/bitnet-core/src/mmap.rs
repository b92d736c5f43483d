//! Memory of whole pages: model files mapped read-only, memory for weights that are laid out at load, and
//! for keys and values. The only unsafe code of this crate.

use std::collections::BTreeMap;
use std::fs::File;
use std::iter::Sum;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

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

/// Bytes below which memory is taken from the allocator.
const SMALL: usize = 64 << 10;

/// Bytes of an [`Arena`]. Only what was written to takes memory.
const ARENA: usize = 64 << 20;

/// The arena that is being cut up, for as long as a piece of it is in use, and how many of its bytes
/// are taken.
static CURRENT: Mutex<(Weak<Arena>, usize)> = Mutex::new((Weak::new(), 0));

/// Memory that weights are cut from one after another. By itself a matrix has up to two huge pages less
/// than its size, the rest of it in small pages, and one of less than two such pages perhaps none.
struct Arena {
    map: memmap2::MmapRaw,
    /// The first byte on a huge page, and how many follow.
    start: usize,
    len: usize,
}

impl Arena {
    fn new(len: usize) -> std::io::Result<Self> {
        let len = len.checked_next_multiple_of(HUGE_PAGE);
        let whole = len.and_then(|len| len.checked_add(HUGE_PAGE));
        let (Some(len), Some(whole)) = (len, whole) else {
            return Err(std::io::ErrorKind::OutOfMemory.into());
        };
        let map = memmap2::MmapRaw::from(memmap2::MmapMut::map_anon(whole)?);
        // A wish: without huge pages everything is the same but for the speed.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        Ok(Arena { map, start, len })
    }
}

/// Bytes of an arena that nothing else refers to.
struct Piece {
    arena: Arc<Arena>,
    from: usize,
    len: usize,
}

impl Piece {
    /// `len` bytes, zero, on a cache line.
    fn new(len: usize) -> std::io::Result<Self> {
        if len >= ARENA {
            return Ok(Piece { arena: Arc::new(Arena::new(len)?), from: 0, len });
        }
        // Nothing panics while it is held.
        let mut current = CURRENT.lock().unwrap_or_else(PoisonError::into_inner);
        let (arena, used) = &mut *current;
        let (arena, from) = match arena.upgrade() {
            Some(arena) if arena.len - *used >= len => (arena, *used),
            _ => {
                let fresh = Arc::new(Arena::new(ARENA)?);
                *arena = Arc::downgrade(&fresh);
                (fresh, 0)
            }
        };
        *used = (from + len).next_multiple_of(LINE);
        Ok(Piece { arena, from, len })
    }

    #[allow(unsafe_code)]
    fn bytes_mut(&mut self) -> &mut [u8] {
        let Arena { map, start, .. } = &*self.arena;
        // SAFETY: the bytes lie in the mapping, which lives as long as this piece, and each byte of an
        // arena is given to one piece only, of which this is the one reference.
        unsafe { std::slice::from_raw_parts_mut(map.as_mut_ptr().add(start + self.from), self.len) }
    }
}

impl AsRef<[u8]> for Piece {
    #[allow(unsafe_code)]
    fn as_ref(&self) -> &[u8] {
        let Arena { map, start, .. } = &*self.arena;
        // SAFETY: as for `bytes_mut`; nothing writes to the piece while this reference lives.
        unsafe { std::slice::from_raw_parts(map.as_ptr().add(start + self.from), self.len) }
    }
}

/// Numbers that [`Zeroed`] may hold.
///
/// # Safety
/// Any bytes are a valid value.
#[allow(unsafe_code)]
pub unsafe trait Plain: Copy {}

#[allow(unsafe_code)]
// SAFETY: any four bytes are an f32.
unsafe impl Plain for f32 {}
#[allow(unsafe_code)]
// SAFETY: any byte is an i8.
unsafe impl Plain for i8 {}
#[allow(unsafe_code)]
// SAFETY: any two bytes are such an array.
unsafe impl Plain for [u8; 2] {}

/// Numbers that are all zero at first, in huge pages where the system gives them; only what was written to takes
/// memory, a page at a time. Read at the speed of memory, small pages that the system has put together from
/// here and there take a third longer.
pub struct Zeroed<T> {
    memory: Memory,
    len: usize,
    of: PhantomData<T>,
}

enum Memory {
    /// Of less than a huge page.
    Small(Vec<u64>),
    Pages(Arena),
}

impl<T: Plain> Zeroed<T> {
    /// So many numbers.
    ///
    /// # Errors
    /// If the memory cannot be had; `what` says for what it is.
    pub fn new(what: &str, len: usize) -> Result<Self, Error> {
        const { assert!(align_of::<T>() <= align_of::<u64>()) };
        let failed = |needed: usize| Error::Memory {
            what: what.to_owned(),
            needed: needed as u64,
            available: crate::budget::available_memory().unwrap_or(0),
        };
        let bytes = len.checked_mul(size_of::<T>()).ok_or_else(|| failed(usize::MAX))?;
        let memory = match bytes < HUGE_PAGE {
            true => Memory::Small(vec![0; bytes.div_ceil(size_of::<u64>())]),
            false => Memory::Pages(Arena::new(bytes).map_err(|_| failed(bytes))?),
        };
        Ok(Zeroed { memory, len, of: PhantomData })
    }
}

impl<T: Plain> Deref for Zeroed<T> {
    type Target = [T];

    #[allow(unsafe_code)]
    fn deref(&self) -> &[T] {
        let start = match &self.memory {
            Memory::Small(words) => words.as_ptr().cast(),
            Memory::Pages(Arena { map, start, .. }) => map.as_ptr().wrapping_add(*start),
        };
        // SAFETY: there are so many bytes, which live as long as `self` and are written to through it alone.
        // They begin a huge page or a vector that is aligned as `new` asserts; any are valid values.
        unsafe { std::slice::from_raw_parts(start.cast(), self.len) }
    }
}

impl<T: Plain> DerefMut for Zeroed<T> {
    #[allow(unsafe_code)]
    fn deref_mut(&mut self) -> &mut [T] {
        let start = match &mut self.memory {
            Memory::Small(words) => words.as_mut_ptr().cast(),
            Memory::Pages(Arena { map, start, .. }) => map.as_mut_ptr().wrapping_add(*start),
        };
        // SAFETY: as for `deref`, and `self` is borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(start.cast(), self.len) }
    }
}

/// `len` bytes that `fill` writes, zero before, starting on a cache line.
///
/// They lie in huge pages where the system gives them: reading weights at the speed of memory, the
/// processor spends much of its time on finding small ones. Weights that are made one after another
/// share such pages, and up to 64 MiB of memory are given back only when all of them are gone.
///
/// # Errors
/// If the memory cannot be had.
pub fn filled(len: usize, fill: impl FnOnce(&mut [u8])) -> Result<Bytes, Error> {
    if len < SMALL {
        let mut bytes = vec![0; len + LINE];
        let start = bytes.as_ptr().align_offset(LINE);
        fill(&mut bytes[start..start + len]);
        return Ok(Bytes::from(bytes).slice(start..start + len));
    }
    let mut piece = Piece::new(len).map_err(|_| Error::Memory {
        what: "a weight matrix".to_owned(),
        needed: len as u64,
        available: crate::budget::available_memory().unwrap_or(0),
    })?;
    fill(piece.bytes_mut());
    Ok(Bytes::from_owner(piece))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_any_size_starts_on_a_line_and_keeps_what_is_written() {
        for len in
            [0, 1, 100, SMALL - 1, SMALL, HUGE_PAGE - 1, 3 * HUGE_PAGE + 7, ARENA - 1, ARENA + 1]
        {
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
    fn zeroed_memory_of_any_size_is_zero_and_keeps_what_is_written() {
        for len in [0, 1, 17, HUGE_PAGE / 4 - 1, HUGE_PAGE / 4, 3 * HUGE_PAGE + 5] {
            let mut floats = Zeroed::<f32>::new("a test", len).unwrap();
            assert_eq!(floats.len(), len);
            assert!(floats.iter().all(|&float| float == 0.0));
            floats.iter_mut().enumerate().for_each(|(i, float)| *float = i as f32);
            assert!(floats.iter().enumerate().all(|(i, &float)| float == i as f32));
        }
        assert!(Zeroed::<f32>::new("a test", usize::MAX / 2).is_err());
    }

    /// Pieces of one arena, of several, made and dropped by several threads at once.
    #[test]
    fn pieces_of_arenas_do_not_share_bytes() {
        std::thread::scope(|scope| {
            for thread in 0..3u8 {
                scope.spawn(move || {
                    let mut kept = Vec::new();
                    for round in 0..60usize {
                        let len = SMALL + (round * 7919 + thread as usize * 104_729) % (4 << 20);
                        let own = thread * 60 + round as u8;
                        let bytes = filled(len, |bytes| {
                            assert!(bytes.iter().all(|&byte| byte == 0), "it was used before");
                            bytes.fill(own + 1);
                        });
                        kept.push((own + 1, bytes.unwrap()));
                        if round % 3 == 0 {
                            kept.swap_remove(round % kept.len());
                        }
                        for (own, bytes) in &kept {
                            assert!(
                                [bytes[0], bytes[bytes.len() / 2], bytes[bytes.len() - 1]]
                                    .iter()
                                    .all(|byte| byte == own)
                            );
                        }
                    }
                });
            }
        });
    }

    #[test]
    fn an_arena_ends_with_its_last_piece() {
        let pieces = [1, 2].map(|n| Piece::new(n * SMALL).unwrap());
        let [first, second] = pieces.map(|piece| (Arc::downgrade(&piece.arena), piece));
        drop(first.1);
        // Other tests may cut pieces of the same arena, and hold them for a while.
        let freed = |arena: &Weak<Arena>| arena.strong_count() == 0;
        assert!(!freed(&second.0));
        drop(second.1);
        let patience = std::time::Instant::now() + std::time::Duration::from_secs(60);
        while !(freed(&first.0) && freed(&second.0)) {
            assert!(std::time::Instant::now() < patience, "it is still there");
            std::thread::yield_now();
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
