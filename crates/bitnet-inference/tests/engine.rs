//! Many requests at once get what each of them gets alone.

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

/// A text of the built-in model that begins to repeat itself.
fn repetitive(model: &Model) -> Vec<u32> {
    alone(model, &[1, 2, 3], &options(200)).tokens
}

fn cases(model: &Model, count: usize, random: &mut Random) -> Vec<Case> {
    let context = model.config().context_length;
    let vocab_size = model.vocab_size();
    let repetitive = repetitive(model);
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
                1..=3 => prompt = repetitive[..1 + random.below(repetitive.len())].to_vec(),
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

fn submit(engine: &Engine, case: &Case, speculation: Option<Speculation>) -> TokenStream {
    let mut request = request(&case.prompt, &case.options);
    request.speculation = speculation;
    request.priority = case.priority;
    request.client = case.client;
    request.buffer = case.buffer;
    engine.submit(request).unwrap()
}

/// Reads the events of a case and compares them, or goes away when the case says so.
fn check(case: &Case, mut stream: TokenStream) -> Option<Usage> {
    let expected = &case.expected;
    for read in 0.. {
        if case.cancel_after == Some(read) {
            return None;
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
                assert!(usage.accepted_tokens <= usage.proposed_tokens.min(read), "{usage:?}");
                assert!(usage.proposed_tokens == 0 || case.options.constraint.is_none());
                return Some(usage);
            }
        }
    }
    unreachable!("an end comes")
}

/// Requests and what each gets alone, without shortcuts.
fn two_hundred_cases() -> &'static [Case] {
    static CASES: OnceLock<Vec<Case>> = OnceLock::new();
    CASES.get_or_init(|| cases(&open(1, Shortcuts::NONE), 200, &mut Random::new(20)))
}

/// Little room for what 200 cases need, so many bytes for each replica, and so much to do for the
/// schedulers.
fn tight(replicas: usize, kv_bytes: u64, random: &mut Random) -> EngineOptions {
    EngineOptions {
        replicas,
        max_sequences: 8,
        step_tokens: 32 + random.below(100),
        queue: 60,
        kv_bytes: replicas as u64 * kv_bytes,
        ..EngineOptions::default()
    }
}

/// Submits the cases and compares what each gets with what it gets alone. Returns what those took that
/// came to their end.
fn run(
    engine: &Engine,
    cases: &[Case],
    random: &mut Random,
    speculation: impl Fn(&mut Random) -> Option<Speculation>,
) -> (EngineStatistics, Vec<(Option<Speculation>, Usage)>) {
    let (mut streams, mut usages) = (Vec::new(), Vec::new());
    let mut cases = cases.iter();
    loop {
        let case = cases.next();
        if let Some(case) = case {
            let speculation = speculation(random);
            streams.push((case, speculation, submit(engine, case, speculation)));
        }
        // Many wait; those whose turn to be read comes late fill their rings and pause.
        while streams.len() > if case.is_some() { 60 } else { 0 } {
            let (case, speculation, stream) = streams.swap_remove(random.below(streams.len()));
            usages.extend(check(case, stream).map(|usage| (speculation, usage)));
        }
        if case.is_none() {
            return (idle(engine), usages);
        }
    }
}

#[test]
fn random_requests_get_the_tokens_they_get_alone() {
    let random = &mut Random::new(21);
    let cases = two_hundred_cases();
    let reasons: Vec<FinishReason> = cases.iter().map(|c| c.expected.finish_reason).collect();
    assert!(reasons.contains(&FinishReason::Stop) && reasons.contains(&FinishReason::Length));
    let constrained = cases.iter().filter(|case| case.options.constraint.is_some()).count();
    assert!(constrained > 40, "{constrained}");
    for (threads, replicas, stages) in [(1, 1, 1), (2, 1, 1), (1, 3, 1), (1, 1, 2), (2, 2, 3)] {
        for prefix_reuse in [false, true] {
            let shortcuts = Shortcuts { prefix: prefix_reuse, ..Shortcuts::ALL };
            let model = open_from("tiny", stages, threads, shortcuts);
            assert_eq!(model.stages().len(), stages);
            // A little more than the longest request needs, for each replica.
            let mut options = tight(replicas, kv_bytes(&model, 700), random);
            if threads == 2 {
                options.policy = SchedulerPolicy::Fifo;
                // No step reaches it, so that prompts get little of each.
                options.target_step_time = Some(Duration::ZERO);
            }
            let engine = model.engine(options).unwrap();
            let (statistics, _) = run(&engine, cases, random, |_| None);
            println!(
                "{replicas} replicas of {threads} threads in {stages} stages, prefix reuse \
                 {prefix_reuse}: {statistics:?}"
            );
            assert!(statistics.preemptions > 20, "{statistics:?}");
            assert_eq!(statistics.kv.reused_tokens > 1000, prefix_reuse, "{statistics:?}");
            assert_eq!(statistics.kv.evicted_blocks > 100, prefix_reuse, "{statistics:?}");
            assert_eq!(statistics.kv.copied_blocks > 0, prefix_reuse, "{statistics:?}");
            assert_eq!(statistics.proposed_tokens, 0);
            assert!(model.shortcut_counts().head_rows > 0, "some rows are screened");
        }
    }
}

