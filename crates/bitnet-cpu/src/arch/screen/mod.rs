//! Upper bounds of logits from a screen of the output head (see [`bitnet_quant::screen`]).

#[cfg(target_arch = "x86_64")]
pub(super) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(super) mod avx512;
#[cfg(target_arch = "aarch64")]
pub(super) mod neon;

use bitnet_core::Screen;
use bitnet_core::screen::{BLOCK_COLS, COLS, GROUP, ROWS};
use bitnet_quant::screen::{Input, products};

use super::Kernels;

pub(super) type UpperBounds = unsafe fn(&Screen, usize, &[Input], &mut [[f32; ROWS]]);

/// Groups of columns in a block.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
const GROUPS: usize = BLOCK_COLS / GROUP;

/// The four elements of one plane of `input` that meet set `quad` of four columns in a group of a
/// block.
///
/// # Safety
/// The input has such columns.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn four(input: &Input, block: usize, group: usize, quad: usize, plane: usize) -> i32 {
    let sets = GROUP / COLS;
    // SAFETY: the contract of this function; there are two planes.
    let planes = unsafe { input.planes.get_unchecked((block * GROUPS + group) * sets + quad) };
    i32::from_ne_bytes(planes[plane].map(|q| q as u8))
}

/// What is subtracted from the sum over a group of a block.
///
/// # Safety
/// The input has such columns.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
#[inline(always)]
unsafe fn center(input: &Input, block: usize, group: usize) -> f32 {
    // SAFETY: the contract of this function.
    unsafe { *input.centers.get_unchecked(GROUPS * block + group) }
}

/// See [`Kernels::upper_bounds`]: plain code.
#[inline(always)]
pub(super) fn upper_bounds(
    screen: &Screen,
    first: usize,
    inputs: &[Input],
    out: &mut [[f32; ROWS]],
) {
    for (band, out) in (first..).zip(out.chunks_exact_mut(inputs.len())) {
        let band = screen.band(band);
        for (input, out) in inputs.iter().zip(out) {
            *out = products(band.blocks, input);
            input.upper_bounds(&band, out);
        }
    }
}

