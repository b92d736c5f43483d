//! Times the ternary product of the gate matrix of BitNet b1.58 2B-4T (6912 x 2560), with norm and
//! quantisation of the input, for 1 token (the weights come from memory: eighteen matrices take turns)
//! to 256, on every instruction set of this CPU or the one in `BITNET_ISA`. Matrices in bands and in
//! triples take turns, and so do their runs.
//!
//! `cargo run --release -p bitnet-cpu --example gemm_speed [SECONDS PER LINE [MOST TOKENS]]`

use std::time::Instant;

use bitnet_core::backend::{ActivationPrecision, Backend, Norm};
use bitnet_core::{Error, LinearUse, TernaryMatrix, TileLayout, TiledMatrix, WeightScale};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa, Linear};
use bitnet_quant::packing::tile;

const ROWS: usize = 6912;
const COLS: usize = 2560;
const MATRICES: usize = 18;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1).map(|argument| argument.parse().ok());
    let seconds = arguments.next().flatten().unwrap_or(0.5);
    let most_tokens = arguments.next().flatten().unwrap_or(f64::INFINITY);
    let matrix = TernaryMatrix::from_rows(ROWS, COLS, WeightScale::Multiply(0.1), |row, codes| {
        for (col, code) in codes.iter_mut().enumerate() {
            *code = ((row * 31 + col * 17 + row * col % 7) % 3) as u8;
        }
    })?;
    println!("GMAC/s of {ROWS} x {COLS}, median and best of the runs");
    println!(
        "{:>8} {:>7} {:>9} {:>6}  {:>15}  {:>15}",
        "isa", "threads", "precision", "tokens", "bands", "triples"
    );
    for isa in Isa::from_env()?.map_or(Isa::detected(), |isa| vec![isa]) {
        for threads in [1, 2] {
            let backend = CpuBackend::new(CpuOptions {
                threads: Some(threads),
                isa: Some(isa),
                ..CpuOptions::default()
            })?;
            for precision in [ActivationPrecision::Int8, ActivationPrecision::F32] {
                let layouts = match precision {
                    ActivationPrecision::Int8 => &[TileLayout::Bands, TileLayout::Triples][..],
                    ActivationPrecision::F32 => &[TileLayout::Bands],
                };
                let linears = (0..MATRICES)
                    .map(|i| load(&backend, &matrix, precision, layouts[i % layouts.len()]))
                    .collect::<Result<Vec<_>, _>>()?;
                for tokens in [1, 2, 4, 8, 16, 64, 128] {
                    if tokens as f64 > most_tokens {
                        break;
                    }
                    let kinds = layouts.len();
                    let rates: String = measure(&backend, &linears, kinds, tokens, seconds)?
                        .into_iter()
                        .map(|(median, best)| format!("  {median:>7.1} {best:>7.1}"))
                        .collect();
                    let (isa, precision) = (isa.to_string(), format!("{precision:?}"));
                    println!("{isa:>8} {threads:>7} {precision:>9} {tokens:>6}{rates}");
                }
            }
        }
    }
    Ok(())
}

/// A matrix in one layout.
fn load(
    backend: &CpuBackend,
    matrix: &TernaryMatrix,
    precision: ActivationPrecision,
    layout: TileLayout,
) -> Result<Linear, Error> {
    let reader = tile::Reader { copies: false, compact: layout == TileLayout::Triples };
    let tiled: TiledMatrix = tile::tiled(matrix, precision, LinearUse::Dense, reader)?;
    backend.load_tiled(&tiled, precision)
}

/// Median and best of the runs on each kind of matrix, which take turns.
fn measure(
    backend: &CpuBackend,
    linears: &[Linear],
    kinds: usize,
    tokens: usize,
    seconds: f64,
) -> Result<Vec<(f64, f64)>, Error> {
    let values: Vec<f32> = (0..tokens * COLS).map(|i| (i * 37 % 101) as f32 - 50.0).collect();
    let mut x = backend.buffer(tokens, COLS)?;
    backend.write(&mut x, COLS, &values);
    let norm = Norm { weight: backend.load_vector(&[1.0; COLS])?, eps: 1e-5 };
    let mut out = backend.buffer(tokens, ROWS)?;
    let mut times = vec![Vec::new(); kinds];
    let start = Instant::now();
    for (i, linear) in linears.iter().enumerate().cycle() {
        let run = Instant::now();
        backend.linears(&x, tokens, Some(&norm), &[linear], &mut [&mut out]);
        times[i % kinds].push(run.elapsed().as_secs_f64());
        if i + 1 == linears.len() && start.elapsed().as_secs_f64() > seconds {
            break;
        }
    }
    let rate = |seconds: f64| (tokens * ROWS * COLS) as f64 / seconds / 1e9;
    Ok(times
        .into_iter()
        .map(|mut times| {
            times.sort_by(f64::total_cmp);
            (rate(times[times.len() / 2]), rate(times[0]))
        })
        .collect())
}
