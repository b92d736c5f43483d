//! `bitnet bench --ops`: single operations on weights that stay in the cache.

use std::fmt::Write;

use anyhow::Result;
use bitnet_inference::bench::{Operation, OperationMeasurement};
use serde::Serialize;

use super::count;
use super::report::{MachineFacts, Spread};
use crate::args::{BenchArgs, BenchFormat};
use crate::output::{self, Messages, number};

#[derive(Serialize)]
struct Report {
    machine: MachineFacts,
    rows: Vec<Row>,
}

#[derive(Serialize)]
struct Row {
    operation: String,
    threads: usize,
    repetitions: usize,
    passes_per_s: Spread,
    macs_per_pass: u64,
    gmac_per_s: f64,
}

impl Row {
    fn new(measurement: &OperationMeasurement) -> Self {
        let (median, min, max) = measurement.per_s();
        Row {
            operation: measurement.operation.name(),
            threads: measurement.threads,
            repetitions: measurement.seconds.len(),
            passes_per_s: Spread { median, min, max },
            macs_per_pass: measurement.operation.macs(),
            gmac_per_s: measurement.gmac_per_s(),
        }
    }
}

const COLUMNS: [&str; 6] = ["operation", "threads", "passes/s", "min..max", "us", "GMAC/s"];

fn cells(row: &Row) -> [String; 6] {
    let Spread { median, min, max } = row.passes_per_s;
    [
        row.operation.clone(),
        row.threads.to_string(),
        number(median),
        format!("{}..{}", number(min), number(max)),
        number(1e6 / median),
        number(row.gmac_per_s),
    ]
}

pub fn run(args: &BenchArgs, messages: &Messages) -> Result<()> {
    // One core unless more are asked for: that is what an operation costs.
    let threads = if args.threads.is_empty() { vec![1] } else { args.threads.clone() };
    let mut rows = Vec::new();
    for threads in threads {
        messages.summary(&format!("measuring operations with {}", count(threads)));
        for operation in Operation::ALL {
            rows.push(Row::new(&operation.measure(threads, usize::from(args.reps))?));
        }
    }
    let mut machine = MachineFacts::collect();
    machine.instruction_set = bitnet_inference::bench::instruction_set()?;
    let report = Report { machine, rows };
    let facts = report.machine.lines();
    match args.format {
        BenchFormat::Json => output::json(&report)?,
        BenchFormat::Table => {
            let mut lines = vec![COLUMNS.map(String::from)];
            lines.extend(report.rows.iter().map(cells));
            let table = output::table(&lines, [false, true, true, true, true, true]);
            output::lines(&format!("{}\n\n{table}", facts.join("\n")))?;
        }
        BenchFormat::Csv => {
            let mut text = "operation,threads,repetitions,passes_per_s_median,passes_per_s_min,\
                            passes_per_s_max,macs_per_pass,gmac_per_s\n"
                .to_owned();
            for row in &report.rows {
                let Row { operation, threads, repetitions, passes_per_s, .. } = row;
                let Spread { median, min, max } = passes_per_s;
                let _ = writeln!(
                    text,
                    "{operation},{threads},{repetitions},{median},{min},{max},{},{}",
                    row.macs_per_pass, row.gmac_per_s
                );
            }
            output::lines(&text)?;
        }
        BenchFormat::Md => {
            let mut text: String = facts.iter().map(|fact| format!("* {fact}\n")).collect();
            let _ = writeln!(text, "\n| {} |", COLUMNS.join(" | "));
            let _ = writeln!(text, "| {} |", ["---"; COLUMNS.len()].join(" | "));
            for row in &report.rows {
                let _ = writeln!(text, "| {} |", cells(row).join(" | "));
            }
            output::lines(&text)?;
        }
    }
    Ok(())
}
