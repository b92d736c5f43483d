//! `bitnet bench --grade`: what a user of a model meets on this machine, with marks.

use anyhow::Result;
use bitnet_inference::benchmark::{Benchmark, Percentiles, Shares, benchmark};
use serde::Serialize;

use super::report::MachineFacts;
use crate::args::{BenchArgs, BenchFormat};
use crate::commands::{WrongUsage, pull};
use crate::output::{self, Messages};

/// What every model is asked to continue.
const PROMPT: &str = "Once upon a time";

/// Requests per repetition that was asked for: percentiles want some.
const REQUESTS: usize = 4;

#[derive(Serialize)]
struct Report {
    machine: MachineFacts,
    model: String,
    iterations: usize,
    latency_ms: Times,
    first_token_ms: Times,
    single_token_ms: Times,
    tokens_per_s: f64,
    batch_tokens_per_s: f64,
    prefill: Speed,
    decode: Speed,
    memory_bytes: u64,
    passes_per_s: f64,
    grades: Vec<Mark>,
    grade: String,
}

#[derive(Serialize)]
struct Times {
    p50: f64,
    p95: f64,
    p99: f64,
}

#[derive(Serialize)]
struct Speed {
    tokens_per_s: f64,
    mac_ceiling_share: f64,
    read_ceiling_share: f64,
}

#[derive(Serialize)]
struct Mark {
    part: &'static str,
    weight_percent: u32,
    grade: String,
}

impl Times {
    fn new(times: &Percentiles) -> Self {
        let [p50, p95, p99] =
            [times.p50, times.p95, times.p99].map(|time| 1e3 * time.as_secs_f64());
        Times { p50, p95, p99 }
    }
}

impl Speed {
    fn new(shares: &Shares) -> Self {
        let Shares { tokens_per_s, multiply_adds, read } = *shares;
        Speed { tokens_per_s, mac_ceiling_share: multiply_adds, read_ceiling_share: read }
    }
}

impl Report {
    fn new(machine: MachineFacts, benchmark: &Benchmark) -> Self {
        let mark = |(part, weight_percent, _, grade): (_, _, String, _)| Mark {
            part,
            weight_percent,
            grade: format!("{grade}"),
        };
        Report {
            machine,
            model: benchmark.model.clone(),
            iterations: benchmark.iterations,
            latency_ms: Times::new(&benchmark.latency),
            first_token_ms: Times::new(&benchmark.first_token),
            single_token_ms: Times::new(&benchmark.single_token),
            tokens_per_s: benchmark.tokens_per_s,
            batch_tokens_per_s: benchmark.batch_tokens_per_s,
            prefill: Speed::new(&benchmark.prefill),
            decode: Speed::new(&benchmark.decode),
            memory_bytes: benchmark.memory_bytes,
            passes_per_s: benchmark.passes_per_s,
            grades: benchmark.grades().into_iter().map(mark).collect(),
            grade: benchmark.grade().to_string(),
        }
    }
}

pub fn run(args: &BenchArgs, messages: &Messages) -> Result<()> {
    if matches!(args.format, BenchFormat::Csv | BenchFormat::Md) {
        return Err(WrongUsage("--grade prints --format table or json".to_owned()).into());
    }
    pull::fetch(&args.model.model, messages)?;
    messages.summary(&format!("measuring {} and this machine", args.model.model));
    let benchmark = benchmark(&args.model.model, PROMPT, REQUESTS * usize::from(args.reps))?;
    let mut machine = MachineFacts::collect();
    machine.instruction_set = benchmark.backend.clone();
    if args.format == BenchFormat::Json {
        output::json(&Report::new(machine, &benchmark))?;
    } else {
        output::lines(&format!("{}\n\n{benchmark}\n", machine.lines().join("\n")))?;
    }
    Ok(())
}
