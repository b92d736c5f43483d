//! Times the output head of the 2B shape in full and screened, on each instruction set:
//! `cargo run --release -p bitnet-cpu --example head_speed [VOCABULARY HIDDEN]`.
//!
//! Runs alternate, and the best of each is shown. GB/s are those of the bytes that each has to read.

use std::time::Instant;

use bitnet_core::backend::{Backend, Norm};
use bitnet_core::{DType, Keep, Pick, Tensor};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_quant::screen;
use bitnet_testing::Random;

const REPETITIONS: usize = 15;

fn normal(random: &mut Random) -> f32 {
    // The sum of the bytes of 64 random bits: variance 8 (256² - 1) / 12.
    let sum: i32 = random.bits().to_le_bytes().iter().map(|&byte| i32::from(byte)).sum();
    (sum - 1020) as f32 / 209.0
}

fn main() {
    let mut args = std::env::args().skip(1).map(|arg| arg.parse().expect("a number"));
    let (vocabulary, hidden) = (args.next().unwrap_or(128_256), args.next().unwrap_or(2560));
    let mut random = Random::new(1);
    let values = (0..vocabulary * hidden).map(|_| normal(&mut random).to_bits() >> 16);
    let bytes: Vec<u8> = values.flat_map(|bits| (bits as u16).to_le_bytes()).collect();
    let table = Tensor::new(DType::BF16, vec![vocabulary, hidden], bytes.into()).unwrap();
    let start = Instant::now();
    let stored = screen::build(&table).unwrap();
    println!("building the screen: {:.2} s", start.elapsed().as_secs_f64());
    let state: Vec<f32> = (0..hidden).map(|_| normal(&mut random)).collect();
    for isa in Isa::detected().into_iter().rev() {
        for threads in [1, 2] {
            let options =
                CpuOptions { isa: Some(isa), threads: Some(threads), ..CpuOptions::default() };
            let backend = CpuBackend::new(options).unwrap();
            let norm = Norm { weight: backend.load_vector(&vec![1.0; hidden]).unwrap(), eps: 1e-5 };
            let loaded = backend.load_table(&table).unwrap();
            let screen = backend.load_screen(&stored).unwrap().expect("shortcuts are on");
            let mut x = backend.buffer(1, hidden).unwrap();
            backend.write(&mut x, hidden, &state);
            let mut out = backend.buffer(1, vocabulary).unwrap();
            let mut candidates = Vec::new();
            let mut best = [f64::INFINITY; 4];
            let keeps = [Keep::Largest(1), Keep::Largest(40), Keep::Within(3.0)];
            let mut survivors = [0; 3];
            for _ in 0..REPETITIONS {
                let start = Instant::now();
                backend.head(&x, &[0], &norm, &loaded, &mut out);
                best[0] = best[0].min(start.elapsed().as_secs_f64());
                for (i, keep) in keeps.into_iter().enumerate() {
                    let start = Instant::now();
                    backend
                        .screened_head(
                            &x,
                            &[Pick { row: 0, keep, exact_ids: &[] }],
                            &norm,
                            &loaded,
                            &screen,
                            std::slice::from_mut(&mut candidates),
                        )
                        .unwrap();
                    best[i + 1] = best[i + 1].min(start.elapsed().as_secs_f64());
                    survivors[i] = candidates.len();
                }
            }
            let full = table.data().len() as f64;
            print!("{}: full {:.2} ms", backend.name(), 1e3 * best[0]);
            print!(" ({:.1} GB/s)", full / best[0] / 1e9);
            for (i, name) in ["largest 1", "largest 40", "within 3"].into_iter().enumerate() {
                let read =
                    stored.data().len() as f64 + full / vocabulary as f64 * survivors[i] as f64;
                let time = best[i + 1];
                print!(
                    "; {name} {:.2} ms ({:.1} GB/s, {} rows)",
                    1e3 * time,
                    read / time / 1e9,
                    survivors[i]
                );
            }
            println!();
        }
    }
}
