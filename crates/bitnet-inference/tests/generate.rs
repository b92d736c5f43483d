//! The loop from a prompt to a finished text, on the built-in model.

use std::collections::BTreeSet;
use std::ops::ControlFlow;

use bitnet_inference::{
    FinishReason, GenerateOptions, Generation, Model, ModelOptions, SamplingParams, SessionOptions,
    generate,
};

/// Greedy text after `prompt`, which must be what was shown piece by piece.
fn greedy(model: &Model, prompt: &[u32], max_tokens: usize, stop: &[&str]) -> Generation {
    let options = GenerateOptions {
        sampling: SamplingParams { temperature: 0.0, ..SamplingParams::default() },
        max_tokens,
        stop: stop.iter().map(|s| s.to_string()).collect(),
        end_ids: BTreeSet::new(),
        constraint: None,
    };
    let mut session = model.session(SessionOptions::default()).unwrap();
    let mut shown = String::new();
    let generation = generate(&mut session, model.tokenizer(), prompt, &options, |text| {
        shown.push_str(text);
        ControlFlow::Continue(())
    })
    .unwrap();
    assert_eq!(shown, generation.text);
    generation
}

#[test]
fn a_stop_string_that_is_complete_only_at_the_end_of_the_text_is_the_reason_of_the_end() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let all = greedy(&model, &[1, 2, 3], 12, &[]);
    assert_eq!((all.finish_reason, all.tokens.len()), (FinishReason::Length, 12));
    let mut ends = all.text.char_indices().rev().map(|(start, _)| start);
    let (last, longer) = (ends.nth(1).unwrap(), ends.nth(1).unwrap());
    // While the text goes on, the longer string may still come, which begins first.
    let longer = format!("{}, and more", &all.text[longer..]);
    let cut = greedy(&model, &[1, 2, 3], 12, &[&longer, &all.text[last..]]);
    assert_eq!(cut.text, all.text[..last]);
    assert_eq!(cut.finish_reason, FinishReason::Stop);
}

#[test]
fn no_tokens_are_generated_where_none_are_asked_for() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let none = greedy(&model, &[1, 2, 3], 0, &[]);
    assert_eq!((none.tokens.len(), none.text.as_str()), (0, ""));
    assert_eq!(none.finish_reason, FinishReason::Length);
}

#[test]
fn a_prompt_that_fills_the_context_has_one_token_after_it() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let context = model.config().context_length;
    let full = greedy(&model, &vec![5; context], 4, &[]);
    assert_eq!((full.tokens.len(), full.finish_reason), (1, FinishReason::Length));
    let last = greedy(&model, &vec![5; context - 1], 4, &[]);
    assert_eq!((last.tokens.len(), last.finish_reason), (2, FinishReason::Length));

    let mut session = model.session(SessionOptions::default()).unwrap();
    let error = session.feed(&vec![5; context + 1], &mut Vec::new()).unwrap_err().to_string();
    assert!(error.contains(&format!("context of {context}")), "{error}");
    assert_eq!((session.length(), session.remaining()), (0, context));
}