#[test]
fn random_requests_whose_tokens_are_guessed_get_the_tokens_they_get_alone() {
    let random = &mut Random::new(22);
    let cases = two_hundred_cases();
    let proposers = [Proposer::PromptLookup, Proposer::DraftModel];
    // How many guesses there is room for depends on what meets in a step, and so on time.
    let mut totals = [(0, 0); 2];
    for (threads, replicas, stages) in [(1, 1, 1), (2, 1, 1), (1, 3, 2)] {
        for prefix_reuse in [false, true] {
            let shortcuts = Shortcuts { prefix: prefix_reuse, ..Shortcuts::ALL };
            let model = open_from("tiny", stages, threads, shortcuts);
            // The same tokens fit for both models.
            let options = tight(replicas, 2 * kv_bytes(&model, 700), random);
            let engine = model.engine_with_draft(&tiny_draft(threads), options).unwrap();
            let (statistics, usages) = run(&engine, cases, random, |random| {
                let proposer = proposers[random.below(2)];
                let tokens = 1 + random.below(16);
                (random.below(8) > 0).then_some(Speculation { proposer, tokens })
            });
            println!(
                "{replicas} replicas of {threads} threads in {stages} stages, prefix reuse \
                 {prefix_reuse}: {statistics:?}"
            );
            assert!(statistics.preemptions > 20, "{statistics:?}");
            assert_eq!(statistics.kv.reused_tokens > 1000, prefix_reuse, "{statistics:?}");
            assert!(model.shortcut_counts().head_rows > 0, "some rows are screened");
            for (proposer, total) in proposers.into_iter().zip(&mut totals) {
                let by = |speculation: &Option<Speculation>| {
                    speculation.is_some_and(|speculation| speculation.proposer == proposer)
                };
                let usages = usages.iter().filter(|(speculation, _)| by(speculation));
                let (proposed, accepted) = usages.fold((0, 0), |(proposed, accepted), (_, u)| {
                    (proposed + u.proposed_tokens, accepted + u.accepted_tokens)
                });
                println!("{proposer:?}: {accepted} of {proposed} were right");
                *total = (total.0 + proposed, total.1 + accepted);
            }
        }
    }
    for (proposed, accepted) in totals {
        assert!(accepted > 20 && proposed - accepted > 20, "{totals:?}");
    }
}

/// What a request gets whose tokens are guessed.
fn guessed(
    engine: &Engine,
    prompt: &[u32],
    options: &GenerateOptions,
    speculation: Speculation,
) -> (Vec<u32>, Finish) {
    let mut request = request(prompt, options);
    request.speculation = Some(speculation);
    let (tokens, finish) = read(&mut engine.submit(request).unwrap());
    (tokens, finish.unwrap())
}

#[test]
fn a_model_that_is_its_own_draft_is_always_right() {
    let model = tiny(1);
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    let ways = [
        SamplingParams::default(),
        SamplingParams { temperature: 1.0, seed: 3, ..SamplingParams::default() },
        SamplingParams { temperature: 0.9, top_k: 30, seed: 4, ..SamplingParams::default() },
        SamplingParams {
            repetition_penalty: 1.2,
            presence_penalty: 0.4,
            repeat_last_n: Some(20),
            logprobs: Some(1),
            ..SamplingParams::default()
        },
    ];
    for (index, sampling) in ways.into_iter().enumerate() {
        let options = GenerateOptions { sampling, ..options(61) };
        // Longer than a step, so that the draft model needs more than one to read it.
        let prompt: Vec<u32> = (0..300).map(|i| (7 * i + index as u32) % 2000).collect();
        let before = engine.statistics().unwrap().steps;
        let (tokens, finish) = guessed(&engine, &prompt, &options, Speculation::draft_model());
        assert_eq!(tokens, alone(&model, &prompt, &options).tokens);
        let Finish { usage, .. } = finish;
        assert_eq!(usage.accepted_tokens, usage.proposed_tokens, "{usage:?}");
        // Five tokens in most steps.
        assert!(usage.accepted_tokens > 40, "{usage:?}");
        let steps = (engine.statistics().unwrap().steps - before) as usize;
        assert_eq!(steps, 300usize.div_ceil(128) + 60 - usage.accepted_tokens);
    }
}

