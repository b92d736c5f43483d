//! Constrained outputs: they are what the constraint says, and the same in an engine as alone.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::time::{Duration, Instant};

use bitnet_inference::{
    Constraint, ConstraintError, Device, Engine, EngineOptions, Error, Event, Finish, FinishReason,
    GenerateOptions, Generation, GenerationParams, InferenceEngine, Model, ModelOptions, Request,
    SamplingParams, SessionOptions, TokenStream, generate,
};
use bitnet_model::tokenizer::Special;
use bitnet_testing::{golden, tiny_model};
use regex::Regex;
use serde_json::Value;

const SCHEMA: &str = r##"{
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 8},
        "größe 🙂": {"enum": ["klein", "groß", "🐉 dragon", null, 7, true]},
        "age": {"type": "integer", "minimum": -3, "maximum": 120},
        "weight": {"type": "number", "minimum": 0, "maximum": 2.5, "multipleOf": 0.25},
        "tags": {
            "type": "array", "minItems": 1, "maxItems": 3,
            "items": {"type": "string", "pattern": "^[a-zé€]{2,4}$"}
        },
        "child": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/toy"}]}
    },
    "required": ["name", "größe 🙂", "age", "tags", "child"],
    "additionalProperties": false,
    "$defs": {
        "toy": {
            "type": "object",
            "properties": {"soft": {"type": "boolean"}, "prices": {
                "type": "array", "maxItems": 2, "items": {"type": "array", "maxItems": 2,
                "items": {"type": "integer", "minimum": 0, "maximum": 99}}
            }},
            "required": ["soft", "prices"],
            "additionalProperties": false
        }
    },
    "x-guidance": {"whitespace_flexible": false}
}"##;

/// Whether a text is what [`SCHEMA`] describes, in plain words.
fn fits_schema(text: &str) -> bool {
    let Ok(Value::Object(object)) = serde_json::from_str::<Value>(text) else { return false };
    let length = |value: &Value, least, most| {
        value.as_str().is_some_and(|text| (least..=most).contains(&text.chars().count()))
    };
    let list = |value: &Value, least: usize, most, each: &dyn Fn(&Value) -> bool| {
        value
            .as_array()
            .is_some_and(|list| (least..=most).contains(&list.len()) && list.iter().all(each))
    };
    let whole = |value: &Value, least, most| {
        // Minus zero is a whole number too.
        value.as_f64().is_some_and(|n| n.fract() == 0.0 && (least..=most).contains(&(n as i64)))
    };
    let tag = |value: &Value| {
        length(value, 2, 4)
            && value.as_str().unwrap().chars().all(|c| c.is_ascii_lowercase() || "é€".contains(c))
    };
    let prices = |value: &Value| list(value, 0, 2, &|price| whole(price, 0, 99));
    let good = |(key, value): (&String, &Value)| match key.as_str() {
        "name" => length(value, 1, 8),
        "größe 🙂" => {
            let words = value.as_str().is_some_and(|w| ["klein", "groß", "🐉 dragon"].contains(&w));
            words || value.is_null() || value == 7 || value == true
        }
        "age" => whole(value, -3, 120),
        "weight" => value.as_f64().is_some_and(|w| (0.0..=2.5).contains(&w) && w % 0.25 == 0.0),
        "tags" => list(value, 1, 3, &tag),
        "child" => match value {
            Value::Object(toy) => {
                toy.len() == 2
                    && toy.get("soft").is_some_and(Value::is_boolean)
                    && toy.get("prices").is_some_and(|list_of| list(list_of, 0, 2, &prices))
            }
            other => other.is_null(),
        },
        _ => false,
    };
    let required = ["name", "größe 🙂", "age", "tags", "child"];
    required.iter().all(|key| object.contains_key(*key)) && object.iter().all(good)
}

const REGEX: &str = r"(\+|-)?[0-9]{1,3}(,[0-9]{3}){0,2} (€|₽|\p{Greek}{2,3})( [^\x00-\x7f]{1,2})?!";

