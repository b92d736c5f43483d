//! The directory of a zip archive whose entries are stored, not compressed, as torch writes them.
//!
//! Read here rather than by a crate because the entries must stay slices of the mapped file, and
//! memory must follow what is in the file, not what it claims. Layout: PKWARE's APPNOTE 4.3 and,
//! for 64-bit sizes, 4.5.3. Checksums are not verified: that would read the whole file.

use std::collections::BTreeMap;
use std::ops::Range;

use super::cursor::Cursor;
use super::{DOWNLOAD_AGAIN, MAX_TENSORS};
use crate::error::excerpt;

/// Entries by name, as byte ranges of the archive.
pub(super) type Directory<'a> = BTreeMap<&'a str, Range<usize>>;

const END: &[u8] = b"PK\x05\x06";
const END_64: &[u8] = b"PK\x06\x06";
const LOCATOR_64: &[u8] = b"PK\x06\x07";
const ENTRY: &[u8] = b"PK\x01\x02";
const LOCAL: &[u8] = b"PK\x03\x04";

/// Bytes of the end record without its comment.
const END_BYTES: usize = 22;
const LOCATOR_64_BYTES: usize = 20;

/// Lists the entries of an archive, or says in words why that cannot be done.
pub(super) fn directory(bytes: &[u8]) -> Result<Directory<'_>, String> {
    let broken = || format!("truncated: its zip directory cannot be read; {DOWNLOAD_AGAIN}");
    let (count, start) = end_record(bytes).ok_or_else(broken)?;
    if count > MAX_TENSORS as u64 {
        return Err(format!("claims {count} zip entries; at most {MAX_TENSORS} are read"));
    }
    let start = usize::try_from(start).map_err(|_| broken())?;
    let mut cursor = Cursor::new(bytes, start);
    let mut entries = Directory::new();
    for _ in 0..count {
        let entry = entry(&mut cursor).ok_or_else(broken)?;
        let name = std::str::from_utf8(entry.name)
            .map_err(|_| "has a zip entry whose name is not UTF-8".to_owned())?;
        let shown = excerpt(name);
        if entry.flags & 1 != 0 {
            return Err(format!("its zip entry `{shown}` is encrypted"));
        }
        if entry.method != 0 || entry.stored_bytes != entry.bytes {
            return Err(format!(
                "its zip entry `{shown}` is compressed; torch stores entries plain"
            ));
        }
        let range = data_range(bytes, &entry).ok_or_else(|| {
            format!(
                "truncated: its zip entry `{shown}` has {} bytes from byte {} on, which do not fit into the {} bytes of the file; {DOWNLOAD_AGAIN}",
                entry.bytes,
                entry.local_header,
                bytes.len()
            )
        })?;
        if entries.insert(name, range).is_some() {
            return Err(format!("its zip entry `{shown}` appears twice"));
        }
    }
    Ok(entries)
}

/// Number of entries and position of the directory, from the record at the end of the archive.
fn end_record(bytes: &[u8]) -> Option<(u64, u64)> {
    // The record ends with a comment of at most 65 535 bytes, so it has to be looked for; it is
    // the last one whose comment reaches exactly to the end of the file.
    let last = bytes.len().checked_sub(END_BYTES)?;
    let first = last.saturating_sub(usize::from(u16::MAX));
    let at = (first..=last).rev().find(|&at| {
        let comment_bytes = u16::from_le_bytes([bytes[at + 20], bytes[at + 21]]);
        bytes[at..].starts_with(END) && at + END_BYTES + usize::from(comment_bytes) == bytes.len()
    })?;
    let mut cursor = Cursor::new(bytes, at);
    cursor.take(4 + 2 + 2 + 2)?; // magic, disk, directory's disk, entries on this disk
    let count = cursor.u16()?;
    cursor.take(4)?; // directory's bytes
    let start = cursor.u32()?;
    if count != u16::MAX && start != u32::MAX {
        return Some((count.into(), start.into()));
    }

    // Too big for these fields: the real numbers are in the 64-bit record, found by its locator.
    let mut locator = Cursor::new(bytes, at.checked_sub(LOCATOR_64_BYTES)?);
    if locator.take(4)? != LOCATOR_64 {
        return Some((count.into(), start.into()));
    }
    locator.take(4)?; // disk
    let mut cursor = Cursor::new(bytes, usize::try_from(locator.u64()?).ok()?);
    if cursor.take(4)? != END_64 {
        return None;
    }
    cursor.take(8 + 2 + 2 + 4 + 4 + 8)?; // own size, versions, disks, entries on this disk
    let count = cursor.u64()?;
    cursor.take(8)?; // directory's bytes
    Some((count, cursor.u64()?))
}

