//! Many requests at once get what each of them gets alone.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bitnet_core::Shortcuts;
use bitnet_inference::{
    Constraint, Engine, EngineOptions, Error, Event, Finish, FinishReason, GenerateOptions,
    Generation, LogitsProcessor, Model, ModelOptions, Request, SamplingParams, SessionOptions,
    TokenStream, generate,
};
use bitnet_testing::Random;

fn open(threads: usize, shortcuts: Shortcuts) -> Model {
    let options = ModelOptions {
        threads: Some(threads),
        shortcuts: Some(shortcuts),
        // A screen of the head, which the model does not bring along.
        copies: true,
        ..ModelOptions::default()
    };
    Model::open("tiny", &options).unwrap()
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

struct Case {
    prompt: Vec<u32>,
    options: GenerateOptions,
    priority: i32,
    client: u64,
    buffer: usize,
    /// Tokens after which the reader goes away.
    cancel_after: Option<usize>,
    expected: Generation,
}

fn cases(model: &Model, count: usize, random: &mut Random) -> Vec<Case> {
    let context = model.config().context_length;
    let vocab_size = model.vocab_size();
    let prefixes: Vec<Vec<u32>> = (0..3)
        .map(|_| (0..16 + random.below(200)).map(|_| random.below(vocab_size) as u32).collect())
        .collect();
    (0..count)
        .map(|_| {
            // 1 to 700, more short ones than long ones.
            let longest = 1 + random.below(700);
            let length = (1 + random.below(longest)).min(context);
            let mut prompt = match random.below(2) {
                0 => Vec::new(),
                _ => prefixes[random.below(prefixes.len())].clone(),
            };
            match random.below(8) {
                // A prompt that others begin with, in whole blocks.
                0 => prompt = prefixes[0][..prefixes[0].len() / 16 * 16].to_vec(),
                _ => prompt.resize_with(length, || random.below(vocab_size) as u32),
            }
            let end_ids = match random.below(2) {
                0 => BTreeSet::new(),
                // Some that come.
                _ => (0..60).map(|_| random.below(vocab_size) as u32).collect(),
            };
            let max_tokens = 1 + random.below(40);
            let sampling = sampling(random);
            let cancel_after = (random.below(6) == 0).then(|| random.below(max_tokens));
            let constraint = constraint(random);
            let mut options =
                GenerateOptions { sampling, max_tokens, stop: vec![], end_ids, constraint };
            let expected = try_alone(model, &prompt, &options).unwrap_or_else(|error| {
                // What the constraint needs can be an end token here.
                assert!(matches!(error, Error::Constraint(_)), "{error}");
                options.constraint = None;
                alone(model, &prompt, &options)
            });
            Case {
                prompt,
                options,
                priority: random.below(3) as i32,
                client: random.below(3) as u64,
                buffer: 1 + random.below(12),
                cancel_after,
                expected,
            }
        })
        .collect()
}

fn submit(engine: &Engine, case: &Case) -> TokenStream {
    let mut request = request(&case.prompt, &case.options);
    request.priority = case.priority;
    request.client = case.client;
    request.buffer = case.buffer;
    engine.submit(request).unwrap()
}

/// Reads the events of a case and compares them, or goes away when the case says so.
fn check(case: &Case, mut stream: TokenStream) {
    let expected = &case.expected;
    for read in 0.. {
        if case.cancel_after == Some(read) {
            return;
        }
        match stream.next().unwrap().unwrap() {
            Event::Token(token) => {
                assert_eq!(token.id, expected.tokens[read], "token {read}");
                assert_eq!(token.logprobs.as_ref(), expected.logprobs.get(read));
            }
            Event::Finished(Finish { reason, usage }) => {
                assert_eq!((read, reason), (expected.tokens.len(), expected.finish_reason));
                assert_eq!(usage.prompt_tokens, case.prompt.len());
                assert_eq!(usage.output_tokens, read);
                return;
            }
        }
    }
}

#[test]
fn random_requests_get_the_tokens_they_get_alone() {
    let random = &mut Random::new(20);
    // What is expected comes without shortcuts.
    let cases = cases(&open(1, Shortcuts::NONE), 200, random);
    let reasons: Vec<FinishReason> = cases.iter().map(|c| c.expected.finish_reason).collect();
    assert!(reasons.contains(&FinishReason::Stop) && reasons.contains(&FinishReason::Length));
    let constrained = cases.iter().filter(|case| case.options.constraint.is_some()).count();
    assert!(constrained > 40, "{constrained}");
    for threads in [1, 2] {
        for prefix_reuse in [false, true] {
            let model = open(threads, Shortcuts { prefix: prefix_reuse, ..Shortcuts::ALL });
            let engine = model
                .engine(EngineOptions {
                    max_sequences: 8,
                    step_tokens: 32 + random.below(100),
                    queue: 60,
                    // A little more than the longest request needs.
                    kv_bytes: kv_bytes(&model, 700),
                    ..EngineOptions::default()
                })
                .unwrap();
            let mut streams = Vec::new();
            for case in &cases {
                streams.push((case, submit(&engine, case)));
                // Many wait; those whose turn to be read comes late fill their rings and pause.
                while streams.len() > 60 {
                    let (case, stream) = streams.swap_remove(random.below(streams.len()));
                    check(case, stream);
                }
            }
            while !streams.is_empty() {
                let (case, stream) = streams.swap_remove(random.below(streams.len()));
                check(case, stream);
            }
            let statistics = idle(&engine);
            println!("{threads} threads, prefix reuse {prefix_reuse}: {statistics:?}");
            assert!(statistics.preemptions > 20, "{statistics:?}");
            assert_eq!(statistics.kv.reused_tokens > 1000, prefix_reuse, "{statistics:?}");
            assert_eq!(statistics.kv.evicted_blocks > 100, prefix_reuse, "{statistics:?}");
            assert_eq!(statistics.kv.copied_blocks > 0, prefix_reuse, "{statistics:?}");
            assert!(model.shortcut_counts().head_rows > 0, "some rows are screened");
        }
    }
}

/// The statistics once nothing runs and nothing waits.
fn idle(engine: &Engine) -> bitnet_inference::EngineStatistics {
    let end = Instant::now() + Duration::from_secs(60);
    loop {
        let statistics = engine.statistics().unwrap();
        if statistics.running + statistics.waiting == 0 {
            assert_eq!(statistics.kv.used_blocks, 0);
            return statistics;
        }
        assert!(Instant::now() < end, "somebody is stuck: {statistics:?}");
        std::thread::yield_now();
    }
}

#[test]
fn a_full_ring_pauses_its_request_and_no_other() {
    let model = tiny(1);
    let engine =
        model.engine(EngineOptions { max_sequences: 2, ..EngineOptions::default() }).unwrap();
    let mut slow = request(&[1, 2, 3], &options(100));
    slow.buffer = 5;
    let mut slow = engine.submit(slow).unwrap();
    let mut quick = engine.submit(request(&[4, 5], &options(200))).unwrap();
    let (tokens, _) = read(&mut quick);
    assert_eq!(tokens, alone(&model, &[4, 5], &options(200)).tokens);
    let statistics = engine.statistics().unwrap();
    assert_eq!(statistics.output_tokens, 200 + 5, "{statistics:?}");
    let (tokens, finish) = read(&mut slow);
    assert_eq!(tokens, alone(&model, &[1, 2, 3], &options(100)).tokens);
    assert_eq!(finish.unwrap().reason, FinishReason::Length);
    idle(&engine);
}

#[test]
fn a_reader_that_goes_away_takes_its_request_along() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut streams: Vec<TokenStream> = (0..4)
        .map(|_| {
            let mut request = request(&[1, 2, 3], &options(400));
            request.buffer = 10;
            engine.submit(request).unwrap()
        })
        .collect();
    assert!(matches!(streams[0].next(), Some(Ok(Event::Token(_)))));
    drop(streams);
    // Without their readers, full rings would never be read.
    let statistics = idle(&engine);
    assert!(statistics.output_tokens <= 4 * 11, "{statistics:?}");
}

