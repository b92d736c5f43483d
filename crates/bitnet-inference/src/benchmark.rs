//! [`benchmark`]: one model on this machine, measured as a user meets it, and graded.

use std::fmt;
use std::time::{Duration, Instant};

use bitnet_core::machine::{physical_cores, resident_bytes};
use bitnet_cpu::ceilings::Ceilings;

use crate::bench::{Bench, Kind, Operation, Test, Weights};
use crate::error::Error;
use crate::inference_engine::{GenerationParams, InferenceEngine};
use crate::{KvType, SamplingParams};

/// Tokens that each request of a benchmark generates.
const TOKENS: usize = 64;

/// Requests of the batch.
const BATCH: usize = 32;

/// Context of the single token whose time is graded, and how often it is generated.
const CONTEXT: usize = 64;
const SINGLE_TOKENS: usize = 200;

/// Repetitions of what is measured beside the requests.
const REPETITIONS: usize = 5;

/// Times below which so many in a hundred stayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Percentiles {
    /// Half of them.
    pub p50: Duration,
    /// 95 in a hundred.
    pub p95: Duration,
    /// 99 in a hundred.
    pub p99: Duration,
}

impl Percentiles {
    /// Of some times: each percentile is one of them, the first that is not exceeded by more.
    ///
    /// # Panics
    /// If there are none.
    pub fn of(mut times: Vec<Duration>) -> Self {
        times.sort_unstable();
        let at = |percent: usize| times[(times.len() * percent).div_ceil(100).max(1) - 1];
        Percentiles { p50: at(50), p95: at(95), p99: at(99) }
    }
}

/// A mark on a scale that [`Benchmark`] documents.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Grade {
    /// Below the scale.
    D,
    /// At its low end.
    C,
    /// In its middle.
    B,
    /// At its high end.
    A,
    /// Above it.
    APlus,
}

impl Grade {
    /// The grade of a value for which more is better: the best whose threshold it reaches, of
    /// those for A+, A, B and C.
    pub fn at_least(value: f64, thresholds: [f64; 4]) -> Self {
        Self::first(thresholds.map(|threshold| value >= threshold))
    }

    /// The grade of a value for which less is better: the best whose threshold it stays below.
    pub fn below(value: f64, thresholds: [f64; 4]) -> Self {
        Self::first(thresholds.map(|threshold| value < threshold))
    }

    fn first(reached: [bool; 4]) -> Self {
        let grades = [Grade::APlus, Grade::A, Grade::B, Grade::C];
        let best = grades.into_iter().zip(reached).find(|(_, reached)| *reached);
        best.map_or(Grade::D, |(grade, _)| grade)
    }

    /// 4 for A+, 3, 2, 1, and 0 for D.
    fn points(self) -> u32 {
        self as u32
    }
}

impl fmt::Display for Grade {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Grade::APlus => "A+",
            Grade::A => "A",
            Grade::B => "B",
            Grade::C => "C",
            Grade::D => "D",
        })
    }
}

/// What [`benchmark`] measured. Printed, it is a table of the figures and one of the grades:
///
/// | part | weight | measured | A+ | A | B | C |
/// |---|---|---|---|---|---|---|
/// | throughput | 40 % | passes per second of a BitLinear of 256 to 256, one token, quantisation included, on one core | 300 000 | 200 000 | 100 000 | 50 000 |
/// | latency | 40 % | one token of the built-in model after 64 others, p50, below | 1 ms | 2 ms | 5 ms | 10 ms |
/// | memory | 15 % | resident in this process after the batch, without the weights, below | 50 MB | 100 MB | 200 MB | 500 MB |
/// | batch | 5 % | tokens per second of 32 requests at once over those of one | 8 | 4 | 2 | 1.2 |
///
/// What misses all of these is a D. For the whole, A+ counts 4, A 3, B 2, C 1 and D 0, and the
/// weighted mean is rounded to the nearest grade.
#[derive(Debug, Clone, PartialEq)]
pub struct Benchmark {
    /// The model, as it was named.
    pub model: String,
    /// Name of the backend.
    pub backend: String,
    /// Requests that were timed one after the other.
    pub iterations: usize,
    /// From the prompt to the last of at most 64 tokens.
    pub latency: Percentiles,
    /// From the prompt to the first token.
    pub first_token: Percentiles,
    /// Of one request at a time, the prompt's time included.
    pub tokens_per_s: f64,
    /// Of 32 requests at once, all together.
    pub batch_tokens_per_s: f64,
    /// Of the decoder alone at the start of a context, and its shares of what the machine can do.
    pub decode: Shares,
    /// The same of reading a prompt of 128 tokens.
    pub prefill: Shares,
    /// Memory of this process in bytes that holds no weights, with the keys and values of the batch.
    pub memory_bytes: u64,
    /// Passes per second of a BitLinear of 256 to 256 on one core.
    pub passes_per_s: f64,
    /// Time of one token of the built-in model after 64 others.
    pub single_token: Percentiles,
}