/// What the directory says about an entry.
struct Entry<'a> {
    flags: u16,
    method: u16,
    stored_bytes: u64,
    bytes: u64,
    name: &'a [u8],
    local_header: u64,
}

fn entry<'a>(cursor: &mut Cursor<'a>) -> Option<Entry<'a>> {
    if cursor.take(4)? != ENTRY {
        return None;
    }
    cursor.take(2 + 2)?; // versions
    let (flags, method) = (cursor.u16()?, cursor.u16()?);
    cursor.take(2 + 2 + 4)?; // time, date, checksum
    let (stored_bytes, bytes) = (cursor.u32()?, cursor.u32()?);
    let (name_bytes, extra_bytes, comment_bytes) = (cursor.u16()?, cursor.u16()?, cursor.u16()?);
    cursor.take(2 + 2 + 4)?; // disk, attributes
    let local_header = cursor.u32()?;
    let name = cursor.take(name_bytes.into())?;
    let mut wide = Cursor::new(zip64_field(cursor.take(extra_bytes.into())?), 0);
    cursor.take(comment_bytes.into())?;
    // The extra field holds, in this order, those numbers that do not fit their own field.
    let mut widen = |short: u32| if short == u32::MAX { wide.u64() } else { Some(short.into()) };
    let bytes = widen(bytes)?;
    let stored_bytes = widen(stored_bytes)?;
    let local_header = widen(local_header)?;
    Some(Entry { flags, method, stored_bytes, bytes, name, local_header })
}

/// The contents of the 64-bit extra field (id 1), empty if there is none.
fn zip64_field(extra: &[u8]) -> &[u8] {
    let mut cursor = Cursor::new(extra, 0);
    while let Some((id, length)) = cursor.u16().zip(cursor.u16()) {
        match cursor.take(length.into()) {
            Some(field) if id == 1 => return field,
            Some(_) => {}
            None => break,
        }
    }
    &[]
}

