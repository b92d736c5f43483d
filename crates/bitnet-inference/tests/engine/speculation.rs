//! Tokens that are guessed: by the text so far, and by a smaller model.

use super::*;

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
