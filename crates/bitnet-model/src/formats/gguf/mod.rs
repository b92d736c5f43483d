//! GGUF versions 2 and 3, little-endian.
//!
//! A file is: magic, version, number of tensors, number of metadata entries; the entries (key, type,
//! value); the tensor table (name, extents innermost first, type, offset); and, from the next
//! multiple of `general.alignment`, the tensors' bytes. A string is a 64-bit length and its bytes.

mod metadata;
#[cfg(test)]
mod tests;
mod writer;

use std::collections::BTreeMap;
use std::path::Path;

use bitnet_core::mmap::map_file;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;

use super::cursor::Cursor;
use super::{DOWNLOAD_AGAIN, MAX_TENSORS, Tensors, refuse_stand_in};
use crate::error::{Error, excerpt};

use metadata::ElementType;
pub use metadata::{Array, FromValue, Metadata, Value};
pub(crate) use writer::{Entries, Line, Writer, header};

/// The first bytes of a GGUF file.
pub const MAGIC: &[u8] = b"GGUF";

/// Most metadata entries; real files have some dozens.
const MAX_ENTRIES: u64 = 1 << 16;

/// Longest metadata key in bytes, by the format's definition.
const MAX_KEY_BYTES: usize = 65_535;

/// Most extents of a tensor, by the format's definition.
const MAX_EXTENTS: u32 = 4;

/// A GGUF file: its metadata and its tensors.
#[derive(Debug)]
pub struct GgufFile {
    /// Model settings, tokenizer and whatever else the writer knew.
    pub metadata: Metadata,
    /// All tensors; shapes are outermost extent first.
    pub tensors: Tensors,
}

/// Reads a GGUF file. Tensor data and metadata texts stay in the mapped file.
pub fn read(path: &Path) -> Result<GgufFile, Error> {
    from_bytes(map_file(path)?, path)
}

/// Reads a GGUF file that is in memory; `path` is for error messages.
pub fn from_bytes(bytes: Bytes, path: &Path) -> Result<GgufFile, Error> {
    refuse_stand_in(&bytes, path)?;
    let mut reader = Reader { cursor: Cursor::new(&bytes, 0), bytes: &bytes, path };
    let (tensor_count, entry_count) = reader.header()?;
    let metadata = reader.metadata(entry_count)?;
    if metadata.get::<u64>("split.count")?.is_some_and(|parts| parts > 1) {
        let reason = "is one part of a split GGUF; join the parts with `llama-gguf-split --merge`";
        return Err(Error::file(path, reason));
    }
    let alignment = alignment(&metadata)?;
    let table = reader.tensor_table(tensor_count)?;
    let data_start = reader.cursor.position().next_multiple_of(alignment);
    let tensors = place_tensors(table, &bytes, data_start, alignment, path)?;
    Ok(GgufFile { metadata, tensors })
}

/// `general.alignment`: where tensors may begin, counted from the start of the data.
fn alignment(metadata: &Metadata) -> Result<usize, Error> {
    const KEY: &str = "general.alignment";
    const DEFAULT: usize = 32;
    let alignment = metadata.get(KEY)?.unwrap_or(DEFAULT);
    if !alignment.is_power_of_two() || !(8..=1 << 20).contains(&alignment) {
        let reason =
            format!("metadata `{KEY}` is {alignment}, not a power of two from 8 to 1048576");
        return Err(Error::file(&metadata.path, reason));
    }
    Ok(alignment)
}

/// The part of a file before the data.
struct Reader<'a> {
    cursor: Cursor<'a>,
    bytes: &'a Bytes,
    path: &'a Path,
}

impl<'a> Reader<'a> {
    fn error(&self, reason: impl ToString) -> Error {
        Error::file(self.path, reason)
    }

