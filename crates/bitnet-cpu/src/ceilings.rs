//! What this machine can do at most, measured on the spot: integer multiply-adds on registers alone,
//! and reading of memory.
//!
//! Every figure is the best of several passes with all threads at work at once, in the sum over
//! the threads. The first pass is not counted: it wakes the cores and fills the pages.

use std::fs;
use std::io::Write;
use std::path::PathBuf;
use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use bitnet_core::mmap::map_file;
use bitnet_core::{Error, budget};
use memmap2::MmapMut;

use crate::arch::ceilings::{MultiplyAdd, dependent_adds};

/// Passes of a loop on registers, besides the first. Many short ones: what else runs on the machine
/// then leaves some of them alone.
const LOOP_PASSES: usize = 100;

/// Seconds of each.
const LOOP_SECONDS: f64 = 0.002;

/// Passes over memory, besides the first.
const READ_PASSES: usize = 32;

/// Passes over memory of [`ReadRate`], besides the first.
const QUICK_READ_PASSES: usize = 4;

/// Bytes of one pass over memory; the next pass reads the bytes behind them.
const WINDOW_BYTES: usize = 256 << 20;

/// Bytes of the buffer that is read: far more than a last-level cache.
const BUFFER_BYTES: usize = 1 << 30;

/// Bytes of the file that is read.
const FILE_BYTES: usize = WINDOW_BYTES;

/// A measured rate and what was measured.
#[derive(Debug, Clone, PartialEq)]
pub struct Rate {
    /// Instructions, or kind of memory.
    pub name: String,
    /// In 10^9 per second: multiply-adds, or bytes.
    pub giga_per_s: f64,
}

/// The ceilings of this machine for one number of threads.
#[derive(Debug, Clone, PartialEq)]
pub struct Ceilings {
    /// Threads that were at work at once.
    pub threads: usize,
    /// Clock while one thread computed, in GHz, by additions that wait for each other; `None` where
    /// there is no such loop.
    pub clock_ghz: Option<f64>,
    /// 10^9 multiply-adds of int8 numbers per second. The first is the one to refer to:
    /// vpmaddubsw + vpaddw on x86, sdot (or smlal) on Arm.
    pub multiply_add: Vec<Rate>,
    /// 10^9 bytes per second, from several kinds of memory.
    pub read: Vec<Rate>,
}

impl Ceilings {
    /// Measures for so many threads, which takes a few seconds and up to 1 GiB of memory.
    ///
    /// # Errors
    /// If there is not enough memory for a buffer beyond the caches.
    ///
    /// # Panics
    /// If `threads` is 0.
    pub fn measure(threads: usize) -> Result<Ceilings, Error> {
        Ceilings::measure_with(threads, BUFFER_BYTES, FILE_BYTES)
    }

    fn measure_with(
        threads: usize,
        buffer_bytes: usize,
        file_bytes: usize,
    ) -> Result<Ceilings, Error> {
        assert!(threads > 0);
        let read = reads(threads, buffer_bytes, file_bytes)?;
        let multiply_add = MultiplyAdd::all()
            .into_iter()
            .map(|kernel| Rate {
                name: kernel.name.to_owned(),
                giga_per_s: operations(threads, |turns| kernel.run(turns)),
            })
            .collect();
        Ok(Ceilings { threads, clock_ghz: clock(), multiply_add, read })
    }

    /// The multiply-add rate that shares refer to, in 10^9 per second.
    pub fn gmac_per_s(&self) -> f64 {
        self.multiply_add[0].giga_per_s
    }

    /// The best read rate, in 10^9 bytes per second.
    pub fn gb_per_s(&self) -> f64 {
        self.read.iter().map(|rate| rate.giga_per_s).fold(0.0, f64::max)
    }
}

/// What memory gives to so many threads, measured again and again beside other work: on a machine that is
/// shared, it may be another rate a second later.
pub struct ReadRate {
    buffer: MmapMut,
    threads: usize,
}