#[test]
fn a_draft_model_that_was_wrong_goes_on_from_what_came() {
    let model = tiny(1);
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    let mut request = request(&[1, 2, 3], &options(80));
    request.speculation = Some(Speculation::draft_model());
    // Tokens that it does not expect.
    let surprises = [10, 30, 50, 70];
    request.processors.push(Box::new(
        move |_: &[u32], output_tokens: usize, logits: &mut [f32]| {
            if surprises.contains(&output_tokens) {
                logits[1000] = 1e9;
            }
        },
    ));
    let usage = read(&mut engine.submit(request).unwrap()).1.unwrap().usage;
    // Those that were guessed for a surprise and after it, and no more.
    let rejected = usage.proposed_tokens - usage.accepted_tokens;
    assert!((1..=4 * surprises.len()).contains(&rejected), "{usage:?}");
    assert!(usage.accepted_tokens > 30, "{usage:?}");
}

#[test]
fn a_token_that_ends_the_output_ends_it_among_accepted_ones_too() {
    let model = tiny(1);
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    let sampling = SamplingParams { temperature: 1.0, seed: 8, ..SamplingParams::default() };
    let mut options = GenerateOptions { sampling, ..options(40) };
    let expected = alone(&model, &[1, 2, 3], &options).tokens;
    let draft = Speculation { proposer: Proposer::DraftModel, tokens: 16 };
    for length in 0..40 {
        options.max_tokens = length;
        let (tokens, finish) = guessed(&engine, &[1, 2, 3], &options, draft);
        assert_eq!((&tokens[..], finish.reason), (&expected[..length], FinishReason::Length));
        options.max_tokens = 40;
        options.end_ids = BTreeSet::from([expected[length]]);
        let (tokens, finish) = guessed(&engine, &[1, 2, 3], &options, draft);
        let end = expected.iter().position(|token| *token == expected[length]).unwrap();
        assert_eq!((&tokens[..], finish.reason), (&expected[..end], FinishReason::Stop));
        options.end_ids.clear();
    }
    assert!(idle(&engine).accepted_tokens > 500);
}

#[test]
fn guesses_do_not_change_what_logits_processors_see() {
    let model = tiny(1);
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    let run = |speculation| {
        let seen = Arc::new(Mutex::new(Vec::new()));
        let mut request = request(&[1, 2, 3], &options(60));
        request.speculation = speculation;
        let log = Arc::clone(&seen);
        request.processors.push(Box::new(
            move |tokens: &[u32], output_tokens: usize, logits: &mut [f32]| {
                log.lock().unwrap().push((tokens.to_vec(), output_tokens, logits.to_vec()));
                // At first what the sequence expects and no draft model, then the other way round.
                if output_tokens < 34 {
                    logits[100 + output_tokens % 6] = 1e9;
                }
            },
        ));
        let (tokens, finish) = read(&mut engine.submit(request).unwrap());
        let usage = finish.unwrap().usage;
        (tokens, std::mem::take(&mut *seen.lock().unwrap()), usage)
    };
    let (tokens, seen, _) = run(None);
    for speculation in [Speculation::prompt_lookup(), Speculation::draft_model()] {
        let (same_tokens, same_seen, usage) = run(Some(speculation));
        assert!(same_tokens == tokens && same_seen == seen);
        assert!(usage.accepted_tokens > 0, "{usage:?}");
        assert!(usage.accepted_tokens < usage.proposed_tokens, "{usage:?}");
    }
}

#[test]
fn a_full_ring_is_no_place_for_accepted_tokens() {
    let model = tiny(1);
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    let mut slow = request(&[1, 2, 3], &options(100));
    slow.speculation = Some(Speculation::draft_model());
    slow.buffer = 7;
    let mut slow = engine.submit(slow).unwrap();
    while engine.statistics().unwrap().output_tokens < 7 {
        std::thread::yield_now();
    }
    assert_eq!(engine.statistics().unwrap().output_tokens, 7);
    assert_eq!(read(&mut slow).0, alone(&model, &[1, 2, 3], &options(100)).tokens);
}