    /// Turns the end of the file into an error that says what was being read.
    fn need<T>(&self, read: Option<T>, what: &str) -> Result<T, Error> {
        read.ok_or_else(|| {
            self.error(format!(
                "truncated: {what} begins at or before byte {} and does not fit into the {} bytes of the file; {DOWNLOAD_AGAIN}",
                self.cursor.position(),
                self.bytes.len()
            ))
        })
    }

    /// Magic, version and counts. Returns the number of tensors and of metadata entries.
    fn header(&mut self) -> Result<(u64, u64), Error> {
        if self.cursor.take(4) != Some(MAGIC) {
            return Err(self.error("is not a GGUF file: it does not begin with `GGUF`"));
        }
        let version = self.cursor.u32();
        match self.need(version, "the version")? {
            2 | 3 => {}
            1 => {
                let reason = "is GGUF version 1, which has been out of use since 2023; convert the original checkpoint again";
                return Err(self.error(reason));
            }
            swapped if matches!(swapped.swap_bytes(), 1..=3) => {
                let reason = "is a big-endian GGUF file; only little-endian ones are read";
                return Err(self.error(reason));
            }
            other => {
                return Err(self.error(format!("is GGUF version {other}; 2 and 3 are read")));
            }
        }
        let counts = self.cursor.u64().zip(self.cursor.u64());
        let (tensors, entries) = self.need(counts, "the number of tensors")?;
        if tensors > MAX_TENSORS as u64 || entries > MAX_ENTRIES {
            let reason = format!(
                "claims {tensors} tensors and {entries} metadata entries; at most {MAX_TENSORS} and {MAX_ENTRIES} are read"
            );
            return Err(self.error(reason));
        }
        Ok((tensors, entries))
    }

    fn metadata(&mut self, count: u64) -> Result<Metadata, Error> {
        let mut entries = BTreeMap::new();
        for _ in 0..count {
            let key = self.text("a metadata key", MAX_KEY_BYTES)?;
            let value = self.value(&key)?;
            if entries.contains_key(&key) {
                let reason = format!("metadata `{}` appears twice", excerpt(&key));
                return Err(self.error(reason));
            }
            entries.insert(key, value);
        }
        Ok(Metadata { path: self.path.to_owned(), entries })
    }

    fn value(&mut self, key: &str) -> Result<Value, Error> {
        let what = format!("metadata `{}`", excerpt(key));
        match self.element_type(&what)? {
            ElementType::String => {
                let text = self.string(&what)?;
                Ok(Value::String(self.bytes.slice_ref(text)))
            }
            ElementType::Array => {
                let element = self.element_type(&what)?;
                let len = self.cursor.u64();
                let len = self.need(len, &what)?;
                let start = self.cursor.position();
                match element.width() {
                    Some(width) => {
                        let data = len.checked_mul(width as u64).and_then(|n| self.cursor.take(n));
                        self.need(data, &what)?;
                    }
                    None if element == ElementType::Array => {
                        return Err(self.error(format!("{what} is a list of lists")));
                    }
                    // Every round reads at least a length, so the file's size bounds the rounds.
                    None => (0..len).try_for_each(|_| self.string(&what).map(drop))?,
                }
                let data = self.bytes.slice(start..self.cursor.position());
                // At least a byte of the file stands for each element, so `len` fits usize.
                Ok(Value::Array(Array { element, len: len as usize, data }))
            }
            scalar => {
                let width = scalar.width().expect("texts and arrays are read above");
                let bytes = self.cursor.take(width as u64);
                Ok(scalar.scalar(self.need(bytes, &what)?))
            }
        }
    }

    fn element_type(&mut self, what: &str) -> Result<ElementType, Error> {
        let id = self.cursor.u32();
        let id = self.need(id, what)?;
        ElementType::from_id(id)
            .ok_or_else(|| self.error(format!("{what} has the unknown value type {id}")))
    }

