//! ONNX: a protocol-buffer message that holds a graph of operations and its constants, the
//! initializers, here or in files beside it (`onnx.proto3`).
//!
//! Only weights are read. Initializers that bear the names of a module's parameters are taken as
//! they are. Exporters rename the others: torch stores the constant of a linear layer the other way
//! round as `onnx::MatMul_123`, and quantised ones are packed for `MatMulNBits`. These are found by
//! the operation that uses them (`modules.rs`), whose name tells its module.

mod modules;
mod packed;
mod proto;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::path::Path;

use bitnet_core::mmap::map_file;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;

use super::index::is_plain_file_name;
use super::{DOWNLOAD_AGAIN, Recipe, Tensors, refuse_stand_in};
use crate::error::{Error, excerpt};
pub(crate) use packed::{BLOCK_COLUMNS, COLUMNS, SCALE_COLUMNS};
use proto::{Data, Graph, Initializer};

/// Adds the weights of an ONNX file. What is stored as it is meant stays in the mapped file.
pub fn read(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    from_bytes(map_file(path)?, path, into)
}

/// Adds the weights of an ONNX file that is in memory. Its folder, where the files with its external
/// data are, is that of `path`, which is also for error messages.
pub fn from_bytes(bytes: Bytes, path: &Path, into: &mut Tensors) -> Result<(), Error> {
    refuse_stand_in(&bytes, path)?;
    let graph = proto::graph(&bytes).map_err(|reason| Error::file(path, reason))?;
    let constants = Constants::read(&bytes, path, &graph)?;
    let found = modules::find(&graph, &constants).map_err(|reason| Error::file(path, reason))?;
    drop((graph, constants));
    for (name, form) in found {
        match form.recipe() {
            Ok(recipe) => into.insert_recipe(path, name, recipe)?,
            Err(tensor) => into.insert(path, name, tensor)?,
        }
    }
    Ok(())
}

/// The constants of a graph: a tensor of each, or why it cannot be used.
struct Constants<'a>(BTreeMap<&'a str, Result<Tensor, String>>);

impl<'a> Constants<'a> {
    fn read(bytes: &Bytes, path: &Path, graph: &Graph<'a>) -> Result<Self, Error> {
        let mut files = ExternalFiles { path, open: BTreeMap::new() };
        let mut constants = BTreeMap::new();
        for message in &graph.initializers {
            let initializer =
                Initializer::read(message).map_err(|reason| Error::file(path, reason))?;
            let tensor = files.tensor(&initializer, bytes)?;
            if constants.insert(initializer.name, tensor).is_some() {
                return Err(Error::tensor(path, initializer.name, "appears twice"));
            }
        }
        Ok(Constants(constants))
    }

    fn get(&self, name: &str) -> Option<&Result<Tensor, String>> {
        self.0.get(name)
    }
}

/// The files beside an ONNX file that hold numbers of its initializers.
struct ExternalFiles<'a> {
    path: &'a Path,
    open: BTreeMap<&'a str, Bytes>,
}

