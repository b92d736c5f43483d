//! Writes GGUF files: the metadata and the tensor table at once, then the tensors one after another.

use std::path::Path;

use bitnet_core::DType;

use super::{MAGIC, metadata::ElementType};
use crate::error::Error;
use crate::output::OutputFile;

/// Tensors begin on multiples of it; the format's default, which is therefore not stated.
const ALIGNMENT: usize = 32;

/// Metadata entries as the file has them.
#[derive(Debug, Default)]
pub(crate) struct Entries {
    bytes: Vec<u8>,
    count: u64,
}

fn string(bytes: &mut Vec<u8>, text: &str) {
    bytes.extend((text.len() as u64).to_le_bytes());
    bytes.extend(text.as_bytes());
}

impl Entries {
    fn entry(&mut self, key: &str, kind: ElementType) {
        self.count += 1;
        string(&mut self.bytes, key);
        self.bytes.extend((kind as u32).to_le_bytes());
    }

    fn list(&mut self, key: &str, kind: ElementType, len: usize) {
        self.entry(key, ElementType::Array);
        self.bytes.extend((kind as u32).to_le_bytes());
        self.bytes.extend((len as u64).to_le_bytes());
    }

    pub(crate) fn u32(&mut self, key: &str, value: u32) {
        self.entry(key, ElementType::U32);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn f32(&mut self, key: &str, value: f32) {
        self.entry(key, ElementType::F32);
        self.bytes.extend(value.to_le_bytes());
    }

    pub(crate) fn bool(&mut self, key: &str, value: bool) {
        self.entry(key, ElementType::Bool);
        self.bytes.push(u8::from(value));
    }

    pub(crate) fn text(&mut self, key: &str, text: &str) {
        self.entry(key, ElementType::String);
        string(&mut self.bytes, text);
    }

    pub(crate) fn texts(&mut self, key: &str, texts: &[String]) {
        self.list(key, ElementType::String, texts.len());
        texts.iter().for_each(|text| string(&mut self.bytes, text));
    }

    pub(crate) fn i32s(&mut self, key: &str, values: impl ExactSizeIterator<Item = i32>) {
        self.list(key, ElementType::I32, values.len());
        self.bytes.extend(values.flat_map(i32::to_le_bytes));
    }

    pub(crate) fn f32s(&mut self, key: &str, values: &[f32]) {
        self.list(key, ElementType::F32, values.len());
        self.bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    }
}

/// A line of the tensor table.
#[derive(Debug)]
pub(crate) struct Line {
    pub(crate) name: String,
    pub(crate) dtype: DType,
    /// Outermost extent first.
    pub(crate) shape: Vec<usize>,
}

/// Everything before the tensors, with padding behind it.
///
/// # Errors
/// A tensor whose type is not written, or whose shape does not fit it: its name, and the reason.
pub(crate) fn header(entries: &Entries, table: &[Line]) -> Result<Vec<u8>, (String, String)> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(3u32.to_le_bytes());
    bytes.extend((table.len() as u64).to_le_bytes());
    bytes.extend(entries.count.to_le_bytes());
    bytes.extend(&entries.bytes);
    let mut offset = 0;
    for Line { name, dtype, shape } in table {
        let wrong = |reason: String| (name.clone(), reason);
        let id = type_id(*dtype).ok_or_else(|| wrong(format!("{dtype} is not written")))?;
        string(&mut bytes, name);
        bytes.extend((shape.len() as u32).to_le_bytes());
        bytes.extend(shape.iter().rev().flat_map(|&extent| (extent as u64).to_le_bytes()));
        bytes.extend(id.to_le_bytes());
        bytes.extend((offset as u64).to_le_bytes());
        offset += dtype.byte_len(shape).map_err(wrong)?.next_multiple_of(ALIGNMENT);
    }
    bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
    Ok(bytes)
}

/// ggml's id of a type that is written.
fn type_id(dtype: DType) -> Option<u32> {
    Some(match dtype {
        DType::F32 => 0,
        DType::F16 => 1,
        DType::Q8_0 => 8,
        DType::Q4K => 12,
        DType::Q6K => 14,
        DType::BF16 => 30,
        DType::Tq1_0 => 34,
        DType::Tq2_0 => 35,
        DType::I2S => 36,
        DType::Q2_0 => super::Q2_0,
        _ => return None,
    })
}

/// A GGUF file that is being written: the tensors of its table, in that order.
pub(crate) struct Writer {
    output: OutputFile,
    /// Bytes of the tensor so far.
    position: usize,
}

impl Writer {
    /// Begins the file with its [`header`].
    pub(crate) fn create(path: &Path, header: &[u8]) -> Result<Self, Error> {
        let mut output = OutputFile::create(path)?;
        output.write(header)?;
        Ok(Writer { output, position: 0 })
    }

    /// Appends bytes to the tensor whose turn it is.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.position += bytes.len();
        self.output.write(bytes)
    }

    /// Goes on to the next tensor.
    pub(crate) fn next(&mut self) -> Result<(), Error> {
        let padding = self.position.next_multiple_of(ALIGNMENT) - self.position;
        self.position = 0;
        self.output.write(&[0; ALIGNMENT][..padding])
    }

    /// Gives the file its name.
    pub(crate) fn finish(self) -> Result<(), Error> {
        self.output.finish()
    }
}
