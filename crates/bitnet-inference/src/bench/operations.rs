//! How fast single operations are, on weights that stay in the cache.

use std::time::Instant;

use bitnet_core::backend::{ActivationPrecision, AttentionShape, Backend, KvLayout, KvType, Span};
use bitnet_core::{Error as CoreError, LinearUse, TernaryMatrix, WeightScale};

use crate::error::Error;
use crate::model::{ModelOptions, cpu_backend};

/// Seconds that one repetition takes at least.
const REPETITION: f64 = 0.02;

/// Heads of BitNet b1.58 2B-4T, for attention.
const HEADS: usize = 20;
const KV_HEADS: usize = 5;
const HEAD_SIZE: usize = 128;

/// An operation by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// A ternary linear layer, the quantisation of its input to int8 included.
    BitLinear {
        /// Width of the input.
        inputs: usize,
        /// Width of the output.
        outputs: usize,
        /// Rows at once.
        tokens: usize,
    },
    /// Attention of one token over a context in f32, 20 query heads of 128 that share 5 of keys and values.
    Attention {
        /// Tokens that are seen.
        context: usize,
    },
}

impl Operation {
    /// What is measured unless something else is asked for.
    pub const ALL: [Operation; 7] = [
        Operation::BITLINEAR_256,
        Operation::BitLinear { inputs: 2560, outputs: 2560, tokens: 1 },
        Operation::BitLinear { inputs: 6912, outputs: 2560, tokens: 1 },
        Operation::BitLinear { inputs: 2560, outputs: 6912, tokens: 16 },
        Operation::BitLinear { inputs: 2560, outputs: 6912, tokens: 128 },
        Operation::Attention { context: 64 },
        Operation::Attention { context: 1000 },
    ];

    /// The layer whose passes per second [`benchmark`](crate::benchmark()) grades.
    pub const BITLINEAR_256: Operation =
        Operation::BitLinear { inputs: 256, outputs: 256, tokens: 1 };

    /// Its name, such as `BitLinear 2560 to 6912 x 16`, which takes sixteen tokens at once.
    pub fn name(&self) -> String {
        match self {
            Operation::BitLinear { inputs, outputs, tokens } => {
                let times = if *tokens == 1 { String::new() } else { format!(" x {tokens}") };
                format!("BitLinear {inputs} to {outputs}{times}")
            }
            Operation::Attention { context } => format!("attention over {context} tokens"),
        }
    }

    /// Multiply-adds of one pass.
    pub fn macs(&self) -> u64 {
        match *self {
            Operation::BitLinear { inputs, outputs, tokens } => (inputs * outputs * tokens) as u64,
            Operation::Attention { context } => (2 * HEADS * HEAD_SIZE * context) as u64,
        }
    }

    /// Measures it with so many threads.
    ///
    /// # Errors
    /// If the threads or the memory cannot be had.
    ///
    /// # Panics
    /// If there are no repetitions.
    pub fn measure(
        &self,
        threads: usize,
        repetitions: usize,
    ) -> Result<OperationMeasurement, Error> {
        assert!(repetitions > 0);
        let options = ModelOptions { threads: Some(threads), ..ModelOptions::default() };
        let backend = cpu_backend(&options)?;
        let mut seconds = match *self {
            Operation::BitLinear { inputs, outputs, tokens } => {
                bit_linear(&backend, (inputs, outputs), tokens, repetitions)?
            }
            Operation::Attention { context } => attention(&backend, context, repetitions)?,
        };
        seconds.sort_by(f64::total_cmp);
        Ok(OperationMeasurement { operation: *self, threads, seconds })
    }
}

/// Name of the instruction set that operations run on.
///
/// # Errors
/// If `BITNET_ISA` names one that is unknown, or that this CPU does not have.
pub fn instruction_set() -> Result<String, Error> {
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    Ok(cpu_backend(&options)?.name())
}

/// The times of an operation.
#[derive(Debug, Clone, PartialEq)]
pub struct OperationMeasurement {
    /// What was measured.
    pub operation: Operation,
    /// Threads that shared it.
    pub threads: usize,
    /// Seconds of one pass, in each repetition, the shortest first.
    pub seconds: Vec<f64>,
}

impl OperationMeasurement {
    /// Passes per second: the median (of an even number of repetitions, the slower of the middle two),
    /// the slowest and the fastest.
    pub fn per_s(&self) -> (f64, f64, f64) {
        let last = self.seconds.len() - 1;
        let rate = |index: usize| 1.0 / self.seconds[index];
        (rate(self.seconds.len() / 2), rate(last), rate(0))
    }

