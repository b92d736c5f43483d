//! Times one sample per setting on the vocabulary of Llama 3 (128 256 tokens), logits as normal
//! noise with a few likely tokens. `cargo run --release -p bitnet-inference --example sampling_time`

use std::time::Instant;

use bitnet_inference::random::uniform;
use bitnet_inference::sampler::{Sampler, SamplingParams};

fn main() {
    // The sum of twelve uniforms is close to normal: deviation 2.5, then twenty logits from 12 to 21.5.
    let normal = |i| (0..12).map(|draw| uniform(1, i, draw)).sum::<f64>() - 6.0;
    let mut logits: Vec<f32> = (0..128_256).map(|i| 2.5 * normal(i) as f32).collect();
    for i in 0..20 {
        logits[i * 613] = 12.0 + i as f32 * 0.5;
    }
    let history: Vec<u32> = (0..1000).map(|i| i * 97 % 5000).collect();

    let base = SamplingParams::default();
    let warm = SamplingParams { temperature: 0.6, ..base.clone() };
    for (name, params) in [
        ("greedy", base.clone()),
        ("greedy, repetition 1.1", SamplingParams { repetition_penalty: 1.1, ..base.clone() }),
        ("greedy, 5 logprobs", SamplingParams { logprobs: Some(5), ..base }),
        ("T 0.6", warm.clone()),
        ("T 0.6, top-p 0.9", SamplingParams { top_p: 0.9, ..warm.clone() }),
        ("T 0.6, top-k 40, top-p 0.9", SamplingParams { top_k: 40, top_p: 0.9, ..warm.clone() }),
        ("T 0.6, min-p 0.05", SamplingParams { min_p: 0.05, ..warm.clone() }),
        ("T 0.6, typical 0.9", SamplingParams { typical_p: 0.9, ..warm }),
    ] {
        let mut sampler = Sampler::new(&params).expect("valid parameters");
        let mut times: Vec<u128> = (0..101)
            .map(|position| {
                let start = Instant::now();
                let sampled = sampler.sample(&logits, &history, position).expect("finite logits");
                std::hint::black_box(sampled);
                start.elapsed().as_micros()
            })
            .collect();
        times.sort_unstable();
        println!("{name:28} {:6} µs (median of {})", times[times.len() / 2], times.len());
    }
}
