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

impl OperationProfile {
    /// Adds calls to those of their kind, or after all others if they are the first.
    pub fn add_to(self, all: &mut Vec<OperationProfile>) {
        let kind = |profile: &OperationProfile| (profile.name, profile.shape, profile.single_row);
        match all.iter_mut().find(|other| kind(other) == kind(&self)) {
            None => all.push(self),
            Some(other) => {
                other.calls += self.calls;
                other.time += self.time;
                other.bytes += self.bytes;
                other.macs += self.macs;
            }
        }
    }

    /// Several profiles, such as those of the stages of a pipeline, as one.
    pub fn merged(profiles: impl IntoIterator<Item = OperationProfile>) -> Vec<OperationProfile> {
        let mut all = Vec::new();
        profiles.into_iter().for_each(|profile| profile.add_to(&mut all));
        all
    }
}
