//! A fork-join pool: one caller and its workers share the parts of a run.
//!
//! A step of a small model has hundreds of runs of some ten microseconds each, so that waking
//! threads must be rare: workers and the caller spin briefly before they sleep. The parts are
//! claimed one by one from a counter, so a worker whose core is busy elsewhere delays nobody: a run
//! ends when its parts are done, whoever did them. A run allocates nothing.
//!
//! What a part may write is described by a [`Partition`]: pieces of slices that do not overlap. The
//! closure that computes a part gets its own piece, so code outside this file is safe code. Results
//! never depend on which thread computes what.

use std::any::Any;
use std::cell::UnsafeCell;
use std::io;
use std::marker::PhantomData;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering, fence};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle, Thread};

use crate::affinity;

/// Turns of the spin loop before a thread sleeps: about a tenth of a millisecond.
const SPINS: usize = 4_000;

/// Threads that compute parts of a run together: the calling thread and the workers.
pub(crate) struct ThreadPool {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
    /// Held during a run: the pool serves one caller at a time.
    turn: Mutex<()>,
}

struct Shared {
    /// Parts of the current run that nobody has claimed. Claiming is one decrement; a thread that
    /// has claimed a part may read `run` until it has counted the part as finished.
    unclaimed: AtomicUsize,
    /// Parts of the current run that are not finished.
    unfinished: AtomicUsize,
    /// The current run. Written by the caller while both counters are 0.
    run: UnsafeCell<Run>,
    /// What the first panicking part said.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
    /// The caller, when it sleeps until the last part is finished.
    caller: Mutex<Option<Thread>>,
    caller_sleeps: AtomicBool,
    sleepers: Vec<AtomicBool>,
    stop: AtomicBool,
}

/// The closure of a run with its lifetime erased, and how many parts the run has.
#[derive(Clone, Copy)]
struct Run {
    work: *const (dyn Fn(usize, usize) + Sync),
    parts: usize,
}

// SAFETY: `run` is the only field that is not Sync by itself. It is written by the one caller that
// holds `turn`, while no part is unfinished, and read by threads that hold a claimed, unfinished
// part; the counters order the two (see `work_on_parts` and `run_parts`).
unsafe impl Sync for Shared {}
// SAFETY: the pointer in `run` is to a `Sync` closure and is followed only during its run.
unsafe impl Send for Shared {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing here is left half-changed by a panic: parts are unwound before any lock is taken.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Shared {
    /// Claims parts and computes them until none is left.
    fn work_on_parts(&self, thread: usize) {
        loop {
            // Acquire: pairs with the caller's release store (directly or through other claims,
            // which continue its release sequence), so that `run` is seen as written for this run.
            let claim = self
                .unclaimed
                .fetch_update(Ordering::Acquire, Ordering::Relaxed, |n| n.checked_sub(1));
            let Ok(left) = claim else { return };
            // SAFETY: the claimed part is unfinished until the decrement below, so the caller is
            // still waiting: `run` is not written and its closure is alive.
            let Run { work, parts } = unsafe { *self.run.get() };
            // SAFETY: as above.
            let work = unsafe { &*work };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| work(thread, parts - left))) {
                lock(&self.panic).get_or_insert(panic);
            }
            // Release: what the part wrote is seen by the caller, which acquires. SeqCst, with
            // the caller's, so that either it sees zero or this thread sees that it sleeps.
            if self.unfinished.fetch_sub(1, Ordering::SeqCst) == 1
                && self.caller_sleeps.load(Ordering::SeqCst)
                && let Some(caller) = lock(&self.caller).as_ref()
            {
                caller.unpark();
            }
        }
    }

    fn worker(&self, index: usize) {
        let asleep = &self.sleepers[index - 1];
        let awake =
            || self.unclaimed.load(Ordering::SeqCst) != 0 || self.stop.load(Ordering::SeqCst);
        loop {
            spin_until(awake);
            asleep.store(true, Ordering::SeqCst);
            // The caller publishes parts and then looks for sleepers; this looks for parts after
            // it says that it sleeps. One of the two sees the other.
            while !awake() {
                thread::park();
            }
            asleep.store(false, Ordering::SeqCst);
            if self.stop.load(Ordering::Relaxed) {
                return;
            }
            self.work_on_parts(index);
        }
    }
}

/// Spins for a short while; whether `done` came true is for the caller to ask again.
fn spin_until(done: impl Fn() -> bool) {
    for _ in 0..SPINS {
        if done() {
            return;
        }
        std::hint::spin_loop();
    }
}

