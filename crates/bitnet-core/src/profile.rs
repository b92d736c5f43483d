//! What the operations of a run have cost: time, bytes and multiply-adds of each kind.

use std::time::Duration;

/// All calls of one kind of operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OperationProfile {
    /// What it does, for people: `linears`, `attention`.
    pub name: &'static str,
    /// Widths of its inputs and outputs, where they tell one call from another: `[2560, 3840]`.
    pub shape: Option<[usize; 2]>,
    /// Whether its steps had one row each, as the decode of one sequence has.
    pub single_row: bool,
    /// How often it ran.
    pub calls: u64,
    /// Wall time of all calls.
    pub time: Duration,
    /// Bytes of weights, keys and values that were read; activations are not counted.
    pub bytes: u64,
    /// Multiply-adds with weights, keys and values, without those that shortcuts left out.
    pub macs: u64,
}
