//! `bitnet bench`: how fast a model reads and writes on this machine.

mod grade;
mod operations;

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow, bail};
use bitnet_core::budget::human_bytes;
use bitnet_core::machine::{Machine, physical_cores};
use bitnet_cpu::ceilings::Ceilings;
use bitnet_inference::bench::{Bench, Kind, Measurement, Test, Weights};
use bitnet_model::shapes::Shape;
use serde::Serialize;

use super::{WrongUsage, session_options};
use crate::args::{BenchArgs, BenchFormat};
use crate::output::{self, Messages, number, percent};

pub fn run(args: BenchArgs, messages: &Messages) -> Result<()> {
    if args.ops {
        return operations::run(&args, messages);
    }
    if args.grade {
        return grade::run(&args, messages);
    }
    let options = session_options(args.kv_type);
    let weights = match &args.shape {
        None => {
            super::pull::fetch(&args.model.model, messages)?;
            Weights::of_model(&args.model.model)?
        }
        Some(name) => {
            let shape = Shape::named(name).expect("the flag takes names of shapes");
            if args.gate_sparsity.is_some() && !shape.has_relu2() {
                return Err(WrongUsage(format!(
                    "{name} has no relu2 gates, so none of them is exactly zero: leave out \
                     --gate-sparsity"
                ))
                .into());
            }
            messages.summary(&format!("making random weights of {name}"));
            Weights::of_shape(shape, args.gate_sparsity)?
        }
    };
    weights.notes.iter().for_each(|note| messages.note(note));
    let mut generate = args.generate.clone();
    if weights.config.pooling.is_some() {
        messages.note("this model makes embeddings: it generates nothing");
        generate.clear();
    }
    let tests = tests(&args, &generate);
    if tests.is_empty() {
        let sentence = "there is nothing to measure: give -p or -n a number above 0";
        return Err(WrongUsage(sentence.to_owned()).into());
    }
    for test in &tests {
        let (length, context) = (test.depth + test.tokens, weights.config.context_length);
        if length > context {
            bail!(
                "{} needs {length} tokens, but the context of {} has {context}: choose a shorter \
                 one",
                test.name(),
                weights.path.display()
            );
        }
    }

    let threads = match args.threads.is_empty() {
        true => vec![physical_cores()],
        false => args.threads.clone(),
    };
    let mut report = Report {
        machine: MachineFacts::collect(),
        model: ModelFacts {
            name: weights.path.display().to_string(),
            random_weights: args.shape.is_some(),
            ternary_weights: bitnet_model::weights::ternary_weights(&weights.config),
            head_weights: 0,
            head_bytes: 0,
            kv_type: options.kv_type.name(),
            gate_sparsity_asked: args.gate_sparsity,
            gate_sparsity: None,
        },
        ceilings: Vec::new(),
        rows: Vec::new(),
    };
    for &threads in &threads {
        let ceilings = match args.ceilings {
            false => None,
            true => {
                messages.summary(&format!("measuring the ceilings of {}", count(threads)));
                Some(Ceilings::measure(threads)?)
            }
        };
        messages.summary(&format!("loading for {}", count(threads)));
        let bench = Bench::load(&weights, threads, options.kv_type)?;
        report.machine.instruction_set = bench.backend_name();
        let costs = bench.costs();
        report.model.head_weights = costs.head_rows * costs.hidden;
        report.model.head_bytes = costs.head_rows * costs.head_row_bytes;
        if report.rows.is_empty() {
            report.model.gate_sparsity = bench.gate_sparsity()?;
        }
        let mut filled = None;
        for &test in &tests {
            // Tests of one depth and batch stand together and share what is filled once.
            let place = (test.depth, test.batch);
            let mut sequences = match filled.take() {
                Some((at, sequences)) if at == place => sequences,
                _ => {
                    let same = tests.iter().filter(|other| (other.depth, other.batch) == place);
                    let most = same.map(|other| other.depth + other.tokens).max();
                    let most = most.expect("this test itself");
                    let mut sequences = bench.sequences(test.batch, most)?;
                    if test.depth > 0 {
                        messages.summary(&format!("filling {} tokens of context", test.depth));
                    }
                    bench.fill(&mut sequences, test.depth)?;
                    sequences
                }
            };
            let measurement = bench.run(test, &mut sequences, usize::from(args.reps))?;
            let row = Row::new(&measurement, threads, ceilings.as_ref());
            messages.summary(&format!(
                "{}, {}: {} tokens/s",
                row.test,
                count(threads),
                number(row.tokens_per_s.median)
            ));
            report.rows.push(row);
            filled = Some((place, sequences));
        }
        report.ceilings.extend(ceilings.iter().map(CeilingFacts::new));
    }
    match args.format {
        BenchFormat::Json => output::json(&report)?,
        BenchFormat::Table => output::lines(&report.table())?,
        BenchFormat::Csv => output::lines(&report.csv()?)?,
        BenchFormat::Md => output::lines(&report.markdown())?,
    }
    Ok(())
}

