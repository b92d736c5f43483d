//! `pytorch_model.bin`: a zip archive with a pickle (`data.pkl`) that describes the tensors, and
//! one entry (`data/KEY`) of plain numbers per storage, as torch's `torch/serialization.py` writes
//! it.

mod machine;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::path::Path;

use bitnet_core::mmap::map_file;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;

use super::{DOWNLOAD_AGAIN, Tensors, index, refuse_stand_in, zip};
use crate::error::{Error, excerpt};

use machine::Machine;

/// Adds all tensors of a `pytorch_model.bin`. Their data stays in the mapped file.
pub fn read(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    from_bytes(map_file(path)?, path, into)
}

/// Adds all tensors of the files that a `pytorch_model.bin.index.json` names. They lie in the
/// index's own folder, and each must have the tensors that the index promises.
pub fn read_index(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    index::read(path, into, read)
}

/// Whether a file begins like one that torch wrote, of today or before version 1.6.
pub(super) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || is_legacy(bytes)
}

/// Before version 1.6 torch wrote a row of pickles, the first of them this number, or a tar
/// archive.
fn is_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19.")
        || bytes.get(257..262) == Some(b"ustar")
}

/// Adds all tensors of a `pytorch_model.bin` that is in memory; `path` is for error messages.
pub fn from_bytes(bytes: Bytes, path: &Path, into: &mut Tensors) -> Result<(), Error> {
    let error = |reason: String| Error::file(path, reason);
    refuse_stand_in(&bytes, path)?;
    if is_legacy(&bytes) {
        let reason = "is a torch file from before version 1.6; load it and save it again with a newer torch, or as safetensors";
        return Err(error(reason.to_owned()));
    }
    if !bytes.starts_with(b"PK\x03\x04") {
        return Err(error("is not a file written by `torch.save`".to_owned()));
    }
    let directory = zip::directory(&bytes).map_err(error)?;
    let mut pickles = directory.iter().filter_map(|(name, range)| {
        let root = name.strip_suffix("/data.pkl")?;
        (!root.contains('/')).then_some((root, range))
    });
    let (Some((root, range)), None) = (pickles.next(), pickles.next()) else {
        return Err(error("is a zip archive without exactly one `data.pkl`".to_owned()));
    };
    if let Some(order) = directory.get(format!("{root}/byteorder").as_str())
        && &bytes[order.clone()] != b"little"
    {
        return Err(error("its byte order is not `little`, the only one read".to_owned()));
    }

    let machine = Machine::run(&bytes[range.clone()])
        .map_err(|reason| error(format!("its pickle cannot be read: {reason}")))?;
    for (name, value) in machine.state_dictionary().map_err(error)? {
        let tensor = match machine.view(value) {
            Err(reason) => Err(reason),
            Ok(view) => {
                let entry = directory.get(format!("{root}/data/{}", view.storage.key).as_str());
                view.tensor(&bytes, entry).map_err(|reason| Error::tensor(path, name, reason))?
            }
        };
        into.insert(path, name.to_owned(), tensor)?;
    }
    Ok(())
}

/// The numbers that tensors look at: an entry of the archive.
#[derive(Debug, Clone, Copy)]
struct Storage<'a> {
    /// torch's class, such as `BFloat16Storage`.
    class: &'a str,
    key: &'a str,
    elements: u64,
}

impl Storage<'_> {
    /// The element type, if we read it. Booleans are their bytes.
    fn dtype(&self) -> Option<DType> {
        Some(match self.class {
            "DoubleStorage" => DType::F64,
            "FloatStorage" => DType::F32,
            "HalfStorage" => DType::F16,
            "BFloat16Storage" => DType::BF16,
            "ByteStorage" | "BoolStorage" => DType::U8,
            "CharStorage" => DType::I8,
            "IntStorage" => DType::I32,
            "LongStorage" => DType::I64,
            _ => return None,
        })
    }
}

/// A tensor as the pickle describes it: a strided view of a storage, in elements.
#[derive(Debug)]
struct View<'a> {
    storage: Storage<'a>,
    offset: u64,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl View<'_> {
    /// The tensor, with the storage in `entry` of the archive `bytes`. `Err` means that the file is
    /// broken, `Ok(Err)` that this one tensor cannot be used.
    fn tensor(
        &self,
        bytes: &Bytes,
        entry: Option<&Range<usize>>,
    ) -> Result<Result<Tensor, String>, String> {
        let Storage { class, key, elements } = self.storage;
        let Some(dtype) = self.storage.dtype() else {
            return Ok(Err(format!("its storage type {} is not read", excerpt(class))));
        };
        let size = dtype.byte_len(&self.shape)?;
        let width = dtype.block_bytes() as u64;
        let entry =
            entry.ok_or_else(|| format!("its storage `{}` is not in the file", excerpt(key)))?;
        if elements.checked_mul(width) != Some(entry.len() as u64) {
            return Err(format!(
                "its storage should have {elements} values of {width} bytes and has {} bytes; {DOWNLOAD_AGAIN}",
                entry.len()
            ));
        }
        if !self.is_contiguous() {
            return Ok(Err(format!(
                "is not contiguous (shape {:?}, strides {:?}); call `.contiguous()` before saving",
                self.shape, self.strides
            )));
        }
        let range = self
            .offset
            .checked_mul(width)
            .and_then(|begin| usize::try_from(begin).ok())
            .and_then(|begin| Some(begin..begin.checked_add(size)?))
            .filter(|range| range.end <= entry.len())
            .ok_or_else(|| {
                format!(
                    "{size} bytes from value {} on reach past its storage of {elements} values",
                    self.offset
                )
            })?;
        let data = bytes.slice(entry.start + range.start..entry.start + range.end);
        Ok(Ok(Tensor::new(dtype, self.shape.clone(), data).map_err(|e| e.to_string())?))
    }

    /// Whether the elements lie one after another in row-major order. Only called with shapes whose
    /// size does not overflow.
    fn is_contiguous(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
            let fits = extent == 1 || stride == expected;
            expected *= extent;
            fits
        })
    }
}
