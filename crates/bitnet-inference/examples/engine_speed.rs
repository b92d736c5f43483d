//! What the engine costs and what it gains: tokens per second of one request over those of the bare
//! loop, and of many requests at once over those of one; and the time to the first token of a
//! short prompt while a long one is read, and of a long prompt that was read before.
//! `engine_speed [MODEL [REQUESTS [TOKENS [LONG PROMPT]]]]`

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::Instant;

use bitnet_inference::{
    EngineOptions, Event, GenerateOptions, Model, ModelOptions, Request, SamplingParams,
    SessionOptions, generate,
};

const REPETITIONS: usize = 9;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first().map_or("tiny", String::as_str);
    let number = |index: usize, default| {
        arguments.get(index).map_or(default, |text: &String| text.parse().expect("a number"))
    };
    let (requests, tokens, long) = (number(1, 16), number(2, 200), number(3, 400));
    let model = Model::open(name, &ModelOptions::default()).expect("a model");
    let engine = model
        .engine(EngineOptions { max_sequences: requests, ..EngineOptions::default() })
        .expect("an engine");
    let options = GenerateOptions {
        sampling: SamplingParams::default(),
        max_tokens: tokens,
        stop: Vec::new(),
        end_ids: BTreeSet::new(),
        constraint: None,
    };
    let prompt = [1, 2, 3, 4];
    let through_engine = |count: usize| {
        let start = Instant::now();
        let streams: Vec<_> = (0..count)
            .map(|_| {
                let mut request = Request::new(prompt.to_vec(), options.sampling.clone(), tokens);
                request.buffer = tokens;
                engine.submit(request).expect("a place")
            })
            .collect();
        for mut stream in streams {
            while let Some(event) = stream.next() {
                if let Event::Finished(finish) = event.expect("a token") {
                    assert_eq!(finish.usage.output_tokens, tokens);
                }
            }
        }
        (count * tokens) as f64 / start.elapsed().as_secs_f64()
    };
    let bare = || {
        let start = Instant::now();
        let mut session = model.session(SessionOptions::default()).expect("a session");
        let show = |_: &str| ControlFlow::Continue(());
        let generation = generate(&mut session, model.tokenizer(), &prompt, &options, show);
        assert_eq!(generation.expect("a text").tokens.len(), tokens);
        tokens as f64 / start.elapsed().as_secs_f64()
    };

    // Prompts that begin with different tokens share no prefix.
    let mut next = 0;
    let mut new_prompt = |length: usize| -> Vec<u32> {
        next += 1;
        (0..length as u32).map(|i| (next + 7 * i) % model.vocab_size() as u32).collect()
    };
    let submit = |prompt: &[u32]| {
        let request = Request::new(prompt.to_vec(), options.sampling.clone(), 4);
        (Instant::now(), engine.submit(request).expect("a place"))
    };
    // Milliseconds to the first token.
    let first_token = |prompt: &[u32]| {
        let (start, mut stream) = submit(prompt);
        match stream.next() {
            Some(Ok(Event::Token(token))) => 1e3 * (token.time - start).as_secs_f64(),
            other => panic!("no token but {other:?}"),
        }
    };

    let (mut overhead, mut gain, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    let (mut idle, mut busy) = (Vec::new(), Vec::new());
    let (mut cold, mut warm) = (Vec::new(), Vec::new());
    bare();
    through_engine(requests);
    for _ in 0..REPETITIONS {
        let (bare, one, many) = (bare(), through_engine(1), through_engine(requests));
        overhead.push(one / bare);
        gain.push(many / one);
        rates.push(many);
        idle.push(first_token(&new_prompt(20)));
        let (_, reading) = submit(&new_prompt(long));
        busy.push(first_token(&new_prompt(20)));
        drop(reading);
        let prompt = new_prompt(long);
        cold.push(first_token(&prompt));
        warm.push(first_token(&prompt));
    }
    println!("{}, medians of {REPETITIONS}", model.backend_name());
    println!("one request through the engine over the bare loop: {:.3}", median(overhead));
    println!("{requests} requests over one: {:.2}", median(gain));
    println!("{requests} requests: {:.0} tokens/s", median(rates));
    println!("first token after 20 tokens, in ms: {:.2}", median(idle));
    println!("the same while {long} tokens of another are read: {:.2}", median(busy));
    println!("first token after {long} tokens: {:.2}", median(cold));
    println!("the same for the second time: {:.2}", median(warm));
}
