//! The flags of `bitnet bench`.

use std::path::PathBuf;

use clap::{Args, ValueEnum};

use super::{KvTypeChoice, ModelName, threads};

#[derive(Debug, Args)]
#[command(after_help = "\
pp512 reads a prompt of 512 tokens up to the first token after it, tg128
generates 128 tokens greedily, tg128x4@1000 does so for 4 sequences at once
that hold 1000 tokens each. Every test runs once to warm up, then all of them
in turn, --reps times. What the columns mean is in docs/performance.md. --ops
measures single operations on weights that stay in the cache, --grade what a
user of the model meets, with marks from A+ to D.

--compare shows the speeds beside those of an earlier run, test by test, and
flags those that are more than 5 % slower.

Examples:
  bitnet bench
  bitnet bench --shape bitnet-2b-4t -p 128,512 -n 64 -t 1,2 --ceilings
  bitnet bench -m models/bitnet-2b.gguf -p 0 -n 64 -d 0,1000,4000 --kv-type f16
  bitnet bench --shape bitnet-2b-4t --gate-sparsity 0 --format json
  bitnet bench --format json > before.json
  bitnet bench --compare before.json --fail-on-regression --plot bench.svg")]
pub struct BenchArgs {
    #[command(flatten)]
    pub model: ModelName,

    /// Measure single operations in place of a model
    #[arg(long, conflicts_with_all = ["model", "shape", "prompt", "generate", "depth", "batch", "kv_type", "ceilings"])]
    pub ops: bool,

    /// Measure requests, a batch, memory and this machine, and grade them
    #[arg(long, conflicts_with_all = ["ops", "shape", "prompt", "generate", "depth", "batch", "kv_type", "ceilings", "threads"])]
    pub grade: bool,

    /// Random weights of a known shape in place of a model
    #[arg(long, value_name = "NAME", value_parser = shape_names(), conflicts_with = "model")]
    pub shape: Option<String>,

    /// Share of gates that are zero, 0 to 1, with a shape that has relu2
    #[arg(long, value_name = "F", requires = "shape", value_parser = share)]
    #[arg(allow_negative_numbers = true)]
    pub gate_sparsity: Option<f64>,

    /// Tokens of the prompts to read; 0 reads none
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',', default_value = "512")]
    #[arg(value_parser = test_tokens)]
    pub prompt: Vec<usize>,

    /// Tokens to generate; 0 generates none
    #[arg(short = 'n', long, value_name = "TOKENS", value_delimiter = ',', default_value = "128")]
    #[arg(value_parser = test_tokens)]
    pub generate: Vec<usize>,

    /// Tokens that are in the context before each test
    #[arg(short, long, value_name = "TOKENS", value_delimiter = ',', default_value = "0")]
    #[arg(value_parser = test_tokens)]
    pub depth: Vec<usize>,

    /// Sequences at once
    #[arg(short, long, value_name = "N", value_delimiter = ',', default_value = "1")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batch: Vec<u16>,

    /// Numbers of threads [default: one per physical core]
    #[arg(short, long, value_name = "N", value_delimiter = ',', value_parser = threads)]
    pub threads: Vec<usize>,

    /// Repetitions of each test
    #[arg(long, value_name = "N", default_value_t = 5)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub reps: u16,

    /// Storage of keys and values; f32 is exact, the others approximate
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvTypeChoice::F32)]
    pub kv_type: KvTypeChoice,

    /// Measure what the machine can do at most, and each result's share of it
    #[arg(long)]
    pub ceilings: bool,

    /// Compare with the results of an earlier run, made by --format json
    #[arg(long, value_name = "FILE", conflicts_with_all = ["ops", "grade"])]
    pub compare: Option<PathBuf>,

    /// With --compare: exit status 1 if a test is more than 5 % slower
    #[arg(long, requires = "compare")]
    pub fail_on_regression: bool,

    /// Draw the results as a chart
    #[arg(long, value_name = "FILE.svg", conflicts_with_all = ["ops", "grade"])]
    pub plot: Option<PathBuf>,

    /// Form of the results
    #[arg(long, value_enum, value_name = "FORMAT", default_value_t = BenchFormat::Table)]
    pub format: BenchFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum BenchFormat {
    Table,
    Json,
    Csv,
    Md,
}

fn shape_names() -> clap::builder::PossibleValuesParser {
    bitnet_model::shapes::ALL.map(|shape| shape.name).into()
}

fn share(text: &str) -> Result<f64, String> {
    let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
    share.ok_or_else(|| "give a share from 0 to 1, such as 0.5".to_owned())
}

/// Far more than any model's context.
const MAX_TEST_TOKENS: usize = 1 << 24;

fn test_tokens(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|&n| n <= MAX_TEST_TOKENS)
        .ok_or_else(|| format!("give a number from 0 to {MAX_TEST_TOKENS}"))
}