const LARK: &str = r#"
start: sum
sum: product (("+" | " − ") product)~0..2
product: atom ("*" atom)~0..2
atom: NUMBER | "(" NUMBER "+" NUMBER ")" | "π"
NUMBER: /[1-9][0-9]{0,2}/
"#;

/// What [`LARK`] derives, which has no recursion.
fn fits_lark(text: &str) -> bool {
    let number = "[1-9][0-9]{0,2}";
    let atom = format!(r"({number}|\({number}\+{number}\)|π)");
    let product = format!(r"{atom}(\*{atom}){{0,2}}");
    let sum = format!(r"^{product}((\+| − ){product}){{0,2}}$");
    Regex::new(&sum).unwrap().is_match(text)
}

fn fits_regex(text: &str) -> bool {
    Regex::new(&format!("^(?:{REGEX})$")).unwrap().is_match(text)
}

/// Whether a text fits a constraint.
type Fits = fn(&str) -> bool;

fn constraints() -> [(Constraint, Fits); 3] {
    [
        (Constraint::JsonSchema(SCHEMA.to_owned()), fits_schema),
        (Constraint::Regex(REGEX.to_owned()), fits_regex),
        (Constraint::Lark(LARK.to_owned()), fits_lark),
    ]
}

fn open(path: &str) -> Model {
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    Model::open(path, &options).unwrap()
}

fn sampled(seed: u64) -> SamplingParams {
    SamplingParams { temperature: 1.5, seed, ..SamplingParams::default() }
}

fn constrained(model: &Model, constraint: Constraint, max_tokens: usize) -> GenerateOptions {
    GenerateOptions {
        sampling: SamplingParams::default(),
        max_tokens,
        stop: Vec::new(),
        end_ids: model.description().end_ids.clone(),
        constraint: Some(constraint),
    }
}

fn alone(model: &Model, prompt: &[u32], options: &GenerateOptions) -> Result<Generation, Error> {
    let mut session = model.session(SessionOptions::default()).unwrap();
    let show = |_: &str| ControlFlow::Continue(());
    generate(&mut session, model.tokenizer(), prompt, options, show)
}

fn submit(
    engine: &Engine,
    prompt: &[u32],
    options: &GenerateOptions,
) -> Result<TokenStream, Error> {
    let GenerateOptions { sampling, max_tokens, end_ids, constraint, .. } = options.clone();
    let request = Request::new(prompt.to_vec(), sampling, max_tokens);
    engine.submit(Request { end_ids, constraint, ..request })
}

fn read(stream: &mut TokenStream) -> (Vec<u32>, Result<Finish, Error>) {
    let mut tokens = Vec::new();
    loop {
        match stream.next().expect("an end comes before nothing") {
            Ok(Event::Token(token)) => tokens.push(token.id),
            Ok(Event::Finished(finish)) => return (tokens, Ok(finish)),
            Err(error) => return (tokens, Err(error)),
        }
    }
}

fn check_fifty_seeds(path: &str) {
    let model = open(path);
    let engine = model.engine(EngineOptions::default()).unwrap();
    for (constraint, fits) in constraints() {
        let mut options = constrained(&model, constraint, 240);
        let mut finished = 0;
        let mut texts = BTreeSet::new();
        let streams: Vec<TokenStream> = (0..50)
            .map(|seed| {
                options.sampling = sampled(seed);
                submit(&engine, &[1, 2, 3], &options).unwrap()
            })
            .collect();
        for (seed, mut stream) in (0..50).zip(streams) {
            options.sampling = sampled(seed);
            let expected = alone(&model, &[1, 2, 3], &options).unwrap();
            let (tokens, end) = read(&mut stream);
            assert_eq!((&tokens, end.unwrap().reason), (&expected.tokens, expected.finish_reason));
            if expected.finish_reason == FinishReason::Stop {
                assert!(fits(&expected.text), "{path}, seed {seed}: {}", expected.text);
                finished += 1;
            }
            texts.insert(expected.text);
        }
        println!(
            "{path}: {finished} of 50 finished, {} texts, such as {:?}",
            texts.len(),
            texts.first()
        );
        // Models with random weights have their favourites.
        assert!(finished >= 40 && texts.len() > 5, "{finished}, {}", texts.len());
    }
    assert_eq!(engine.statistics().unwrap().kv.used_blocks, 0);
}