    /// 10^9 multiply-adds per second, at the median.
    pub fn gmac_per_s(&self) -> f64 {
        self.per_s().0 * self.operation.macs() as f64 / 1e9
    }
}

/// Seconds of one pass in each repetition, after one that is not counted.
fn repeat(repetitions: usize, mut pass: impl FnMut()) -> Vec<f64> {
    let mut passes = 1;
    let mut time = |passes: usize| {
        let start = Instant::now();
        (0..passes).for_each(|_| pass());
        start.elapsed().as_secs_f64()
    };
    loop {
        let elapsed = time(passes);
        if elapsed >= REPETITION {
            break;
        }
        passes = (passes * 2).max((1.2 * REPETITION / elapsed.max(1e-9) * passes as f64) as usize);
    }
    (0..repetitions).map(|_| time(passes) / passes as f64).collect()
}

/// Rows of numbers between -1 and 1.
fn rows<B: Backend>(backend: &B, rows: usize, cols: usize) -> Result<B::Buffer, CoreError> {
    let values: Vec<f32> = (0..rows * cols).map(|i| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
    let mut buffer = backend.buffer(rows, cols)?;
    backend.write(&mut buffer, cols, &values);
    Ok(buffer)
}

fn bit_linear<B: Backend>(
    backend: &B,
    (inputs, outputs): (usize, usize),
    tokens: usize,
    repetitions: usize,
) -> Result<Vec<f64>, Error> {
    let mut state = 1u32;
    let scale = WeightScale::Multiply(0.02);
    let matrix = TernaryMatrix::from_rows(outputs, inputs, scale, |_, codes| {
        for code in codes {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *code = ((state >> 16) % 3) as u8;
        }
    })?;
    let linear = backend.load_linear(&matrix, ActivationPrecision::Int8, LinearUse::Dense)?;
    let x = rows(backend, tokens, inputs)?;
    let mut out = backend.buffer(tokens, outputs)?;
    Ok(repeat(repetitions, || {
        backend.linears(&x, tokens, None, &[&linear], &mut [&mut out]);
    }))
}

fn attention<B: Backend>(
    backend: &B,
    context: usize,
    repetitions: usize,
) -> Result<Vec<f64>, Error> {
    let layout = KvLayout {
        layers: 1,
        kv_heads: KV_HEADS,
        head_size: HEAD_SIZE,
        block_tokens: 16,
        kv_type: KvType::F32,
    };
    let blocks: Vec<u32> = (0..context.div_ceil(layout.block_tokens) as u32).collect();
    let mut kv = backend.kv_allocate(layout, blocks.len())?;
    let kv_width = KV_HEADS * HEAD_SIZE;
    let (k, v) = (rows(backend, context, kv_width)?, rows(backend, context, kv_width)?);
    let all = [Span { rows: 0..context, position: 0, blocks: &blocks }];
    backend.kv_write(&mut kv, 0, &k, &v, &all);
    let q = rows(backend, 1, HEADS * HEAD_SIZE)?;
    let mut out = backend.buffer(1, HEADS * HEAD_SIZE)?;
    let spans = [Span { rows: 0..1, position: context - 1, blocks: &blocks }];
    let scale = 1.0 / (HEAD_SIZE as f32).sqrt();
    let shape = AttentionShape { heads: HEADS, scale, window: None };
    Ok(repeat(repetitions, || backend.attention(shape, 0, &q, &kv, &spans, &mut out)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_measurement_gives_rates_and_multiply_adds() {
        let operation = Operation::BITLINEAR_256;
        assert_eq!(operation.name(), "BitLinear 256 to 256");
        let seconds = vec![1e-6, 2e-6, 4e-6];
        let measurement = OperationMeasurement { operation, threads: 1, seconds };
        let (median, slowest, fastest) = measurement.per_s();
        assert_eq!([median, slowest, fastest].map(f64::round), [5e5, 2.5e5, 1e6]);
        assert!((measurement.gmac_per_s() - 32.768).abs() < 1e-9);
    }

    #[test]
    fn operations_run_on_any_number_of_threads() {
        for operation in [Operation::BITLINEAR_256, Operation::Attention { context: 20 }] {
            for threads in [1, 2] {
                let measurement = operation.measure(threads, 2).unwrap();
                assert_eq!(measurement.seconds.len(), 2);
                assert!(measurement.seconds[0] > 0.0);
            }
        }
    }
}