/// A speed and its shares of the machine's ceilings.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Shares {
    /// Tokens per second.
    pub tokens_per_s: f64,
    /// Share of the multiply-adds per second.
    pub multiply_adds: f64,
    /// Share of the bytes read per second.
    pub read: f64,
}

impl Benchmark {
    /// Tokens per second of the batch over those of one request.
    pub fn batch_gain(&self) -> f64 {
        self.batch_tokens_per_s / self.tokens_per_s
    }

    /// Name, weight in per cent, measured value and grade of each part.
    pub fn grades(&self) -> [(&'static str, u32, String, Grade); 4] {
        let ms = 1e3 * self.single_token.p50.as_secs_f64();
        let mb = self.memory_bytes as f64 / 1e6;
        let gain = self.batch_gain();
        [
            (
                "throughput",
                40,
                format!("{:.0} BitLinear passes/s", self.passes_per_s),
                Grade::at_least(self.passes_per_s, [300e3, 200e3, 100e3, 50e3]),
            ),
            ("latency", 40, format!("{ms:.3} ms a token"), Grade::below(ms, [1.0, 2.0, 5.0, 10.0])),
            (
                "memory",
                15,
                format!("{mb:.1} MB without weights"),
                Grade::below(mb, [50.0, 100.0, 200.0, 500.0]),
            ),
            (
                "batch",
                5,
                format!("{gain:.2} times one request"),
                Grade::at_least(gain, [8.0, 4.0, 2.0, 1.2]),
            ),
        ]
    }

    /// The grade of the whole.
    pub fn grade(&self) -> Grade {
        let sum: u32 =
            self.grades().iter().map(|(_, weight, _, grade)| weight * grade.points()).sum();
        match (sum + 50) / 100 {
            0 => Grade::D,
            1 => Grade::C,
            2 => Grade::B,
            3 => Grade::A,
            _ => Grade::APlus,
        }
    }
}

impl fmt::Display for Benchmark {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ms = |time: Duration| 1e3 * time.as_secs_f64();
        let times = |times: &Percentiles| {
            format!("{:>9.2} {:>9.2} {:>9.2}", ms(times.p50), ms(times.p95), ms(times.p99))
        };
        writeln!(f, "{} on {}", self.model, self.backend)?;
        writeln!(f, "\n{:<26} {:>9} {:>9} {:>9}", "ms", "p50", "p95", "p99")?;
        let requests = format!("{} requests of {TOKENS} tokens", self.iterations);
        writeln!(f, "{requests:<26} {}", times(&self.latency))?;
        writeln!(f, "{:<26} {}", "to the first token", times(&self.first_token))?;
        writeln!(f, "{:<26} {}", "one token, built-in model", times(&self.single_token))?;
        writeln!(f, "\n{:<26} {:>9} {:>9} {:>9}", "", "tokens/s", "of MAC/s", "of reads")?;
        for (name, Shares { tokens_per_s, multiply_adds, read }) in
            [("prefill of 128", self.prefill), ("decode", self.decode)]
        {
            let (macs, read) = (100.0 * multiply_adds, 100.0 * read);
            writeln!(f, "{name:<26} {tokens_per_s:>9.1} {macs:>7.1} % {read:>7.1} %")?;
        }
        writeln!(f, "{:<26} {:>9.1}", "one request at a time", self.tokens_per_s)?;
        let batch = format!("{BATCH} requests at once");
        writeln!(f, "{batch:<26} {:>9.1}", self.batch_tokens_per_s)?;
        writeln!(f, "\n{:<12} {:>6}  {:<32} {:>5}", "", "weight", "measured", "grade")?;
        for (name, weight, measured, grade) in self.grades() {
            writeln!(f, "{name:<12} {weight:>4} %  {measured:<32} {grade:>5}")?;
        }
        write!(f, "{:<12} {:>6}  {:<32} {:>5}", "together", "", "", self.grade())
    }
}

