//! Hundreds of random requests at once, with every shortcut and without.

use super::*;

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