#[test]
fn a_draft_model_with_a_shorter_context_guesses_up_to_its_end() {
    let context = |tokens: &str| format!("\"max_position_embeddings\": {tokens}");
    let draft = altered(1, "config.json", &context("512"), &context("40"));
    let model = tiny(1);
    let engine = model.engine_with_draft(&draft, EngineOptions::default()).unwrap();
    let speculation = Speculation::draft_model();
    let (tokens, finish) = guessed(&engine, &[1, 2, 3], &options(100), speculation);
    assert_eq!(tokens, alone(&model, &[1, 2, 3], &options(100)).tokens);
    // All 38 guesses after 3 tokens, but for the first token of each step.
    let Finish { usage, .. } = finish;
    assert!((25..=38).contains(&usage.accepted_tokens), "{usage:?}");
    assert_eq!(usage.accepted_tokens, usage.proposed_tokens);
    let (tokens, finish) = guessed(&engine, &[5; 41], &options(9), speculation);
    assert_eq!(tokens, alone(&model, &[5; 41], &options(9)).tokens);
    assert_eq!(finish.usage.proposed_tokens, 0);
}

#[test]
fn without_the_shortcut_nothing_is_guessed() {
    let model = open(1, Shortcuts { speculation: false, ..Shortcuts::ALL });
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    for speculation in [Speculation::prompt_lookup(), Speculation::draft_model()] {
        let (tokens, finish) = guessed(&engine, &[1, 2, 3], &options(60), speculation);
        assert_eq!(tokens, alone(&model, &[1, 2, 3], &options(60)).tokens);
        assert_eq!(finish.usage.proposed_tokens, 0);
    }
}

#[test]
fn nothing_is_guessed_for_a_constrained_request() {
    let model = tiny(1);
    let engine = model.engine_with_draft(&tiny(1), EngineOptions::default()).unwrap();
    let constraint = Some(Constraint::Regex("(and then ){20}".to_owned()));
    let options = GenerateOptions { constraint, ..options(60) };
    let expected = alone(&model, &[1, 2, 3], &options).tokens;
    for speculation in [Speculation::prompt_lookup(), Speculation::draft_model()] {
        let (tokens, finish) = guessed(&engine, &[1, 2, 3], &options, speculation);
        assert_eq!(tokens, expected);
        assert_eq!(finish.usage.proposed_tokens, 0);
    }
    let mut request = request(&[1, 2, 3], &options);
    request.speculation = Some(Speculation { tokens: 0, ..Speculation::prompt_lookup() });
    assert!(matches!(engine.submit(request).err(), Some(Error::Parameter(_))));
}