#[test]
fn a_panicking_logits_processor_fails_its_own_request() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut other = engine.submit(request(&[4, 5], &options(50))).unwrap();
    let mut request = request(&[1, 2, 3], &options(50));
    request.processors.push(Box::new(|_: &[u32], output_tokens: usize, _: &mut [f32]| {
        assert!(output_tokens < 3, "three is enough");
    }));
    let mut failing = engine.submit(request).unwrap();
    let (tokens, end) = read(&mut failing);
    assert_eq!(tokens, alone(&model, &[1, 2, 3], &options(3)).tokens);
    assert!(
        matches!(&end, Err(Error::ProcessorPanicked { message }) if message == "three is enough")
    );
    assert_eq!(read(&mut other).0, alone(&model, &[4, 5], &options(50)).tokens);
    idle(&engine);
}

#[test]
fn logits_processors_change_what_is_sampled() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut request = request(&[1, 2, 3], &options(4));
    request.processors.push(Box::new(
        |tokens: &[u32], output_tokens: usize, logits: &mut [f32]| {
            assert_eq!(tokens.len(), 3 + output_tokens);
            logits[100 + output_tokens] = 1e9;
        },
    ));
    let (tokens, _) = read(&mut engine.submit(request).unwrap());
    assert_eq!(tokens, [100, 101, 102, 103]);
}

