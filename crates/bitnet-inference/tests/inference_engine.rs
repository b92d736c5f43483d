//! Text in, text out: what the bare loop gives, in every form in which it can be asked for.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::Duration;

use bitnet_inference::{
    Device, Error, FinishReason, GenerateOptions, Generation, GenerationParams, InferenceEngine,
    MemorySize, Message, Model, OptimizationLevel, SamplingParams, SessionOptions, StreamEvent,
    StreamingConfig, generate, quick_infer, smart_infer,
};
use bitnet_model::tokenizer::Special;
use bitnet_testing::{golden, tiny_model};
use futures_util::{StreamExt, stream};

const PROMPTS: [&str; 5] =
    ["Once upon a time", "The little dog", "Größe 🙂", "One day, Lily and Tom", "a"];

fn tiny() -> InferenceEngine {
    let mut engine = InferenceEngine::new();
    engine.load_model("tiny").unwrap();
    engine
}

fn params(max_tokens: usize) -> GenerationParams {
    GenerationParams { max_tokens, ..GenerationParams::default() }
}

/// What the bare loop gives.
fn alone(model: &Model, prompt: &[u32], params: &GenerationParams) -> Generation {
    let options = GenerateOptions {
        sampling: params.sampling.clone(),
        max_tokens: params.max_tokens,
        stop: params.stop.clone(),
        end_ids: match params.ignore_end {
            true => Default::default(),
            false => model.description().end_ids.clone(),
        },
        constraint: params.constraint.clone(),
    };
    let mut session = model.session(SessionOptions::default()).unwrap();
    let show = |_: &str| ControlFlow::Continue(());
    generate(&mut session, model.tokenizer(), prompt, &options, show).unwrap()
}

fn encode(model: &Model, prompt: &str) -> Vec<u32> {
    model.tokenizer().encode(prompt, true, Special::Recognised).unwrap()
}

fn same(generation: &Generation, expected: &Generation) {
    assert_eq!(generation.tokens, expected.tokens);
    assert_eq!(generation.text, expected.text);
    assert_eq!(generation.finish_reason, expected.finish_reason);
    assert_eq!(generation.logprobs, expected.logprobs);
}

#[test]
fn a_generation_is_that_of_the_bare_loop() {
    let engine = tiny();
    let model = engine.model().unwrap();
    let sampled = SamplingParams { temperature: 1.0, seed: 5, ..SamplingParams::default() };
    let logprobs = SamplingParams { logprobs: Some(3), ..SamplingParams::default() };
    let all = [
        params(60),
        params(0),
        GenerationParams { sampling: sampled, ignore_end: true, ..params(90) },
        GenerationParams { sampling: logprobs, ..params(10) },
        GenerationParams { stop: vec![".".into(), "the".into()], ..params(100) },
        GenerationParams { max_tokens: usize::MAX, ..params(0) },
    ];
    let cases = PROMPTS.iter().flat_map(|prompt| all.iter().map(move |params| (prompt, params)));
    // All of them at once, and nobody reads until all are submitted.
    let cases: Vec<_> = cases
        .map(|(prompt, params)| (prompt, params, engine.generate(prompt, params.clone())))
        .collect();
    let mut reasons = Vec::new();
    for (prompt, params, answer) in cases {
        let expected = alone(model, &encode(model, prompt), params);
        same(&answer.wait().unwrap(), &expected);
        reasons.push((expected.finish_reason, params.stop.is_empty()));
    }
    assert!(reasons.contains(&(FinishReason::Stop, false)));
}

#[test]
fn a_stop_string_that_is_complete_only_at_the_end_of_the_text_is_the_reason_of_the_end() {
    let engine = tiny();
    let all = engine.generate(PROMPTS[0], params(12)).wait().unwrap();
    let mut ends = all.text.char_indices().rev().map(|(start, _)| start);
    let (last, longer) = (ends.nth(1).unwrap(), ends.nth(1).unwrap());
    // While the text goes on, the longer string may still come, which begins first.
    let longer = format!("{}, and more", &all.text[longer..]);
    let stop = vec![longer, all.text[last..].to_owned()];
    let cut = engine.generate(PROMPTS[0], GenerationParams { stop, ..params(12) }).wait().unwrap();
    assert_eq!((cut.text.as_str(), cut.finish_reason), (&all.text[..last], FinishReason::Stop));
}

