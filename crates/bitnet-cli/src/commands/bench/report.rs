//! What `bitnet bench` has measured, in every form that it prints.

use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, anyhow};
use bitnet_core::budget::human_bytes;
use bitnet_core::machine::Machine;
use bitnet_cpu::ceilings::Ceilings;
use bitnet_inference::bench::{Measurement, Test};
use serde::Serialize;

use super::compare::ComparedWith;
use super::count;
use crate::output::{self, number, percent};

#[derive(Serialize)]
pub struct Report {
    pub machine: MachineFacts,
    pub model: ModelFacts,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub compared_with: Option<ComparedWith>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ceilings: Vec<CeilingFacts>,
    pub rows: Vec<Row>,
}

#[derive(Serialize)]
pub struct MachineFacts {
    pub cpu: String,
    pub cores: usize,
    /// The backend as it names itself.
    pub instruction_set: String,
    pub memory_bytes: Option<u64>,
    pub os: String,
    pub version: &'static str,
    /// Of the measurement, in UTC.
    pub date: String,
}

impl MachineFacts {
    pub fn collect() -> Self {
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
    pub fn lines(&self) -> [String; 2] {
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
pub struct ModelFacts {
    pub name: String,
    pub random_weights: bool,
    pub ternary_weights: u64,
    pub head_weights: u64,
    pub head_bytes: u64,
    pub kv_type: &'static str,
    pub gate_sparsity_asked: Option<f64>,
    /// Measured share of gates that are zero or less.
    pub gate_sparsity: Option<f64>,
}

#[derive(Serialize)]
pub struct CeilingFacts {
    pub threads: usize,
    pub clock_ghz: Option<f64>,
    pub multiply_add: Vec<RateFacts>,
    pub read: Vec<RateFacts>,
}

#[derive(Serialize)]
pub struct RateFacts {
    pub name: String,
    pub giga_per_s: f64,
}

impl CeilingFacts {
    pub fn new(ceilings: &Ceilings) -> Self {
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
pub struct Spread {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

#[derive(Serialize)]
pub struct Row {
    pub test: String,
    #[serde(skip)]
    pub of: Test,
    pub threads: usize,
    pub repetitions: usize,
    /// Of all sequences together.
    pub tokens_per_s: Spread,
    pub sequences: usize,
    /// The median of one of them.
    pub tokens_per_s_each: f64,
    /// The median of an earlier run, and this one's over it.
    pub before_tokens_per_s: Option<f64>,
    pub ratio: Option<f64>,
    pub gmac_per_s: f64,
    pub gb_per_s: f64,
    pub mac_ceiling_share: Option<f64>,
    pub read_ceiling_share: Option<f64>,
    /// What memory gave beside the repetitions.
    #[serde(skip)]
    pub read_rates: Vec<f64>,
    /// The same test at the least depth that was measured, and what this one costs beyond it: time and bytes of
    /// keys and values per token, and the rate of the one over the other as a share of the reads.
    pub beyond: Option<String>,
    pub beyond_ms: Option<f64>,
    pub beyond_kv_bytes: Option<f64>,
    pub beyond_read_share: Option<f64>,
    pub ternary_macs_per_token: f64,
    pub head_macs_per_token: f64,
    pub ternary_bytes_per_token: f64,
    pub head_bytes_per_token: f64,
    pub kv_bytes_per_token: f64,
    pub up_rows_skipped: f64,
    pub down_columns_skipped: f64,
    pub head_rows_screened: f64,
    pub head_rows_rescored: f64,
}

impl Row {
    /// Of one of some measurements that were taken in turn.
    pub fn new(
        measurement: &Measurement,
        all: &[Measurement],
        threads: usize,
        ceilings: Option<&Ceilings>,
    ) -> Self {
        let (median, min, max) = measurement.tokens_per_s();
        let (gmac_per_s, gb_per_s) = (measurement.gmac_per_s(), measurement.gb_per_s());
        let Measurement { test, times, read_rates, savings, work } = measurement;
        let same = |other: &&Measurement| Test { depth: test.depth, ..other.test } == *test;
        let shallow = all.iter().filter(same).min_by_key(|other| other.test.depth);
        let shallow = shallow.filter(|other| other.test.depth < test.depth);
        let deeper = shallow.map(|other| measurement.beyond(other));
        Row {
            test: test.name(),
            of: *test,
            threads,
            repetitions: times.len(),
            tokens_per_s: Spread { median, min, max },
            sequences: test.batch,
            tokens_per_s_each: median / test.batch as f64,
            before_tokens_per_s: None,
            ratio: None,
            gmac_per_s,
            gb_per_s,
            mac_ceiling_share: ceilings.map(|c| gmac_per_s / c.gmac_per_s()),
            read_ceiling_share: measurement.read_share(),
            read_rates: read_rates.clone(),
            beyond: shallow.map(|other| other.test.name()),
            beyond_ms: deeper.map(|deeper| 1e3 * deeper.seconds),
            beyond_kv_bytes: deeper.map(|deeper| deeper.kv_bytes),
            beyond_read_share: deeper.and_then(|deeper| deeper.read_share),
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
            let of_these = self.rows.iter().filter(|row| row.threads == ceilings.threads);
            let mut beside: Vec<f64> = of_these.flat_map(|row| row.read_rates.clone()).collect();
            beside.sort_by(f64::total_cmp);
            if let [least, .., most] = beside[..] {
                let median = number(beside[beside.len() / 2]);
                let (least, most) = (number(least), number(most));
                lines.push(format!("  GB/s read beside the tests: {median} ({least}..{most})"));
            }
        }
        if let Some(ceilings) = self.ceilings.first() {
            lines.push(format!(
                "shares are of {} and of the reads beside each test",
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

    pub fn table(&self) -> String {
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
        let mut rows = vec![Self::BEYOND.map(String::from)];
        rows.extend(self.rows.iter().filter_map(Self::beyond));
        if rows.len() > 1 {
            let right = [false, true, true, true, true, true, true];
            let _ = write!(text, "\n{}", output::table(&rows, right));
        }
        let at_once = self.rows.iter().filter(|row| row.sequences > 1);
        let mut rows = vec![Self::AT_ONCE.map(String::from)];
        rows.extend(at_once.map(|row| self.at_once(row)));
        if rows.len() > 1 {
            let right = [false, true, true, true, true, true];
            let _ = write!(text, "\n{}", output::table(&rows, right));
        }
        if let Some(compared) = &self.compared_with {
            let _ = write!(text, "\n{}", compared.table(&self.rows));
        }
        text
    }

    const BEYOND: [&str; 7] = ["depth", "threads", "beyond", "ms", "MB KV", "GB/s", "share"];

    /// What a deeper context costs per token.
    fn beyond(row: &Row) -> Option<[String; 7]> {
        let (ms, kv_bytes) = (row.beyond_ms?, row.beyond_kv_bytes?);
        // Where the machine changed its pace meanwhile, the deeper context may seem to take no time.
        let rate = (ms > 0.0).then(|| kv_bytes / ms / 1e6);
        let share = row.beyond_read_share.filter(|share| share.is_finite());
        Some([
            row.test.clone(),
            row.threads.to_string(),
            row.beyond.clone()?,
            number(ms),
            mega(kv_bytes),
            rate.map_or("-".to_owned(), number),
            share.map_or("-".to_owned(), percent),
        ])
    }

    const AT_ONCE: [&str; 6] =
        ["tokens/s", "threads", "sequences", "together", "each", "times one"];

    fn at_once(&self, row: &Row) -> [String; 6] {
        // The same test of one sequence, if it was measured.
        let alone = self
            .rows
            .iter()
            .find(|other| other.threads == row.threads && other.of == Test { batch: 1, ..row.of });
        let times = alone.map(|alone| row.tokens_per_s.median / alone.tokens_per_s.median);
        [
            row.test.clone(),
            row.threads.to_string(),
            row.sequences.to_string(),
            number(row.tokens_per_s.median),
            number(row.tokens_per_s_each),
            times.map_or("-".to_owned(), number),
        ]
    }

    pub fn markdown(&self) -> String {
        let mut text = String::new();
        for line in self.facts() {
            let _ = writeln!(text, "* {}", line.trim());
        }
        text.push('\n');
        let names = [&Self::SPEED[..], &Self::WORK[1..], &["each", "before", "ratio"]].concat();
        let mut lines = vec![names.join(" | "), vec!["---"; names.len()].join(" | ")];
        for row in &self.rows {
            let or_none = |value: Option<f64>| value.map_or("-".to_owned(), number);
            let last = [
                number(row.tokens_per_s_each),
                or_none(row.before_tokens_per_s),
                or_none(row.ratio),
            ];
            let cells = [&Self::speed(row)[..], &Self::work(row)[1..], &last].concat();
            lines.push(cells.join(" | "));
        }
        for line in lines {
            let _ = writeln!(text, "| {line} |");
        }
        text
    }

    /// One line per row, with the names that the JSON has, spread flattened.
    pub fn csv(&self) -> Result<String> {
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
