//! From files to a runnable decoder: readers, architectures, weights, tokenizer and chat template.
#![forbid(unsafe_code)]

pub mod chat;
pub mod error;
pub mod formats;
pub mod tokenizer;

pub use error::Error;