#[test]
fn every_finished_output_fits_its_constraint_and_is_the_one_alone() {
    check_fifty_seeds("tiny");
    for name in ["bonsai", "bitnet-1bitllm-odd"] {
        check_fifty_seeds(golden(name).expect("it is in this repository").to_str().unwrap());
    }
}

#[test]
fn any_object_is_one_and_any_value_too() {
    let model = open("tiny");
    let any =
        Constraint::JsonSchema(r#"{"x-guidance": {"whitespace_flexible": false}}"#.to_owned());
    for constraint in [Constraint::JsonObject, any] {
        let mut finished = 0;
        for seed in 0..20 {
            let mut options = constrained(&model, constraint.clone(), 150);
            options.sampling = sampled(seed);
            let generation = alone(&model, &[1, 2, 3], &options).unwrap();
            if generation.finish_reason == FinishReason::Stop {
                let value: Value = serde_json::from_str(&generation.text).unwrap();
                assert!(value.is_object() || constraint != Constraint::JsonObject);
                finished += 1;
            }
        }
        println!("{constraint:?}: {finished} of 20 finished");
        assert!(finished > 0);
    }
}

/// A model that would write line breaks for ever, between the parts of an object, cannot.
#[test]
fn white_space_comes_to_an_end() {
    let model = open("tiny");
    let line_break = model.tokenizer().encode("\n", false, Special::Recognised).unwrap();
    let schema = r#"{"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"],
        "additionalProperties": false}"#;
    let mut options = constrained(&model, Constraint::JsonSchema(schema.to_owned()), 300);
    let last = *line_break.last().unwrap();
    options.sampling = SamplingParams { logit_bias: vec![(last, 1e6)], ..options.sampling };
    let generation = alone(&model, &[1], &options).unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Stop, "{:?}", generation.text);
    assert!(generation.text.contains(&"\n".repeat(24)), "{:?}", generation.text);
    assert!(!generation.text.contains(&"\n".repeat(25)), "{:?}", generation.text);
    let value: Value = serde_json::from_str(&generation.text).unwrap();
    assert_eq!(value["a"], 1);
}

#[test]
fn greedy_takes_the_best_allowed_token() {
    let model = open("tiny");
    // One token at a time: the first letter of what may come, by the logits of the bare model.
    let words = ["Tom", "Tim", "Lily", "Lulu"];
    let options = constrained(&model, Constraint::Regex(words.join("|")), 20);
    let generation = alone(&model, &[1, 2, 3], &options).unwrap();
    let mut session = model.session(SessionOptions::default()).unwrap();
    let (mut logits, mut text, mut tokens) = (Vec::new(), Vec::new(), vec![1, 2, 3]);
    let mut fed = 0;
    while !words.iter().any(|word| word.as_bytes() == text) {
        session.feed(&tokens[fed..], &mut logits).unwrap();
        fed = tokens.len();
        let goes_on = |id: u32| {
            let bytes = model.tokenizer().token_bytes(id).unwrap_or_default();
            let longer = [&text, bytes].concat();
            !bytes.is_empty() && words.iter().any(|word| word.as_bytes().starts_with(&longer))
        };
        let allowed = (0..logits.len() as u32).filter(|&id| goes_on(id));
        let best = allowed.max_by(|&a, &b| logits[a as usize].total_cmp(&logits[b as usize]));
        text.extend_from_slice(model.tokenizer().token_bytes(best.unwrap()).unwrap());
        tokens.push(best.unwrap());
    }
    assert_eq!(generation.tokens, tokens[3..]);
    assert_eq!(generation.text.as_bytes(), text);
    assert_eq!(generation.finish_reason, FinishReason::Stop);
}