/// Measures a model on this machine: `iterations` requests that continue `prompt` one after the other
/// and a batch of 32, the decoder alone against the machine's ceilings, and what
/// [`Benchmark`] grades. Takes some seconds, and with a large model minutes.
///
/// # Errors
/// If the model cannot be loaded or does not generate, the prompt is refused, or the machine lacks the
/// memory.
///
/// ```no_run
/// let benchmark = bitnet_inference::benchmark("tiny", "Once upon a time", 20)?;
/// println!("{benchmark}");
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
///
/// # Panics
/// If there are no iterations.
pub fn benchmark(model: &str, prompt: &str, iterations: usize) -> Result<Benchmark, Error> {
    assert!(iterations > 0);
    let threads = physical_cores();
    let passes = Operation::BITLINEAR_256.measure(1, REPETITIONS)?;
    let single_token = single_token(threads)?;
    let ceilings = Ceilings::measure(threads)?;
    let [prefill, decode] = shares(model, threads, &ceilings)?;

    let mut engine = InferenceEngine::fast();
    engine.load_model(model)?;
    let params = GenerationParams {
        sampling: SamplingParams::default(),
        max_tokens: TOKENS,
        ignore_end: true,
        ..GenerationParams::default()
    };
    // Wakes threads and fills caches; its prefix serves the others, as that of a chat does.
    engine.generate(prompt, params.clone()).wait()?;
    let (mut latencies, mut first_tokens, mut tokens) = (Vec::new(), Vec::new(), 0);
    for _ in 0..iterations {
        let start = Instant::now();
        let generation = engine.generate(prompt, params.clone()).wait()?;
        latencies.push(start.elapsed());
        first_tokens.push(generation.prompt_time);
        tokens += generation.tokens.len();
    }
    let all: Duration = latencies.iter().sum();
    let start = Instant::now();
    let answers: Vec<_> = (0..BATCH).map(|_| engine.generate(prompt, params.clone())).collect();
    let mut batch_tokens = 0;
    for answer in answers {
        batch_tokens += answer.wait()?.tokens.len();
    }
    let batch_time = start.elapsed();
    let resident = resident_bytes().ok_or(Error::NotMeasured("how much memory a process has"))?;
    let loaded = engine.model()?;
    let weights = loaded.weight_bytes();
    Ok(Benchmark {
        model: model.to_owned(),
        backend: loaded.backend_name(),
        iterations,
        latency: Percentiles::of(latencies),
        first_token: Percentiles::of(first_tokens),
        tokens_per_s: tokens as f64 / all.as_secs_f64(),
        batch_tokens_per_s: batch_tokens as f64 / batch_time.as_secs_f64(),
        decode,
        prefill,
        memory_bytes: resident.saturating_sub(weights.total()),
        passes_per_s: passes.per_s().0,
        single_token,
    })
}

/// Times of one token of the built-in model after [`CONTEXT`] others.
fn single_token(threads: usize) -> Result<Percentiles, Error> {
    let bench = Bench::load(&Weights::of_model("tiny")?, threads, KvType::F32)?;
    let tests = [Test { kind: Kind::Decode, tokens: 1, depth: CONTEXT, batch: 1 }];
    let mut sequences = bench.sequences(&tests)?;
    let measurements = bench.run(&tests, &mut sequences, SINGLE_TOKENS, None, |_| {})?;
    Ok(Percentiles::of(measurements.into_iter().flat_map(|of| of.times).collect()))
}

