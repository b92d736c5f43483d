//! Perplexity of the trained models on held-out stories, against transformers in float32.

use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::tokenizer::Special;
use bitnet_testing::golden::log_softmax;
use bitnet_testing::{golden, tiny_model};
use serde_json::Value;

/// The rule of `eval.json`: each story is the begin token, its tokens and the end token, cut to
/// 256 tokens; the sum of -log p runs over every token after the first.
fn perplexity(model: &Model, stories: &str) -> (f64, usize) {
    let tokenizer = model.tokenizer();
    let end = tokenizer.id_of("<|end_of_text|>").expect("the trained models have it");
    let (mut nll, mut tokens) = (0.0, 0);
    for story in stories.split("<|endoftext|>").map(str::trim).filter(|story| !story.is_empty()) {
        let mut ids = tokenizer.encode(story, true, Special::Recognised).unwrap();
        ids.push(end);
        ids.truncate(256);
        let mut session = model.session(SessionOptions::default()).unwrap();
        let mut next = ids[1..].iter();
        session
            .feed_showing_all(&ids, |logits| {
                if let Some(&id) = next.next() {
                    nll -= log_softmax(logits)[id as usize];
                    tokens += 1;
                }
            })
            .unwrap();
    }
    ((nll / tokens as f64).exp(), tokens)
}

fn check(name: &str, model: &str, stories: &str, eval: &std::path::Path) {
    let eval: Value = serde_json::from_slice(&std::fs::read(eval).unwrap()).unwrap();
    let reference = eval["perplexity"]["perplexity"].as_f64().unwrap();
    let model = Model::open(model, &ModelOptions::default()).unwrap();
    let (ours, tokens) = perplexity(&model, stories);
    println!("{name}: perplexity {ours:.6}, reference {reference:.6}, {tokens} tokens");
    assert_eq!(tokens as u64, eval["perplexity"]["tokens"].as_u64().unwrap());
    assert!((ours / reference - 1.0).abs() < 1e-3, "{name}: {ours} against {reference}");
}

#[test]
fn the_built_in_model_has_the_perplexity_of_the_reference() {
    let Some(data) = golden("tiny/eval.json") else { return };
    let Some(stories) = golden("tiny/valid.txt") else { return };
    let stories = std::fs::read_to_string(stories).unwrap();
    check("tiny", "tiny", &stories, &data);
    // The same model from its folder.
    check("models/tiny", tiny_model().to_str().unwrap(), &stories, &data);
}

#[test]
fn master_weights_have_the_perplexity_of_the_reference() {
    let Some(path) = golden("tiny-trained") else { return };
    let stories = std::fs::read_to_string(path.join("valid.txt")).unwrap();
    check("tiny-trained", path.to_str().unwrap(), &stories, &path.join("eval.json"));
}