#[test]
fn presets_and_optimization_levels_change_no_token() {
    let expected = tiny().generate(PROMPTS[0], params(40)).wait().unwrap();
    let mut engines =
        vec![InferenceEngine::fast(), InferenceEngine::balanced(), InferenceEngine::low_memory()];
    for level in [OptimizationLevel::None, OptimizationLevel::Basic, OptimizationLevel::Aggressive]
    {
        let builder = InferenceEngine::builder().optimization_level(level).threads(2);
        let builder = builder.max_batch_size(2).max_queue_length(3).step_tokens(7);
        let builder = builder.kv_block_tokens(5).memory_pool_size(MemorySize::MB(8));
        engines.push(builder.device(Device::Cpu).build().unwrap());
    }
    for mut engine in engines {
        engine.load_model("tiny").unwrap();
        for _ in 0..2 {
            same(&engine.generate(PROMPTS[0], params(40)).wait().unwrap(), &expected);
        }
    }
}

#[test]
fn logits_are_those_of_a_session_in_the_order_of_the_batch() {
    let engine = InferenceEngine::builder().max_batch_size(2).max_queue_length(2).build();
    let mut engine = engine.unwrap();
    engine.load_model("tiny").unwrap();
    let batch: Vec<Vec<u32>> =
        (1..20).map(|length| (0..length * 3).map(|i| i * 7 % 2000).collect()).collect();
    let found = engine.infer_batch(&batch).wait().unwrap();
    assert_eq!(found.len(), batch.len());
    for (tokens, found) in batch.iter().zip(found) {
        let mut logits = Vec::new();
        let mut session = engine.model().unwrap().session(SessionOptions::default()).unwrap();
        session.feed(tokens, &mut logits).unwrap();
        assert_eq!(found, logits);
        assert_eq!(engine.infer(tokens).wait().unwrap(), logits);
    }
}

#[test]
fn the_pieces_of_a_stream_make_the_whole() {
    let engine = tiny();
    for stop in [vec![], vec!["the ".to_owned()]] {
        let params = GenerationParams { stop, ..params(70) };
        let expected = engine.generate(PROMPTS[3], params.clone()).wait().unwrap();
        let config = StreamingConfig { buffer: 3, ..StreamingConfig::default() };
        let stream = engine.stream(PROMPTS[3], params, config).unwrap();
        let events: Vec<StreamEvent> = stream.blocking().map(Result::unwrap).collect();
        let text: String = events.iter().map(|event| event.text.as_str()).collect();
        assert_eq!(text, expected.text);
        let ids: Vec<u32> =
            events.iter().flat_map(|event| &event.tokens).map(|token| token.id).collect();
        assert_eq!(ids, expected.tokens);
        let (last, before) = events.split_last().unwrap();
        assert!(before.iter().all(|event| event.finish.is_none()));
        let finish = last.finish.unwrap();
        assert_eq!(finish.reason, expected.finish_reason);
        assert_eq!(finish.usage.output_tokens, ids.len());
        let prompt = encode(engine.model().unwrap(), PROMPTS[3]);
        assert_eq!(finish.usage.prompt_tokens, prompt.len());
    }
}

#[test]
fn gathered_tokens_come_in_fewer_pieces() {
    let engine = tiny();
    let expected = engine.generate(PROMPTS[3], params(70)).wait().unwrap();
    for buffer in [5, 1000] {
        let max_latency = std::time::Duration::from_secs(3600);
        let config = StreamingConfig { buffer, max_latency, ..StreamingConfig::default() };
        let stream = engine.stream(PROMPTS[3], params(70), config).unwrap();
        let events: Vec<StreamEvent> = stream.blocking().map(Result::unwrap).collect();
        let text: String = events.iter().map(|event| event.text.as_str()).collect();
        let ids: Vec<u32> =
            events.iter().flat_map(|event| &event.tokens).map(|token| token.id).collect();
        assert_eq!((text, ids), (expected.text.clone(), expected.tokens.clone()));
        let finish = events.last().unwrap().finish.unwrap();
        assert_eq!(finish.usage.output_tokens, expected.tokens.len());
        // Woken by a full ring or the end, and perhaps a few times by chance.
        assert!(events.len() < expected.tokens.len() / 2, "{} pieces", events.len());
    }
}

#[test]
fn a_prompt_that_was_there_before_is_reused() {
    let engine = tiny();
    let prompt = PROMPTS.join(" ").repeat(4);
    let reused = |stop: &[&str]| {
        let stop = stop.iter().map(|text| text.to_string()).collect();
        let params = GenerationParams { stop, ..params(30) };
        let stream = engine.stream(&prompt, params, StreamingConfig::default()).unwrap();
        let last = stream.blocking().last().unwrap().unwrap();
        last.finish.unwrap().usage.reused_tokens
    };
    let tokens = encode(engine.model().unwrap(), &prompt).len();
    assert_eq!(reused(&[]), 0);
    assert_eq!(reused(&[]), (tokens - 1) / 16 * 16);
    // Also where the text ends before the engine does.
    assert_eq!(reused(&["e"]), (tokens - 1) / 16 * 16);
}

