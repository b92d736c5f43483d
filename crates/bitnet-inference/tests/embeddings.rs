//! Embeddings of whole models against transformers, through the interface that programs use.

use bitnet_inference::{Error, Model, ModelOptions, SessionOptions};
use bitnet_testing::golden;
use bitnet_testing::golden::{GoldenModel, deviation, largest_difference};

#[test]
fn embeddings_are_those_of_transformers_and_have_length_one() {
    for (file, reference) in [
        ("qwen3-embedding", "qwen3-embedding"),
        ("gemma3-embedding", "gemma3-embedding"),
        ("gguf/qwen3-embedding-I2_S.gguf", "qwen3-embedding"),
    ] {
        let (Some(path), Some(reference)) = (golden(file), golden(reference)) else { continue };
        let model = Model::open(path.to_str().unwrap(), &ModelOptions::default()).unwrap();
        let golden = GoldenModel::read(&reference);
        for (k, prompt) in golden.prompts.iter().enumerate() {
            let expected = golden.f32(&format!("embedding.{k}")).unwrap();
            let whole = model.embed(&prompt.ids, SessionOptions::default()).unwrap();
            let error = largest_difference(&whole, &expected) / deviation(&expected);
            println!("{file} prompt {k}: {error:.1e} std");
            assert!(error <= 1e-5, "{file} prompt {k}: {error:e} std");
            let length: f64 = whole.iter().map(|&v| f64::from(v).powi(2)).sum();
            assert!((length - 1.0).abs() < 1e-6, "{file} prompt {k}: length² {length}");
            let options = SessionOptions { chunk: 5, ..SessionOptions::default() };
            let pieces = model.embed(&prompt.ids, options).unwrap();
            assert_eq!(pieces, whole, "{file} prompt {k} in chunks");
        }
    }
}

#[test]
fn a_text_generator_makes_no_embeddings() {
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let error = model.embed(&[1], SessionOptions::default()).unwrap_err();
    assert!(matches!(error, Error::WrongKind(_)), "{error}");
}
