//! What speculation gains and what it costs: tokens per second with guesses over those without, one
//! request at a time and many at once, for a text that repeats itself and for one that does not. A
//! draft model is measured where one is named.
//! `speculation_speed [MODEL [TOKENS [REQUESTS [DRAFT MODEL]]]]`

use std::time::Instant;

use bitnet_inference::{
    Engine, EngineOptions, Event, Model, ModelOptions, Request, SamplingParams, Speculation,
};
use bitnet_model::tokenizer::Special;

const REPETITIONS: usize = 9;

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds that the requests take at once, and the guesses made for them and accepted.
fn run(engine: &Engine, requests: &[Request]) -> (f64, [usize; 2]) {
    let start = Instant::now();
    let again = |request: &Request| Request {
        speculation: request.speculation,
        buffer: request.max_tokens,
        ..Request::new(request.prompt.clone(), request.sampling.clone(), request.max_tokens)
    };
    let streams: Vec<_> =
        requests.iter().map(|request| engine.submit(again(request)).expect("a place")).collect();
    let mut counts = [0; 2];
    for mut stream in streams {
        while let Some(event) = stream.next() {
            if let Event::Finished(finish) = event.expect("a token") {
                counts[0] += finish.usage.proposed_tokens;
                counts[1] += finish.usage.accepted_tokens;
            }
        }
    }
    (start.elapsed().as_secs_f64(), counts)
}

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first().map_or("tiny", String::as_str);
    let number = |index: usize, default| {
        arguments.get(index).map_or(default, |text: &String| text.parse().expect("a number"))
    };
    let (tokens, many) = (number(1, 400), number(2, 8));
    let model = Model::open(name, &ModelOptions::default()).expect("a model");
    let draft = arguments
        .get(3)
        .map(|name| Model::open(name, &ModelOptions::default()).expect("a draft model"));
    let engine = match &draft {
        Some(draft) => model.engine_with_draft(draft, EngineOptions::default()),
        None => model.engine(EngineOptions::default()),
    };
    let engine = engine.expect("an engine");

    let mut ways = vec![Speculation::prompt_lookup()];
    ways.extend(draft.as_ref().map(|_| Speculation::draft_model()));
    let greedy = SamplingParams::default();
    let sampled = SamplingParams { temperature: 1.0, ..greedy.clone() };
    let text = "Once upon a time there was a little";
    let prompt = model.tokenizer().encode(text, true, Special::Recognised).expect("tokens");
    println!("{}, medians of {REPETITIONS}", model.backend_name());
    for (text, sampling) in [("repeats itself", greedy), ("does not", sampled)] {
        for count in [1, many] {
            let requests = |speculation| -> Vec<Request> {
                let request = |seed| Request {
                    speculation,
                    ..Request::new(
                        prompt.clone(),
                        SamplingParams { seed, ..sampling.clone() },
                        tokens,
                    )
                };
                (0..count as u64).map(request).collect()
            };
            for way in &ways {
                let (plain, guessing) = (requests(None), requests(Some(*way)));
                run(&engine, &plain);
                let (_, [proposed, accepted]) = run(&engine, &guessing);
                let (mut ratios, mut rates) = (Vec::new(), Vec::new());
                for _ in 0..REPETITIONS {
                    let (without, _) = run(&engine, &plain);
                    let (with, _) = run(&engine, &guessing);
                    ratios.push(without / with);
                    rates.push((count * tokens) as f64 / with);
                }
                println!(
                    "{count} x {tokens} tokens of a text that {text}, {:?}: {:.0} tokens/s, {:.3} of the \
                     speed without; {accepted} of {proposed} guesses were right",
                    way.proposer,
                    median(rates),
                    median(ratios),
                );
            }
        }
    }
}
