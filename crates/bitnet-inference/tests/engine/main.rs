//! Many requests at once get what each of them gets alone.

mod cases;
mod overflow;
mod replicas;
mod requests;
mod speculation;

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use bitnet_core::Shortcuts;
use bitnet_inference::sampler::Sampler;
use bitnet_inference::{
    Constraint, Device, Engine, EngineOptions, EngineStatistics, Error, Event, Finish,
    FinishReason, GenerateOptions, Generation, LogitsProcessor, Model, ModelOptions, Overflow,
    Proposer, Request, SamplingParams, SchedulerPolicy, SessionOptions, Speculation, TokenStream,
    Usage, generate,
};
use bitnet_testing::{Random, altered_tiny_model, golden};

fn open(threads: usize, shortcuts: Shortcuts) -> Model {
    open_from("tiny", 1, threads, shortcuts)
}

fn open_from(model: &str, stages: usize, threads: usize, shortcuts: Shortcuts) -> Model {
    let options = ModelOptions {
        threads: Some(threads),
        shortcuts: Some(shortcuts),
        // A screen of the head, which the model does not bring along.
        copies: true,
        ..ModelOptions::default()
    };
    Model::open_distributed(model, &vec![Device::Cpu; stages], &options).unwrap()
}

/// The built-in model with something else in one of its files.
fn altered(threads: usize, file: &str, before: &str, after: &str) -> Model {
    let folder = tempfile::tempdir().unwrap();
    altered_tiny_model(folder.path(), file, before, after);
    open_from(folder.path().to_str().unwrap(), 1, threads, Shortcuts::ALL)
}

/// A model that writes much like the built-in one, but not the same: it takes tokens for further
/// apart than they are.
fn tiny_draft(threads: usize) -> Model {
    altered(threads, "config.json", "\"rope_theta\": 10000.0", "\"rope_theta\": 7000.0")
}

fn tiny(threads: usize) -> Model {
    open(threads, Shortcuts::ALL)
}

fn options(max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampling: SamplingParams::default(),
        max_tokens,
        stop: Vec::new(),
        end_ids: BTreeSet::new(),
        constraint: None,
    }
}

/// A request for what [`alone`] gives.
fn request(prompt: &[u32], options: &GenerateOptions) -> Request {
    let GenerateOptions { sampling, max_tokens, end_ids, stop, constraint } = options.clone();
    assert!(stop.is_empty(), "without text there are no stop strings");
    Request { end_ids, constraint, ..Request::new(prompt.to_vec(), sampling, max_tokens) }
}

fn alone(model: &Model, prompt: &[u32], options: &GenerateOptions) -> Generation {
    try_alone(model, prompt, options).unwrap()
}

fn try_alone(
    model: &Model,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Result<Generation, Error> {
    let mut session = model.session(SessionOptions::default()).unwrap();
    let show = |_: &str| ControlFlow::Continue(());
    generate(&mut session, model.tokenizer(), prompt, options, show)
}

/// A KV budget for so many tokens of the built-in model, in blocks of 16.
fn kv_bytes(model: &Model, tokens: usize) -> u64 {
    let layout = model.config().kv_layout(bitnet_core::backend::KvType::F32, 16);
    (layout.block_bytes() * tokens.div_ceil(16)) as u64
}

/// Reads a stream to its end.
fn read(stream: &mut TokenStream) -> (Vec<u32>, Result<Finish, Error>) {
    let mut tokens = Vec::new();
    loop {
        match stream.next().expect("an end comes before nothing") {
            Ok(Event::Token(token)) => tokens.push(token.id),
            Ok(Event::Finished(finish)) => {
                assert!(stream.next().is_none());
                return (tokens, Ok(finish));
            }
            Err(error) => return (tokens, Err(error)),
        }
    }
}

/// One of a few ways to choose tokens, with and without the need for all logits.
fn sampling(random: &mut Random) -> SamplingParams {
    let neutral = SamplingParams { seed: random.bits(), ..SamplingParams::default() };
    match random.below(8) {
        0 => SamplingParams { temperature: 1.0, ..neutral },
        1 => SamplingParams { temperature: 0.8, top_k: 20, top_p: 0.9, ..neutral },
        2 => SamplingParams { temperature: 1.2, min_p: 0.05, ..neutral },
        3 => SamplingParams { repetition_penalty: 1.2, presence_penalty: 0.3, ..neutral },
        4 => SamplingParams { temperature: 0.7, logprobs: Some(2), ..neutral },
        5 => SamplingParams { logit_bias: vec![(3, 2.0), (9, f32::NEG_INFINITY)], ..neutral },
        _ => neutral,
    }
}

/// Nothing, or one of a few constraints.
fn constraint(random: &mut Random) -> Option<Constraint> {
    match random.below(8) {
        0 => Some(Constraint::JsonObject),
        1 => Some(Constraint::Regex("[A-Z][a-z]{1,9}( [a-z]{1,9}){2,12}[.!]".to_owned())),
        2 => Some(Constraint::Lark("start: \"(\" (start | /[a-z]+/)~1..3 \")\"".to_owned())),
        _ => None,
    }
}

/// The statistics once nothing runs and nothing waits.
fn idle(engine: &Engine) -> EngineStatistics {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let statistics = engine.statistics().unwrap();
        if statistics.running + statistics.waiting == 0 {
            assert_eq!(statistics.kv.used_blocks, 0);
            assert_eq!(statistics.draft_kv.used_blocks, 0);
            return statistics;
        }
        assert!(Instant::now() < end, "somebody is stuck: {statistics:?}");
        std::thread::yield_now();
    }
}

/// Changes nothing, and panics where no panic is expected: when it is dropped.
struct Unruly;

impl LogitsProcessor for Unruly {
    fn process(&mut self, _: &[u32], _: usize, _: &mut [f32]) {}
}

impl Drop for Unruly {
    fn drop(&mut self) {
        panic!("not here");
    }
}