impl ThreadPool {
    /// A pool of `threads` threads, the caller of each run included. With `pinned`, each keeps to a
    /// processor of its own, the calling thread among them.
    pub(crate) fn new(threads: usize, pinned: bool) -> io::Result<Self> {
        let workers = threads.saturating_sub(1);
        let processors = if pinned { affinity::processors()? } else { Vec::new() };
        if pinned && processors.len() < threads {
            return Err(io::Error::other(format!(
                "there are {} processors to pin them to",
                processors.len()
            )));
        }
        let idle: &'static (dyn Fn(usize, usize) + Sync) = &|_, _| {};
        let shared = Arc::new(Shared {
            unclaimed: AtomicUsize::new(0),
            unfinished: AtomicUsize::new(0),
            run: UnsafeCell::new(Run { work: idle, parts: 0 }),
            panic: Mutex::new(None),
            caller: Mutex::new(None),
            caller_sleeps: AtomicBool::new(false),
            sleepers: (0..workers).map(|_| AtomicBool::new(false)).collect(),
            stop: AtomicBool::new(false),
        });
        let mut pool = ThreadPool { shared, workers: Vec::new(), turn: Mutex::new(()) };
        for index in 1..=workers {
            let shared = Arc::clone(&pool.shared);
            let name = format!("bitnet-cpu-{index}");
            let processor = processors.get(index).copied();
            let spawned = thread::Builder::new().name(name).spawn(move || {
                // Whether it may was found out by the calling thread, below.
                processor.map(affinity::pin);
                shared.worker(index);
            });
            // On an error the workers that are already there end with the pool.
            pool.workers.push(spawned?);
        }
        if let Some(&processor) = processors.first() {
            affinity::pin(processor)?;
        }
        Ok(pool)
    }

    /// Threads of a run, the caller included.
    pub(crate) fn threads(&self) -> usize {
        self.workers.len() + 1
    }

    /// Computes every part of `partition`, each exactly once, and returns when all are done. The
    /// closure gets the index of the thread it runs on (0 is the caller) and the part.
    ///
    /// # Panics
    /// As the first part that panics, after the others are done.
    pub(crate) fn run<P: Partition>(&self, partition: P, work: impl Fn(usize, P::Part) + Sync) {
        let partition = &partition;
        self.run_parts(partition.parts(), &|thread, index| {
            // SAFETY: `run_parts` passes each index below `parts` once, and the partition, which
            // was moved in here, ends with this run.
            work(thread, unsafe { partition.part(index) });
        });
    }

    /// As [`run`](ThreadPool::run), on the calling thread alone: for work too small to be shared.
    pub(crate) fn run_alone<P: Partition>(partition: P, work: impl Fn(usize, P::Part)) {
        for index in 0..partition.parts() {
            // SAFETY: each index is passed once, and the partition ends with this run.
            work(0, unsafe { partition.part(index) });
        }
    }

    fn run_parts(&self, parts: usize, work: &(dyn Fn(usize, usize) + Sync)) {
        if parts <= 1 || self.workers.is_empty() {
            return (0..parts).for_each(|part| work(0, part));
        }
        let turn = lock(&self.turn);
        let shared = &*self.shared;
        // SAFETY: only the lifetime changes. The pointer is followed by threads that hold an
        // unfinished part, and this function returns when there are none.
        let work = unsafe {
            std::mem::transmute::<
                *const (dyn Fn(usize, usize) + Sync + '_),
                *const (dyn Fn(usize, usize) + Sync + 'static),
            >(work)
        };
        // SAFETY: this caller holds `turn` and the run before it finished all its parts, so no
        // thread reads `run` until parts are published below.
        unsafe { *shared.run.get() = Run { work, parts } };
        shared.unfinished.store(parts, Ordering::Relaxed);
        shared.unclaimed.store(parts, Ordering::SeqCst);
        // At most one worker per part is of use, and the caller takes one part itself.
        for (asleep, worker) in shared.sleepers.iter().zip(&self.workers).take(parts - 1) {
            if asleep.load(Ordering::SeqCst) {
                worker.thread().unpark();
            }
        }
        shared.work_on_parts(0);

        let done = || shared.unfinished.load(Ordering::SeqCst) == 0;
        spin_until(done);
        if !done() {
            *lock(&shared.caller) = Some(thread::current());
            shared.caller_sleeps.store(true, Ordering::SeqCst);
            while !done() {
                thread::park();
            }
            shared.caller_sleeps.store(false, Ordering::SeqCst);
        }
        fence(Ordering::Acquire);
        let panic = lock(&shared.panic).take();
        drop(turn);
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }
}

impl Drop for ThreadPool {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        for worker in self.workers.drain(..) {
            worker.thread().unpark();
            // A worker cannot panic: parts are unwound inside it.
            let _ = worker.join();
        }
    }
}

/// Work cut into parts that can be computed at the same time.
///
/// # Safety
/// Parts of different index must not overlap in anything mutable.
pub(crate) unsafe trait Partition: Sync {
    /// What one part may use.
    type Part;