#[test]
fn nothing_that_is_not_allowed_comes_whatever_bias_and_processors_do() {
    let model = open("tiny");
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut options = constrained(&model, Constraint::Regex("[ab]{6}".to_owned()), 20);
    let id = |text: &str| model.tokenizer().id_of(text).unwrap();
    options.sampling.logit_bias = vec![(id("z"), 1000.0), (id("a"), 2000.0)];
    let generation = alone(&model, &[1, 2, 3], &options).unwrap();
    assert_eq!(generation.text, "aaaaaa");
    let mut request = Request::new(vec![1, 2, 3], SamplingParams::default(), 20);
    request.constraint = options.constraint.clone();
    let (b, z) = (id("b"), id("z"));
    request.processors.push(Box::new(move |_: &[u32], _: usize, logits: &mut [f32]| {
        (logits[b as usize], logits[z as usize]) = (1000.0, 2000.0);
    }));
    let (tokens, end) = read(&mut engine.submit(request).unwrap());
    assert_eq!((tokens, end.unwrap().reason), (vec![b; 6], FinishReason::Stop));

    // All that may come is banned.
    let banned = |id| (id, f32::NEG_INFINITY);
    options.sampling.logit_bias = (0..model.vocab_size() as u32).map(banned).collect();
    assert!(matches!(alone(&model, &[1], &options), Err(Error::Sample(_))));
    let (tokens, end) = read(&mut submit(&engine, &[1], &options).unwrap());
    assert!(tokens.is_empty() && matches!(end, Err(Error::Sample(_))));
}

#[test]
fn log_probabilities_are_those_of_the_whole_vocabulary() {
    let model = open("tiny");
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut free = constrained(&model, Constraint::JsonObject, 1);
    free.sampling.logprobs = Some(3);
    let expected = {
        let free = GenerateOptions { constraint: None, ..free.clone() };
        alone(&model, &[1, 2, 3], &free).unwrap()
    };
    let generation = alone(&model, &[1, 2, 3], &free).unwrap();
    assert_ne!(generation.tokens, expected.tokens);
    assert_eq!(generation.logprobs[0].top, expected.logprobs[0].top);
    assert!(generation.logprobs[0].logprob < expected.logprobs[0].top[2].1);
    let mut stream = submit(&engine, &[1, 2, 3], &free).unwrap();
    let Some(Ok(Event::Token(token))) = stream.next() else { panic!("a token comes") };
    assert_eq!(token.logprobs.as_ref(), Some(&generation.logprobs[0]));
}

