//! What the engine costs and what it gains: decoded tokens per second of one request over those of
//! the bare decoder, and of many requests at once over those of one; and the time to the first token
//! of a short prompt while a long one is read, and of a prompt that begins like one before.
//! `engine_speed [--model MODEL | --shape SHAPE] [--requests N] [--tokens N] [--long TOKENS]
//! [--prefix TOKENS] [--repetitions N]`

use std::time::Instant;

use bitnet_core::machine::physical_cores;
use bitnet_inference::bench::{Bench, Kind, Test, Weights};
use bitnet_inference::{EngineOptions, Event, KvType, Request, SamplingParams};
use bitnet_model::shapes::Shape;

/// Tokens of a short prompt, and of what follows a shared prefix.
const SHORT: usize = 20;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// The value of a flag.
fn flag(name: &str) -> Option<String> {
    std::env::args().skip_while(|argument| argument != name).nth(1)
}

fn number(name: &str, default: usize) -> usize {
    flag(name).map_or(default, |text| text.parse().expect("a number"))
}

fn main() {
    let (requests, tokens) = (number("--requests", 16), number("--tokens", 200));
    let (long, prefix) = (number("--long", 400), number("--prefix", 400));
    let repetitions = number("--repetitions", 9);
    let weights = match flag("--shape") {
        Some(name) => Weights::of_shape(Shape::named(&name).expect("a known shape"), None),
        None => Weights::of_model(flag("--model").as_deref().unwrap_or("tiny")),
    };
    let weights = weights.expect("weights");
    let bench = Bench::load(&weights, physical_cores(), KvType::F32).expect("a decoder");
    let vocab_size = bench.costs().head_rows as u32;
    let engine = bench
        .engine(EngineOptions { max_sequences: requests, ..EngineOptions::default() })
        .expect("an engine");

    // Prompts that begin with different tokens share no prefix.
    let mut next = 0;
    let mut new_prompt = |length: usize| -> Vec<u32> {
        next += 1;
        (0..length as u32).map(|i| (next + 7 * i) % vocab_size).collect()
    };
    let submit = |prompt: &[u32], tokens: usize| {
        let mut request = Request::new(prompt.to_vec(), SamplingParams::default(), tokens);
        request.buffer = tokens;
        (Instant::now(), engine.submit(request).expect("a place"))
    };
    let decoded = [1, 2, 3, 4];
    // Tokens per second, while all of so many requests decode.
    let through_engine = |count: usize| {
        let streams: Vec<_> = (0..count).map(|_| submit(&decoded, tokens)).collect();
        let mut times: Vec<Vec<Instant>> = Vec::new();
        for (_, mut stream) in streams {
            let mut of_request = Vec::new();
            while let Some(event) = stream.next() {
                if let Event::Token(token) = event.expect("a token") {
                    of_request.push(token.time);
                }
            }
            assert_eq!(of_request.len(), tokens);
            times.push(of_request);
        }
        let start = times.iter().map(|times| times[0]).max().expect("a request");
        let end = times.iter().map(|times| times[tokens - 1]).min().expect("a request");
        let between = times.iter().flatten().filter(|time| (start < **time) && (**time <= end));
        between.count() as f64 / (end - start).as_secs_f64()
    };
    let test = Test { kind: Kind::Decode, tokens, depth: decoded.len(), batch: 1 };
    let mut sequences = bench.sequences(&[test]).expect("a context");
    let mut bare = || {
        let measurements = bench.run(&[test], &mut sequences, 1, None, |_| {}).expect("tokens");
        measurements[0].tokens_per_s().0
    };
    // Milliseconds to the first token.
    let first_token = |prompt: &[u32]| {
        let (start, mut stream) = submit(prompt, 1);
        match stream.next() {
            Some(Ok(Event::Token(token))) => 1e3 * (token.time - start).as_secs_f64(),
            other => panic!("no token but {other:?}"),
        }
    };
    // Returns between the steps.
    let computed = || engine.statistics().expect("an engine").computed_tokens;

    let (mut overhead, mut gain) = (Vec::new(), Vec::new());
    let (mut single, mut many) = (Vec::new(), Vec::new());
    let (mut idle, mut busy, mut delay) = (Vec::new(), Vec::new(), Vec::new());
    let (mut first, mut second, mut saved) = (Vec::new(), Vec::new(), Vec::new());
    through_engine(requests);
    for _ in 0..repetitions {
        let (bare, one, all) = (bare(), through_engine(1), through_engine(requests));
        overhead.push(one / bare);
        gain.push(all / one);
        single.push(one);
        many.push(all);

        let alone = first_token(&new_prompt(SHORT));
        let before = computed();
        let (_, reading) = submit(&new_prompt(long), 1);
        while computed() == before {}
        let beside = first_token(&new_prompt(SHORT));
        drop(reading);
        idle.push(alone);
        busy.push(beside);
        delay.push(beside / alone);

        let shared = new_prompt(prefix);
        let mut after_prefix = || first_token(&[&shared[..], &new_prompt(SHORT)].concat());
        let (cold, warm) = (after_prefix(), after_prefix());
        first.push(cold);
        second.push(warm);
        saved.push(warm / cold);
    }
    println!("{}, {} threads, medians of {repetitions}", bench.backend_name(), physical_cores());
    println!("one request through the engine over the bare decoder: {:.3}", median(overhead));
    println!("one request: {:.1} tokens/s", median(single));
    println!(
        "{requests} requests: {:.1} tokens/s, {:.2} times as many",
        median(many),
        median(gain)
    );
    println!("first token after {SHORT} tokens, in ms: {:.2}", median(idle));
    println!(
        "the same while {long} tokens of another are read: {:.2}, {:.2} times as long",
        median(busy),
        median(delay)
    );
    println!("first token after {prefix} and {SHORT} tokens: {:.2}", median(first));
    println!(
        "after the same {prefix} and {SHORT} others: {:.2}, {:.4} of it",
        median(second),
        median(saved)
    );
}