#[test]
fn a_deadline_ends_a_request_and_no_other() {
    let model = tiny(1);
    let engine =
        model.engine(EngineOptions { max_sequences: 1, ..EngineOptions::default() }).unwrap();
    let mut running = engine.submit(request(&[4, 5], &options(50))).unwrap();
    let mut late = request(&[1, 2, 3], &options(50));
    late.deadline = Some(Instant::now());
    let (tokens, end) = read(&mut engine.submit(late).unwrap());
    assert!(tokens.is_empty() && matches!(end, Err(Error::DeadlineExceeded)));
    assert_eq!(read(&mut running).0.len(), 50);

    // One that pauses for ever is ended too.
    let mut paused = request(&[1, 2, 3], &options(50));
    (paused.buffer, paused.deadline) = (2, Some(Instant::now() + Duration::from_millis(300)));
    let mut paused = engine.submit(paused).unwrap();
    idle(&engine);
    let (tokens, end) = read(&mut paused);
    assert!(tokens.len() <= 2 && matches!(end, Err(Error::DeadlineExceeded)));
}

#[test]
fn bad_requests_are_refused_with_the_reason() {
    let model = tiny(1);
    let context = model.config().context_length;
    let small = EngineOptions {
        kv_bytes: kv_bytes(&model, 64),
        max_sequences: 1,
        queue: 1,
        ..EngineOptions::default()
    };
    let engine = model.engine(small).unwrap();
    let refused = |prompt: Vec<u32>, options: GenerateOptions| {
        engine.submit(request(&prompt, &options)).err().expect("it is refused").to_string()
    };
    assert!(refused(vec![], options(5)).contains("empty"));
    assert!(refused(vec![1, 5000], options(5)).contains("5000"));
    assert!(refused(vec![1; context + 1], options(5)).contains("context"));
    assert!(
        refused(vec![1; 60], options(6)).contains("65 tokens but the KV cache has room for 64")
    );
    let mut bad = options(5);
    bad.sampling.top_p = 2.0;
    assert!(refused(vec![1], bad).contains("top_p"));

    // The same with no room at all, and with as much as is needed.
    let none = model.engine(EngineOptions { kv_bytes: 0, ..small }).unwrap();
    assert!(matches!(
        none.submit(request(&[1], &options(1))),
        Err(Error::KvBudget { needed: 1, room: 0 })
    ));
    let (tokens, _) = read(&mut engine.submit(request(&[1; 60], &options(5))).unwrap());
    assert_eq!(tokens, alone(&model, &[1; 60], &options(5)).tokens);

    let mut patient = options(60);
    patient.sampling.temperature = 1.0;
    let streams: Vec<TokenStream> = (0..2)
        .map(|_| {
            let mut request = request(&[1], &patient);
            request.buffer = 1;
            engine.submit(request).unwrap()
        })
        .collect();
    assert!(refused(vec![1], options(5)).contains("2 requests"));
    drop(streams);
    idle(&engine);
    engine.submit(request(&[1], &options(5))).unwrap();
}

