//! Perplexity of the trained models on held-out stories, against transformers in float32, and the
//! windows that long texts are cut into.

use bitnet_inference::perplexity::{Perplexity, Windows, choice_logprobs, perplexity};
use bitnet_inference::{Error, Model, ModelOptions, SessionOptions};
use bitnet_model::tokenizer::Special;
use bitnet_testing::golden::log_softmax;
use bitnet_testing::{golden, tiny_model};
use serde_json::Value;

/// The rule of `eval.json`: each story is the begin token, its tokens and the end token, cut to
/// 256 tokens; the sum of -log p runs over every token after the first.
fn of_stories(model: &Model, stories: &str) -> (f64, usize) {
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
    let (ours, tokens) = of_stories(&model, stories);
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

/// Context, stride, tokens that are scored, perplexity: what `scripts/strided_perplexity.py` prints for
/// `tiny-trained` and its `valid.txt` as one text (torch 2.9.1, transformers 5.23.0).
const STRIDED: [(usize, usize, usize, f64); 3] =
    [(128, 48, 11_895, 33.241103), (256, 256, 11_849, 34.205584), (512, 256, 11_895, 35.494639)];

#[test]
fn windows_give_the_perplexity_that_transformers_gives() {
    let Some(path) = golden("tiny-trained") else { return };
    let stories = std::fs::read_to_string(path.join("valid.txt")).unwrap();
    let model = Model::open(path.to_str().unwrap(), &ModelOptions::default()).unwrap();
    let ids = model.tokenizer().encode(&stories, true, Special::Recognised).unwrap();
    for (context, stride, tokens, reference) in STRIDED {
        let mut seen = 0;
        let result = perplexity(
            &model,
            &ids,
            Windows { context, stride },
            SessionOptions::default(),
            |sums| seen = sums.tokens,
        );
        let result = result.unwrap();
        println!("{context}, {stride}: {:.6}, reference {reference:.6}", result.perplexity());
        assert_eq!((result.tokens, seen), (tokens, tokens));
        assert!((result.perplexity() / reference - 1.0).abs() < 1e-3, "{context}, {stride}");
        if stride < context {
            // Every token but the begin token, and so every byte.
            assert_eq!(result.bytes, stories.len() as u64);
        }
    }
}

#[test]
fn one_window_is_the_plain_sum_and_many_begin_where_they_should() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let ids: Vec<u32> = (0..40).map(|i| i * 37 % 2000).collect();
    let plain = |window: &[u32], scored: usize| {
        let mut session = model.session(SessionOptions::default()).unwrap();
        let mut rows = Vec::new();
        session.feed_showing_all(window, |logits| rows.push(log_softmax(logits))).unwrap();
        let first = window.len() - scored;
        (first..window.len()).map(|i| -rows[i - 1][window[i] as usize]).sum::<f64>()
    };
    let of = |context, stride| {
        let windows = Windows { context, stride };
        perplexity(&model, &ids, windows, SessionOptions::default(), |_| ()).unwrap()
    };
    let near = |result: Perplexity, nll: f64, tokens| {
        assert_eq!(result.tokens, tokens);
        assert!((result.nll - nll).abs() < 1e-9 * nll, "{} and {nll}", result.nll);
    };
    near(of(512, 512), plain(&ids, 39), 39);
    near(of(40, 1), plain(&ids, 39), 39);
    let three = plain(&ids[..16], 15) + plain(&ids[12..28], 12) + plain(&ids[24..], 12);
    near(of(16, 12), three, 39);
    let apart = plain(&ids[..16], 15) + plain(&ids[16..32], 15) + plain(&ids[32..], 7);
    near(of(16, 16), apart, 37);
}

#[test]
fn windows_that_cannot_be_are_refused() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    for (context, stride) in [(1, 1), (513, 1), (16, 0), (16, 17)] {
        let windows = Windows { context, stride };
        let result = perplexity(&model, &[1, 2, 3], windows, SessionOptions::default(), |_| ());
        assert!(matches!(result, Err(Error::Windows { .. })), "{context}, {stride}");
    }
}

#[test]
fn choices_after_a_text_that_is_read_once_are_scored_as_whole_texts_are() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let text: Vec<u32> = (1..50).collect();
    let choices: [&[u32]; 4] = [&[7], &[300, 301, 302], &[7, 8, 9, 10, 11], &[300, 301, 999]];
    let mut session = model.session(SessionOptions::default()).unwrap();
    session.feed(&[5; 100], &mut Vec::new()).unwrap();
    let logprobs = choice_logprobs(&mut session, &text, &choices).unwrap();
    for (choice, logprob) in choices.iter().zip(logprobs) {
        let whole = [&text, *choice].concat();
        let mut rows = Vec::new();
        let mut session = model.session(SessionOptions::default()).unwrap();
        session.feed_showing_all(&whole, |logits| rows.push(log_softmax(logits))).unwrap();
        let expected: f64 = (text.len()..whole.len()).map(|i| rows[i - 1][whole[i] as usize]).sum();
        assert!((logprob - expected).abs() < 1e-9, "{choice:?}: {logprob} and {expected}");
    }
    let none: [&[u32]; 1] = [&[]];
    assert!(matches!(choice_logprobs(&mut session, &text, &none), Err(Error::EmptyPrompt)));
}