#[test]
fn the_end_comes_where_the_grammar_may_end_and_nowhere_else() {
    let model = open("tiny");
    let engine = model.engine(EngineOptions::default()).unwrap();
    let id = |text: &str| model.tokenizer().id_of(text).unwrap();
    let (a, b) = (id("a"), id("b"));
    let mut options = constrained(&model, Constraint::Regex("[ab]{3,8}".to_owned()), 20);
    // Whatever the end tokens are, they are wanted more than any other: here two of them, one of which
    // is a letter that the grammar has.
    for ends in [vec![b], vec![b, id("<|end_of_text|>")], vec![id("<|end_of_text|>")]] {
        for &wanted in &ends {
            options.end_ids = ends.iter().copied().collect();
            options.sampling.logit_bias = vec![(wanted, 2000.0), (a, 1000.0)];
            let generation = alone(&model, &[1, 2, 3], &options).unwrap();
            assert_eq!(
                (generation.tokens, generation.finish_reason),
                (vec![a; 3], FinishReason::Stop)
            );
            let (tokens, end) = read(&mut submit(&engine, &[1, 2, 3], &options).unwrap());
            assert_eq!((tokens, end.unwrap().reason), (vec![a; 3], FinishReason::Stop));
        }
    }
    // Without any it ends where nothing more can come, also if that is the last token there may be.
    options.end_ids.clear();
    for (max_tokens, tokens, reason) in [
        (20, 8, FinishReason::Stop),
        (8, 8, FinishReason::Stop),
        (7, 7, FinishReason::Length),
        (1, 1, FinishReason::Length),
        (0, 0, FinishReason::Length),
    ] {
        options.max_tokens = max_tokens;
        options.sampling.logit_bias = vec![(a, 1000.0)];
        let generation = alone(&model, &[1, 2, 3], &options).unwrap();
        assert_eq!((generation.tokens, generation.finish_reason), (vec![a; tokens], reason));
        let (found, end) = read(&mut submit(&engine, &[1, 2, 3], &options).unwrap());
        let Finish { reason: found_reason, usage } = end.unwrap();
        assert_eq!((found, found_reason), (vec![a; tokens], reason));
        assert_eq!(usage.output_tokens, tokens);
    }
    // One that needs an end token before its end cannot go on.
    let mut stuck = constrained(&model, Constraint::Regex("ab".to_owned()), 20);
    stuck.end_ids = [b].into();
    let dead_end = |error| matches!(error, Error::Constraint(ConstraintError::DeadEnd { .. }));
    assert!(dead_end(alone(&model, &[1, 2, 3], &stuck).unwrap_err()));
    let (tokens, end) = read(&mut submit(&engine, &[1, 2, 3], &stuck).unwrap());
    assert!(tokens == [a] && dead_end(end.unwrap_err()));
    // One that is complete before it begins.
    let empty = constrained(&model, Constraint::Regex(String::new()), 20);
    let generation = alone(&model, &[1, 2, 3], &empty).unwrap();
    assert_eq!((generation.tokens.len(), generation.finish_reason), (0, FinishReason::Stop));
    let (tokens, end) = read(&mut submit(&engine, &[1, 2, 3], &empty).unwrap());
    assert_eq!((tokens.len(), end.unwrap().reason), (0, FinishReason::Stop));
}

