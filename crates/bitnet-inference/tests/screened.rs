//! The screened head samples the tokens that the full head samples.

use std::ops::ControlFlow;

use bitnet_core::Shortcuts;
use bitnet_inference::{
    GenerateOptions, Model, ModelOptions, SamplingParams, SessionOptions, generate,
};
use bitnet_testing::golden;

fn parameters() -> Vec<SamplingParams> {
    let neutral = SamplingParams::default();
    let mut all = Vec::new();
    for (bias, repetition, presence, last_n) in [
        (vec![], 1.0, 0.0, None),
        (vec![(3, 20.0), (9, f32::NEG_INFINITY), (1 << 30, 1.0)], 1.0, 0.0, None),
        (vec![], 1.3, 0.5, Some(8)),
        (vec![(5, -2.0)], 0.5, -1.5, None),
    ] {
        for (temperature, top_k, top_p, min_p) in [
            (0.0, 0, 1.0, 0.0),
            (0.8, 1, 1.0, 0.0),
            (1.5, 40, 0.9, 0.0),
            (0.7, 5, 1.0, 0.05),
            (1.0, 0, 1.0, 0.1),
            (2.5, 0, 1.0, 0.3),
            (1.0, 0, 1.0, 1.0),
            (1.0, 0, 0.9, 0.0),
        ] {
            all.push(SamplingParams {
                logit_bias: bias.clone(),
                repetition_penalty: repetition,
                presence_penalty: presence,
                repeat_last_n: last_n,
                temperature,
                top_k,
                top_p,
                min_p,
                seed: all.len() as u64,
                ..neutral.clone()
            });
        }
    }
    all
}

#[test]
fn tokens_are_the_same_with_and_without_the_screen() {
    let mut paths = vec!["tiny".to_owned()];
    for name in ["bitnet-bf16", "gguf/bitnet-packed-TQ2_0.gguf", "tiny-trained"] {
        paths.extend(golden(name).map(|path| path.to_str().unwrap().to_owned()));
    }
    for path in paths {
        let open = |shortcuts| {
            let options = ModelOptions {
                threads: Some(2),
                shortcuts: Some(shortcuts),
                copies: true,
                ..ModelOptions::default()
            };
            Model::open(&path, &options).unwrap()
        };
        let (screened, full) = (open(Shortcuts::ALL), open(Shortcuts::NONE));
        for sampling in parameters() {
            let options = GenerateOptions {
                sampling,
                max_tokens: 24,
                stop: Vec::new(),
                end_ids: Default::default(),
                constraint: None,
            };
            let tokens = |model: &Model| {
                let mut session = model.session(SessionOptions::default()).unwrap();
                let prompt = [1, 2, 3, 2, 5];
                let show = |_: &str| ControlFlow::Continue(());
                generate(&mut session, model.tokenizer(), &prompt, &options, show).unwrap().tokens
            };
            let sampling = &options.sampling;
            assert_eq!(tokens(&screened), tokens(&full), "{path} {sampling:?}");
        }
        let (screened, full) = (screened.shortcut_counts(), full.shortcut_counts());
        assert!(screened.head_rows_rescored < screened.head_rows, "{path}: {screened:?}");
        assert_eq!(full.head_rows, 0);
    }
}
