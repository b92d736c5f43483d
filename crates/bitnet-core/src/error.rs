//! Errors of the core crate. Each message is one sentence that says what, where and what to do.

use std::path::PathBuf;

use crate::device::Device;
use crate::dtype::DType;

/// What can go wrong below the model and file layers.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be opened or mapped.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The operating system's reason.
        source: std::io::Error,
    },
    /// A tensor's data is shorter or longer than its shape and type say.
    #[error("a {dtype} tensor of shape {shape:?} takes {expected} bytes but {found} are there")]
    TensorSize {
        /// Element type.
        dtype: DType,
        /// Extents, outermost first.
        shape: Vec<usize>,
        /// Bytes that shape and type imply.
        expected: usize,
        /// Bytes found.
        found: usize,
    },
    /// A shape whose byte count does not fit the address space, or whose rows do not hold whole
    /// blocks of the type.
    #[error("a {dtype} tensor cannot have the shape {shape:?}: {reason}")]
    TensorShape {
        /// Element type.
        dtype: DType,
        /// Extents, outermost first.
        shape: Vec<usize>,
        /// Which rule is broken.
        reason: String,
    },
    /// A tensor of another element type than its reader asks for.
    #[error("the tensor holds {found} where {expected} is needed")]
    TensorType {
        /// Element type found.
        found: DType,
        /// What is needed.
        expected: &'static str,
    },
    /// A ternary code outside {0, 1, 2}, that is a weight outside {-1, 0, +1}.
    #[error(
        "illegal ternary code {code} at row {row}, column {column}: only 0, 1 and 2 (weights -1, 0, +1) exist"
    )]
    IllegalCode {
        /// The code found.
        code: u8,
        /// Matrix row.
        row: usize,
        /// Matrix column.
        column: usize,
    },
    /// A ternary matrix whose scales do not fit its shape or are not usable numbers.
    #[error("the scale of a ternary matrix of {rows} x {cols} is unusable: {reason}")]
    WeightScale {
        /// Matrix rows (output features).
        rows: usize,
        /// Matrix columns (input features).
        cols: usize,
        /// Which rule is broken.
        reason: String,
    },
    /// The memory that something needs is not there.
    #[error("{what} needs {} but only {} of memory are available", crate::budget::human_bytes(*needed), crate::budget::human_bytes(*available))]
    Memory {
        /// What was to be allocated.
        what: String,
        /// Bytes needed.
        needed: u64,
        /// Bytes that can be had.
        available: u64,
    },
    /// The device was asked for and this program or machine does not have it.
    #[error("device `{device}` is not available: {reason}")]
    DeviceUnavailable {
        /// The device asked for.
        device: Device,
        /// Why it is not there.
        reason: String,
    },
    /// An imported KV block does not have the layout of the store it is to enter.
    #[error("KV import: {0}")]
    KvImport(String),
}
