//! Times attention in the shape of BitNet b1.58 2B-4T (20 query heads that share 5 key/value heads of
//! 128 elements) on every instruction set of this CPU, for each storage type of keys and values.
//!
//! Decode: one token after a context, with as many layers taking turns as the keys and values need
//! to come from memory; GB/s counts them once. Prefill: a prompt in one step; GFLOP/s counts what the
//! causal mask leaves. Times are medians. The first lines are what this CPU can do at best: reading with plain loads,
//! and fused multiply-adds on registers.
//!
//! `cargo run --release -p bitnet-cpu --example attention_speed [SECONDS PER FIGURE [CASE]]`
//! `CASE` is a part of `THREADS/TYPE/STEP/CONTEXT`, for instance `1/f16/1/4000`; `BITNET_ISA`
//! narrows the instruction sets to one.

use std::time::{Duration, Instant};

use bitnet_core::Error;
use bitnet_core::backend::{AttentionShape, Backend, KvLayout, KvType, Span};
use bitnet_cpu::{Buffer, CpuBackend, CpuOptions, Isa};

const HEADS: usize = 20;
const KV_HEADS: usize = 5;
const HEAD_SIZE: usize = 128;
const BLOCK_TOKENS: usize = 64;
/// Bytes of keys and values that no cache holds.
const UNCACHED_BYTES: usize = 400 << 20;

fn main() -> Result<(), Error> {
    let seconds = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0.3);
    for threads in [1, 2] {
        println!("{threads} threads read {:.1} GB/s", read_bandwidth(threads, seconds));
    }
    let isas = match Isa::from_env()? {
        Some(isa) => vec![isa],
        None => Isa::detected(),
    };
    println!(
        "{:>8} {:>8} {:>6} {:>8} {:>8} {:>11} {:>10} {:>8} {:>8}",
        "isa", "threads", "kv", "step", "context", "us/layer", "write us", "GB/s", "GFLOP/s"
    );
    let only: Option<String> = std::env::args().nth(2);
    for isa in isas {
        for threads in [1, 2] {
            let options =
                CpuOptions { threads: Some(threads), isa: Some(isa), ..Default::default() };
            let backend = CpuBackend::new(options)?;
            for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
                for (rows, context) in [
                    (1, 64),
                    (1, 512),
                    (1, 4000),
                    (8, 512),
                    (128, 128),
                    (512, 512),
                    (128, 2048),
                    (2048, 2048),
                ] {
                    let name = format!("{threads}/{kv_type:?}/{rows}/{context}").to_lowercase();
                    if only.as_ref().is_some_and(|only| !name.contains(only)) {
                        continue;
                    }
                    let case = Case::new(&backend, kv_type, rows, context)?;
                    let figures = case.measure(seconds)?;
                    println!(
                        "{:>8} {threads:>8} {:>6} {rows:>8} {context:>8} {:>11.1} {:>10.1} {:>8.1} {:>8.1}",
                        isa.to_string(),
                        format!("{kv_type:?}").to_lowercase(),
                        figures.attention * 1e6,
                        figures.write * 1e6,
                        case.bytes() as f64 / figures.attention / 1e9,
                        case.flops() as f64 / figures.attention / 1e9,
                    );
                }
            }
        }
    }
    Ok(())
}

struct Case<'a> {
    backend: &'a CpuBackend,
    layout: KvLayout,
    rows: usize,
    context: usize,
}

/// Median times of one layer, in seconds.
struct Figures {
    write: f64,
    attention: f64,
}

impl<'a> Case<'a> {
    /// A step of the last `rows` tokens of a context.
    fn new(
        backend: &'a CpuBackend,
        kv_type: KvType,
        rows: usize,
        context: usize,
    ) -> Result<Self, Error> {
        let mut layout = KvLayout {
            layers: 1,
            kv_heads: KV_HEADS,
            head_size: HEAD_SIZE,
            block_tokens: BLOCK_TOKENS,
            kv_type,
        };
        if rows == 1 {
            let layer_bytes = layout.block_bytes() * context.div_ceil(BLOCK_TOKENS);
            layout.layers = (UNCACHED_BYTES / layer_bytes).clamp(2, 200);
        }
        Ok(Case { backend, layout, rows, context })
    }