#[test]
fn a_stream_that_is_dropped_is_cancelled() {
    let engine = tiny();
    let params = GenerationParams { ignore_end: true, ..params(400) };
    let mut stream =
        engine.stream(PROMPTS[0], params, StreamingConfig::default()).unwrap().blocking();
    assert!(stream.next().unwrap().is_ok());
    drop(stream);
    while engine.statistics().unwrap().running > 0 {
        std::thread::yield_now();
    }
    assert!(engine.statistics().unwrap().output_tokens < 400);
}

#[test]
fn prompts_of_a_stream_are_answered_in_order_or_as_completed() {
    for replicas in [1, 2] {
        let builder = InferenceEngine::builder().max_batch_size(3).max_queue_length(0);
        let mut engine = builder.replicas(replicas).build().unwrap();
        engine.load_model("tiny").unwrap();
        let prompts: Vec<String> =
            (0..20).map(|index| PROMPTS[index % 5].repeat(1 + index % 3)).collect();
        let expected: Vec<Generation> = prompts
            .iter()
            .map(|prompt| engine.generate(prompt, params(15)).wait().unwrap())
            .collect();
        for ordered in [true, false] {
            let config = StreamingConfig { ordered, ..StreamingConfig::default() };
            let prompts = stream::iter(prompts.clone());
            let results = engine.generate_stream(prompts, params(15), config).unwrap();
            let mut results: Vec<_> = futures_executor::block_on(results.collect());
            if !ordered {
                results.sort_by_key(|(index, _)| *index);
            }
            assert_eq!(results.len(), 20);
            for (place, (index, generation)) in results.into_iter().enumerate() {
                assert_eq!(place, index);
                same(&generation.unwrap(), &expected[index]);
            }
        }
    }
}

#[test]
fn prompts_of_a_stream_that_end_at_a_stop_string_make_room_for_the_next() {
    for max_batch_size in [1, 3] {
        let engine = InferenceEngine::builder().max_batch_size(max_batch_size).max_queue_length(0);
        let mut engine = engine.build().unwrap();
        engine.load_model("tiny").unwrap();
        let prompts = (0..60).map(|index| PROMPTS[index % 5].to_owned());
        let params = GenerationParams { stop: vec!["e".into()], ignore_end: true, ..params(200) };
        let config = StreamingConfig { ordered: false, ..StreamingConfig::default() };
        let results = engine.generate_stream(stream::iter(prompts), params, config).unwrap();
        let results: Vec<_> = futures_executor::block_on(results.collect());
        assert_eq!(results.len(), 60);
        for (_, generation) in results {
            assert_eq!(generation.unwrap().finish_reason, FinishReason::Stop);
        }
    }
}

#[test]
fn answers_and_streams_can_be_awaited() {
    let engine = tiny();
    let expected = engine.generate(PROMPTS[1], params(30)).wait().unwrap();
    let text = futures_executor::block_on(async {
        let mut stream = engine.stream(PROMPTS[1], params(30), StreamingConfig::default()).unwrap();
        let mut text = String::new();
        while let Some(event) = stream.next().await {
            text.push_str(&event.unwrap().text);
        }
        assert_eq!(engine.generate(PROMPTS[1], params(30)).await.unwrap().text, text);
        text
    });
    assert_eq!(text, expected.text);
}

/// The built-in model with another chat template, or none.
fn tiny_with_template(folder: &Path, template: Option<&str>) {
    for file in std::fs::read_dir(tiny_model()).unwrap().map(Result::unwrap) {
        if file.file_type().unwrap().is_file() {
            std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
        }
    }
    let path = folder.join("tokenizer_config.json");
    let mut config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    config["chat_template"] = template.into();
    std::fs::write(&path, config.to_string()).unwrap();
}

/// Puts the role before what is said.
const TEMPLATE: &str = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n\
                        {% endfor %}assistant:";

#[test]
fn a_chat_continues_what_the_template_makes_of_it() {
    let folder = tempfile::tempdir().unwrap();
    tiny_with_template(folder.path(), Some(TEMPLATE));
    let mut engine = InferenceEngine::new();
    engine.load_model(folder.path().to_str().unwrap()).unwrap();
    let messages = [Message::new("system", "Be kind."), Message::new("user", "Tell a story")];
    let answer = engine.chat(&messages, params(25)).wait().unwrap();
    let text = "system: Be kind.\nuser: Tell a story\nassistant:";
    same(&answer, &engine.generate(text, params(25)).wait().unwrap());
}

#[test]
fn a_loaded_model_takes_the_place_of_the_one_before_and_running_generations_go_on() {
    let folder = tempfile::tempdir().unwrap();
    tiny_with_template(folder.path(), Some(TEMPLATE));
    let mut engine = tiny();
    let before = engine.generate(PROMPTS[0], params(50));
    engine.load_model(folder.path().to_str().unwrap()).unwrap();
    let after = engine.generate(PROMPTS[0], params(50)).wait().unwrap();
    same(&before.wait().unwrap(), &after);
    assert_eq!(engine.model().unwrap().chat_template().unwrap().source(), TEMPLATE);
}

