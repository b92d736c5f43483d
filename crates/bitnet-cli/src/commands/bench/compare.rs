//! How speeds compare with those of an earlier run.

use anyhow::{Result, anyhow, bail};
use bitnet_inference::bench::Test;
use serde::{Deserialize, Serialize};

use super::report::{Report, Row};
use crate::output::{self, number};

/// How much slower a test may be before it is a regression.
pub const TOLERATED_PERCENT: u32 = 5;

/// What is needed of the JSON of an earlier run.
#[derive(Deserialize)]
pub struct Earlier {
    #[serde(skip)]
    name: String,
    machine: EarlierMachine,
    model: EarlierModel,
    rows: Vec<EarlierRow>,
}

#[derive(Deserialize)]
struct EarlierMachine {
    cpu: String,
    instruction_set: String,
    version: String,
    date: String,
}

#[derive(Deserialize)]
struct EarlierModel {
    name: String,
    kv_type: String,
}

#[derive(Deserialize)]
struct EarlierRow {
    test: String,
    threads: usize,
    tokens_per_s: EarlierSpread,
}

#[derive(Deserialize)]
struct EarlierSpread {
    median: f64,
}

/// Which run this one is compared with.
#[derive(Serialize)]
pub struct ComparedWith {
    file: String,
    version: String,
    date: String,
}

impl Earlier {
    pub fn parse(text: &str, name: String) -> Result<Self> {
        let earlier: Earlier = serde_json::from_str(text).map_err(|error| {
            anyhow!("{name}: holds no results as `bitnet bench --format json` prints them: {error}")
        })?;
        Ok(Earlier { name, ..earlier })
    }

    /// Refuses a run that has nothing in common with what is going to be measured.
    pub fn must_have_one_of(&self, tests: &[Test], threads: &[usize]) -> Result<()> {
        let has = |test: &Test| threads.iter().any(|&n| self.median(&test.name(), n).is_some());
        if tests.iter().any(has) {
            return Ok(());
        }
        let rows: Vec<String> =
            self.rows.iter().map(|row| format!("{} by {}", row.test, row.threads)).collect();
        bail!(
            "{}: has none of these tests, by as many threads: it has {}",
            self.name,
            rows.join(", ")
        );
    }

    fn median(&self, test: &str, threads: usize) -> Option<f64> {
        let row = self.rows.iter().find(|row| row.test == test && row.threads == threads)?;
        (row.tokens_per_s.median > 0.0).then_some(row.tokens_per_s.median)
    }

    /// What makes the two runs hard to compare, a sentence each.
    pub fn differences(&self, report: &Report) -> Vec<String> {
        let facts = [
            ("processor", &self.machine.cpu, report.machine.cpu.as_str()),
            ("model", &self.model.name, report.model.name.as_str()),
            ("KV type", &self.model.kv_type, report.model.kv_type),
            ("backend", &self.machine.instruction_set, report.machine.instruction_set.as_str()),
        ];
        let name = &self.name;
        let differs = facts.into_iter().filter(|(_, before, now)| before != now);
        differs
            .map(|(what, before, now)| format!("{name} is of another {what}: {before}, not {now}"))
            .collect()
    }

    /// Puts the earlier medians beside those of the report, and names the tests that have become
    /// slower than is tolerated.
    pub fn compare(&self, report: &mut Report) -> Vec<String> {
        for row in &mut report.rows {
            row.before_tokens_per_s = self.median(&row.test, row.threads);
            row.ratio = row.before_tokens_per_s.map(|before| row.tokens_per_s.median / before);
        }
        report.compared_with = Some(ComparedWith {
            file: self.name.clone(),
            version: self.machine.version.clone(),
            date: self.machine.date.clone(),
        });
        report.rows.iter().filter(|row| is_regression(row)).map(|row| row.test.clone()).collect()
    }
}

fn is_regression(row: &Row) -> bool {
    row.ratio.is_some_and(is_slower)
}

/// Whether the share of an earlier speed is less than is tolerated.
fn is_slower(ratio: f64) -> bool {
    100.0 * ratio < 100.0 - f64::from(TOLERATED_PERCENT)
}

impl ComparedWith {
    /// For people, a line per test that both runs have.
    pub fn table(&self, rows: &[Row]) -> String {
        let header = ["tokens/s", "threads", "before", "now", "ratio", ""];
        let mut cells = vec![header.map(String::from)];
        for row in rows {
            let (Some(before), Some(ratio)) = (row.before_tokens_per_s, row.ratio) else {
                continue;
            };
            cells.push([
                row.test.clone(),
                row.threads.to_string(),
                number(before),
                number(row.tokens_per_s.median),
                format!("{ratio:.3}"),
                if is_regression(row) { "SLOWER".to_owned() } else { String::new() },
            ]);
        }
        let table = output::table(&cells, [false, true, true, true, true, false]);
        format!("{}\n{table}", self.sentence())
    }

    /// Which run it was.
    pub fn sentence(&self) -> String {
        let ComparedWith { file, version, date } = self;
        format!("compared with {file}: bitnet {version}, {date}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn five_percent_are_tolerated() {
        assert_eq!([0.9499, 0.95, 1.0, 2.0].map(is_slower), [true, false, false, false]);
    }
}