    /// Bytes of keys and values that the step's last token sees.
    fn bytes(&self) -> usize {
        self.layout.block_bytes() / self.layout.layers * self.context / BLOCK_TOKENS
    }

    /// Multiplications and additions.
    fn flops(&self) -> usize {
        let before = self.context - self.rows;
        let seen = self.rows * before + self.rows * (self.rows + 1) / 2;
        seen * HEADS * HEAD_SIZE * 4
    }

    fn buffer(&self, rows: usize, heads: usize, salt: usize) -> Result<Buffer, Error> {
        let cols = heads * HEAD_SIZE;
        let values: Vec<f32> =
            (0..rows * cols).map(|i| ((i * 37 + salt) % 101) as f32 / 50.0 - 1.0).collect();
        let mut buffer = self.backend.buffer(rows, cols)?;
        self.backend.write(&mut buffer, cols, &values);
        Ok(buffer)
    }

    fn measure(&self, seconds: f64) -> Result<Figures, Error> {
        let Case { backend, layout, rows, context } = *self;
        let blocks: Vec<u32> = (0..context.div_ceil(BLOCK_TOKENS) as u32).collect();
        let mut kv = backend.kv_allocate(layout, blocks.len())?;
        let (k, v) = (self.buffer(context, KV_HEADS, 1)?, self.buffer(context, KV_HEADS, 2)?);
        let all = [Span { rows: 0..context, position: 0, blocks: &blocks }];
        for layer in 0..layout.layers {
            backend.kv_write(&mut kv, layer, &k, &v, &all);
        }
        let q = self.buffer(rows, HEADS, 3)?;
        let mut out = backend.buffer(rows, HEADS * HEAD_SIZE)?;
        let spans = [Span { rows: 0..rows, position: context - rows, blocks: &blocks }];
        let scale = 1.0 / (HEAD_SIZE as f32).sqrt();
        let shape = AttentionShape { heads: HEADS, scale, window: None };
        let (mut writes, mut attentions) = (Vec::new(), Vec::new());
        let start = Instant::now();
        for run in 0.. {
            let layer = run % layout.layers;
            let now = Instant::now();
            backend.kv_write(&mut kv, layer, &k, &v, &spans);
            writes.push(now.elapsed());
            let now = Instant::now();
            backend.attention(shape, layer, &q, &kv, &spans, &mut out);
            attentions.push(now.elapsed());
            if run > 4 && start.elapsed().as_secs_f64() > seconds {
                break;
            }
        }
        let median = |mut times: Vec<Duration>| {
            times.sort();
            times[times.len() / 2].as_secs_f64()
        };
        Ok(Figures { write: median(writes), attention: median(attentions) })
    }
}

/// GB/s of a plain sum over memory that no cache holds, every thread its own part.
fn read_bandwidth(threads: usize, seconds: f64) -> f64 {
    let words = vec![1u64; UNCACHED_BYTES / 8];
    let mut best = f64::INFINITY;
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < 3.0 * seconds {
        let now = Instant::now();
        std::thread::scope(|scope| {
            for part in words.chunks(words.len() / threads) {
                scope.spawn(move || {
                    let sums =
                        part.as_chunks::<32>().0.iter().fold([0u64; 32], |mut sums, words| {
                            for (sum, word) in sums.iter_mut().zip(words) {
                                *sum = sum.wrapping_add(*word);
                            }
                            sums
                        });
                    std::hint::black_box(sums);
                });
            }
        });
        best = best.min(now.elapsed().as_secs_f64());
    }
    UNCACHED_BYTES as f64 / best / 1e9
}
