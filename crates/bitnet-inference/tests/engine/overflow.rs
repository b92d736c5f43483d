//! Outputs past the end of the context.

use super::*;

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
