//! The operations: each cuts its work into parts for the threads and calls the kernels on them.

mod attention;
mod ffn;
mod linears;
mod rows;
mod screen;
mod table;

pub(crate) use ffn::Ffn;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bitnet_core::{ShortcutCounts, Shortcuts};
use bitnet_quant::activation::QuantizedRow;
use bitnet_quant::packing::tile::{self, Tile};

use crate::arch::Kernels;
use crate::profile::Profile;
use crate::threads::{Cut, ThreadPool};

/// Elements (of a ternary product: columns of bands) below which waking other threads costs more
/// than it saves.
const SMALL: usize = 16_384;

/// Most parts of an operation, for each thread.
const PARTS_PER_THREAD: usize = 4;

/// Bands in the last parts of a matrix: about 3 microseconds for one token at the speed of memory.
const LEAST_BANDS: usize = 8;

/// What the operations compute with.
pub(crate) struct Compute {
    pub(crate) kernels: &'static Kernels,
    pub(crate) pool: ThreadPool,
    pub(crate) shortcuts: Shortcuts,
    /// Shared by replicas.
    pub(crate) counts: Arc<Counts>,
    /// As well.
    pub(crate) profile: Arc<Profile>,
    scratch: Mutex<Scratch>,
}

/// Memory that operations need between their parts. It grows to the largest step and stays.
#[derive(Default)]
struct Scratch {
    inputs: InputScratch,
    /// Quantised inputs spread for rows computed by themselves.
    planes: Vec<i8>,
    /// Columns with a live input, and that input, in the order in which they are read.
    columns: Vec<(u32, i8)>,
    /// Sums of the quantised inputs, per row and scale group, for each length of groups.
    group_sums: Vec<i32>,
    /// Partial results of attention.
    partials: Vec<f32>,
    /// What the screen of a head needs.
    screen: screen::Scratch,
    /// What each thread needs for itself.
    threads: Vec<Mutex<ThreadScratch>>,
}

/// Prepared inputs of linear layers.
#[derive(Default)]
struct InputScratch {
    /// Normed inputs, rows padded with zeros to whole tiles.
    floats: Vec<f32>,
    /// Quantised inputs, padded likewise.
    quantized: Vec<i8>,
    /// Per input row.
    rows: Vec<QuantizedRow>,
}

#[derive(Default)]
struct ThreadScratch {
    floats: Vec<f32>,
    shorts: Vec<i16>,
    bytes: Vec<i8>,
    halves: Vec<[u8; 2]>,
    /// Integer sums of a band of a linear layer.
    acc: Vec<[i32; tile::ROWS]>,
    /// Sums of a few bands of a linear layer.
    totals: Vec<[[f32; tile::ROWS]; linears::TOKENS]>,
    /// A band of a matrix in row order.
    tiles: Vec<Tile>,
    /// Rows with a live gate, ascending and in the order in which they are read; their sums in that
    /// order, and the sums of all rows.
    live_rows: Vec<u32>,
    row_order: Vec<u32>,
    live_sums: Vec<i32>,
    row_sums: Vec<i32>,
    /// Columns with a live input, and that input, ascending; and the sums of all rows over the columns
    /// of this thread.
    live_columns: Vec<(u32, i8)>,
    column_sums: Vec<i32>,
    /// Sums of a few columns.
    narrow: Vec<i16>,
}

/// [`ShortcutCounts`] that threads add to.
#[derive(Default)]
pub(crate) struct Counts {
    up_rows: AtomicU64,
    up_rows_skipped: AtomicU64,
    down_columns: AtomicU64,
    down_columns_skipped: AtomicU64,
    head_rows: AtomicU64,
    head_rows_rescored: AtomicU64,
}

impl Counts {
    pub(crate) fn read(&self) -> ShortcutCounts {
        let read = |count: &AtomicU64| count.load(Ordering::Relaxed);
        ShortcutCounts {
            up_rows: read(&self.up_rows),
            up_rows_skipped: read(&self.up_rows_skipped),
            down_columns: read(&self.down_columns),
            down_columns_skipped: read(&self.down_columns_skipped),
            head_rows: read(&self.head_rows),
            head_rows_rescored: read(&self.head_rows_rescored),
        }
    }
}

fn count(count: &AtomicU64, more: usize) {
    count.fetch_add(more as u64, Ordering::Relaxed);
}

impl Compute {
    pub(crate) fn new(
        kernels: &'static Kernels,
        pool: ThreadPool,
        shortcuts: Shortcuts,
        counts: Arc<Counts>,
        profile: Arc<Profile>,
    ) -> Self {
        let threads = (0..pool.threads()).map(|_| Mutex::default()).collect();
        let scratch = Mutex::new(Scratch { threads, ..Scratch::default() });
        Compute { kernels, pool, shortcuts, counts, profile, scratch }
    }

    /// The scratch of the one operation that runs.
    fn scratch(&self) -> MutexGuard<'_, Scratch> {
        lock(&self.scratch)
    }

    /// Into how many parts an operation of so many elements is best cut: a few per thread, so that
    /// a thread that is held up leaves its share to the others.
    fn parts(&self, elements: usize) -> usize {
        let threads = self.pool.threads();
        if threads == 1 || elements < SMALL {
            1
        } else {
            (elements / SMALL * 2).min(PARTS_PER_THREAD * threads)
        }
    }

    /// How so many bands, each of `unit` numbers of the result, are shared out in an operation of so many
    /// elements.
    fn bands(&self, bands: usize, unit: usize, elements: usize) -> Cut {
        let (parts, threads) = (self.parts(elements), self.pool.threads());
        if threads > 1 && parts == PARTS_PER_THREAD * threads {
            return Cut::Tapered { unit, least: LEAST_BANDS, threads };
        }
        Cut::Even(bands.div_ceil(parts) * unit)
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