impl<'a> ExternalFiles<'a> {
    /// The tensor of an initializer of the file `bytes`. The inner error is about this one alone.
    fn tensor(
        &mut self,
        initializer: &Initializer<'a>,
        bytes: &Bytes,
    ) -> Result<Result<Tensor, String>, Error> {
        let error = |reason: String| Error::tensor(self.path, initializer.name, reason);
        let Some(dtype) = initializer.dtype() else {
            let reason = format!("its element type {} is not read", initializer.data_type);
            return Ok(Err(reason));
        };
        let data = match initializer.data {
            Data::Here(data) => bytes.slice_ref(data),
            Data::Unread(how) => return Ok(Err(format!("its numbers are {how}"))),
            Data::Varints(data) => match from_varints(dtype, data) {
                Ok(data) => data.into(),
                Err(reason) => return Ok(Err(reason)),
            },
            Data::External { location, offset, length } => {
                let file = self.file(location, initializer.name)?;
                let rest = file.len().checked_sub(usize::try_from(offset).unwrap_or(usize::MAX));
                let length = length.or(rest.map(|rest| rest as u64));
                match (rest, length) {
                    (Some(rest), Some(length)) if length <= rest as u64 => {
                        // Both are at most the file's length, so they fit usize.
                        file.slice(offset as usize..(offset + length) as usize)
                    }
                    _ => {
                        return Err(error(format!(
                            "truncated: it needs {} bytes from byte {offset} of `{location}`, \
                             which has {} bytes; {DOWNLOAD_AGAIN}",
                            length.unwrap_or(0),
                            file.len()
                        )));
                    }
                }
            }
        };
        let tensor = Tensor::new(dtype, initializer.shape.clone(), data);
        tensor.map(Ok).map_err(|reason| error(reason.to_string()))
    }

    fn file(&mut self, location: &'a str, tensor: &str) -> Result<Bytes, Error> {
        if let Some(file) = self.open.get(location) {
            return Ok(file.clone());
        }
        let error = |reason: String| Error::tensor(self.path, tensor, reason);
        if !is_plain_file_name(location) {
            let location = excerpt(location);
            return Err(error(format!(
                "its numbers are in `{location}`, which is not a plain file name"
            )));
        }
        let path = self.path.with_file_name(location);
        if !path.is_file() {
            return Err(error(format!(
                "its numbers are in `{}`, which is not there; download it into the same folder",
                excerpt(location)
            )));
        }
        let file = map_file(&path)?;
        self.open.insert(location, file.clone());
        Ok(file)
    }
}

/// Numbers that are stored as a varint each, as the bytes of their element type.
fn from_varints(dtype: DType, data: &[u8]) -> Result<Vec<u8>, String> {
    // Half-precision numbers are stored as their bits.
    let width = match dtype {
        DType::U8 | DType::I8 => 1,
        DType::F16 | DType::BF16 => 2,
        DType::I32 => 4,
        _ => return Err(format!("its {dtype} numbers are in `int32_data`")),
    };
    let mut bytes = Vec::new();
    for value in crate::protobuf::packed_varints(data) {
        bytes.extend_from_slice(&value.map_err(String::from)?.to_le_bytes()[..width]);
    }
    Ok(bytes)
}

/// A weight as the graph has it.
enum Form {
    /// As it is meant.
    Plain(Result<Tensor, String>),
    /// `[columns, rows]`.
    Transposed(Tensor),
    /// Numbers -1, 0 and 1 one by one, whose scale is apart.
    Ternary { weights: Tensor, transposed: bool },
    /// For `MatMulNBits`.
    Packed(Box<packed::Packed>),
    /// The scales of a matrix for `MatMulNBits`, one per block of columns.
    BlockScales(Box<packed::Packed>),
}

impl Form {
    /// How the tensor is made, or the tensor where nothing is to be made.
    fn recipe(self) -> Result<Recipe, Result<Tensor, String>> {
        let recipe = |dtype, bytes: usize, make| Recipe { dtype, stored_bytes: bytes as u64, make };
        Ok(match self {
            Form::Plain(tensor) => return Err(tensor),
            Form::Transposed(tensor) => recipe(
                tensor.dtype(),
                tensor.data().len(),
                Box::new(move || packed::transposed(&tensor)),
            ),
            Form::Ternary { weights, transposed } => recipe(
                DType::U8,
                weights.data().len(),
                Box::new(move || packed::of_ternary(&weights, transposed)),
            ),
            Form::Packed(matrix) => {
                recipe(DType::U8, matrix.codes.data().len(), Box::new(move || matrix.weight()))
            }
            Form::BlockScales(matrix) => {
                recipe(DType::F32, matrix.scales.data().len(), Box::new(move || matrix.scale()))
            }
        })
    }
}
