//! What `run --profile` reports: the time of each kind of operation, the bytes it read, and what
//! bounds it.

use std::time::Duration;

use bitnet_core::OperationProfile;
use bitnet_cpu::ceilings::Ceilings;
use serde::Serialize;

use crate::output::{self, number, percent};

/// Share of a ceiling from which on it is what bounds an operation.
const BOUND: f64 = 0.5;

/// The costs of a run.
#[derive(Serialize)]
pub struct Profile {
    threads: usize,
    /// 10^9 bytes per second and multiply-adds per second that this machine can do at most.
    read_ceiling_gb_per_s: f64,
    mac_ceiling_gmac_per_s: f64,
    operations: Vec<Operation>,
}

#[derive(Serialize)]
struct Operation {
    name: &'static str,
    /// Widths of inputs and outputs.
    shape: Option<[usize; 2]>,
    /// Whether its steps had one row each.
    single_row: bool,
    calls: u64,
    ms: f64,
    bytes: u64,
    macs: u64,
    gb_per_s: f64,
    gmac_per_s: f64,
    bound_by: &'static str,
}

impl Profile {
    pub fn new(operations: Vec<OperationProfile>, ceilings: &Ceilings) -> Self {
        let (read, mac) = (ceilings.gb_per_s(), ceilings.gmac_per_s());
        let operation = |profile: OperationProfile| {
            let OperationProfile { name, shape, single_row, calls, time, bytes, macs } = profile;
            let giga =
                |count: u64| count as f64 / time.max(Duration::from_nanos(1)).as_nanos() as f64;
            let (gb_per_s, gmac_per_s) = (giga(bytes), giga(macs));
            Operation {
                name,
                shape,
                single_row,
                calls,
                ms: 1e3 * time.as_secs_f64(),
                bytes,
                macs,
                gb_per_s,
                gmac_per_s,
                bound_by: bound(gb_per_s / read, gmac_per_s / mac),
            }
        };
        Profile {
            threads: ceilings.threads,
            read_ceiling_gb_per_s: read,
            mac_ceiling_gmac_per_s: mac,
            operations: operations.into_iter().map(operation).collect(),
        }
    }

    /// As tables: steps of several tokens, then those of one.
    pub fn table(&self) -> String {
        let Profile { threads, read_ceiling_gb_per_s, mac_ceiling_gmac_per_s, operations } = self;
        let plural = if *threads == 1 { "" } else { "s" };
        let mut text = format!(
            "{threads} thread{plural} read at most {} GB/s here, and multiply {} G a second\n",
            number(*read_ceiling_gb_per_s),
            number(*mac_ceiling_gmac_per_s),
        );
        for (single_row, title) in [(false, "several rows"), (true, "one row")] {
            let mut operations: Vec<_> =
                operations.iter().filter(|operation| operation.single_row == single_row).collect();
            operations.sort_by(|a, b| b.ms.total_cmp(&a.ms));
            let all: f64 = operations.iter().map(|operation| operation.ms).sum();
            let header = [title, "calls", "us", "share", "kB", "GB/s", "bound by"];
            let mut rows = vec![header.map(String::from)];
            rows.extend(operations.iter().map(|operation| {
                let calls = operation.calls as f64;
                let shape = operation.shape.map(|[from, to]| format!(" {from} to {to}"));
                let read = operation.bytes > 0;
                let shown = |value: f64| if read { number(value) } else { "-".to_owned() };
                [
                    format!("{}{}", operation.name, shape.unwrap_or_default()),
                    operation.calls.to_string(),
                    number(1e3 * operation.ms / calls),
                    percent(operation.ms / all),
                    shown(operation.bytes as f64 / calls / 1e3),
                    shown(operation.gb_per_s),
                    if read { operation.bound_by.to_owned() } else { "-".to_owned() },
                ]
            }));
            if rows.len() > 1 {
                let right = [false, true, true, true, true, true, false];
                text.push_str(&format!("\n{}", output::table(&rows, right)));
            }
        }
        text
    }
}

/// What bounds an operation that reaches these shares of the ceilings.
fn bound(read: f64, mac: f64) -> &'static str {
    if mac >= BOUND && mac >= read {
        "compute"
    } else if read > 1.05 {
        "cache"
    } else if read >= BOUND {
        "memory"
    } else {
        "neither"
    }
}

#[cfg(test)]
mod tests {
    use bitnet_cpu::ceilings::Rate;

    use super::*;

    #[test]
    fn a_profile_says_what_bounds_each_operation() {
        let rate = |giga_per_s| Rate { name: String::new(), giga_per_s };
        let ceilings = Ceilings {
            threads: 2,
            clock_ghz: None,
            multiply_add: vec![rate(400.0)],
            read: vec![rate(30.0), rate(40.0)],
        };
        let operation = |name, shape, single_row, ms, bytes, macs| OperationProfile {
            name,
            shape,
            single_row,
            calls: 10,
            time: Duration::from_millis(ms),
            bytes,
            macs,
        };
        let profile = Profile::new(
            vec![
                operation("linears", Some([2560, 3840]), false, 30, 300_000_000, 9_000_000_000),
                operation("linears", Some([2560, 3840]), true, 10, 300_000_000, 1_200_000_000),
                operation("attention", None, true, 5, 50_000_000, 50_000_000),
                operation("rope", None, true, 5, 0, 0),
                operation("rows of head", None, true, 1, 80_000_000, 10_000_000),
            ],
            &ceilings,
        );
        assert_eq!(
            profile.table(),
            "\
2 threads read at most 40.0 GB/s here, and multiply 400 G a second

several rows          calls    us  share     kB  GB/s  bound by
linears 2560 to 3840     10  3000  100 %  30000  10.0  compute

one row               calls    us  share     kB  GB/s  bound by
linears 2560 to 3840     10  1000   48 %  30000  30.0  memory
attention                10   500   24 %   5000  10.0  neither
rope                     10   500   24 %      -     -  -
rows of head             10   100  4.8 %   8000  80.0  cache
"
        );
    }
}
