//! Times the feed-forward network of BitNet b1.58 2B-4T (2560 to 6912) for one token, at several
//! shares of dead gates, on every instruction set of this CPU or the one in
//! `BITNET_ISA`. The weights come from memory: layers
//! of distinct weights take turns. The columns of figures take turns too, and each is the median of
//! its runs:
//!
//! * `bands`: every matrix in bands of two bits, no shortcut;
//! * `off`, `on`: `up` in row order and a column copy of `down` in two bits, without and with shortcuts;
//! * `off`, `on` again: the same in compact layouts, where the instruction set takes them.
//!
//! `cargo run --release -p bitnet-cpu --example ffn_speed [SECONDS PER LINE] [LAYERS]`

use std::time::Instant;

use bitnet_core::backend::{
    Activation, ActivationPrecision, Backend, BitLinear, GatedFfn, Norm, Scratch,
};
use bitnet_core::{Error, LinearUse, Shortcuts, TernaryMatrix, WeightScale};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_quant::packing::tile::{self, Reader};

const HIDDEN: usize = 2560;
const INTERMEDIATE: usize = 6912;

type Ffn = GatedFfn<CpuBackend>;

fn main() -> Result<(), Error> {
    let mut arguments = std::env::args().skip(1);
    let seconds = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let layers = arguments.next().and_then(|s| s.parse().ok()).unwrap_or(8);
    let isas = Isa::from_env()?.map_or(Isa::detected(), |isa| vec![isa]);
    println!("us per layer and token of {HIDDEN} to {INTERMEDIATE}, medians of the runs");
    println!("{:33}{:^15}{:^15}", "", "two bits", "compact");
    println!(
        "{:>7} {:>7} {:>5} {:>9}  {:>6} {:>6}  {:>6} {:>6}   {:>5} {:>5}",
        "isa", "threads", "dead", "bands", "off", "on", "off", "on", "up", "down",
    );
    for dead in [0, 25, 50, 75, 90] {
        for isa in isas.iter().copied() {
            let layouts: &[Option<Reader>] = match Isa::takes_compact(Some(isa))? {
                true => &[None, TWO_BITS, COMPACT],
                false => &[None, TWO_BITS],
            };
            let loaded = layouts.iter().map(|&reader| load(isa, layers, dead, reader));
            let loaded: Vec<Vec<Ffn>> = loaded.collect::<Result<_, _>>()?;
            for threads in [1, 2] {
                measure(isa, threads, dead, &loaded, seconds)?;
            }
        }
    }
    Ok(())
}

const TWO_BITS: Option<Reader> = Some(Reader { copies: true, compact: false });
const COMPACT: Option<Reader> = Some(Reader { copies: true, compact: true });

/// Layers of which `dead` per cent of the gates are negative for positive inputs; in bands of two bits
/// if there is no reader to lay them out for.
fn load(isa: Isa, layers: usize, dead: u32, reader: Option<Reader>) -> Result<Vec<Ffn>, Error> {
    let loader =
        CpuBackend::new(CpuOptions { threads: Some(1), isa: Some(isa), ..CpuOptions::default() })?;
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
        let precision = ActivationPrecision::Int8;
        let usage = if reader.is_some() { usage } else { LinearUse::Dense };
        let tiled = tile::tiled(&matrix, precision, usage, reader.unwrap_or_default())?;
        let weight = loader.load_tiled(&tiled, precision)?;
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
    loaded: &[Vec<Ffn>],
    seconds: f64,
) -> Result<(), Error> {
    let backend = |shortcuts| {
        let (isa, threads) = (Some(isa), Some(threads));
        CpuBackend::new(CpuOptions { threads, isa, shortcuts, ..CpuOptions::default() })
    };
    let (off, on) = (backend(Shortcuts::NONE)?, backend(Shortcuts::ALL)?);
    let values: Vec<f32> = (0..HIDDEN).map(|i| (i * 37 % 101) as f32 + 20.0).collect();
    let mut x = off.buffer(1, HIDDEN)?;
    off.write(&mut x, HIDDEN, &values);
    let norm = Norm { weight: vec![1.0; HIDDEN], eps: 1e-5 };
    let wide = || off.buffer(1, INTERMEDIATE);
    let mut scratch = Scratch { normed: wide()?, gate: wide()?, up: wide()? };
    let mut out = off.buffer(1, HIDDEN)?;
    let [bands, sparse @ ..] = loaded else { unreachable!("bands and one more") };
    let shortcuts = sparse.iter().flat_map(|layers| [(&off, layers), (&on, layers)]);
    let variants: Vec<_> = [(&off, bands)].into_iter().chain(shortcuts).collect();
    let mut times = vec![Vec::new(); variants.len()];
    let start = Instant::now();
    while start.elapsed().as_secs_f64() < seconds {
        for (times, (backend, layers)) in times.iter_mut().zip(&variants) {
            let run = Instant::now();
            for ffn in *layers {
                backend.gated_ffn(&x, 1, Some(&norm), ffn, &mut scratch, &mut out);
            }
            times.push(run.elapsed().as_secs_f64() / layers.len() as f64);
        }
    }
    let counts = on.shortcut_counts();
    let live = |all: u64, skipped: u64| 1.0 - skipped as f64 / all.max(1) as f64;
    let up = live(counts.up_rows, counts.up_rows_skipped);
    let down = live(counts.down_columns, counts.down_columns_skipped);
    let medians: Vec<String> = times
        .iter_mut()
        .map(|times| {
            times.sort_by(f64::total_cmp);
            format!("{:.1}", times[times.len() / 2] * 1e6)
        })
        .collect();
    let [bands, sparse @ ..] = &medians[..] else { unreachable!("as above") };
    print!("{:>7} {threads:>7} {dead:>4}% {bands:>9}", isa.to_string());
    for pair in sparse.chunks(2) {
        print!("  {:>6} {:>6}", pair[0], pair[1]);
    }
    println!("{:1$}  {up:>5.2} {down:>5.2}", "", if sparse.len() > 2 { 1 } else { 16 });
    Ok(())
}
