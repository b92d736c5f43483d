//! What an engine tells those who watch it: metrics through the `metrics` crate, spans through
//! `tracing`. docs/engine.md has the table.
//!
//! Metrics go to the recorder that is there when the engine starts: the recorder of the thread that
//! starts it, or else the one of the program. Handles are made then, once, and an engine that
//! started without a recorder stays silent. Names and labels do not tell engines and replicas apart:
//! counters and gauges are sums over all of them.
//!
//! The step loop adds to atomic numbers and no more, as far as the recorder lets it: the storage of
//! `metrics-util`, on which the Prometheus exporter stands, takes no lock for that. Without a
//! recorder, and without a subscriber for the spans, nothing is allocated or formatted.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use metrics::{Counter, Gauge, Histogram, Unit, counter, gauge, histogram};
use metrics::{describe_counter, describe_gauge, describe_histogram};
use tracing::field::Empty;
use tracing::span::EnteredSpan;
use tracing::{Span, debug_span, info_span, trace_span};

use crate::engine::EngineStatistics;
use crate::error::Error;
use crate::generate::FinishReason;

/// Requests that take part in steps.
pub const RUNNING_REQUESTS: &str = "bitnet_engine_running_requests";
/// Requests that wait for a place or for blocks.
pub const WAITING_REQUESTS: &str = "bitnet_engine_waiting_requests";
/// KV blocks, by `state`: `used`, `idle` (kept for their prefix) and `free`.
pub const KV_BLOCKS: &str = "bitnet_engine_kv_blocks";
/// Requests that ended, by `outcome`: `stop`, `length`, `cancelled`, `deadline` and `failed`.
pub const REQUESTS: &str = "bitnet_engine_requests_total";
/// Requests that were refused, by `reason`: `queue_full` and `invalid`.
pub const REJECTED_REQUESTS: &str = "bitnet_engine_rejected_requests_total";
/// Computed tokens of prompts, and of outputs that are computed anew.
pub const PREFILL_TOKENS: &str = "bitnet_engine_prefill_tokens_total";
/// Computed tokens of outputs, one for each sequence and step.
pub const DECODE_TOKENS: &str = "bitnet_engine_decode_tokens_total";
/// Tokens that speculation proposed, computed in addition.
pub const PROPOSED_TOKENS: &str = "bitnet_engine_proposed_tokens_total";
/// Of the proposed tokens, those that came.
pub const ACCEPTED_TOKENS: &str = "bitnet_engine_accepted_tokens_total";
/// Generated tokens.
pub const OUTPUT_TOKENS: &str = "bitnet_engine_output_tokens_total";
/// Tokens of admitted sequences, each time they were admitted.
pub const ADMITTED_TOKENS: &str = "bitnet_engine_admitted_tokens_total";
/// Of the admitted tokens, those whose keys and values were there already.
pub const REUSED_TOKENS: &str = "bitnet_engine_reused_tokens_total";
/// KV blocks whose prefix was given up for other tokens.
pub const EVICTED_KV_BLOCKS: &str = "bitnet_engine_evicted_kv_blocks_total";
/// How often a sequence gave up its blocks, to be computed anew.
pub const PREEMPTIONS: &str = "bitnet_engine_preemptions_total";
/// Time of a step.
pub const STEP_SECONDS: &str = "bitnet_engine_step_seconds";
/// Rows of a step, one for each token.
pub const STEP_TOKENS: &str = "bitnet_engine_step_tokens";
/// Sequences of a step.
pub const STEP_SEQUENCES: &str = "bitnet_engine_step_sequences";
/// From the submission of a request to its first token.
pub const TIME_TO_FIRST_TOKEN_SECONDS: &str = "bitnet_engine_time_to_first_token_seconds";
/// From the submission of a request to its end.
pub const REQUEST_SECONDS: &str = "bitnet_engine_request_seconds";

/// The target of all spans.
const TARGET: &str = "bitnet_inference";