#[test]
fn processors_of_the_builder_apply_to_every_generation() {
    let engine = InferenceEngine::builder()
        .logits_processor(|| |_: &[u32], _: usize, logits: &mut [f32]| logits[7] = 1e9)
        .logits_processor(|| {
            |_: &[u32], position: usize, logits: &mut [f32]| {
                if position % 2 == 1 {
                    logits[8] = 2e9;
                }
            }
        })
        .build();
    let mut engine = engine.unwrap();
    engine.load_model("tiny").unwrap();
    for _ in 0..2 {
        let generation = engine.generate("a", params(4)).wait().unwrap();
        assert_eq!(generation.tokens, [7, 8, 7, 8]);
    }
}

#[test]
fn one_line_is_enough() {
    let engine = tiny();
    let texts = smart_infer("tiny", &PROMPTS).unwrap();
    for (prompt, text) in PROMPTS.iter().zip(texts) {
        assert_eq!(text, engine.generate(prompt, params(128)).wait().unwrap().text);
        assert_eq!(text, quick_infer("tiny", prompt).unwrap());
    }
}

#[test]
fn what_cannot_be_done_is_refused_with_the_reason() {
    let empty = InferenceEngine::new();
    assert!(matches!(empty.generate("a", params(1)).wait(), Err(Error::NoModel)));
    assert!(matches!(empty.infer(&[1]).wait(), Err(Error::NoModel)));
    assert!(matches!(empty.infer_batch(&[]).wait(), Err(Error::NoModel)));
    assert!(matches!(empty.model(), Err(Error::NoModel)));

    let engine = tiny();
    assert!(matches!(engine.infer_batch(&[]).wait(), Err(Error::EmptyBatch)));
    assert!(matches!(smart_infer("tiny", &[]), Err(Error::EmptyBatch)));
    let batch = [vec![1], vec![5000]];
    assert!(matches!(engine.infer_batch(&batch).wait(), Err(Error::TokenOutOfRange { .. })));
    let folder = tempfile::tempdir().unwrap();
    tiny_with_template(folder.path(), None);
    let mut base = InferenceEngine::new();
    base.load_model(folder.path().to_str().unwrap()).unwrap();
    let error = base.chat(&[Message::new("user", "hi")], params(1)).wait().unwrap_err();
    assert!(error.to_string().contains("without a chat template"), "{error}");
    let stop = GenerationParams { stop: vec![String::new()], ..params(1) };
    assert!(matches!(engine.generate("a", stop).wait(), Err(Error::Stop(_))));
    let late = GenerationParams { time_limit: Some(Duration::ZERO), ..params(100) };
    assert!(matches!(engine.generate("a", late).wait(), Err(Error::DeadlineExceeded)));
    let error = engine.generate(&"long ".repeat(1000), params(1)).wait().unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { .. }));

    let error = InferenceEngine::with_device(Device::Mlx).err().unwrap().to_string();
    assert!(error.contains("mlx"), "{error}");
    let error = InferenceEngine::builder().gpu(true).build().err().unwrap().to_string();
    assert!(error.contains("gpu"), "{error}");
    assert!(InferenceEngine::builder().gpu(true).gpu(false).build().is_ok());
    let error = InferenceEngine::builder().replicas(0).build().err().unwrap().to_string();
    assert!(error.contains("the number of replicas is 0; give 1 to 64"), "{error}");
    let error = InferenceEngine::builder().max_batch_size(0).build().err().unwrap().to_string();
    assert!(error.contains("run at once is 0; give 1 to 4096"), "{error}");
    let error = InferenceEngine::builder().max_queue_length(10_001).build().err().unwrap();
    assert!(error.to_string().contains("may wait is 10001; give 0 to 10000"), "{error}");
    let mut none = InferenceEngine::builder().threads(0).build().unwrap();
    assert!(none.load_model("tiny").unwrap_err().to_string().contains("0 threads"));
    let mut small = InferenceEngine::builder().memory_pool_size(MemorySize::KB(1)).build().unwrap();
    small.load_model("tiny").unwrap();
    assert!(matches!(small.generate("a", params(1)).wait(), Err(Error::KvBudget { room: 0, .. })));
    assert!(none.load_model("no such model").is_err());
    if let Some(path) = golden("qwen3-embedding") {
        let error = InferenceEngine::new().load_model(path.to_str().unwrap()).unwrap_err();
        assert!(error.to_string().contains("makes embeddings"), "{error}");
    }
}
