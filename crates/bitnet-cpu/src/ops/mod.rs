//! The operations: each cuts its work into parts for the threads and calls the kernels on them.

mod attention;
mod linears;
mod rows;
mod screen;
mod table;

use std::sync::{Mutex, MutexGuard, PoisonError};

use bitnet_quant::activation::QuantizedRow;

use crate::arch::Kernels;
use crate::threads::ThreadPool;

/// Elements (of a ternary product: columns of bands) below which waking other threads costs more
/// than it saves.
const SMALL: usize = 16_384;

/// What the operations compute with.
pub(crate) struct Compute {
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: ThreadPool,
    scratch: Mutex<Scratch>,
    pub(crate) head_counts: screen::HeadCounts,
}

/// Memory that operations need between their parts. It grows to the largest step and stays.
#[derive(Default)]
struct Scratch {
    /// Normed inputs, rows padded with zeros to whole tiles.
    inputs: Vec<f32>,
    /// Quantised inputs, padded likewise.
    quantized: Vec<i8>,
    /// Per input row.
    rows: Vec<QuantizedRow>,
    /// Sums of the quantised inputs, per row and scale group, for each length of groups.
    group_sums: Vec<i32>,
    /// Partial results of attention.
    partials: Vec<f32>,
    /// What the screen of a head needs.
    screen: screen::Scratch,
    /// What each thread needs for itself.
    threads: Vec<Mutex<ThreadScratch>>,
}

#[derive(Default)]
struct ThreadScratch {
    floats: Vec<f32>,
    bytes: Vec<i8>,
}

impl Compute {
    pub(crate) fn new(kernels: &'static Kernels, pool: ThreadPool) -> Self {
        let threads = (0..pool.threads()).map(|_| Mutex::default()).collect();
        let scratch = Mutex::new(Scratch { threads, ..Scratch::default() });
        Compute { kernels, pool, scratch, head_counts: screen::HeadCounts::default() }
    }

    /// The scratch of the one operation that runs.
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        lock(&self.scratch)
    }

    /// Into how many parts an operation of so many elements is best cut: a few per thread, so that
    /// a thread that is held up leaves its share to the others.
    fn parts(&self, elements: usize) -> usize {
        let threads = self.pool.threads();
        if threads == 1 || elements < SMALL { 1 } else { (elements / SMALL * 2).min(4 * threads) }
    }
}

/// Locks scratch memory, whose contents no operation takes over from the one before.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The first `len` elements, after growing to have them. Their contents are left from before.
fn at_least<T: Clone + Default>(vec: &mut Vec<T>, len: usize) -> &mut [T] {
    if vec.len() < len {
        vec.resize(len, T::default());
    }
    &mut vec[..len]
}