/// A counter that follows a number of the statistics.
type CounterOf = (&'static str, fn(&EngineStatistics) -> u64);

const COUNTERS: [CounterOf; 9] = [
    (PREFILL_TOKENS, |now| now.prefill_tokens),
    (DECODE_TOKENS, |now| now.computed_tokens - now.prefill_tokens - now.proposed_tokens),
    (PROPOSED_TOKENS, |now| now.proposed_tokens),
    (ACCEPTED_TOKENS, |now| now.accepted_tokens),
    (OUTPUT_TOKENS, |now| now.output_tokens),
    (ADMITTED_TOKENS, |now| now.kv.admitted_tokens),
    (REUSED_TOKENS, |now| now.kv.reused_tokens),
    (EVICTED_KV_BLOCKS, |now| now.kv.evicted_blocks),
    (PREEMPTIONS, |now| now.preemptions),
];

/// A gauge that follows a number of the statistics, and the state that it is labelled with.
type GaugeOf = (&'static str, Option<&'static str>, fn(&EngineStatistics) -> usize);

const GAUGES: [GaugeOf; 5] = [
    (RUNNING_REQUESTS, None, |now| now.running),
    (WAITING_REQUESTS, None, |now| now.waiting),
    (KV_BLOCKS, Some("used"), |now| now.kv.used_blocks),
    (KV_BLOCKS, Some("idle"), |now| now.kv.idle_blocks),
    (KV_BLOCKS, Some("free"), |now| now.kv.blocks - now.kv.used_blocks - now.kv.idle_blocks),
];

/// Tells the recorder what the metrics are.
fn describe() {
    let count = Unit::Count;
    describe_gauge!(RUNNING_REQUESTS, count, "Requests that take part in steps");
    describe_gauge!(WAITING_REQUESTS, count, "Requests that wait for a place or for KV blocks");
    describe_gauge!(KV_BLOCKS, count, "KV blocks by state");
    describe_counter!(REQUESTS, count, "Requests that ended, by outcome");
    describe_counter!(REJECTED_REQUESTS, count, "Requests that were refused, by reason");
    describe_counter!(
        PREFILL_TOKENS,
        count,
        "Tokens of prompts computed, and outputs computed anew"
    );
    describe_counter!(
        DECODE_TOKENS,
        count,
        "Tokens of outputs computed, one per sequence and step"
    );
    describe_counter!(PROPOSED_TOKENS, count, "Tokens that speculation proposed");
    describe_counter!(ACCEPTED_TOKENS, count, "Proposed tokens that came");
    describe_counter!(OUTPUT_TOKENS, count, "Tokens generated");
    describe_counter!(ADMITTED_TOKENS, count, "Tokens of admitted sequences");
    describe_counter!(REUSED_TOKENS, count, "Admitted tokens whose keys and values were there");
    describe_counter!(EVICTED_KV_BLOCKS, count, "KV blocks whose prefix was given up");
    describe_counter!(PREEMPTIONS, count, "Times that a sequence gave up its KV blocks");
    describe_histogram!(STEP_SECONDS, Unit::Seconds, "Time of a step");
    describe_histogram!(STEP_TOKENS, count, "Rows of a step, one per token");
    describe_histogram!(STEP_SEQUENCES, count, "Sequences of a step");
    describe_histogram!(TIME_TO_FIRST_TOKEN_SECONDS, Unit::Seconds, "Submission to first token");
    describe_histogram!(REQUEST_SECONDS, Unit::Seconds, "Submission to end");
}

/// The metrics of one step loop.
pub(crate) struct StepMetrics {
    counters: [Counter; COUNTERS.len()],
    gauges: [Gauge; GAUGES.len()],
    seconds: Histogram,
    tokens: Histogram,
    sequences: Histogram,
    /// What has been published.
    published: EngineStatistics,
}

impl StepMetrics {
    /// Metrics at the recorder that is there now.
    pub(crate) fn register() -> Self {
        StepMetrics {
            counters: COUNTERS.map(|(name, _)| counter!(name)),
            gauges: GAUGES.map(|(name, state, _)| match state {
                Some(state) => gauge!(name, "state" => state),
                None => gauge!(name),
            }),
            seconds: histogram!(STEP_SECONDS),
            tokens: histogram!(STEP_TOKENS),
            sequences: histogram!(STEP_SEQUENCES),
            published: EngineStatistics::default(),
        }
    }

    /// Adds what has changed since the last time: other loops add to the same metrics.
    pub(crate) fn publish(&mut self, now: EngineStatistics) {
        let before = &self.published;
        for ((_, of), counter) in COUNTERS.iter().zip(&self.counters) {
            let more = of(&now) - of(before);
            if more > 0 {
                counter.increment(more);
            }
        }
        for ((_, _, of), gauge) in GAUGES.iter().zip(&self.gauges) {
            let change = of(&now) as f64 - of(before) as f64;
            if change != 0.0 {
                gauge.increment(change);
            }
        }
        self.published = now;
    }

    /// A step was computed.
    pub(crate) fn step(&self, time: Duration, tokens: usize, sequences: usize) {
        self.seconds.record(time);
        self.tokens.record(tokens as f64);
        self.sequences.record(sequences as f64);
    }
}

impl Drop for StepMetrics {
    /// A loop that has ended runs nothing and has no blocks.
    fn drop(&mut self) {
        for ((_, _, of), gauge) in GAUGES.iter().zip(&self.gauges) {
            gauge.decrement(of(&self.published) as f64);
        }
    }
}

/// How a request ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    Finished(FinishReason),
    Deadline,
    Failed,
}

impl Outcome {
    const ALL: [Outcome; 5] = [
        Outcome::Finished(FinishReason::Stop),
        Outcome::Finished(FinishReason::Length),
        Outcome::Finished(FinishReason::Cancelled),
        Outcome::Deadline,
        Outcome::Failed,
    ];