impl ReadRate {
    /// Takes 256 MiB of memory, in huge pages where there are.
    ///
    /// # Errors
    /// If that is not there.
    ///
    /// # Panics
    /// If `threads` is 0.
    pub fn new(threads: usize) -> Result<Self, Error> {
        assert!(threads > 0);
        let (what, needed) = ("measuring the read bandwidth", WINDOW_BYTES as u64);
        budget::require(what, needed)?;
        let buffer = Pages::Huge.buffer(WINDOW_BYTES).or_else(|| Pages::Plain.buffer(WINDOW_BYTES));
        let available = budget::available_memory().unwrap_or(0);
        let buffer =
            buffer.ok_or_else(|| Error::Memory { what: what.to_owned(), needed, available })?;
        Ok(ReadRate { buffer, threads })
    }

    /// 10^9 bytes per second now: the best of a few passes, which take less than a tenth of a second.
    pub fn measure(&self) -> f64 {
        read(&self.buffer, self.threads, QUICK_READ_PASSES)
    }
}

/// The time of `work`, of the best pass, from when all threads are ready to when the last is done.
fn best_pass(threads: usize, passes: usize, work: impl Fn(usize, usize) + Sync) -> Duration {
    let (ready, done) = (Barrier::new(threads), Barrier::new(threads));
    let pass = |thread: usize, pass: usize| {
        ready.wait();
        let start = Instant::now();
        work(thread, pass);
        done.wait();
        start.elapsed()
    };
    thread::scope(|scope| {
        for thread in 1..threads {
            scope.spawn(move || {
                (0..=passes).for_each(|index| {
                    pass(thread, index);
                });
            });
        }
        let times: Vec<Duration> = (0..=passes).map(|index| pass(0, index)).collect();
        // The first is the warm-up.
        times.into_iter().skip(1).min().expect("there are passes")
    })
}

/// Turns of a loop that take [`LOOP_SECONDS`], which is long against the barriers.
fn turns_of_a_pass(run: impl Fn(u64) -> u64) -> u64 {
    const SHORT: u64 = 10_000;
    run(SHORT);
    let start = Instant::now();
    run(SHORT);
    let second = start.elapsed().as_secs_f64().max(1e-9);
    (SHORT as f64 * LOOP_SECONDS / second).clamp(1.0, 1e12) as u64
}

/// 10^9 operations per second of a loop, which runs for some turns and returns the operations that
/// this took.
fn operations(threads: usize, run: impl Fn(u64) -> u64 + Sync) -> f64 {
    let turns = turns_of_a_pass(&run);
    let time = best_pass(threads, LOOP_PASSES, |_, _| {
        run(turns);
    });
    (threads as u64 * run(1) * turns) as f64 / time.as_secs_f64() / 1e9
}

fn clock() -> Option<f64> {
    dependent_adds(1)?;
    Some(operations(1, |turns| dependent_adds(turns).expect("there is a loop")))
}

fn reads(threads: usize, buffer_bytes: usize, file_bytes: usize) -> Result<Vec<Rate>, Error> {
    let available = budget::available_memory().unwrap_or(u64::MAX);
    let bytes = buffer_bytes.min(usize::try_from(available / 4).unwrap_or(usize::MAX));
    budget::require("measuring the read bandwidth", 64 << 20)?;
    let mut rates = Vec::new();
    for pages in [Pages::Huge, Pages::Plain] {
        if let Some(buffer) = pages.buffer(bytes) {
            rates.push(Rate {
                name: pages.name().to_owned(),
                giga_per_s: read(&buffer, threads, READ_PASSES),
            });
        }
    }
    // A folder that cannot be written to, or a full disk, is no reason to give nothing at all.
    if let Some(file) = TemporaryFile::new(file_bytes.min(bytes))
        && let Ok(contents) = map_file(&file.0)
    {
        let giga_per_s = read(&contents, threads, READ_PASSES);
        rates.push(Rate { name: "mapped file".to_owned(), giga_per_s });
    }
    if rates.is_empty() {
        let what = "measuring the read bandwidth".to_owned();
        return Err(Error::Memory { what, needed: bytes as u64, available });
    }
    Ok(rates)
}

/// What a buffer's memory is cut into.
#[derive(Debug, Clone, Copy)]
enum Pages {
    Huge,
    Plain,
}

impl Pages {
    /// A buffer without a page of zeros that is shared: every page is written to.
    fn buffer(self, bytes: usize) -> Option<MmapMut> {
        let mut buffer = MmapMut::map_anon(bytes).ok()?;
        if !self.advise(&buffer) {
            return None;
        }
        buffer.fill(1);
        Some(buffer)
    }