#[test]
fn whoever_has_read_the_end_finds_a_place() {
    let model = tiny(1);
    let one = EngineOptions { max_sequences: 1, queue: 0, ..EngineOptions::default() };
    let engine = model.engine(one).unwrap();
    for _ in 0..1000 {
        let mut stream = engine.submit(request(&[1], &options(1))).unwrap();
        assert!(read(&mut stream).1.is_ok());
    }
}

#[test]
fn no_tokens_are_generated_where_none_are_asked_for() {
    let engine = tiny(1).engine(EngineOptions::default()).unwrap();
    let (tokens, end) = read(&mut engine.submit(request(&[1, 2], &options(0))).unwrap());
    assert_eq!((tokens.len(), end.unwrap().reason), (0, FinishReason::Length));
}

#[test]
fn a_prompt_that_fills_the_context_has_one_token_after_it() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let context = model.config().context_length;
    for (length, tokens) in [(context, 1), (context - 1, 2)] {
        let request = request(&vec![5; length], &options(4));
        let (found, end) = read(&mut engine.submit(request).unwrap());
        assert_eq!((found.len(), end.unwrap().reason), (tokens, FinishReason::Length));
        assert_eq!(found, alone(&model, &vec![5; length], &options(4)).tokens);
    }
}

#[test]
fn a_prompt_that_fills_the_kv_budget_comes_again_as_often_as_it_is_sent() {
    let model = tiny(1);
    let kv_bytes = kv_bytes(&model, 64);
    let engine = model.engine(EngineOptions { kv_bytes, ..EngineOptions::default() }).unwrap();
    let expected = alone(&model, &[5; 64], &options(1)).tokens;
    for _ in 0..3 {
        let mut request = request(&[5; 64], &options(1));
        // A request that is stuck fails the test instead of hanging it.
        request.deadline = Some(Instant::now() + Duration::from_secs(20));
        let (tokens, end) = read(&mut engine.submit(request).unwrap());
        assert_eq!((&tokens, end.unwrap().reason), (&expected, FinishReason::Length));
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

#[test]
fn if_the_step_thread_dies_nobody_waits_for_ever() {
    let engine = tiny(1).engine(EngineOptions::default()).unwrap();
    let mut other = engine.submit(request(&[4, 5], &options(400))).unwrap();
    let mut unruly = request(&[1, 2, 3], &options(2));
    unruly.processors.push(Box::new(Unruly));
    let mut unruly = engine.submit(unruly).unwrap();
    assert_eq!(read(&mut unruly).0.len(), 2);
    assert!(matches!(read(&mut other).1, Err(Error::EngineStopped { .. })));
    assert!(other.next().is_none());
    let refused = engine.submit(request(&[4, 5], &options(1))).err();
    assert!(matches!(refused, Some(Error::EngineStopped { .. })), "{refused:?}");
    assert!(matches!(engine.statistics(), Err(Error::EngineStopped { .. })));
}

#[test]
fn a_stream_outlives_the_engine_it_came_from() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut stream = engine.submit(request(&[4, 5], &options(200))).unwrap();
    drop(engine);
    assert_eq!(read(&mut stream).0, alone(&model, &[4, 5], &options(200)).tokens);
}
