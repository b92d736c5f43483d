//! How much memory can be had, asked before a model is loaded.

use crate::error::Error;

/// Bytes of memory this process can still get: what the system says is available, or what the
/// container's limit leaves if that is less. `None` where the system does not tell.
pub fn available_memory() -> Option<u64> {
    let mut system = sysinfo::System::new().ok()?;
    system.refresh_memory();
    let machine = system.available_memory();
    Some(system.cgroup_limits().map_or(machine, |limits| machine.min(limits.free_memory)))
}

/// Refuses `what` when it needs more bytes than [`available_memory`] reports.
pub fn require(what: &str, needed: u64) -> Result<(), Error> {
    match available_memory() {
        Some(available) if needed > available => {
            Err(Error::Memory { what: what.to_owned(), needed, available })
        }
        _ => Ok(()),
    }
}

/// Bytes for people, in powers of 1000: `1.18 GB`.
pub fn human_bytes(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "kB", "MB", "GB", "TB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 999.5 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ if value < 9.995 => format!("{value:.2} {}", UNITS[unit]),
        _ if value < 99.95 => format!("{value:.1} {}", UNITS[unit]),
        _ => format!("{value:.0} {}", UNITS[unit]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_are_written_with_three_digits() {
        assert_eq!(human_bytes(999), "999 B");
        assert_eq!(human_bytes(1_184_000_000), "1.18 GB");
        assert_eq!(human_bytes(52_100_000), "52.1 MB");
        assert_eq!(human_bytes(999_900), "1.00 MB");
    }

    #[test]
    fn more_than_the_machine_has_is_refused_with_both_numbers() {
        let error = require("a test", u64::MAX).unwrap_err().to_string();
        assert!(error.contains("a test needs") && error.contains("available"), "{error}");
    }

    #[test]
    fn some_memory_is_available() {
        assert!(available_memory().is_none_or(|bytes| bytes > 1 << 20));
    }
}
