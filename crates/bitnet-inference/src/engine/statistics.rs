//! What an engine has done.

use std::iter::Sum;

use crate::kv_cache::KvStatistics;

/// What an engine has done and what it is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStatistics {
    /// Sequences that take part in steps.
    pub running: usize,
    /// Sequences that wait for a place or for blocks.
    pub waiting: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Tokens computed in these steps, proposed ones included.
    pub computed_tokens: u64,
    /// Of those, tokens of prompts, and of outputs that were computed anew.
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Tokens that speculation proposed.
    pub proposed_tokens: u64,
    /// Of those, tokens that came.
    pub accepted_tokens: u64,
    /// How often a sequence gave up its blocks, to be computed anew.
    pub preemptions: u64,
    /// The KV blocks.
    pub kv: KvStatistics,
    /// Those of the draft model; all zero without one.
    pub draft_kv: KvStatistics,
}

impl Sum for EngineStatistics {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(EngineStatistics::default(), |sum, more| EngineStatistics {
            running: sum.running + more.running,
            waiting: sum.waiting + more.waiting,
            steps: sum.steps + more.steps,
            computed_tokens: sum.computed_tokens + more.computed_tokens,
            prefill_tokens: sum.prefill_tokens + more.prefill_tokens,
            output_tokens: sum.output_tokens + more.output_tokens,
            preemptions: sum.preemptions + more.preemptions,
            kv: [sum.kv, more.kv].into_iter().sum(),
            draft_kv: [sum.draft_kv, more.draft_kv].into_iter().sum(),
            proposed_tokens: sum.proposed_tokens + more.proposed_tokens,
            accepted_tokens: sum.accepted_tokens + more.accepted_tokens,
        })
    }
}