    fn string(&mut self, what: &str) -> Result<&'a [u8], Error> {
        let length = self.cursor.u64();
        let length = self.need(length, what)?;
        let text = self.cursor.take(length);
        self.need(text, what)
    }

    /// A key or name: at most `limit` bytes of UTF-8.
    fn text(&mut self, what: &str, limit: usize) -> Result<String, Error> {
        let text = self.string(what)?;
        if text.len() > limit {
            return Err(self.error(format!("{what} has {} bytes, more than {limit}", text.len())));
        }
        match std::str::from_utf8(text) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error(format!("{what} is not UTF-8"))),
        }
    }

    fn tensor_table(&mut self, count: u64) -> Result<Vec<TableEntry>, Error> {
        // Name length, rank, type and offset.
        const SMALLEST: u64 = 8 + 4 + 4 + 8;
        if count * SMALLEST > self.cursor.remaining() as u64 {
            let reason = format!(
                "truncated: a table of {count} tensors does not fit into its {} bytes; {DOWNLOAD_AGAIN}",
                self.bytes.len()
            );
            return Err(self.error(reason));
        }
        (0..count).map(|_| self.table_entry()).collect()
    }

    fn table_entry(&mut self) -> Result<TableEntry, Error> {
        let name = self.text("a tensor name", super::MAX_NAME_BYTES)?;
        let error = |reason: String| Error::tensor(self.path, &name, reason);
        let truncated =
            || error(format!("truncated: the file ends in the table; {DOWNLOAD_AGAIN}"));
        let rank = self.cursor.u32().ok_or_else(truncated)?;
        if rank > MAX_EXTENTS {
            return Err(error(format!("has {rank} extents; at most {MAX_EXTENTS} are read")));
        }
        let mut shape = Vec::with_capacity(rank as usize);
        for _ in 0..rank {
            let extent = self.cursor.u64().ok_or_else(truncated)?;
            match usize::try_from(extent) {
                Ok(extent) if extent > 0 => shape.push(extent),
                _ => return Err(error(format!("has an extent of {extent}"))),
            }
        }
        shape.reverse();
        let type_id = self.cursor.u32().ok_or_else(truncated)?;
        let offset = self.cursor.u64().ok_or_else(truncated)?;
        Ok(TableEntry { name, shape, type_id, offset })
    }
}

/// A line of the tensor table.
struct TableEntry {
    name: String,
    /// Outermost extent first.
    shape: Vec<usize>,
    type_id: u32,
    /// Counted from the start of the data.
    offset: u64,
}

/// Gives every tensor its bytes. A tensor may use what lies between its offset and the next one's.
fn place_tensors(
    mut table: Vec<TableEntry>,
    bytes: &Bytes,
    data_start: usize,
    alignment: usize,
    path: &Path,
) -> Result<Tensors, Error> {
    table.sort_by_key(|entry| entry.offset);
    let data_bytes = bytes.len().saturating_sub(data_start) as u64;
    let ends: Vec<u64> = (1..=table.len())
        .map(|next| table.get(next).map_or(data_bytes, |entry| entry.offset.min(data_bytes)))
        .collect();
    let q2_0 = q2_0_width(&table, &ends, alignment);

    let mut tensors = Tensors::default();
    for (entry, end) in table.into_iter().zip(ends) {
        let TableEntry { name, shape, type_id, offset } = entry;
        let error = |reason: String| Error::tensor(path, &name, reason);
        if !offset.is_multiple_of(alignment as u64) {
            let reason = format!("begins at byte {offset}, not a multiple of {alignment}");
            return Err(error(reason));
        }
        let dtype = match type_id {
            Q2_0 => q2_0.clone(),
            id => element_type(id),
        };
        let tensor = match dtype {
            Err(reason) => Err(reason),
            Ok(dtype) => {
                let size = dtype
                    .byte_len(&shape)
                    .map_err(|reason| error(format!("{dtype} of shape {shape:?}: {reason}")))?;
                let tensor_end = offset.saturating_add(size as u64);
                if tensor_end > data_bytes {
                    return Err(error(format!(
                        "truncated: it ends at byte {} but the file has {} bytes; {DOWNLOAD_AGAIN}",
                        tensor_end.saturating_add(data_start as u64),
                        bytes.len()
                    )));
                }
                if tensor_end > end {
                    return Err(error(format!(
                        "its {size} bytes reach into the next tensor, which begins {} bytes after it",
                        end - offset
                    )));
                }
                // The end is inside the file, so all of this fits usize.
                let begin = data_start + offset as usize;
                let data = bytes.slice(begin..begin + size);
                Ok(Tensor::new(dtype, shape, data).map_err(|e| error(e.to_string()))?)
            }
        };
        tensors.insert(path, name, tensor)?;
    }
    Ok(tensors)
}