#[test]
fn constraints_that_cannot_be_kept_are_refused_with_the_reason() {
    let model = open("tiny");
    let engine =
        model.engine(EngineOptions { max_sequences: 1, queue: 0, ..EngineOptions::default() });
    let engine = engine.unwrap();
    let schema = |text: &str| Constraint::JsonSchema(text.to_owned());
    let regex = |text: &str| Constraint::Regex(text.to_owned());
    let lark = |text: &str| Constraint::Lark(text.to_owned());
    let patterns: Vec<String> = (0..5000).map(|i| format!(r#""^{i}":true"#)).collect();
    let patterns = format!(r#"{{"patternProperties":{{{}}}}}"#, patterns.join(","));
    let multiples = r#"{"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}"#;
    for (constraint, sentence) in [
        (
            schema("{"),
            "the JSON schema cannot be used: it is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (schema("[1]"), "the JSON schema cannot be used: schema must be an object or boolean"),
        (schema(r#"{"type": "strng"}"#), "the JSON schema cannot be used: Invalid type: strng"),
        (
            schema(r#"{"type": "array", "uniqueItems": true}"#),
            "the JSON schema cannot be used: Unimplemented keys: [\"uniqueItems\"]",
        ),
        (schema("false"), "nothing satisfies the JSON schema: schema is false"),
        (
            schema(r#"{"type": "integer", "minimum": 5, "maximum": 3}"#),
            "nothing satisfies the JSON schema: minimum (5) is greater than maximum (3)",
        ),
        (
            schema(r##"{"$ref": "#"}"##),
            "nothing satisfies the JSON schema: no token of the model can begin it",
        ),
        (
            schema(&patterns),
            "the JSON schema cannot be used: its patternProperties have 5000 entries and may have 64",
        ),
        (
            schema(multiples),
            "the JSON schema cannot be used: its multipleOf 9967, 9973 have a common multiple above 10000 of their last decimal place",
        ),
        (
            schema(r#"{"multipleOf": 1e-7}"#),
            "the JSON schema cannot be used: its multipleOf 1e-7 have a common multiple above 10000 of their last decimal place",
        ),
        (
            schema(r##"{"$ref": "https://example.com/a.json"}"##),
            "the JSON schema cannot be used: Only absolute $ref's (#/...) are supported without 'referencing' feature; ref 'https://example.com/a.json'",
        ),
        (regex("("), "the regular expression cannot be used: unclosed group"),
        (
            regex("(?=a)b"),
            "the regular expression cannot be used: look-around, including look-ahead and look-behind, is not supported",
        ),
        (
            regex(r"[^\x00-\x{10FFFF}]"),
            "nothing satisfies the regular expression: no token of the model can begin it",
        ),
        (lark(""), "the Lark grammar cannot be used: no start rule found"),
        (
            lark("start: foo"),
            "the Lark grammar cannot be used: line 1, column 8: unknown name: \"foo\"",
        ),
        (
            lark("start: a\na[temperature=0.5]: /b/"),
            "the Lark grammar cannot be used: it sets a temperature: set that of the request",
        ),
        (
            lark(&format!("start: %json {multiples}")),
            "the Lark grammar cannot be used: its multipleOf 9967, 9973 have a common multiple above 10000 of their last decimal place",
        ),
        (
            regex(&"a".repeat(70_000)),
            "the regular expression has 70000 bytes and may have 65536: make it shorter",
        ),
    ] {
        let options = constrained(&model, constraint, 20);
        let error = submit(&engine, &[1], &options).err();
        let error = error.unwrap_or_else(|| panic!("not refused: {sentence}"));
        assert!(matches!(error, Error::Constraint(_)));
        assert_eq!(error.to_string(), sentence);
        assert_eq!(alone(&model, &[1], &options).unwrap_err().to_string(), sentence);
    }
    // The engine has its place still.
    let good = constrained(&model, regex("abc"), 20);
    assert_eq!(
        read(&mut submit(&engine, &[1], &good).unwrap()).1.unwrap().reason,
        FinishReason::Stop
    );
}

/// A text whose masks all take long: it has any of a hundred pairs of letters twice, and which of them
/// have come once is a state of its own.
fn wide() -> Constraint {
    let letters = || ('a'..='z').step_by(2);
    let pairs = letters().flat_map(|a| letters().map(move |b| format!("{a}{b}"))).take(100);
    let texts: Vec<String> = pairs.map(|pair| format!("[a-z ]*{pair}[a-z ]*{pair}")).collect();
    Constraint::Regex(format!("({})!", texts.join("|")))
}

#[test]
fn a_full_ring_pauses_a_request_whose_masks_are_late() {
    let model = open("tiny");
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut options = constrained(&model, wide(), 12);
    options.end_ids.clear();
    for seed in 0..10 {
        options.sampling = sampled(seed);
        let expected = alone(&model, &[1, 2, 3], &options).unwrap().tokens;
        let mut request = Request::new(vec![1, 2, 3], options.sampling.clone(), 12);
        (request.constraint, request.buffer) = (options.constraint.clone(), 1);
        let mut stream = engine.submit(request).unwrap();
        let before = engine.statistics().unwrap().output_tokens;
        for (index, &expected) in expected.iter().enumerate() {
            let Some(Ok(Event::Token(token))) = stream.next() else { panic!("a token comes") };
            assert_eq!(token.id, expected);
            // Steps go on while nobody reads.
            let free = Request::new(vec![4, 5], SamplingParams::default(), 50);
            assert_eq!(read(&mut engine.submit(free).unwrap()).0.len(), 50);
            let output_tokens = engine.statistics().unwrap().output_tokens - before;
            let tokens = index as u64 + 1;
            assert!(output_tokens <= 50 * tokens + tokens + 1, "{output_tokens}, {tokens}");
        }
    }
}

#[test]
fn requests_whose_masks_take_longer_than_steps_change_no_token() {
    let model = open("tiny");
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut slow = constrained(&model, wide(), 12);
    slow.sampling = sampled(1);
    let mut free = GenerateOptions { constraint: None, max_tokens: 300, ..slow.clone() };
    free.end_ids.clear();
    let quick = constrained(&model, Constraint::Regex("[a-z ]{200}".to_owned()), 60);
    let options = [&slow, &free, &quick, &slow, &free, &quick];
    let mut streams = options.map(|options| submit(&engine, &[1, 2, 3], options).unwrap());
    for (options, stream) in options.iter().zip(&mut streams) {
        let expected = alone(&model, &[1, 2, 3], options).unwrap();
        let (tokens, end) = read(stream);
        assert_eq!((tokens, end.unwrap().reason), (expected.tokens, expected.finish_reason));
    }
    // Readers that go away while masks are on their way.
    drop(options.map(|options| submit(&engine, &[1, 2, 3], options).unwrap()));
    let (tokens, _) = read(&mut submit(&engine, &[1, 2, 3], &quick).unwrap());
    assert_eq!(tokens, alone(&model, &[1, 2, 3], &quick).unwrap().tokens);
    assert_eq!(engine.statistics().unwrap().kv.used_blocks, 0);
}

#[test]
fn a_late_mask_wakes_the_replica_that_waits_for_it() {
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    let model = Model::open_distributed("tiny", &[Device::Cpu; 2], &options).unwrap();
    let replicas = 3;
    let engine = model.engine(EngineOptions { replicas, ..EngineOptions::default() }).unwrap();
    let mut slow = constrained(&model, wide(), 12);
    let mut of_seed = |seed| {
        slow.sampling = sampled(seed);
        let mut request = Request::new(vec![1, 2, 3], slow.sampling.clone(), slow.max_tokens);
        request.end_ids = slow.end_ids.clone();
        request.constraint = slow.constraint.clone();
        // The end of the wait of a replica that is not woken: nothing else is there to do it.
        request.deadline = Some(Instant::now() + Duration::from_secs(120));
        (alone(&model, &[1, 2, 3], &slow).unwrap().tokens, request)
    };
    // One for each replica.
    let cases: Vec<_> = (0..replicas as u64).map(&mut of_seed).collect();
    let submit = |(expected, request)| (expected, engine.submit(request).unwrap());
    let streams: Vec<_> = cases.into_iter().map(submit).collect();
    for (expected, mut stream) in streams {
        let (tokens, end) = read(&mut stream);
        assert!(end.is_ok(), "{end:?}");
        assert_eq!(tokens, expected);
    }
}

#[test]
fn an_engine_for_texts_keeps_constraints_too() {
    let mut engine = InferenceEngine::new();
    engine.load_model(tiny_model().to_str().unwrap()).unwrap();
    let params = GenerationParams {
        sampling: sampled(3),
        max_tokens: 200,
        constraint: Some(Constraint::JsonSchema(SCHEMA.to_owned())),
        ..GenerationParams::default()
    };
    let generation = engine.generate("Once upon a time", params.clone()).wait().unwrap();
    assert_eq!(generation.finish_reason, FinishReason::Stop);
    assert!(fits_schema(&generation.text), "{}", generation.text);
    let constraint = Some(Constraint::Regex("*".to_owned()));
    let refused = engine.generate("Once", GenerationParams { constraint, ..params }).wait();
    let invalid = ConstraintError::Invalid {
        kind: "regular expression",
        reason: "repetition operator missing expression".to_owned(),
    };
    assert!(matches!(refused, Err(Error::Constraint(error)) if error == invalid));
}
