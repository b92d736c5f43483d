//! What coarser keys and values change: the largest difference of a logit from exact (f32)
//! storage, in standard deviations of its row, and the perplexity of the text.
//!
//! `cargo run --release -p bitnet-inference --example kv_error -- TEXT_FILE [MODEL]`
//! (the text's first tokens, as many as the model's context holds).

use bitnet_core::backend::KvType;
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::tokenizer::Special;

fn logits(model: &Model, ids: &[u32], kv_type: KvType) -> Vec<Vec<f32>> {
    let options = SessionOptions { kv_type, ..SessionOptions::default() };
    let mut rows = Vec::new();
    let mut session = model.session(options).expect("a session");
    session.feed_showing_all(ids, |row| rows.push(row.to_vec())).expect("the tokens fit");
    rows
}

fn deviation(row: &[f32]) -> f64 {
    let n = row.len() as f64;
    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    (row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt()
}

fn perplexity(rows: &[Vec<f32>], ids: &[u32]) -> f64 {
    let nll = |(row, &next): (&Vec<f32>, &u32)| {
        let max = row.iter().fold(f64::MIN, |m, &v| m.max(f64::from(v)));
        let sum: f64 = row.iter().map(|&v| (f64::from(v) - max).exp()).sum();
        max + sum.ln() - f64::from(row[next as usize])
    };
    let total: f64 = rows.iter().zip(&ids[1..]).map(nll).sum();
    (total / (ids.len() - 1) as f64).exp()
}

fn main() {
    let mut arguments = std::env::args().skip(1);
    let file = arguments.next().expect("usage: kv_error TEXT_FILE [MODEL]");
    let name = arguments.next().unwrap_or_else(|| "tiny".to_owned());
    let model = Model::open(&name, &ModelOptions::default()).expect("a model");
    let text = std::fs::read_to_string(&file).expect("a text");
    let mut ids = model.tokenizer().encode(&text, true, Special::Recognised).expect("tokens");
    ids.truncate(model.config().context_length);
    let exact = logits(&model, &ids, KvType::F32);
    println!("{name}, {} tokens of {file}", ids.len());
    println!("f32: perplexity {:.4}", perplexity(&exact, &ids));
    for kv_type in [KvType::F16, KvType::Int8] {
        let rows = logits(&model, &ids, kv_type);
        let errors = exact.iter().zip(&rows).map(|(exact, row)| {
            let pairs = exact.iter().zip(row);
            pairs.map(|(a, b)| f64::from((a - b).abs())).fold(0.0, f64::max) / deviation(exact)
        });
        let errors: Vec<f64> = errors.collect();
        let largest = errors.iter().fold(0.0, |m: f64, &e| m.max(e));
        let mean = errors.iter().sum::<f64>() / errors.len() as f64;
        println!(
            "{kv_type:?}: perplexity {:.4}, largest logit error {largest:.4} std, mean over positions {mean:.4}",
            perplexity(&rows, &ids)
        );
    }
}