    /// The label's value.
    fn as_str(self) -> &'static str {
        match self {
            Outcome::Finished(reason) => reason.as_str(),
            Outcome::Deadline => "deadline",
            Outcome::Failed => "failed",
        }
    }
}

impl From<&Result<FinishReason, Error>> for Outcome {
    fn from(end: &Result<FinishReason, Error>) -> Self {
        match end {
            Ok(reason) => Outcome::Finished(*reason),
            Err(Error::DeadlineExceeded) => Outcome::Deadline,
            Err(_) => Outcome::Failed,
        }
    }
}

/// The metrics of the requests of one engine.
pub(crate) struct RequestMetrics {
    outcomes: [(Outcome, Counter); Outcome::ALL.len()],
    queue_full: Counter,
    invalid: Counter,
    time_to_first_token: Histogram,
    seconds: Histogram,
    /// The number of the next request, for its span.
    next_id: AtomicU64,
}

impl RequestMetrics {
    /// Metrics at the recorder that is there now, which learns what they are.
    pub(crate) fn register() -> Arc<Self> {
        describe();
        Arc::new(RequestMetrics {
            outcomes: Outcome::ALL
                .map(|outcome| (outcome, counter!(REQUESTS, "outcome" => outcome.as_str()))),
            queue_full: counter!(REJECTED_REQUESTS, "reason" => "queue_full"),
            invalid: counter!(REJECTED_REQUESTS, "reason" => "invalid"),
            time_to_first_token: histogram!(TIME_TO_FIRST_TOKEN_SECONDS),
            seconds: histogram!(REQUEST_SECONDS),
            next_id: AtomicU64::new(0),
        })
    }

    /// A request was refused.
    pub(crate) fn rejected(&self, error: &Error) {
        match error {
            Error::QueueFull(_) => self.queue_full.increment(1),
            // It was accepted, and has failed.
            Error::EngineStopped { .. } => {}
            _ => self.invalid.increment(1),
        }
    }
}

/// What is told of one request. When it is dropped, the request has ended.
pub(crate) struct RequestTelemetry {
    metrics: Arc<RequestMetrics>,
    span: Span,
    submitted: Instant,
    output_tokens: usize,
    outcome: Outcome,
}

impl RequestTelemetry {
    /// Of a request that is accepted. The span that is open in this thread is the parent of its own.
    pub(crate) fn new(
        metrics: &Arc<RequestMetrics>,
        submitted: Instant,
        prompt_tokens: usize,
    ) -> Self {
        let id = metrics.next_id.fetch_add(1, Ordering::Relaxed);
        let span = debug_span!(
            target: TARGET,
            "request",
            id,
            prompt_tokens,
            output_tokens = Empty,
            finish_reason = Empty
        );
        let metrics = Arc::clone(metrics);
        RequestTelemetry { metrics, span, submitted, output_tokens: 0, outcome: Outcome::Failed }
    }

    /// A token was generated.
    pub(crate) fn token(&mut self, time: Instant) {
        if self.output_tokens == 0 {
            self.metrics.time_to_first_token.record(time - self.submitted);
        }
        self.output_tokens += 1;
    }

    /// The request has ended. One that is dropped without a word has failed.
    pub(crate) fn end(mut self, outcome: Outcome) {
        self.outcome = outcome;
    }
}

impl Drop for RequestTelemetry {
    fn drop(&mut self) {
        let outcomes = &self.metrics.outcomes;
        let counter = outcomes.iter().find(|(outcome, _)| *outcome == self.outcome);
        counter.expect("all outcomes are there").1.increment(1);
        self.metrics.seconds.record(self.submitted.elapsed());
        self.span.record("output_tokens", self.output_tokens);
        self.span.record("finish_reason", self.outcome.as_str());
    }
}

/// The span of a step, until it is dropped. Its `rows` are known, and recorded, later.
pub(crate) fn step_span(sequences: usize) -> EnteredSpan {
    trace_span!(target: TARGET, "step", rows = Empty, sequences).entered()
}

/// The span of a generation without an engine; [`generated`] completes it.
pub(crate) fn generate_span(prompt_tokens: usize) -> EnteredSpan {
    debug_span!(
        target: TARGET,
        "generate",
        prompt_tokens,
        output_tokens = Empty,
        finish_reason = Empty
    )
    .entered()
}

/// Tells the span of a generation what came of it.
pub(crate) fn generated(span: &Span, output_tokens: usize, reason: FinishReason) {
    span.record("output_tokens", output_tokens);
    span.record("finish_reason", reason.as_str());
}

/// The span in which a model is loaded, until it is dropped.
pub(crate) fn load_span(model: &Path, devices: usize) -> EnteredSpan {
    info_span!(target: TARGET, "load_model", model = %model.display(), devices).entered()
}