    #[cfg(target_os = "linux")]
    fn name(self) -> &'static str {
        match self {
            Pages::Huge => "huge pages",
            Pages::Plain => "plain pages",
        }
    }

    #[cfg(target_os = "linux")]
    fn advise(self, buffer: &MmapMut) -> bool {
        let advice = match self {
            Pages::Huge => memmap2::Advice::HugePage,
            Pages::Plain => memmap2::Advice::NoHugePage,
        };
        // A kernel without huge pages refuses the advice, and all its pages are plain.
        buffer.advise(advice).is_ok() || matches!(self, Pages::Plain)
    }

    #[cfg(not(target_os = "linux"))]
    fn name(self) -> &'static str {
        "memory"
    }

    /// Elsewhere pages are as the system has them.
    #[cfg(not(target_os = "linux"))]
    fn advise(self, _buffer: &MmapMut) -> bool {
        matches!(self, Pages::Plain)
    }
}

/// 10^9 bytes per second with each thread reading its own part of a window.
fn read(bytes: &[u8], threads: usize, passes: usize) -> f64 {
    let window = WINDOW_BYTES.min(bytes.len());
    let windows: Vec<&[u8]> = bytes.chunks_exact(window).collect();
    let part = window / threads;
    let time = best_pass(threads, passes, |thread, pass| {
        let part = &windows[pass % windows.len()][thread * part..(thread + 1) * part];
        std::hint::black_box(sum(std::hint::black_box(part)));
    });
    (part * threads) as f64 / time.as_secs_f64() / 1e9
}

/// Sums 32-bit words in 32 lanes, which the compiler makes vector loads of. Two 16-byte loads
/// per cycle, which every x86-64 CPU has, outrun its memory by far.
fn sum(bytes: &[u8]) -> u32 {
    let mut lanes = [0u32; 32];
    for block in bytes.as_chunks::<128>().0 {
        for (lane, word) in lanes.iter_mut().zip(block.as_chunks::<4>().0) {
            *lane = lane.wrapping_add(u32::from_ne_bytes(*word));
        }
    }
    lanes.iter().fold(0, |sum, &lane| sum.wrapping_add(lane))
}

/// A file that goes away with this value.
struct TemporaryFile(PathBuf);

impl TemporaryFile {
    fn new(bytes: usize) -> Option<Self> {
        let name = format!("bitnet-ceilings-{}", std::process::id());
        let path = std::env::temp_dir().join(name);
        let mut file = fs::OpenOptions::new().write(true).create_new(true).open(&path).ok()?;
        let guard = TemporaryFile(path);
        let block = vec![1u8; 1 << 20];
        for _ in 0..bytes >> 20 {
            file.write_all(&block).ok()?;
        }
        Some(guard)
    }
}

impl Drop for TemporaryFile {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_ceiling_is_a_positive_number() {
        let ceilings = Ceilings::measure_with(1, 64 << 20, 16 << 20).unwrap();
        assert!(!ceilings.multiply_add.is_empty() && !ceilings.read.is_empty());
        for rate in ceilings.multiply_add.iter().chain(&ceilings.read) {
            assert!(rate.giga_per_s.is_finite() && rate.giga_per_s > 0.0, "{rate:?}");
        }
        assert!(ceilings.clock_ghz.is_none_or(|ghz| ghz.is_finite() && ghz > 0.0));
        let best = ceilings.read.iter().map(|rate| rate.giga_per_s).fold(0.0, f64::max);
        assert_eq!(ceilings.gb_per_s(), best);
    }

    #[test]
    fn the_rate_of_reading_is_measured_again_and_again() {
        let reads = ReadRate::new(2).unwrap();
        assert!((0..2).all(|_| reads.measure().is_finite() && reads.measure() > 0.0));
    }

    #[test]
    fn the_sum_reads_every_word() {
        let bytes: Vec<u8> = (0..128 * 3).map(|i| (i % 251) as u8).collect();
        let words = bytes.chunks_exact(4).map(|word| u32::from_ne_bytes(word.try_into().unwrap()));
        assert_eq!(sum(&bytes), words.fold(0, u32::wrapping_add));
    }
}
