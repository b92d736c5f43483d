//! What of a conversation is left out when it outgrows the context.

use bitnet_inference::{Error, GenerationParams, InferenceEngine, MemorySize, Message, Model};
use bitnet_model::chat::ChatTemplate;

fn tiny() -> InferenceEngine {
    let mut engine = InferenceEngine::new();
    engine.load_model("tiny").unwrap();
    engine
}

fn conversation(turns: usize) -> Vec<Message> {
    let mut messages = vec![Message::new("system", "You tell stories.")];
    for turn in 0..turns {
        messages.push(Message::new("user", format!("Tell me story number {turn} of the cat.")));
        messages.push(Message::new("assistant", "Once upon a time there was a cat and a dog."));
    }
    messages.push(Message::new("user", "Why?"));
    messages
}

fn tokens(engine: &InferenceEngine, messages: &[Message]) -> usize {
    let model = engine.model().unwrap();
    let template = model.chat_template().unwrap();
    template.encode(model.tokenizer(), messages, true).unwrap().1.len()
}

#[test]
fn what_fits_is_whole() {
    let engine = tiny();
    let messages = conversation(3);
    let all = tokens(&engine, &messages);
    let window = engine.chat_window(&messages, 512 - all).unwrap();
    assert_eq!((window.dropped, window.prompt_tokens, window.context_length), (0, all, 512));
    assert!(engine.chat_window(&messages, 513 - all).unwrap().dropped > 0);
}

#[test]
fn what_does_not_fit_loses_the_fewest_whole_turns_that_free_half_of_the_context() {
    let engine = tiny();
    let messages = conversation(40);
    let window = engine.chat_window(&messages, 20).unwrap();
    assert_eq!(window.dropped % 2, 0);
    let without = |dropped: usize| [&messages[..1], &messages[1 + dropped..]].concat();
    let kept = without(window.dropped);
    assert_eq!(tokens(&engine, &kept), window.prompt_tokens);
    assert!(window.prompt_tokens <= 256);
    assert!(tokens(&engine, &without(window.dropped - 2)) > 256);
    let params = GenerationParams { max_tokens: 20, ..GenerationParams::default() };
    engine.chat(&kept, params).wait().unwrap();
}

#[test]
fn a_last_turn_that_is_too_long_is_refused() {
    let engine = tiny();
    let mut messages = conversation(2);
    messages.push(Message::new("user", "the cat ".repeat(400)));
    let error = engine.chat_window(&messages, 1).unwrap_err();
    assert!(matches!(error, Error::ContextExceeded { context_length: 512, .. }), "{error}");
    // More than half of the context is no reason.
    messages.pop();
    messages.push(Message::new("user", "the cat ".repeat(180)));
    let window = engine.chat_window(&messages, 100).unwrap();
    assert_eq!(window.dropped, 5);
    assert!(window.prompt_tokens > 256);
}

#[test]
fn little_memory_for_keys_and_values_is_a_short_context() {
    let mut engine =
        InferenceEngine::builder().memory_pool_size(MemorySize::KB(1000)).build().unwrap();
    engine.load_model("tiny").unwrap();
    let context = engine.context_length().unwrap();
    assert!(context < 512);
    // The begin token and a letter come before it.
    let params = |max_tokens| GenerationParams { max_tokens, ..GenerationParams::default() };
    engine.generate("a", params(context - 2)).wait().unwrap();
    assert!(engine.generate("a", params(context)).wait().is_err());
}

#[test]
fn a_model_without_a_template_can_be_given_one() {
    let Some(path) = bitnet_testing::golden("trilm") else { return };
    let mut model = Model::open(&path.to_string_lossy(), &Default::default()).unwrap();
    assert!(model.chat_template().is_err());
    let source = "{% for message in messages %}{{ message.content }}\n{% endfor %}";
    model.set_chat_template(ChatTemplate::new(source).unwrap());
    let mut engine = InferenceEngine::new();
    engine.use_model(model).unwrap();
    let params = GenerationParams { max_tokens: 5, ..GenerationParams::default() };
    let answer = engine.chat(&[Message::new("user", "Hello")], params.clone()).wait().unwrap();
    assert_eq!(answer.tokens, engine.generate("Hello\n", params).wait().unwrap().tokens);
}
