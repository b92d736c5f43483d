//! What every crate of BitNet-Rust speaks: tensors, ternary matrices, the float recipe and the
//! [`Backend`](backend::Backend) trait.
//!
//! This crate knows nothing of tokenizers, file formats or HTTP. Unsafe code lives in
//! [`mmap`] only.

pub mod backend;
pub mod budget;
pub mod device;
pub mod dtype;
pub mod error;
pub mod machine;
pub mod mmap;
pub mod numerics;
pub mod profile;
pub mod screen;
pub mod shortcuts;
pub mod tensor;
pub mod ternary;

pub use device::Device;
pub use dtype::DType;
pub use error::Error;
pub use mmap::WeightBytes;
pub use profile::OperationProfile;
pub use screen::{Candidate, Keep, Pick, Screen};
pub use shortcuts::{ShortcutCounts, Shortcuts};
pub use tensor::Tensor;
pub use ternary::{
    ColumnCopy, LinearUse, RunCodes, TernaryMatrix, TileLayout, TiledMatrix, WeightScale,
};