/// What the flags ask for, tests of the same depth and batch together.
fn tests(args: &BenchArgs, generate: &[usize]) -> Vec<Test> {
    let mut tests = Vec::new();
    for &batch in &args.batch {
        for &depth in &args.depth {
            let of = |kind, tokens| Test { kind, tokens, depth, batch: usize::from(batch) };
            let prefills = args.prompt.iter().map(|&tokens| of(Kind::Prefill, tokens));
            let decodes = generate.iter().map(|&tokens| of(Kind::Decode, tokens));
            tests.extend(prefills.chain(decodes).filter(|test| test.tokens > 0));
        }
    }
    tests
}

fn count(threads: usize) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}

#[derive(Serialize)]
struct Report {
    machine: MachineFacts,
    model: ModelFacts,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    ceilings: Vec<CeilingFacts>,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct MachineFacts {
    cpu: String,
    cores: usize,
    /// The backend as it names itself.
    instruction_set: String,
    memory_bytes: Option<u64>,
    os: String,
    version: &'static str,
    /// Of the measurement, in UTC.
    date: String,
}

impl MachineFacts {
    fn collect() -> Self {
        let Machine { cpu, cores, memory_bytes, os } = Machine::this();
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |t| t.as_secs());
        MachineFacts {
            cpu,
            cores,
            instruction_set: String::new(),
            memory_bytes,
            os,
            version: env!("CARGO_PKG_VERSION"),
            date: date(seconds),
        }
    }

    /// For people.
    fn lines(&self) -> [String; 2] {
        let MachineFacts { cpu, cores, instruction_set, memory_bytes, os, version, date } = self;
        let memory = memory_bytes.map_or("unknown memory".to_owned(), human_bytes);
        let plural = if *cores == 1 { "" } else { "s" };
        [
            format!("{cpu}, {cores} core{plural}, {memory}, {os}"),
            format!("bitnet {version}, {instruction_set}, {date}"),
        ]
    }
}