/// Prefill and decode of the decoder alone.
fn shares(model: &str, threads: usize, ceilings: &Ceilings) -> Result<[Shares; 2], Error> {
    let bench = Bench::load(&Weights::of_model(model)?, threads, KvType::F32)?;
    let of = |kind, tokens| Test { kind, tokens, depth: 0, batch: 1 };
    let tests = [of(Kind::Prefill, 2 * TOKENS), of(Kind::Decode, TOKENS)];
    let mut sequences = bench.sequences(&tests)?;
    let measurements = bench.run(&tests, &mut sequences, REPETITIONS, None, |_| {})?;
    let shares = measurements.iter().map(|measurement| Shares {
        tokens_per_s: measurement.tokens_per_s().0,
        multiply_adds: measurement.gmac_per_s() / ceilings.gmac_per_s(),
        read: measurement.gb_per_s() / ceilings.gb_per_s(),
    });
    Ok(shares.collect::<Vec<_>>().try_into().expect("a measurement of each test"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measured() -> Benchmark {
        let ms = Duration::from_millis;
        let times = Percentiles { p50: ms(10), p95: ms(12), p99: ms(20) };
        let shares = Shares { tokens_per_s: 1234.5, multiply_adds: 0.25, read: 0.5 };
        Benchmark {
            model: "tiny".to_owned(),
            backend: "cpu (avx2, 2 threads)".to_owned(),
            iterations: 20,
            latency: times,
            first_token: times,
            tokens_per_s: 1000.0,
            batch_tokens_per_s: 5000.0,
            decode: shares,
            prefill: shares,
            memory_bytes: 120_000_000,
            passes_per_s: 250_000.0,
            single_token: Percentiles { p50: ms(3), ..times },
        }
    }

    #[test]
    fn percentiles_are_times_that_were_measured() {
        let times = |count: u64| (1..=count).rev().map(Duration::from_secs).collect();
        let of = |count| {
            let Percentiles { p50, p95, p99 } = Percentiles::of(times(count));
            [p50, p95, p99].map(|time| time.as_secs())
        };
        assert_eq!(of(100), [50, 95, 99]);
        assert_eq!(of(1), [1, 1, 1]);
        assert_eq!(of(3), [2, 3, 3]);
        assert_eq!(of(20), [10, 19, 20]);
    }

    #[test]
    fn a_grade_is_the_best_whose_threshold_is_reached() {
        let scale = [300.0, 200.0, 100.0, 50.0];
        let grades = [300.0, 299.9, 100.0, 50.0, 49.9].map(|value| Grade::at_least(value, scale));
        assert_eq!(grades, [Grade::APlus, Grade::A, Grade::B, Grade::C, Grade::D]);
        let scale = [1.0, 2.0, 5.0, 10.0];
        let grades = [0.9, 1.0, 4.9, 9.9, 10.0].map(|value| Grade::below(value, scale));
        assert_eq!(grades, [Grade::APlus, Grade::A, Grade::B, Grade::C, Grade::D]);
        // What is not a number reaches nothing.
        assert_eq!(Grade::at_least(f64::NAN, scale), Grade::D);
    }

    #[test]
    fn the_parts_are_weighed_and_printed() {
        let benchmark = measured();
        let grades = benchmark.grades().map(|(_, weight, _, grade)| (weight, grade));
        // 40 x 3 + 40 x 2 + 15 x 2 + 5 x 3 = 245: nearer to 2 than to 3.
        let expected = [(40, Grade::A), (40, Grade::B), (15, Grade::B), (5, Grade::A)];
        assert_eq!((grades, benchmark.grade()), (expected, Grade::B));
        assert_eq!(
            benchmark.to_string(),
            "\
tiny on cpu (avx2, 2 threads)

ms                               p50       p95       p99
20 requests of 64 tokens       10.00     12.00     20.00
to the first token             10.00     12.00     20.00
one token, built-in model       3.00     12.00     20.00

                            tokens/s  of MAC/s  of reads
prefill of 128                1234.5    25.0 %    50.0 %
decode                        1234.5    25.0 %    50.0 %
one request at a time         1000.0
32 requests at once           5000.0

             weight  measured                         grade
throughput     40 %  250000 BitLinear passes/s            A
latency        40 %  3.000 ms a token                     B
memory         15 %  120.0 MB without weights             B
batch           5 %  5.00 times one request               A
together                                                  B"
        );
    }
}
