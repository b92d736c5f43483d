//! The books of what each operation costs.

use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bitnet_core::OperationProfile;

/// What one call of an operation worked on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Call {
    pub(crate) name: &'static str,
    /// Widths of inputs and outputs.
    pub(crate) shape: Option<[usize; 2]>,
    pub(crate) rows: usize,
    /// Bytes of weights, keys and values that were read.
    pub(crate) bytes: usize,
    /// Multiply-adds with these.
    pub(crate) macs: usize,
}

impl Call {
    /// A call that reads activations alone.
    pub(crate) fn of_rows(name: &'static str, rows: usize) -> Self {
        Call { name, shape: None, rows, bytes: 0, macs: 0 }
    }
}

/// The costs of all operations, where somebody asked for them.
pub(crate) struct Profile(Option<Mutex<Vec<OperationProfile>>>);

impl Profile {
    pub(crate) fn new(wanted: bool) -> Self {
        Profile(wanted.then(Mutex::default))
    }

    /// The time now, if anybody wants to know.
    pub(crate) fn start(&self) -> Option<Instant> {
        self.0.as_ref().map(|_| Instant::now())
    }

    /// Notes a call that ran since `start`.
    pub(crate) fn note(&self, start: Option<Instant>, call: impl FnOnce() -> Call) {
        let (Some(start), Some(books)) = (start, &self.0) else { return };
        let time = start.elapsed();
        let Call { name, shape, rows, bytes, macs } = call();
        let call = OperationProfile {
            name,
            shape,
            single_row: rows == 1,
            calls: 1,
            time,
            bytes: bytes as u64,
            macs: macs as u64,
        };
        call.add_to(&mut books.lock().unwrap_or_else(PoisonError::into_inner));
    }

    /// The costs so far.
    pub(crate) fn read(&self) -> Vec<OperationProfile> {
        let Some(books) = &self.0 else { return Vec::new() };
        books.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
