//! GGUF versions 2 and 3, little-endian.
//!
//! A file is: magic, version, number of tensors, number of metadata entries; the entries (key, type,
//! value); the tensor table (name, extents innermost first, type, offset); and, from the next
//! multiple of `general.alignment`, the tensors' bytes. A string is a 64-bit length and its bytes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bitnet_core::mmap::map_file;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;

use super::cursor::Cursor;
use super::{DOWNLOAD_AGAIN, MAX_TENSORS, Tensors, refuse_stand_in};
use crate::error::{Error, excerpt};

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

/// Metadata of a GGUF file. Texts and arrays are slices of the file, checked to lie in it.
#[derive(Debug)]
pub struct Metadata {
    path: PathBuf,
    entries: BTreeMap<String, Value>,
}

impl Metadata {
    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The value as it is stored.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// The value of `key` as a `T`, or `None` if the file does not have the key.
    ///
    /// # Errors
    /// The value is there and is not a `T`.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let reason = format!(
                    "metadata `{}` is {}, not {}",
                    excerpt(key),
                    value.description(),
                    T::DESCRIPTION
                );
                Err(Error::file(&self.path, reason))
            }
        }
    }

    /// The value of `key` as a `T`.
    ///
    /// # Errors
    /// The file does not have the key, or its value is not a `T`.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, Error> {
        self.get(key)?.ok_or_else(|| {
            Error::file(&self.path, format!("metadata `{}` is missing", excerpt(key)))
        })
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A 32-bit float.
    F32(f32),
    /// A 64-bit float.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A text, which should be UTF-8.
    String(Bytes),
    /// A list of values of one type.
    Array(Array),
}

impl Value {
    fn description(&self) -> String {
        match self {
            Value::Unsigned(value) => format!("the number {value}"),
            Value::Signed(value) => format!("the number {value}"),
            Value::F32(value) => format!("the number {value}"),
            Value::F64(value) => format!("the number {value}"),
            Value::Bool(value) => value.to_string(),
            Value::String(text) => match std::str::from_utf8(text) {
                Ok(text) => format!("the text \"{}\"", excerpt(text)),
                Err(_) => "a text that is not UTF-8".to_owned(),
            },
            Value::Array(array) => {
                format!("a list of {} values of type {:?}", array.len, array.element)
            }
        }
    }
}

/// A metadata array: the elements as they are encoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    element: ElementType,
    len: usize,
    data: Bytes,
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, if they are texts.
    fn texts(&self) -> Option<impl Iterator<Item = &[u8]>> {
        let mut cursor = Cursor::new(&self.data, 0);
        let next = move || {
            let length = cursor.u64()?;
            cursor.take(length)
        };
        (self.element == ElementType::String).then(|| std::iter::from_fn(next))
    }

    /// The elements, if they are numbers or truth values.
    fn scalars(&self) -> Option<impl Iterator<Item = Value>> {
        let width = self.element.width()?;
        Some(self.data.chunks_exact(width).map(|bytes| self.element.scalar(bytes)))
    }
}

/// Types of metadata values, by GGUF's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ElementType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ElementType {
    fn from_id(id: u32) -> Option<Self> {
        use ElementType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64]
            .get(usize::try_from(id).ok()?)
            .copied()
    }

    /// Bytes of one value; `None` for those that bring their own length.
    fn width(self) -> Option<usize> {
        use ElementType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }

    /// Decodes a number or truth value of exactly [`width`](Self::width) bytes.
    fn scalar(self, bytes: &[u8]) -> Value {
        let mut raw = [0; 8];
        raw[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(raw);
        match self {
            ElementType::I8 => Value::Signed(bits as i8 as i64),
            ElementType::I16 => Value::Signed(bits as i16 as i64),
            ElementType::I32 => Value::Signed(bits as i32 as i64),
            ElementType::I64 => Value::Signed(bits as i64),
            ElementType::F32 => Value::F32(f32::from_bits(bits as u32)),
            ElementType::F64 => Value::F64(f64::from_bits(bits)),
            ElementType::Bool => Value::Bool(bits != 0),
            _ => Value::Unsigned(bits),
        }
    }
}

/// What a metadata value can be read as. Integers convert where their value fits, floats to f32 or
/// f64, texts where they are UTF-8.
pub trait FromValue<'a>: Sized {
    /// The kind of value in words, for messages.
    const DESCRIPTION: &'static str;

    /// The value, if it is of this kind.
    fn from_value(value: &'a Value) -> Option<Self>;
}

