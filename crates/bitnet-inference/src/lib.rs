//! The inference engine: a model on a device, sequences, sampling, text as it is generated.
#![forbid(unsafe_code)]

pub mod bench;
pub mod engine;
pub mod error;
pub mod generate;
mod kv_cache;
pub mod model;
pub mod random;
pub mod request;
pub mod sampler;
mod scheduler;
pub mod session;
pub mod stop;
mod stream;
mod transcript;

pub use engine::{Engine, EngineOptions, EngineStatistics};
pub use error::Error;
pub use generate::{FinishReason, GenerateOptions, Generation, generate};
pub use kv_cache::KvStatistics;
pub use model::{Model, ModelOptions, device_reason};
pub use request::{Event, Finish, LogitsProcessor, Request, Token, Usage};
pub use sampler::SamplingParams;
pub use scheduler::QueueFull;
pub use session::{Session, SessionOptions};
pub use stream::TokenStream;
