//! The inference engine: a model on a device, sequences, sampling, text as it is generated.
#![forbid(unsafe_code)]

pub mod bench;
pub mod benchmark;
pub mod builder;
pub mod chat_window;
pub mod conversation;
pub mod engine;
pub mod error;
pub mod generate;
pub mod grammar;
pub mod inference_engine;
pub mod inference_stream;
mod kv_cache;
mod masks;
pub mod model;
pub mod model_cache;
pub mod perplexity;
pub mod random;
pub mod request;
mod runner;
pub mod sampler;
mod scheduler;
pub mod session;
pub mod speculation;
mod step_time;
pub mod stop;
mod stream;
pub mod telemetry;
mod transcript;

pub use benchmark::{Benchmark, benchmark};
pub use bitnet_core::backend::KvType;
pub use bitnet_core::{Device, WeightBytes};
pub use bitnet_model::chat::Message;
#[cfg(feature = "hub")]
pub use bitnet_model::hub;
pub use bitnet_model::weights::LoadProgress;
pub use builder::{InferenceEngineBuilder, MemorySize, OptimizationLevel};
pub use chat_window::ChatWindow;
pub use conversation::ConversationError;
pub use engine::{Engine, EngineOptions, EngineStatistics};
pub use error::Error;
pub use generate::{FinishReason, GenerateOptions, Generation, generate};
pub use grammar::{Constraint, ConstraintError};
pub use inference_engine::{Answer, GenerationParams, InferenceEngine, quick_infer, smart_infer};
pub use inference_stream::{InferenceStream, StreamEvent, StreamingConfig};
pub use kv_cache::KvStatistics;
pub use model::{Model, ModelOptions, device_reason};
pub use model_cache::{CacheStatistics, ModelCache};
pub use request::{Event, Finish, LogitsProcessor, Overflow, Request, Token, Usage};
pub use sampler::SamplingParams;
pub use scheduler::{QueueFull, SchedulerPolicy};
pub use session::{Session, SessionOptions};
pub use speculation::{Proposer, Speculation};
pub use stream::TokenStream;