fn integer<T: TryFrom<u64> + TryFrom<i64>>(value: &Value) -> Option<T> {
    match *value {
        Value::Unsigned(value) => value.try_into().ok(),
        Value::Signed(value) => value.try_into().ok(),
        _ => None,
    }
}

fn float(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(value) => Some(value.into()),
        Value::F64(value) => Some(value),
        _ => None,
    }
}

impl FromValue<'_> for u64 {
    const DESCRIPTION: &'static str = "an unsigned integer";

    fn from_value(value: &Value) -> Option<Self> {
        integer(value)
    }
}

impl FromValue<'_> for u32 {
    const DESCRIPTION: &'static str = "an unsigned integer of 32 bits";

    fn from_value(value: &Value) -> Option<Self> {
        integer(value)
    }
}

impl FromValue<'_> for usize {
    const DESCRIPTION: &'static str = "an unsigned integer";

    fn from_value(value: &Value) -> Option<Self> {
        integer(value)
    }
}

impl FromValue<'_> for i64 {
    const DESCRIPTION: &'static str = "an integer";

    fn from_value(value: &Value) -> Option<Self> {
        integer(value)
    }
}

impl FromValue<'_> for f64 {
    const DESCRIPTION: &'static str = "a float";

    fn from_value(value: &Value) -> Option<Self> {
        float(value)
    }
}

impl FromValue<'_> for f32 {
    const DESCRIPTION: &'static str = "a float";

    fn from_value(value: &Value) -> Option<Self> {
        float(value).map(|value| value as f32)
    }
}

impl FromValue<'_> for bool {
    const DESCRIPTION: &'static str = "a truth value";

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const DESCRIPTION: &'static str = "a text";

    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::String(text) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for Vec<&'a str> {
    const DESCRIPTION: &'static str = "a list of UTF-8 texts";

    fn from_value(value: &'a Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.texts()?.map(|text| std::str::from_utf8(text).ok()).collect()
    }
}

impl FromValue<'_> for Vec<i64> {
    const DESCRIPTION: &'static str = "a list of integers";

    fn from_value(value: &Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.scalars()?.map(|value| integer(&value)).collect()
    }
}

