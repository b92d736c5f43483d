//! Times the ternary product of the gate matrix of BitNet b1.58 2B-4T (6912 x 2560) on every
//! instruction set of this CPU, with norm and quantisation of the input, for 1 token (the weights
//! come from memory: eighteen matrices take turns) to 256.
//!
//! `cargo run --release -p bitnet-cpu --example gemm_speed [SECONDS PER FIGURE]`

use std::time::Instant;

use bitnet_core::backend::{ActivationPrecision, Backend, Norm};
use bitnet_core::{Error, LinearUse, TernaryMatrix, WeightScale};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};

const ROWS: usize = 6912;
const COLS: usize = 2560;
const MATRICES: usize = 18;

fn main() -> Result<(), Error> {
    let seconds = std::env::args().nth(1).and_then(|s| s.parse().ok()).unwrap_or(0.5);
    let matrix = TernaryMatrix::from_rows(ROWS, COLS, WeightScale::Multiply(0.1), |row, codes| {
        for (col, code) in codes.iter_mut().enumerate() {
            *code = ((row * 31 + col * 17 + row * col % 7) % 3) as u8;
        }
    })?;
    println!("GMAC/s of {ROWS} x {COLS}, best of the runs");
    println!("{:>8} {:>8} {:>10} {:>8} {:>8}", "isa", "threads", "precision", "tokens", "GMAC/s");
    for isa in Isa::detected() {
        for threads in [1, 2] {
            let backend = CpuBackend::new(CpuOptions {
                threads: Some(threads),
                isa: Some(isa),
                ..CpuOptions::default()
            })?;
            for precision in [ActivationPrecision::Int8, ActivationPrecision::F32] {
                let linears: Vec<_> = (0..MATRICES)
                    .map(|_| backend.load_linear(&matrix, precision, LinearUse::Dense))
                    .collect::<Result<_, _>>()?;
                for tokens in [1, 2, 4, 8, 16, 64, 128] {
                    let gmacs = measure(&backend, &linears, tokens, seconds)?;
                    println!(
                        "{:>8} {threads:>8} {:>10} {tokens:>8} {gmacs:>8.1}",
                        isa.to_string(),
                        format!("{precision:?}")
                    );
                }
            }
        }
    }
    Ok(())
}

fn measure(
    backend: &CpuBackend,
    linears: &[bitnet_cpu::Linear],
    tokens: usize,
    seconds: f64,
) -> Result<f64, Error> {
    let values: Vec<f32> = (0..tokens * COLS).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
    let mut x = backend.buffer(tokens, COLS)?;
    backend.write(&mut x, COLS, &values);
    let norm = Norm { weight: backend.load_vector(&[1.0; COLS])?, eps: 1e-5 };
    let mut out = backend.buffer(tokens, ROWS)?;
    let mut best = f64::INFINITY;
    let start = Instant::now();
    for linear in linears.iter().cycle() {
        let run = Instant::now();
        backend.linears(&x, tokens, Some(&norm), &[linear], &mut [&mut out]);
        best = best.min(run.elapsed().as_secs_f64());
        if start.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    Ok((tokens * ROWS * COLS) as f64 / best / 1e9)
}