    /// How many parts there are.
    fn parts(&self) -> usize;

    /// The part of an index below [`parts`](Partition::parts).
    ///
    /// # Safety
    /// Each index may be asked for once in the life of the partition.
    unsafe fn part(&self, index: usize) -> Self::Part;
}

/// Consecutive pieces of a slice, each of the same length but the last, which may be shorter.
pub(crate) struct Chunks<'a, T> {
    start: *mut T,
    len: usize,
    chunk: usize,
    slice: PhantomData<&'a mut [T]>,
}

// SAFETY: a shared `Chunks` hands out disjoint exclusive pieces, so it moves `T`s between threads.
unsafe impl<T: Send> Sync for Chunks<'_, T> {}

impl<'a, T> Chunks<'a, T> {
    /// Pieces of `chunk` elements.
    pub(crate) fn new(slice: &'a mut [T], chunk: usize) -> Self {
        assert_ne!(chunk, 0);
        Chunks { start: slice.as_mut_ptr(), len: slice.len(), chunk, slice: PhantomData }
    }
}

// SAFETY: piece `i` is elements `i * chunk .. (i + 1) * chunk`, which no other piece holds.
unsafe impl<'a, T: Send> Partition for Chunks<'a, T> {
    /// The index of the piece, and the piece.
    type Part = (usize, &'a mut [T]);

    fn parts(&self) -> usize {
        self.len.div_ceil(self.chunk)
    }

    unsafe fn part(&self, index: usize) -> Self::Part {
        let from = index * self.chunk;
        assert!(from < self.len);
        let len = self.chunk.min(self.len - from);
        // SAFETY: the range lies in the slice that `self` borrows exclusively for 'a, and by the
        // contract of this function this piece is made once.
        (index, unsafe { std::slice::from_raw_parts_mut(self.start.add(from), len) })
    }
}

/// How a length is cut into parts, one after another.
#[derive(Clone, Copy)]
pub(crate) enum Cut {
    /// Parts of this length, the last of which may be shorter.
    Even(usize),
    /// Parts that become shorter, in whole units: each takes its share of three quarters of what is left,
    /// but at least some units. Threads that began at different times or run at different speeds so
    /// end at about the same time, without the cost of many parts.
    Tapered { unit: usize, least: usize, threads: usize },
}

impl Cut {
    /// The parts of a length.
    fn ranges(self, len: usize) -> impl Iterator<Item = Range<usize>> {
        let mut from = 0;
        std::iter::from_fn(move || {
            let left = len - from;
            let part = match self {
                Cut::Even(part) => part,
                Cut::Tapered { unit, least, threads } => {
                    (3 * left).div_ceil(4 * threads * unit).max(least) * unit
                }
            };
            assert_ne!(part, 0);
            let range = from..from + part.min(left);
            from = range.end;
            (!range.is_empty()).then_some(range)
        })
    }
}

/// A matrix `[rows, width]` cut into vertical strips, and these across into pieces of the same number of
/// rows, the last of which may be lower. The last rows come first.
pub(crate) struct Strips<'a, T = f32> {
    start: *mut T,
    rows: usize,
    width: usize,
    cut: Cut,
    height: usize,
    matrix: PhantomData<&'a mut [T]>,
}

// SAFETY: a shared `Strips` hands out disjoint exclusive strips, so it moves `T`s between threads.
unsafe impl<T: Send> Sync for Strips<'_, T> {}

impl<'a, T> Strips<'a, T> {
    /// Strips of the columns of a matrix.
    pub(crate) fn new(matrix: &'a mut [T], width: usize, cut: Cut) -> Self {
        assert!(width != 0 && matrix.len().is_multiple_of(width));
        let (start, rows) = (matrix.as_mut_ptr(), matrix.len() / width);
        Strips { start, rows, width, cut, height: rows.max(1), matrix: PhantomData }
    }

    /// Cuts the strips into pieces of `height` rows.
    pub(crate) fn cut(self, height: usize) -> Self {
        assert_ne!(height, 0);
        Strips { height, ..self }
    }
}

