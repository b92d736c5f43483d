//! How an engine is set up.

use std::time::Duration;

use bitnet_core::backend::KvType;

use crate::sampler::InvalidParameter;
use crate::scheduler::SchedulerPolicy;
use crate::session::DEFAULT_CHUNK;

/// How an engine is set up. None of these changes a token, but the KV type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Step loops, each with the model's number of threads, and keys and values of its own. They
    /// share the weights. A request goes to the one that has the fewest.
    pub replicas: usize,
    /// Sequences that run at once on each replica.
    pub max_sequences: usize,
    /// Most tokens per step, or one for each sequence if that is more.
    pub step_tokens: usize,
    /// Requests that may wait, at all replicas together, besides those that run.
    pub queue: usize,
    /// Most bytes of keys and values, those of a draft model included, of which each replica has an
    /// equal part. Storage that was never used takes none.
    pub kv_bytes: u64,
    /// Storage of keys and values.
    pub kv_type: KvType,
    /// Tokens per KV block: prefixes are shared in whole blocks.
    pub block_tokens: usize,
    /// Who comes first among waiting requests of the same priority.
    pub policy: SchedulerPolicy,
    /// How long a step is to take in which prompts are read while others write; the tokens that prompts
    /// get follow from what steps have taken. `None`: they get what is left of `step_tokens`.
    pub target_step_time: Option<Duration>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            replicas: 1,
            max_sequences: 16,
            step_tokens: DEFAULT_CHUNK,
            queue: 256,
            kv_bytes: 2_000_000_000,
            kv_type: KvType::F32,
            block_tokens: 16,
            policy: SchedulerPolicy::default(),
            target_step_time: None,
        }
    }
}

impl EngineOptions {
    /// Refuses numbers that no engine can have. Room is made for all of them at the start, and each
    /// step looks at every place, so that a slip of a few digits must not take all memory and time.
    pub(crate) fn validate(&self) -> Result<(), InvalidParameter> {
        for (name, value, possible, allowed) in [
            ("the number of replicas", self.replicas, 1..=64, "1 to 64"),
            ("the number of requests that run at once", self.max_sequences, 1..=4096, "1 to 4096"),
            ("the number of tokens per step", self.step_tokens, 1..=65_536, "1 to 65536"),
            ("the number of requests that may wait", self.queue, 0..=10_000, "0 to 10000"),
            ("the number of tokens per KV block", self.block_tokens, 1..=4096, "1 to 4096"),
        ] {
            if !possible.contains(&value) {
                return Err(InvalidParameter { name, value: value.to_string(), allowed });
            }
        }
        Ok(())
    }
}
