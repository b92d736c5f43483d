//! Times the feed-forward network of BitNet b1.58 2B-4T (2560 to 6912) for one token, at several
//! shares of dead gates, on every instruction set of this CPU or the one in
//! `BITNET_ISA`. The weights come from memory: layers
//! of distinct weights take turns. The columns of figures take turns too, and each is the best of
//! its runs:
//!
//! * `plain`: every matrix in bands, no shortcut;
//! * `off`: `up` in row order and a column copy of `down`, no shortcut;
//! * `on`: the same with the shortcut.
//!
//! `cargo run --release -p bitnet-cpu --example ffn_speed [SECONDS PER LINE] [LAYERS]`

use std::time::Instant;

use bitnet_core::backend::{
    Activation, ActivationPrecision, Backend, BitLinear, GatedFfn, Norm, Scratch,
};
use bitnet_core::{Error, LinearUse, Shortcuts, TernaryMatrix, WeightScale};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};

const HIDDEN: usize = 2560;
const INTERMEDIATE: usize = 6912;

type Ffn = GatedFfn<CpuBackend>;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let layers = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(8);
    let isas = Isa::from_env()?.map_or(Isa::detected(), |isa| vec![isa]);
    println!("ms per layer and token of {HIDDEN} to {INTERMEDIATE}, best of the runs");
    println!(
        "{:>6} {:>7} {:>5}  {:>6} {:>6} {:>6}  {:>7} {:>7}  {:>5} {:>5}  {:>5} {:>5} {:>5}",
        "isa",
        "threads",
        "dead",
        "plain",
        "off",
        "on",
        "off/pl.",
        "on/pl.",
        "up",
        "down",
        "MB",
        "GB/s",
        "plain"
    );
    for dead in [0, 25, 50, 75, 90] {
        let plain = load(layers, dead, false)?;
        let sparse = load(layers, dead, true)?;
        for isa in isas.iter().copied() {
            for threads in [1, 2] {
                measure(isa, threads, dead, &plain, &sparse, seconds)?;
            }
        }
    }
    Ok(())
}

/// Layers of which `dead` per cent of the gates are negative for positive inputs.
fn load(layers: usize, dead: u32, sparse: bool) -> Result<Vec<Ffn>, Error> {
    let loader =
        CpuBackend::new(CpuOptions { threads: Some(1), copies: sparse, ..CpuOptions::default() })?;
    let mut state = 1u32;
    let mut random = move |below: u32| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 16) % below
    };
    let mut linear = |rows, cols, usage, dead: Option<u32>| {
        let scale = WeightScale::Multiply(0.02);
        let matrix = TernaryMatrix::from_rows(rows, cols, scale, |_, codes| {
            let sign = dead.map(|dead| u8::from(random(100) >= dead));
            for code in codes {
                *code = match sign {
                    // Three of four weights are 0, 0, ±1 and random: a clear sign of the sum.
                    Some(sign) if random(4) == 0 => 2 * sign,
                    Some(_) if random(3) != 0 => 1,
                    _ => random(3) as u8,
                };
            }
        })?;
        let usage = if sparse { usage } else { LinearUse::Dense };
        let weight = loader.load_linear(&matrix, ActivationPrecision::Int8, usage)?;
        Ok::<_, Error>(BitLinear::<CpuBackend> { weight, norm: None })
    };
    (0..layers)
        .map(|_| {
            Ok(Ffn {
                gate: linear(INTERMEDIATE, HIDDEN, LinearUse::Dense, Some(dead))?,
                up: linear(INTERMEDIATE, HIDDEN, LinearUse::SparseOutputs, None)?,
                down: linear(HIDDEN, INTERMEDIATE, LinearUse::SparseInputs, None)?,
                activation: Activation::Relu2,
                sub_norm: Some(Norm { weight: vec![1.0; INTERMEDIATE], eps: 1e-5 }),
            })
        })
        .collect()
}

fn measure(
    isa: Isa,
    threads: usize,
    dead: u32,
    plain: &[Ffn],
    sparse: &[Ffn],
    seconds: f64,
) -> Result<(), Error> {
    let backend = |shortcuts| {
        let (isa, threads) = (Some(isa), Some(threads));
        CpuBackend::new(CpuOptions {
            threads,
            isa,
            shortcuts,
            copies: true,
            ..CpuOptions::default()
        })
    };
    let (off, on) = (backend(Shortcuts::NONE)?, backend(Shortcuts::ALL)?);
    let values: Vec<f32> = (0..HIDDEN).map(|i| (i * 37 % 101) as f32 + 20.0).collect();
    let mut x = off.buffer(1, HIDDEN)?;
    off.write(&mut x, HIDDEN, &values);
    let norm = Norm { weight: vec![1.0; HIDDEN], eps: 1e-5 };
    let wide = || off.buffer(1, INTERMEDIATE);
    let mut scratch = Scratch { normed: wide()?, gate: wide()?, up: wide()? };
    let mut out = off.buffer(1, HIDDEN)?;
    let mut best = [f64::INFINITY; 3];
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        for (best, (backend, layers)) in
            best.iter_mut().zip([(&off, plain), (&off, sparse), (&on, sparse)])
        {
            let run = Instant::now();
            for ffn in layers {
                backend.gated_ffn(&x, 1, Some(&norm), ffn, &mut scratch, &mut out);
            }
            *best = best.min(run.elapsed().as_secs_f64() / layers.len() as f64);
        }
    }
    let counts = on.shortcut_counts();
    let live = |all: u64, skipped: u64| 1.0 - skipped as f64 / all.max(1) as f64;
    let up = live(counts.up_rows, counts.up_rows_skipped);
    let down = live(counts.down_columns, counts.down_columns_skipped);
    let matrix = (HIDDEN * INTERMEDIATE / 4) as f64;
    let bytes = matrix * (1.0 + up + down);
    let ms = best.map(|best| best * 1e3);
    println!(
        "{:>6} {threads:>7} {dead:>4}%  {:>6.3} {:>6.3} {:>6.3}  {:>7.3} {:>7.3}  {up:>5.2} \
         {down:>5.2}  {:>5.1} {:>5.1} {:>5.1}",
        isa.to_string(),
        ms[0],
        ms[1],
        ms[2],
        ms[1] / ms[0],
        ms[2] / ms[0],
        bytes / 1e6,
        bytes / best[2] / 1e9,
        3.0 * matrix / best[0] / 1e9
    );
    Ok(())
}