#[test]
fn guesses_that_nobody_can_make_are_refused_with_the_reason() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let refused = |proposer, tokens| {
        let mut request = request(&[1, 2, 3], &options(5));
        request.speculation = Some(Speculation { proposer, tokens });
        engine.submit(request).err().expect("it is refused")
    };
    for tokens in [0, 17] {
        let error = refused(Proposer::PromptLookup, tokens).to_string();
        assert!(error.contains(&format!("guessed per step is {tokens}; give 1 to 16")), "{error}");
    }
    assert!(matches!(refused(Proposer::DraftModel, 4), Error::NoDraftModel));

    let refused = |draft: &Model| {
        let engine = model.engine_with_draft(draft, EngineOptions::default());
        engine.err().expect("it is refused").to_string()
    };
    let token = "<|reserved_special_token_0|>";
    let other = altered(1, "tokenizer.json", token, "<|another|>");
    assert!(refused(&other).contains("in which token 2038 is another"), "{}", refused(&other));
    for (name, reason) in
        [("bitnet-1bitllm", "2048 tokens and not 1024"), ("qwen3-embedding", "embeddings")]
    {
        let path = golden(name).expect("it is in this repository");
        let draft = open_from(path.to_str().unwrap(), 1, 1, Shortcuts::ALL);
        assert!(refused(&draft).contains(reason), "{}", refused(&draft));
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

#[test]
fn replicas_share_the_requests_and_the_limit() {
    let model = tiny(1);
    let options = EngineOptions {
        replicas: 2,
        max_sequences: 1,
        queue: 1,
        kv_bytes: kv_bytes(&model, 128),
        ..EngineOptions::default()
    };
    let engine = model.engine(options).unwrap();
    assert_eq!(engine.statistics().unwrap().kv.blocks, 2 * 4);
    // Each replica has half of the keys and values, and a request is on one of them.
    assert!(matches!(
        engine.submit(request(&[1; 60], &self::options(6))),
        Err(Error::KvBudget { needed: 65, room: 64 })
    ));
    let paused = || {
        let mut request = request(&[1, 2], &self::options(60));
        request.buffer = 1;
        engine.submit(request).unwrap()
    };
    let streams = [paused(), paused(), paused()];
    let refused = engine.submit(request(&[1], &self::options(5))).err();
    assert!(matches!(refused, Some(Error::QueueFull(full)) if full.limit == 3), "{refused:?}");
    // Both run one at once, and nobody waits behind a request while a replica is free.
    let end = Instant::now() + Duration::from_secs(60);
    while engine.statistics().unwrap().running < 2 {
        assert!(Instant::now() < end, "{:?}", engine.statistics());
        std::thread::yield_now();
    }
    let expected = alone(&model, &[1, 2], &self::options(60)).tokens;
    for mut stream in streams {
        assert_eq!(read(&mut stream).0, expected);
    }
    idle(&engine);
}

#[test]
fn if_one_replica_dies_the_others_go_on() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions { replicas: 2, ..EngineOptions::default() }).unwrap();
    let mut unruly = request(&[1, 2, 3], &options(2));
    unruly.processors.push(Box::new(Unruly));
    let mut unruly = engine.submit(unruly).unwrap();
    let mut other = engine.submit(request(&[4, 5], &options(400))).unwrap();
    assert_eq!(read(&mut unruly).0.len(), 2);
    assert_eq!(read(&mut other).0, alone(&model, &[4, 5], &options(400)).tokens);
    let end = Instant::now() + Duration::from_secs(60);
    while engine.statistics().is_ok() {
        assert!(Instant::now() < end, "the thread has panicked");
        std::thread::yield_now();
    }
    // The thread ends a little later than its mailbox.
    let served = |_| match engine.submit(request(&[4, 5], &options(3))) {
        Ok(mut stream) => read(&mut stream).1.is_ok(),
        Err(error) => {
            assert!(matches!(error, Error::EngineStopped { .. }), "{error}");
            assert!(Instant::now() < end, "nobody serves");
            false
        }
    };
    assert!((0..).any(served));
}