/// Type id of `Q2_0`, which ggml writes in blocks of 64 and Prism's fork in blocks of 128.
const Q2_0: u32 = 42;

/// Tells the two kinds of `Q2_0` apart. Writers put one tensor after the other, so with the right
/// width every such tensor ends less than `alignment` bytes before the next one begins.
fn q2_0_width(table: &[TableEntry], ends: &[u64], alignment: usize) -> Result<DType, String> {
    let fits_all = |dtype: DType| {
        table.iter().zip(ends).filter(|(entry, _)| entry.type_id == Q2_0).all(|(entry, end)| {
            let (Ok(size), Some(room)) =
                (dtype.byte_len(&entry.shape), end.checked_sub(entry.offset))
            else {
                return false;
            };
            size as u64 <= room && room - (size as u64) < alignment as u64
        })
    };
    match (fits_all(DType::Q2_0), fits_all(DType::Q2_0Wide)) {
        (true, false) => Ok(DType::Q2_0),
        (false, true) => Ok(DType::Q2_0Wide),
        (both, _) => Err(format!(
            "it is Q2_0, and the sizes in the file fit {} the 64-wide {} the 128-wide kind",
            if both { "both" } else { "neither" },
            if both { "and" } else { "nor" },
        )),
    }
}

/// The element type of a ggml type id, or why it cannot be used. The ids of I2_S, TL1 and TL2 are
/// bitnet.cpp's own.
fn element_type(id: u32) -> Result<DType, String> {
    const CONVERT: &str = "convert the original checkpoint to I2_S or TQ2_0 instead";
    let name = match id {
        0 => return Ok(DType::F32),
        1 => return Ok(DType::F16),
        8 => return Ok(DType::Q8_0),
        12 => return Ok(DType::Q4K),
        14 => return Ok(DType::Q6K),
        24 => return Ok(DType::I8),
        26 => return Ok(DType::I32),
        27 => return Ok(DType::I64),
        28 => return Ok(DType::F64),
        30 => return Ok(DType::BF16),
        34 => return Ok(DType::Tq1_0),
        35 => return Ok(DType::Tq2_0),
        36 => return Ok(DType::I2S),
        38 => {
            return Err(format!(
                "it is TL1, whose tiling depends on a file that is not in the GGUF; {CONVERT}"
            ));
        }
        39 => {
            return Err(format!(
                "it is MXFP4 (llama.cpp) or TL2 (bitnet.cpp), which share an id, and neither is read; {CONVERT}"
            ));
        }
        2 => "Q4_0",
        3 => "Q4_1",
        6 => "Q5_0",
        7 => "Q5_1",
        9 => "Q8_1",
        10 => "Q2_K",
        11 => "Q3_K",
        13 => "Q5_K",
        15 => "Q8_K",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        20 => "IQ4_NL",
        21 => "IQ3_S",
        22 => "IQ2_S",
        23 => "IQ4_XS",
        25 => "I16",
        29 => "IQ1_M",
        37 => "I8_S",
        40 => "NVFP4",
        41 => "Q1_0",
        134 => "IQ1_BN",
        135 => "IQ2_BN",
        335 => "IQ2_BN_R4",
        _ => return Err(format!("its type id {id} is unknown")),
    };
    Err(format!("its element type {name} is not read"))
}