impl FromValue<'_> for Vec<f32> {
    const DESCRIPTION: &'static str = "a list of floats";

    fn from_value(value: &Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.scalars()?.map(|value| float(&value).map(|value| value as f32)).collect()
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes GGUF files, honest or not.
    struct Builder {
        entries: Vec<Vec<u8>>,
        table: Vec<Vec<u8>>,
        data: Vec<u8>,
    }

    fn string(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u64).to_le_bytes(), text].concat()
    }

    fn value(id: u32, bytes: &[u8]) -> Vec<u8> {
        [&id.to_le_bytes(), bytes].concat()
    }

    fn array(element: u32, count: u64, bytes: &[u8]) -> Vec<u8> {
        value(9, &[&element.to_le_bytes(), &count.to_le_bytes()[..], bytes].concat())
    }

    impl Builder {
        fn new() -> Self {
            Builder { entries: Vec::new(), table: Vec::new(), data: Vec::new() }
        }

        fn entry(mut self, key: &str, value: Vec<u8>) -> Self {
            self.entries.push([string(key.as_bytes()), value].concat());
            self
        }

        /// A line of the table, extents innermost first, and no data.
        fn line(mut self, name: &str, extents: &[u64], type_id: u32, offset: u64) -> Self {
            let extents: Vec<_> = [extents.len() as u32]
                .iter()
                .flat_map(|n| n.to_le_bytes())
                .chain(extents.iter().flat_map(|extent| extent.to_le_bytes()))
                .collect();
            let line = [
                &string(name.as_bytes())[..],
                &extents,
                &type_id.to_le_bytes(),
                &offset.to_le_bytes(),
            ]
            .concat();
            self.table.push(line);
            self
        }

        /// A tensor with `bytes` bytes of data, padded to 32.
        fn tensor(mut self, name: &str, extents: &[u64], type_id: u32, bytes: usize) -> Self {
            let offset = self.data.len();
            self.data.extend((0..bytes).map(|byte| byte as u8));
            self.data.resize(self.data.len().next_multiple_of(32), 0);
            self.line(name, extents, type_id, offset as u64)
        }

        /// The part before the data, with its padding.
        fn head(&self) -> Vec<u8> {
            let mut bytes = [MAGIC, &3u32.to_le_bytes()].concat();
            bytes.extend_from_slice(&(self.table.len() as u64).to_le_bytes());
            bytes.extend_from_slice(&(self.entries.len() as u64).to_le_bytes());
            bytes.extend(self.entries.concat());
            bytes.extend(self.table.concat());
            bytes.resize(bytes.len().next_multiple_of(32), 0);
            bytes
        }

        fn bytes(&self) -> Vec<u8> {
            [self.head(), self.data.clone()].concat()
        }

        fn parse(&self) -> Result<GgufFile, String> {
            parse(self.bytes())
        }

        fn refusal(&self) -> String {
            self.parse().expect_err("the file lies")
        }
    }

    fn parse(bytes: Vec<u8>) -> Result<GgufFile, String> {
        from_bytes(bytes.into(), Path::new("m.gguf")).map_err(|error| error.to_string())
    }

    #[test]
    fn values_of_every_type_are_read() {
        let texts = [string(b"a"), string("é".as_bytes())].concat();
        let file = Builder::new()
            .entry("u8", value(0, &[200]))
            .entry("i8", value(1, &[0xff]))
            .entry("u16", value(2, &[1, 2]))
            .entry("i16", value(3, &[0xfe, 0xff]))
            .entry("u32", value(4, &[0xff; 4]))
            .entry("i32", value(5, &[0xfd, 0xff, 0xff, 0xff]))
            .entry("f32", value(6, &1e-5f32.to_le_bytes()))
            .entry("yes", value(7, &[1]))
            .entry("text", value(8, &string(b"words")))
            .entry("texts", array(8, 2, &texts))
            .entry("ints", array(5, 2, &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]))
            .entry("floats", array(6, 1, &0.5f32.to_le_bytes()))
            .entry("none", array(8, 0, &[]))
            .entry("u64", value(10, &[0xff; 8]))
            .entry("i64", value(11, &i64::MIN.to_le_bytes()))
            .entry("f64", value(12, &0.1f64.to_le_bytes()))
            .parse()
            .unwrap();
        let m = &file.metadata;
        assert_eq!(m.require::<u64>("u8").unwrap(), 200);
        assert_eq!(m.require::<i64>("i8").unwrap(), -1);
        assert_eq!(m.require::<u32>("u16").unwrap(), 513);
        assert_eq!(m.require::<i64>("i16").unwrap(), -2);
        assert_eq!(m.require::<usize>("u32").unwrap(), u32::MAX as usize);
        assert_eq!(m.require::<i64>("i32").unwrap(), -3);
        assert_eq!(m.require::<f32>("f32").unwrap(), 1e-5);
        assert_eq!(m.require::<f64>("f32").unwrap(), f64::from(1e-5f32));
        assert!(m.require::<bool>("yes").unwrap());
        assert_eq!(m.require::<&str>("text").unwrap(), "words");
        assert_eq!(m.require::<Vec<&str>>("texts").unwrap(), ["a", "é"]);
        assert_eq!(m.require::<Vec<i64>>("ints").unwrap(), [1, -1]);
        assert_eq!(m.require::<Vec<f32>>("floats").unwrap(), [0.5]);
        assert!(m.require::<Vec<&str>>("none").unwrap().is_empty());
        assert_eq!(m.require::<u64>("u64").unwrap(), u64::MAX);
        assert_eq!(m.require::<i64>("i64").unwrap(), i64::MIN);
        assert_eq!(m.require::<f64>("f64").unwrap(), 0.1);
        assert!(matches!(m.value("texts"), Some(Value::Array(array)) if array.len() == 2));
        assert_eq!(m.keys().count(), 16);
    }

    #[test]
    fn a_value_of_another_type_or_none_is_refused_by_key() {
        let file = Builder::new()
            .entry("n", value(5, &[0xff; 4]))
            .entry("text", value(8, &string(&[0xff])))
            .entry("texts", array(8, 1, &string(&[0xff])))
            .parse()
            .unwrap();
        let m = &file.metadata;
        let message = m.require::<u32>("n").unwrap_err().to_string();
        let expected = "m.gguf: metadata `n` is the number -1, not an unsigned integer of 32 bits";
        assert_eq!(message, expected);
        assert!(m.require::<f32>("n").is_err() && m.require::<bool>("n").is_err());
        assert!(m.require::<&str>("n").is_err() && m.require::<Vec<i64>>("n").is_err());
        assert!(m.get::<&str>("text").unwrap_err().to_string().contains("not UTF-8"));
        assert!(m.get::<Vec<&str>>("texts").is_err() && m.get::<Vec<f32>>("texts").is_err());
        assert!(m.get::<u32>("absent").unwrap().is_none());
        let message = m.require::<u32>("absent").unwrap_err().to_string();
        assert_eq!(message, "m.gguf: metadata `absent` is missing");
    }

    #[test]
    fn other_versions_and_byte_orders_are_refused() {
        let good = Builder::new().bytes();
        for (version, word) in [
            ([1, 0, 0, 0], "version 1, which"),
            ([0, 0, 0, 3], "big-endian"),
            ([4, 0, 0, 0], "version 4"),
            ([0, 0, 0, 0], "version 0"),
        ] {
            let mut bytes = good.clone();
            bytes[4..8].copy_from_slice(&version);
            let error = parse(bytes).unwrap_err();
            assert!(error.contains(word), "{error}");
        }
        let mut second = good.clone();
        second[4] = 2;
        parse(second).unwrap();
        assert!(parse(b"GGUG".to_vec()).unwrap_err().contains("does not begin with"));
    }

    #[test]
    fn tensors_of_every_type_have_their_bytes_and_shapes_outermost_first() {
        let types = [
            (0, DType::F32, 512 * 4),
            (1, DType::F16, 512 * 2),
            (8, DType::Q8_0, 16 * 34),
            (12, DType::Q4K, 2 * 144),
            (14, DType::Q6K, 2 * 210),
            (24, DType::I8, 512),
            (26, DType::I32, 512 * 4),
            (27, DType::I64, 512 * 8),
            (28, DType::F64, 512 * 8),
            (30, DType::BF16, 512 * 2),
            (34, DType::Tq1_0, 2 * 54),
            (35, DType::Tq2_0, 2 * 66),
            (36, DType::I2S, 512 / 4 + 32),
        ];
        let mut builder = Builder::new();
        for (id, _, bytes) in types {
            builder = builder.tensor(&format!("t{id}"), &[256, 2], id, bytes);
        }
        let tensors = builder.parse().unwrap().tensors;
        for (id, dtype, bytes) in types {
            let tensor = tensors.get(&format!("t{id}")).unwrap().unwrap();
            assert_eq!((tensor.dtype(), tensor.shape()), (dtype, &[2, 256][..]));
            let expected: Vec<u8> = (0..bytes).map(|byte| byte as u8).collect();
            assert_eq!(tensor.data()[..], expected, "{dtype}");
        }
    }

    #[test]
    fn the_two_kinds_of_q2_0_are_told_apart_by_their_size() {
        let after = |bytes| {
            Builder::new()
                .tensor("w", &[256, 32], Q2_0, bytes)
                .tensor("norm", &[8], 0, 32)
                .tensor("v", &[128], Q2_0, if bytes == 8192 / 64 * 18 { 36 } else { 34 })
                .parse()
                .unwrap()
                .tensors
        };
        for (bytes, dtype) in [(8192 / 64 * 18, DType::Q2_0), (8192 / 128 * 34, DType::Q2_0Wide)] {
            let tensors = after(bytes);
            assert_eq!(tensors.get("w").unwrap().unwrap().dtype(), dtype);
            assert_eq!(tensors.get("v").unwrap().unwrap().dtype(), dtype);
        }
        let error = after(4000).get("w").unwrap_err().to_string();
        assert!(error.contains("fit neither the 64-wide nor the 128-wide"), "{error}");
        let tensors = Builder::new().tensor("w", &[128], Q2_0, 36).parse().unwrap().tensors;
        assert!(tensors.get("w").unwrap_err().to_string().contains("fit both the 64-wide and"));
    }

    #[test]
    fn types_that_are_not_read_are_named_when_their_tensor_is_asked_for() {
        for (id, word) in [
            (2, "Q4_0 is not read"),
            (
                38,
                "TL1, whose tiling depends on a file that is not in the GGUF; convert the original checkpoint to I2_S",
            ),
            (39, "MXFP4 (llama.cpp) or TL2 (bitnet.cpp)"),
            (4, "type id 4 is unknown"),
            (u32::MAX, "type id 4294967295 is unknown"),
        ] {
            let file =
                Builder::new().tensor("w", &[64], id, 7).tensor("n", &[1], 0, 4).parse().unwrap();
            let error = file.tensors.get("w").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
            assert!(file.tensors.get("n").unwrap().is_some());
        }
    }

    #[test]
    fn every_cut_is_refused() {
        let builder = Builder::new()
            .entry("general.name", value(8, &string(b"model")))
            .entry("texts", array(8, 2, &[string(b"a"), string(b"b")].concat()))
            .entry("ints", array(5, 3, &[0; 12]))
            .tensor("w", &[8], 0, 32);
        let bytes = builder.bytes();
        for length in 0..bytes.len() {
            let error = parse(bytes[..length].to_vec()).expect_err("the file is cut");
            let told = error.contains("truncated") || error.contains("empty") || length < 4;
            assert!(told, "{length} bytes: {error}");
        }
        let error = parse(bytes[..bytes.len() - 1].to_vec()).unwrap_err();
        let (end, len) = (bytes.len(), bytes.len() - 1);
        let expected = format!(
            "m.gguf: tensor `w`: truncated: it ends at byte {end} but the file has {len} bytes; download the file again"
        );
        assert_eq!(error, expected);
    }

    #[test]
    fn counts_and_lengths_that_cannot_be_are_refused_before_anything_is_allocated() {
        let good = Builder::new().entry("k", value(4, &[0; 4])).tensor("w", &[8], 0, 32).bytes();
        for at in [8, 16] {
            for count in [MAX_TENSORS as u64 + 1, i64::MAX as u64, u64::MAX] {
                let mut bytes = good.clone();
                bytes[at..at + 8].copy_from_slice(&count.to_le_bytes());
                assert!(parse(bytes).unwrap_err().contains("at most 262144 and 65536 are read"));
            }
        }
        let mut bytes = good.clone();
        bytes[8..16].copy_from_slice(&(MAX_TENSORS as u64).to_le_bytes());
        assert!(parse(bytes).unwrap_err().contains("a table of 262144 tensors does not fit"));
        for count in [1 << 40, i64::MAX as u64, u64::MAX] {
            for builder in [
                Builder::new().entry("k", value(8, &count.to_le_bytes())),
                Builder::new().entry("k", array(8, count, &[])),
                Builder::new().entry("k", array(12, count, &[])),
                Builder::new().entry("k", array(0, count, &[])),
            ] {
                let error = builder.refusal();
                assert!(error.contains("truncated: metadata `k` begins at"), "{error}");
            }
        }
    }

    #[test]
    fn metadata_that_lies_is_refused() {
        let one = || value(4, &[1, 0, 0, 0]);
        for (builder, word) in [
            (Builder::new().entry("k", one()).entry("k", one()), "metadata `k` appears twice"),
            (Builder::new().entry("k", value(13, &[])), "unknown value type 13"),
            (Builder::new().entry("k", array(13, 1, &[])), "unknown value type 13"),
            (Builder::new().entry("k", array(9, 1, &[])), "a list of lists"),
            (Builder::new().entry(&"k".repeat(65_536), one()), "more than 65535"),
            (Builder::new().entry("split.count", value(2, &[2, 0])), "one part of a split GGUF"),
        ] {
            let error = builder.refusal();
            assert!(error.contains(word), "{error}");
        }
        for alignment in [0u32, 1, 24, 1 << 21, u32::MAX] {
            let builder =
                Builder::new().entry("general.alignment", value(4, &alignment.to_le_bytes()));
            assert!(builder.refusal().contains("not a power of two from 8 to 1048576"));
        }
        let text = Builder::new().entry("general.alignment", value(8, &string(b"32")));
        assert!(text.refusal().contains("is the text \"32\", not an unsigned integer"));
        let wide = Builder::new()
            .entry("general.alignment", value(4, &[64, 0, 0, 0]))
            .tensor("a", &[8], 0, 32)
            .tensor("b", &[8], 0, 32);
        assert!(wide.refusal().contains("tensor `b`: begins at byte 32, not a multiple of 64"));
    }

    #[test]
    fn tensors_that_lie_are_refused() {
        let base = || Builder::new().tensor("a", &[8], 0, 32);
        for (builder, word) in [
            (base().line("a", &[8], 0, 0), "the next tensor"),
            (base().tensor("a", &[8], 0, 32), "tensor `a`: appears twice"),
            (base().line("b", &[9], 0, 0), "the next tensor"),
            (base().line("b", &[8], 0, 33), "not a multiple of 32"),
            (base().line("b", &[8], 0, u64::MAX - 31), "truncated"),
            (base().line("b", &[0], 0, 32), "extent of 0"),
            (base().line("b", &[u64::MAX, 2], 0, 32), "overflows"),
            (base().line("b", &[1 << 62], 28, 32), "overflows"),
            (base().line("b", &[u64::MAX], 24, 32), "truncated"),
            (base().line("b", &[1, 1, 1, 1, 1], 0, 32), "5 extents"),
            (base().line("b", &[100], 35, 32), "whole blocks of 256"),
            (base().line("b", &[3], 36, 32), "do not fill whole bytes"),
            (base().tensor("", &[1], 0, 4), "a name of 0 bytes"),
            (base().line(&"n".repeat(1025), &[1], 0, 32), "1025 bytes, more than 1024"),
        ] {
            let error = builder.refusal();
            assert!(error.contains(word), "{word}: {error}");
        }
    }
}