/// Cuts inputs into passes of as many as share the unpacking of codes: makes `upper_bounds` from
/// `pass`, a function with a constant for their number.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! in_passes {
    ($(#[$features:meta])+ $($passes:literal)+) => {
        /// See [`Kernels::upper_bounds`](crate::arch::Kernels::upper_bounds).
        ///
        /// # Safety
        /// The CPU has these instructions, and each input is as long as the blocks.
        $(#[$features])+
        pub(in crate::arch) unsafe fn upper_bounds(
            screen: &Screen,
            first: usize,
            inputs: &[Input],
            out: &mut [[f32; ROWS]],
        ) {
            for (band, out) in (first..).zip(out.chunks_exact_mut(inputs.len())) {
                let band = screen.band(band);
                let (mut inputs, mut out) = (inputs, out);
                $(
                    while let Some((now, later)) = inputs.split_first_chunk::<$passes>() {
                        let (these, others) = out.split_at_mut($passes);
                        // SAFETY: the contract of this function.
                        unsafe { pass::<$passes>(band.blocks, now, these) };
                        for (input, out) in now.iter().zip(these) {
                            input.upper_bounds(&band, out);
                        }
                        (inputs, out) = (later, others);
                    }
                )+
            }
        }
    };
}
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use in_passes;

impl Kernels {
    /// Upper bounds `[bands, inputs]` of the logits of bands of a screen, from band `first` on.
    ///
    /// # Panics
    /// If an input belongs to a screen of another width, or there are no such bands.
    pub(crate) fn upper_bounds(
        &self,
        screen: &Screen,
        first: usize,
        inputs: &[Input],
        out: &mut [[f32; ROWS]],
    ) {
        let columns = screen.cols().next_multiple_of(BLOCK_COLS);
        for Input { planes, centers, .. } in inputs {
            assert_eq!(planes.as_flattened().as_flattened().len(), 2 * columns);
            assert_eq!(centers.len() * GROUP, columns);
        }
        if !inputs.is_empty() {
            // SAFETY: the CPU has the instructions (see `Kernels`), and the inputs are as long as
            // the blocks, as just checked.
            unsafe { (self.upper_bounds)(screen, first, inputs, out) }
        }
    }
}

#[cfg(test)]
mod tests {
    use bitnet_core::Tensor;
    use bitnet_testing::Random;

    use super::*;
    use crate::arch::tests::all_kernels;

    /// A screen of the bytes that `byte` gives, but for the numbers of its rows.
    fn screen(rows: usize, cols: usize, mut byte: impl FnMut() -> u8) -> Screen {
        let values: Vec<f32> = (0..rows * cols).map(|i| (i % 7) as f32 - 3.0).collect();
        let like = bitnet_quant::screen::build(&Tensor::from_f32(vec![rows, cols], &values));
        let mut bytes = like.unwrap().data().to_vec();
        let band = (bytes.len() - 4 * cols) / rows.div_ceil(ROWS);
        let end = bytes.len() - 4 * cols;
        for band in bytes[..end].chunks_exact_mut(band) {
            let codes = band.len() - 3 * 4 * ROWS;
            band[..codes].fill_with(&mut byte);
        }
        Screen::new(rows, cols, bytes.into()).unwrap()
    }

    fn check(screen: &Screen, states: &[Vec<f32>]) {
        let mut inputs = vec![Input::default(); states.len()];
        for (input, state) in inputs.iter_mut().zip(states) {
            input.set(state, screen);
        }
        let bands = screen.rows().div_ceil(ROWS);
        let mut expected = vec![[0.0; ROWS]; bands * states.len()];
        upper_bounds(screen, 0, &inputs, &mut expected);
        assert!(expected.as_flattened().iter().all(|bound| !bound.is_nan()));
        for kernels in all_kernels() {
            for first in [0, bands - 1] {
                let expected = &expected[first * states.len()..];
                let mut out = vec![[-1.0; ROWS]; expected.len()];
                kernels.upper_bounds(screen, first, &inputs, &mut out);
                assert_eq!(out, expected, "{}, {} states", kernels.name, states.len());
            }
        }
    }

    #[test]
    fn bounds_are_the_same_for_every_count_of_inputs() {
        let mut random = Random::new(3);
        for cols in [4, 32, 100, 128, 129, 500] {
            let screen = screen(35, cols, || random.bits() as u8);
            let mut random = Random::new(4);
            for count in 1..=9 {
                let states: Vec<Vec<f32>> = (0..count).map(|_| random.activations(cols)).collect();
                check(&screen, &states);
            }
        }
    }

    /// All codes and steps at their ends, all planes of the input too.
    #[test]
    fn narrow_sums_of_screens_hold_at_their_fullest() {
        for byte in [0, 255] {
            let screen = screen(16, 4096, || byte);
            // As large as a high plane can be, and as small as a low one, beside one that is larger.
            let ends = [8127.0f32, -8127.0, 8000.0, -7936.0].map(|end| {
                let mut state = vec![end; 4096];
                state[5] = 8127.0;
                state
            });
            check(&screen, &ends);
            let mut alternating = vec![1.0; 4096];
            alternating.iter_mut().step_by(2).for_each(|h| *h = -1.0);
            check(&screen, &[alternating]);
        }
    }

    #[test]
    #[should_panic(expected = "assertion")]
    fn inputs_of_another_width_are_refused() {
        let screen = screen(16, 256, || 1);
        let mut input = Input::default();
        input.set(&[1.0; 128], &self::screen(16, 128, || 1));
        let kernels = Kernels::for_isa(crate::Isa::Scalar).unwrap();
        kernels.upper_bounds(&screen, 0, &[input], &mut [[0.0; ROWS]]);
    }
}