/// Where the bytes of an entry lie: behind its local header, which repeats the name and has an
/// extra field of its own length (torch pads with it).
fn data_range(bytes: &[u8], entry: &Entry<'_>) -> Option<Range<usize>> {
    let mut cursor = Cursor::new(bytes, usize::try_from(entry.local_header).ok()?);
    if cursor.take(4)? != LOCAL {
        return None;
    }
    cursor.take(22)?; // version, flags, method, time, date, checksum, sizes
    let (name_bytes, extra_bytes) = (cursor.u16()?, cursor.u16()?);
    cursor.take(u64::from(name_bytes) + u64::from(extra_bytes))?;
    let start = cursor.position();
    cursor.take(entry.bytes)?;
    Some(start..cursor.position())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Cursor as Memory, Write as _};
    use zip::write::{SimpleFileOptions, ZipWriter};

    fn archive(comment: &str, large: bool) -> Vec<u8> {
        let mut writer = ZipWriter::new(Memory::new(Vec::new()));
        let options = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored)
            .large_file(large);
        for (name, data) in [("m/a", &b"first"[..]), ("m/b", &[])] {
            writer.start_file(name, options).unwrap();
            writer.write_all(data).unwrap();
        }
        writer.set_comment(comment).unwrap();
        writer.finish().unwrap().into_inner()
    }

    /// Position of the `n`th occurrence of `magic`.
    fn find(bytes: &[u8], magic: &[u8], n: usize) -> usize {
        let mut found = (0..bytes.len()).filter(|&at| bytes[at..].starts_with(magic));
        found.nth(n).expect("the record is there")
    }

    #[test]
    fn entries_are_the_byte_ranges_of_what_was_stored() {
        for bytes in [archive("", false), archive("a comment", false), archive("", true)] {
            let entries = directory(&bytes).unwrap();
            assert_eq!(entries.keys().copied().collect::<Vec<_>>(), ["m/a", "m/b"]);
            assert_eq!(&bytes[entries["m/a"].clone()], b"first");
            assert!(entries["m/b"].is_empty());
        }
    }

    #[test]
    fn sizes_in_64_bits_are_read() {
        // The writer uses 64-bit records only above 4 GiB, so they are put in by hand.
        let plain = archive("", false);
        let (start, end) = (find(&plain, ENTRY, 0), find(&plain, END, 0));
        let mut bytes = plain[..start].to_vec();
        bytes.extend_from_slice(&plain[start..][..20]); // up to the sizes
        bytes.extend_from_slice(&[0xff; 8]); // both sizes
        bytes.extend_from_slice(&[3, 0, 32, 0, 0, 0]); // name, extra, comment
        bytes.extend_from_slice(&[0; 8]);
        bytes.extend_from_slice(&[0xff; 4]); // local header
        bytes.extend_from_slice(b"m/a");
        bytes.extend_from_slice(&[9, 9, 0, 0]); // some other extra field
        bytes.extend_from_slice(&[1, 0, 24, 0]);
        for number in [5u64, 5, 0] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        let end_64 = bytes.len() as u64;
        bytes.extend_from_slice(END_64);
        bytes.extend_from_slice(&[0; 28]);
        for number in [1u64, 0, start as u64] {
            bytes.extend_from_slice(&number.to_le_bytes());
        }
        bytes.extend_from_slice(LOCATOR_64);
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&end_64.to_le_bytes());
        bytes.extend_from_slice(&[1, 0, 0, 0]);
        bytes.extend_from_slice(&plain[end..][..8]);
        bytes.extend_from_slice(&[0xff; 12]); // both counts, size and start
        bytes.extend_from_slice(&[0, 0]);
        let entries = directory(&bytes).unwrap();
        assert_eq!(&bytes[entries["m/a"].clone()], b"first");
    }

    #[test]
    fn every_cut_is_refused() {
        let bytes = archive("", false);
        for length in 0..bytes.len() {
            assert!(directory(&bytes[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn records_that_lie_are_refused() {
        let plain = archive("", false);
        let (local, entry) = (find(&plain, LOCAL, 0), find(&plain, ENTRY, 0));
        let end = find(&plain, END, 0);
        let second = find(&plain, ENTRY, 1);
        for (at, value, word) in [
            (entry + 8, &[1, 0][..], "encrypted"),
            (entry + 10, &[8, 0], "compressed"),
            (entry + 20, &[4, 0, 0, 0], "compressed"),
            (entry + 20, &[0xfe, 0xff, 0xff, 0x7f, 0xfe, 0xff, 0xff, 0x7f], "do not fit"),
            (entry + 20, &[0xff; 8], "cannot be read"),
            (entry + 28, &[0xff, 0xff], "cannot be read"),
            (entry + 42, &[0, 0, 0, 0x7f], "do not fit"),
            (entry + 42, &[1, 0, 0, 0], "do not fit"),
            (local + 28, &[0xff, 0xff], "do not fit"),
            (second + 48, b"a", "appears twice"),
            (second + 46, &[0xff], "not UTF-8"),
            (end + 10, &[3, 0], "cannot be read"),
            (end + 10, &[0xff, 0xff], "cannot be read"),
            (end + 16, &[0xfe, 0xff, 0xff, 0xff], "cannot be read"),
        ] {
            let mut bytes = plain.clone();
            bytes[at..at + value.len()].copy_from_slice(value);
            let error = directory(&bytes).unwrap_err();
            assert!(error.contains(word), "at {at}: {error}");
        }
    }
}
