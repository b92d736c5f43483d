//! The CPU backend: SIMD kernels chosen at run time, and threads that share each operation.
//!
//! The results are the same, bit for bit, on every instruction set and with any number of threads:
//! ternary products are integer sums, hence exact in any order, and every float reduction follows
//! the one recipe in [`bitnet_core::numerics`]. The tests hold every instruction set against
//! [`bitnet_quant::reference::ReferenceBackend`].
//!
//! Where to enter: [`CpuBackend`] owns the memory and the threads and has one file per group of
//! operations in `ops/`, which cut them into parts; the inner loops are in `arch/`, the choice of an
//! instruction set in `dispatch.rs`. Unsafe code lives in `arch/` and `threads.rs` only.
#![deny(unsafe_code)]

mod affinity;
#[allow(unsafe_code)]
mod arch;
mod backend;
mod buffer;
pub mod ceilings;
mod dispatch;
mod kv;
mod linear;
mod ops;
mod profile;
#[allow(unsafe_code)]
mod threads;

pub use backend::{CpuBackend, CpuOptions};
pub use buffer::Buffer;
pub use dispatch::{Isa, UnknownIsa};
pub use kv::KvStore;
pub use linear::Linear;
