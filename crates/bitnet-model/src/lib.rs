//! From files to a runnable decoder: readers, architectures, weights, tokenizer and chat template.
#![forbid(unsafe_code)]

pub mod arch;
pub mod chat;
pub mod config;
pub mod convert;
pub mod decoder;
pub mod error;
pub mod formats;
#[cfg(feature = "hub")]
pub mod hub;
mod known;
mod pipeline;
pub mod shapes;
pub mod source;
pub mod tokenizer;
pub mod weights;

pub use error::Error;
