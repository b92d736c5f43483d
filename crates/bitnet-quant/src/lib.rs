//! Ternary numbers in safe code: how they are packed in files.
#![forbid(unsafe_code)]

pub mod packing;