/// One strip of a matrix, or a piece of one.
pub(crate) struct Strip<'a, T = f32> {
    start: *mut T,
    rows: Range<usize>,
    width: usize,
    columns: Range<usize>,
    matrix: PhantomData<&'a mut [T]>,
}

impl<T> Strip<'_, T> {
    /// The columns of the matrix that this strip holds.
    pub(crate) fn columns(&self) -> Range<usize> {
        self.columns.clone()
    }

    /// The rows of the matrix that this strip holds.
    pub(crate) fn rows(&self) -> Range<usize> {
        self.rows.clone()
    }

    /// This strip's piece of one row of the matrix.
    pub(crate) fn row(&mut self, row: usize) -> &mut [T] {
        assert!(self.rows.contains(&row));
        // SAFETY: the row lies in the matrix, so do the columns by construction, and this strip
        // holds them exclusively.
        unsafe {
            std::slice::from_raw_parts_mut(
                self.start.add(row * self.width + self.columns.start),
                self.columns.len(),
            )
        }
    }
}

// SAFETY: two strips hold disjoint columns, or the same columns of disjoint rows, hence disjoint
// pieces of every row.
unsafe impl<'a, T: Send> Partition for Strips<'a, T> {
    type Part = Strip<'a, T>;

    fn parts(&self) -> usize {
        self.cut.ranges(self.width).count() * self.rows.div_ceil(self.height)
    }

    unsafe fn part(&self, index: usize) -> Strip<'a, T> {
        let strips = self.cut.ranges(self.width).count();
        let (across, strip) = (index / strips, index % strips);
        let columns = self.cut.ranges(self.width).nth(strip).expect("one of the strips");
        let first = (self.rows.div_ceil(self.height) - 1 - across) * self.height;
        Strip {
            start: self.start,
            rows: first..self.rows.min(first + self.height),
            width: self.width,
            columns,
            matrix: PhantomData,
        }
    }
}

/// The parts of several partitions, one after another; a part comes with the index of its
/// partition.
// SAFETY: parts of one partition are disjoint by its own promise, and different partitions hold
// different things exclusively.
unsafe impl<P: Partition, const N: usize> Partition for [Option<P>; N] {
    type Part = (usize, P::Part);

    fn parts(&self) -> usize {
        self.iter().flatten().map(P::parts).sum()
    }

    unsafe fn part(&self, mut index: usize) -> Self::Part {
        for (which, partition) in self.iter().enumerate() {
            let Some(partition) = partition else { continue };
            let parts = partition.parts();
            if index < parts {
                // SAFETY: this index of this partition is reached by one index of `self` only.
                return (which, unsafe { partition.part(index) });
            }
            index -= parts;
        }
        panic!("a part beyond the last");
    }
}

/// Two partitions walked together: part `i` of both.
// SAFETY: each side's parts are disjoint by its own promise.
unsafe impl<A: Partition, B: Partition> Partition for (A, B) {
    type Part = (A::Part, B::Part);

    fn parts(&self) -> usize {
        assert_eq!(self.0.parts(), self.1.parts());
        self.0.parts()
    }

