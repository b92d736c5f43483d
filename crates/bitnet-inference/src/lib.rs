//! The inference engine: logits to tokens, requests to streams.
#![forbid(unsafe_code)]

pub mod random;
pub mod sampler;
pub mod stop;
