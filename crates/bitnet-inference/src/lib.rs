//! The inference engine: a model on a device, sequences, sampling, text as it is generated.
#![forbid(unsafe_code)]

pub mod bench;
pub mod error;
pub mod generate;
#[cfg_attr(not(test), expect(dead_code))] // until the step loop
mod kv_cache;
pub mod model;
pub mod random;
pub mod sampler;
#[expect(dead_code)] // until the step loop
mod scheduler;
pub mod session;
pub mod stop;

pub use error::Error;
pub use generate::{FinishReason, GenerateOptions, Generation, generate};
pub use model::{Model, ModelOptions, device_reason};
pub use sampler::SamplingParams;
pub use session::{Session, SessionOptions};
