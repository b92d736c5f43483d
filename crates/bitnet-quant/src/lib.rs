//! Ternary numbers: quantisation of weights and activations, packings of every file format, and
//! the scalar [`ReferenceBackend`](reference::ReferenceBackend) that all other backends are
//! compared with. Safe code only.
#![forbid(unsafe_code)]

pub mod activation;
pub mod packing;
pub mod reference;
pub mod screen;
pub mod ternary;