    unsafe fn part(&self, index: usize) -> Self::Part {
        // SAFETY: passed on.
        unsafe { (self.0.part(index), self.1.part(index)) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts that are plain numbers below the one given.
    // SAFETY: there is nothing mutable in a number.
    unsafe impl Partition for usize {
        type Part = usize;

        fn parts(&self) -> usize {
            *self
        }

        unsafe fn part(&self, index: usize) -> usize {
            index
        }
    }

    #[test]
    fn every_part_is_computed_once_by_any_number_of_threads() {
        for threads in [1, 2, 3, 8] {
            let pool = ThreadPool::new(threads, false).unwrap();
            // Many short runs in a row, so that workers are caught awake, asleep and in between.
            for round in 0..500usize {
                let mut counts = vec![0usize; round % 67];
                pool.run(Chunks::new(&mut counts, 3), |thread, (index, piece)| {
                    assert!(thread < threads);
                    for (i, count) in piece.iter_mut().enumerate() {
                        *count += index * 3 + i + 1;
                    }
                });
                assert!(counts.iter().enumerate().all(|(i, &count)| count == i + 1));
                if round % 100 == 99 {
                    thread::sleep(std::time::Duration::from_millis(2));
                }
            }
        }
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn pinned_threads_keep_to_different_processors() {
        let processors = affinity::processors().unwrap();
        // A thread of its own, so that the test's thread stays free.
        thread::scope(|scope| {
            scope.spawn(|| {
                let threads = processors.len().min(2);
                let pool = ThreadPool::new(threads, true).unwrap();
                let mut seen = vec![Vec::new(); threads];
                let met = AtomicUsize::new(0);
                pool.run(Chunks::new(&mut seen, 1), |_, (_, seen)| {
                    seen[0] = affinity::processors().unwrap();
                    // No part ends before each thread has one.
                    met.fetch_add(1, Ordering::SeqCst);
                    while met.load(Ordering::SeqCst) < threads {
                        thread::yield_now();
                    }
                });
                assert!(seen.iter().all(|seen| seen.len() == 1), "{seen:?}");
                assert!(threads == 1 || seen[0] != seen[1], "{seen:?}");
                let error = ThreadPool::new(processors.len() + 1, true).err().unwrap();
                assert!(error.to_string().contains("processors to pin them to"), "{error}");
            });
        });
    }

    #[test]
    fn parts_of_a_length_follow_each_other_to_its_end() {
        for len in [0, 1, 15, 16, 17, 640, 2560, 6912, 128_256] {
            let cuts = [1, 2, 16].map(|threads| Cut::Tapered { unit: 16, least: 8, threads });
            for cut in cuts.into_iter().chain([Cut::Even(1000)]) {
                let parts: Vec<Range<usize>> = cut.ranges(len).collect();
                let ends = parts.iter().map(|part| part.end);
                assert!(
                    parts
                        .iter()
                        .map(|part| part.start)
                        .eq([0].into_iter().chain(ends).take(parts.len()))
                );
                assert_eq!(parts.last().map_or(0, |part| part.end), len);
                assert!(parts.is_sorted_by_key(|part| std::cmp::Reverse(part.len())));
                if let Cut::Tapered { unit, least, .. } = cut {
                    let (_, whole) = parts.split_last().unwrap_or((&(0..0), &[]));
                    assert!(whole.iter().all(|part| part.len().is_multiple_of(unit)));
                    assert!(whole.iter().all(|part| part.len() >= unit * least));
                }
            }
        }
        // Two threads: three eighths of 64 units, of 40, of 25.
        let parts = Cut::Tapered { unit: 1, least: 4, threads: 2 }.ranges(64);
        assert_eq!(parts.map(|part| part.len()).take(4).collect::<Vec<_>>(), [24, 15, 10, 6]);
    }

    #[test]
    fn strips_of_several_matrices_cover_them() {
        let pool = ThreadPool::new(3, false).unwrap();
        let (mut a, mut b) = (vec![0.0; 3 * 7], vec![0.0; 2 * 5]);
        let parts = [
            Some(Strips::new(&mut a, 7, Cut::Even(2))),
            None,
            Some(Strips::new(&mut b, 5, Cut::Even(5))),
        ];
        pool.run(parts, |_, (which, mut strip)| {
            let columns = strip.columns();
            for row in 0..if which == 0 { 3 } else { 2 } {
                for (value, column) in strip.row(row).iter_mut().zip(columns.clone()) {
                    *value += (100 * which + 10 * row + column) as f32;
                }
            }
        });
        for (i, &value) in a.iter().enumerate() {
            assert_eq!(value, (10 * (i / 7) + i % 7) as f32);
        }
        for (i, &value) in b.iter().enumerate() {
            assert_eq!(value, (200 + 10 * (i / 5) + i % 5) as f32);
        }
    }

    #[test]
    fn a_panicking_part_panics_the_caller_and_the_pool_lives_on() {
        let pool = ThreadPool::new(2, false).unwrap();
        for bad in [0usize, 7] {
            let done = AtomicUsize::new(0);
            let outcome = catch_unwind(AssertUnwindSafe(|| {
                pool.run(8usize, |_, part| {
                    assert_ne!(part, bad, "part {bad}");
                    done.fetch_add(1, Ordering::Relaxed);
                });
            }));
            assert!(outcome.unwrap_err().downcast_ref::<String>().unwrap().contains("part"));
            assert_eq!(done.load(Ordering::Relaxed), 7, "the others are still computed");
        }
        let sum = AtomicUsize::new(0);
        pool.run(10usize, |_, part| {
            sum.fetch_add(part, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }

    #[test]
    fn callers_on_several_threads_take_turns() {
        let pool = ThreadPool::new(2, false).unwrap();
        thread::scope(|scope| {
            for caller in 0..3usize {
                let pool = &pool;
                scope.spawn(move || {
                    for _ in 0..200 {
                        let mut values = [0usize; 5];
                        pool.run(Chunks::new(&mut values, 1), |_, (i, v)| v[0] = i + caller);
                        assert_eq!(values, std::array::from_fn(|i| i + caller));
                    }
                });
            }
        });
    }
}