/// The date in UTC of a time in seconds since 1970.
fn date(seconds: u64) -> String {
    // Years that begin in March have their odd day at the end ("days_from_civil" of H. Hinnant).
    let days = seconds / 86_400 + 719_468;
    let (era, day) = (days / 146_097, days % 146_097);
    let year = (day - day / 1460 + day / 36_524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = era * 400 + year + u64::from(month <= 2);
    format!("{year:04}-{month:02}-{day:02}")
}

#[derive(Serialize)]
struct ModelFacts {
    name: String,
    random_weights: bool,
    ternary_weights: u64,
    head_weights: u64,
    head_bytes: u64,
    kv_type: &'static str,
    gate_sparsity_asked: Option<f64>,
    /// Measured share of gates that are zero or less.
    gate_sparsity: Option<f64>,
}

#[derive(Serialize)]
struct CeilingFacts {
    threads: usize,
    clock_ghz: Option<f64>,
    multiply_add: Vec<RateFacts>,
    read: Vec<RateFacts>,
}

#[derive(Serialize)]
struct RateFacts {
    name: String,
    giga_per_s: f64,
}

impl CeilingFacts {
    fn new(ceilings: &Ceilings) -> Self {
        let rates = |rates: &[bitnet_cpu::ceilings::Rate]| {
            let facts = |rate: &bitnet_cpu::ceilings::Rate| RateFacts {
                name: rate.name.clone(),
                giga_per_s: rate.giga_per_s,
            };
            rates.iter().map(facts).collect()
        };
        CeilingFacts {
            threads: ceilings.threads,
            clock_ghz: ceilings.clock_ghz,
            multiply_add: rates(&ceilings.multiply_add),
            read: rates(&ceilings.read),
        }
    }
}

#[derive(Serialize)]
struct Spread {
    median: f64,
    min: f64,
    max: f64,
}

#[derive(Serialize)]
struct Row {
    test: String,
    threads: usize,
    repetitions: usize,
    tokens_per_s: Spread,
    gmac_per_s: f64,
    gb_per_s: f64,
    mac_ceiling_share: Option<f64>,
    read_ceiling_share: Option<f64>,
    ternary_macs_per_token: f64,
    head_macs_per_token: f64,
    ternary_bytes_per_token: f64,
    head_bytes_per_token: f64,
    kv_bytes_per_token: f64,
    up_rows_skipped: f64,
    down_columns_skipped: f64,
    head_rows_screened: f64,
    head_rows_rescored: f64,
}

impl Row {
    fn new(measurement: &Measurement, threads: usize, ceilings: Option<&Ceilings>) -> Self {
        let (median, min, max) = measurement.tokens_per_s();
        let (gmac_per_s, gb_per_s) = (measurement.gmac_per_s(), measurement.gb_per_s());
        let Measurement { test, times, savings, work } = measurement;
        Row {
            test: test.name(),
            threads,
            repetitions: times.len(),
            tokens_per_s: Spread { median, min, max },
            gmac_per_s,
            gb_per_s,
            mac_ceiling_share: ceilings.map(|c| gmac_per_s / c.gmac_per_s()),
            read_ceiling_share: ceilings.map(|c| gb_per_s / c.gb_per_s()),
            ternary_macs_per_token: work.ternary_macs,
            head_macs_per_token: work.head_macs,
            ternary_bytes_per_token: work.ternary_bytes,
            head_bytes_per_token: work.head_bytes,
            kv_bytes_per_token: work.kv_bytes,
            up_rows_skipped: savings.up_rows_skipped,
            down_columns_skipped: savings.down_columns_skipped,
            head_rows_screened: savings.head_rows_screened,
            head_rows_rescored: savings.head_rows_rescored,
        }
    }
}

fn mega(value: f64) -> String {
    number(value / 1e6)
}

impl Report {
    /// What stands above the rows, a line each.
    fn facts(&self) -> Vec<String> {
        let model = &self.model;
        let mut lines = self.machine.lines().to_vec();
        lines.push(format!(
            "{}{}: {} M ternary weights, head {}, KV {}",
            model.name,
            if model.random_weights { " (random weights)" } else { "" },
            mega(model.ternary_weights as f64),
            human_bytes(model.head_bytes),
            model.kv_type,
        ));
        if let Some(measured) = model.gate_sparsity {
            let asked = match model.gate_sparsity_asked {
                None => String::new(),
                Some(asked) => format!(" (asked for: {})", percent(asked)),
            };
            lines.push(format!("gates at zero: {}{asked}", percent(measured)));
        }
        for ceilings in &self.ceilings {
            let rates = |rates: &[RateFacts]| {
                let rate = |rate: &RateFacts| format!("{} {}", rate.name, number(rate.giga_per_s));
                rates.iter().map(rate).collect::<Vec<_>>().join(", ")
            };
            let clock = ceilings.clock_ghz.map_or(String::new(), |ghz| format!(", {ghz:.2} GHz"));
            lines.push(format!("ceilings of {}{clock}", count(ceilings.threads)));
            lines.push(format!("  GMAC/s: {}", rates(&ceilings.multiply_add)));
            lines.push(format!("  GB/s read: {}", rates(&ceilings.read)));
        }
        if let Some(ceilings) = self.ceilings.first() {
            lines.push(format!(
                "shares are of {} and of the best read",
                ceilings.multiply_add[0].name
            ));
        }
        lines
    }

    const SPEED: [&str; 8] =
        ["test", "threads", "tokens/s", "min..max", "GMAC/s", "share", "GB/s", "share"];

    fn speed(row: &Row) -> [String; 8] {
        let share = |share: Option<f64>| share.map_or("-".to_owned(), percent);
        [
            row.test.clone(),
            row.threads.to_string(),
            number(row.tokens_per_s.median),
            format!("{}..{}", number(row.tokens_per_s.min), number(row.tokens_per_s.max)),
            number(row.gmac_per_s),
            share(row.mac_ceiling_share),
            number(row.gb_per_s),
            share(row.read_ceiling_share),
        ]
    }

    const WORK: [&str; 9] =
        ["per token", "MMAC", "head", "MB", "head", "KV", "up -", "down -", "head rows"];

    fn work(row: &Row) -> [String; 9] {
        // Rows that are computed in full: all where none is screened.
        let in_full = 1.0 - row.head_rows_screened + row.head_rows_rescored;
        [
            row.test.clone(),
            mega(row.ternary_macs_per_token),
            mega(row.head_macs_per_token),
            mega(row.ternary_bytes_per_token),
            mega(row.head_bytes_per_token),
            mega(row.kv_bytes_per_token),
            percent(row.up_rows_skipped),
            percent(row.down_columns_skipped),
            percent(in_full),
        ]
    }

    fn table(&self) -> String {
        let mut text = String::new();
        for line in self.facts() {
            let _ = writeln!(text, "{line}");
        }
        let mut rows = vec![Self::SPEED.map(String::from)];
        rows.extend(self.rows.iter().map(Self::speed));
        let right = [false, true, true, true, true, true, true, true];
        let _ = write!(text, "\n{}", output::table(&rows, right));
        let mut rows = vec![Self::WORK.map(String::from)];
        // The work is the same for every number of threads.
        let first = self.rows.first().map(|row| row.threads);
        rows.extend(self.rows.iter().filter(|row| Some(row.threads) == first).map(Self::work));
        let right = [false, true, true, true, true, true, true, true, true];
        let _ = write!(text, "\n{}", output::table(&rows, right));
        text
    }

    fn markdown(&self) -> String {
        let mut text = String::new();
        for line in self.facts() {
            let _ = writeln!(text, "* {}", line.trim());
        }
        text.push('\n');
        let mut lines = vec![[&Self::SPEED[..], &Self::WORK[1..]].concat().join(" | ")];
        lines.push(vec!["---"; Self::SPEED.len() + Self::WORK.len() - 1].join(" | "));
        for row in &self.rows {
            lines.push([&Self::speed(row)[..], &Self::work(row)[1..]].concat().join(" | "));
        }
        for line in lines {
            let _ = writeln!(text, "| {line} |");
        }
        text
    }

    /// One line per row, with the names that the JSON has, spread flattened.
    fn csv(&self) -> Result<String> {
        let mut text = String::new();
        for row in &self.rows {
            let value = serde_json::to_value(row)?;
            let fields = value.as_object().ok_or_else(|| anyhow!("a row is an object"))?;
            let mut names = Vec::new();
            let mut cells = Vec::new();
            let mut cell = |name: String, value: &serde_json::Value| {
                names.push(name);
                cells.push(match value {
                    serde_json::Value::Null => String::new(),
                    serde_json::Value::String(text) => text.clone(),
                    number => number.to_string(),
                });
            };
            for (name, value) in fields {
                match value.as_object() {
                    None => cell(name.clone(), value),
                    Some(inner) => {
                        inner.iter().for_each(|(part, v)| cell(format!("{name}_{part}"), v));
                    }
                }
            }
            cell("gate_sparsity".to_owned(), &serde_json::to_value(self.model.gate_sparsity)?);
            if text.is_empty() {
                let _ = writeln!(text, "{}", names.join(","));
            }
            let _ = writeln!(text, "{}", cells.join(","));
        }
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_those_of_the_calendar() {
        assert_eq!(date(0), "1970-01-01");
        assert_eq!(date(951_782_400), "2000-02-29");
        assert_eq!(date(1_709_251_199), "2024-02-29");
        assert_eq!(date(4_107_542_400), "2100-03-01");
    }
}