#[test]
fn replicas_end_with_their_engine() {
    let engine = tiny(2).engine(EngineOptions { replicas: 3, ..EngineOptions::default() }).unwrap();
    let streams: Vec<_> =
        (0..6).map(|_| engine.submit(request(&[4, 5], &options(50))).unwrap()).collect();
    drop(engine);
    drop(streams);
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

/// The built-in model with a context of 64 tokens.
fn short_context() -> Model {
    let context = |tokens: usize| format!("\"max_position_embeddings\": {tokens}");
    altered(1, "config.json", &context(512), &context(64))
}

/// What a request gets whose context of 64 tokens drops its older half again and again, and how many
/// tokens are dropped: whenever it is full, what was kept is read as a new prompt.
fn sliding(
    model: &Model,
    prompt: &[u32],
    options: &GenerateOptions,
    keep_first: usize,
) -> (Vec<u32>, usize) {
    let mut sampler = Sampler::new(&options.sampling).unwrap();
    let (mut tokens, mut output, mut dropped) = (prompt.to_vec(), Vec::new(), 0);
    let mut logits = Vec::new();
    let mut session = None;
    while output.len() < options.max_tokens {
        while tokens.len() > 64 {
            let oldest = (tokens.len() - keep_first).div_ceil(2);
            tokens.drain(keep_first..keep_first + oldest);
            dropped += oldest;
            session = None;
        }
        match &mut session {
            None => {
                let new = session.insert(model.session(SessionOptions::default()).unwrap());
                new.feed(&tokens, &mut logits).unwrap();
            }
            Some(session) => session.feed(&tokens[tokens.len() - 1..], &mut logits).unwrap(),
        }
        let sampled = sampler.sample(&logits, &tokens, output.len() as u64).unwrap();
        tokens.push(sampled.token);
        output.push(sampled.token);
    }
    (output, dropped)
}

#[test]
fn a_conversation_past_the_context_goes_on_from_what_is_kept() {
    let model = short_context();
    let two = EngineOptions { kv_bytes: 2 * kv_bytes(&model, 64), ..EngineOptions::default() };
    let engine = model.engine_with_draft(&short_context(), two).unwrap();
    let mut streams = Vec::new();
    for index in 0..24 {
        let keep_first = [0, 4, 16, 32][index % 4];
        let sampling = SamplingParams {
            temperature: [0.0, 1.0][index / 4 % 2],
            repetition_penalty: [1.0, 1.2][index % 2],
            seed: index as u64,
            ..SamplingParams::default()
        };
        let options = GenerateOptions { sampling, ..options(200) };
        // The last ones are too long from the beginning.
        let prompt: Vec<u32> = (0..1 + 9 * index as u32).map(|i| i * 7 % 2000).collect();
        let expected = sliding(&model, &prompt, &options, keep_first);
        let mut request = request(&prompt, &options);
        request.overflow = Overflow::DropOldest { keep_first };
        request.buffer = 1000;
        request.speculation =
            [None, Some(Speculation::prompt_lookup()), Some(Speculation::draft_model())][index % 3];
        streams.push((prompt.len(), expected, engine.submit(request).unwrap()));
    }
    for (prompt_tokens, (tokens, dropped), mut stream) in streams {
        let (found, finish) = read(&mut stream);
        assert_eq!(found, tokens);
        let Finish { usage, reason } = finish.unwrap();
        assert_eq!((usage.prompt_tokens, usage.dropped_tokens), (prompt_tokens, dropped));
        assert_eq!((usage.output_tokens, reason), (200, FinishReason::Length));
        assert!(dropped > 0);
    }
    let statistics = idle(&engine);
    assert!(statistics.preemptions > 0 && statistics.accepted_tokens > 0, "{statistics:?}");
}

#[test]
fn what_follows_a_cut_is_what_a_fresh_request_for_the_rest_gets() {
    let model = short_context();
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut long = request(&[1, 2, 3, 4], &options(100));
    long.overflow = Overflow::DropOldest { keep_first: 3 };
    let (tokens, finish) = read(&mut engine.submit(long).unwrap());
    // 65 tokens are known when the context is full. 31 of them are dropped, and 34 are kept.
    let kept = [&[1, 2, 3], &tokens[30..61]].concat();
    let (fresh, _) = read(&mut engine.submit(request(&kept, &options(31))).unwrap());
    assert_eq!(fresh, tokens[61..92]);
    assert_eq!(finish.unwrap().usage.dropped_tokens, 2 * 31);
    // Unless it is asked for, the end of the context is the end.
    let (stopped, finish) =
        read(&mut engine.submit(request(&[1, 2, 3, 4], &options(100))).unwrap());
    assert_eq!(stopped, tokens[..61]);
    assert_eq!(finish.unwrap().reason, FinishReason::Length);

    let mut refused = request(&[1], &options(5));
    refused.overflow = Overflow::DropOldest { keep_first: 33 };
    let error = engine.submit(refused).err().unwrap().to_string();
    assert!(error.contains("33") && error.contains("at most half of the context"), "{error}");
}

#[test]
fn more_sequences_than_are_screened_together_get_their_tokens() {
    let model = tiny(1);
    let options = EngineOptions { max_sequences: 150, ..EngineOptions::default() };
    let engine = model.engine(options).unwrap();
    let streams: Vec<(Vec<u32>, TokenStream)> = (0..150)
        .map(|index| {
            let prompt = vec![index, 7];
            let mut request = request(&prompt, &self::options(5));
            request.speculation = (index % 2 == 0).then(Speculation::prompt_lookup);
            (prompt, engine.submit(request).unwrap())
        })
        .collect();
    for (prompt, mut stream) in streams {
        assert_eq!(read(&mut stream).0, alone(&model, &prompt, &self::options(5)).tokens);
    }
}

#[test]
fn whoever_drops_the_last_stream_does_not_wait_for_the_step() {
    let engine = tiny(1).engine(EngineOptions::default()).unwrap();
    let (in_step, step_begun) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    let mut slow = request(&[1, 2, 3], &options(50));
    slow.processors.push(Box::new(move |_: &[u32], _: usize, _: &mut [f32]| {
        let _ = in_step.send(());
        let _ = may_go_on.recv();
    }));
    let stream = engine.submit(slow).unwrap();
    drop(engine);
    step_begun.recv().unwrap();
    let (dropped, is_dropped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(stream);
        dropped.send(()).unwrap();
    });
    assert!(is_dropped.recv_timeout(Duration::from_secs(60)).is_ok(), "it waits for the step");
    drop(go_on);
    // The thread ends, and with it the processor.
    while step_begun.recv().is_ok() {}
}
