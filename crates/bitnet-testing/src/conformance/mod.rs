//! What every backend must compute: one set of cases for each operation, compared with the
//! reference.
//!
//! A backend's own test calls [`backend_matches_reference`]. Shapes are the odd ones on purpose:
//! kernels fail at their tails.

mod attention;
mod linears;
mod tables;

use bitnet_core::backend::{Activation, Backend, Norm};
use bitnet_core::numerics;
use bitnet_quant::reference::ReferenceBackend;

use crate::random::Random;

/// How close a backend must come to the reference.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Tolerance {
    /// The same bits: CPUs, which all follow the recipe of [`bitnet_core::numerics`].
    Exact,
    /// Devices whose sums have another order: a value may be off by this share of the largest
    /// magnitude of its row.
    Relative(f32),
}

/// Runs every operation of `backend` and of the reference on the same inputs.
///
/// # Panics
/// At the first difference, with the case and the place.
pub fn backend_matches_reference<B: Backend>(
    backend: &B,
    reference: &ReferenceBackend,
    tolerance: Tolerance,
) {
    let pair = Pair { backend, reference, tolerance };
    pair.rows_move_in_and_out();
    pair.linears();
    pair.linears_together();
    pair.layouts();
    pair.projections_and_feed_forward();
    pair.feed_forward_of_zeros();
    pair.norms();
    pair.rope();
    pair.elementwise();
    pair.tables();
    pair.attention();
    pair.attention_shapes();
    pair.long_attention();
    pair.large_values();
    pair.blocks_move();
}

/// Runs the operations that leave zeros out, for a backend with other options.
///
/// # Panics
/// As [`backend_matches_reference`].
pub fn zeros_match_reference<B: Backend>(
    backend: &B,
    reference: &ReferenceBackend,
    tolerance: Tolerance,
) {
    let pair = Pair { backend, reference, tolerance };
    pair.layouts();
    pair.feed_forward_of_zeros();
}

/// The two backends that do the same.
struct Pair<'a, B: Backend> {
    backend: &'a B,
    reference: &'a ReferenceBackend,
    tolerance: Tolerance,
}

/// Buffers of the same contents on both.
struct Both<B: Backend> {
    ours: B::Buffer,
    theirs: <ReferenceBackend as Backend>::Buffer,
}

/// Inner dimensions around the sizes of tiles, lanes and registers; 320 = 8640 / 27 and 452 are
/// multiples of 4 that are no multiples of 64; 1040 passes the widening limit of 16-bit sums.
const COLS: [usize; 11] = [1, 3, 4, 15, 16, 17, 100, 127, 320, 452, 1040];
const ROWS: [usize; 6] = [1, 3, 15, 16, 17, 100];
const TOKENS: [usize; 6] = [1, 2, 3, 5, 9, 17];

impl<B: Backend> Pair<'_, B> {
    fn buffer(&self, rows: usize, cols: usize, values: &[f32]) -> Both<B> {
        let mut both = Both {
            ours: self.backend.buffer(rows, cols).expect("a buffer"),
            theirs: self.reference.buffer(rows, cols).expect("a buffer"),
        };
        self.backend.write(&mut both.ours, cols, values);
        self.reference.write(&mut both.theirs, cols, values);
        both
    }

    /// A buffer of values that nobody expects in a result.
    fn unwritten(&self, rows: usize, cols: usize) -> Both<B> {
        self.buffer(rows, cols, &vec![-777.0; rows * cols])
    }

    fn norm(&self, random: &mut Random, cols: usize) -> (Norm<B>, Norm<ReferenceBackend>) {
        let weight: Vec<f32> = (0..cols).map(|_| 1.0 + random.signed() / 2.0).collect();
        let eps = 1e-5;
        (
            Norm { weight: self.backend.load_vector(&weight).expect("a vector"), eps },
            Norm { weight: self.reference.load_vector(&weight).expect("a vector"), eps },
        )
    }

    #[track_caller]
    fn compare(&self, both: &Both<B>, rows: usize, case: &str) {
        let (mut ours, mut theirs) = (Vec::new(), Vec::new());
        self.backend.read(&both.ours, rows, &mut ours).expect("the device is there");
        self.reference.read(&both.theirs, rows, &mut theirs).expect("memory is there");
        assert_eq!(ours.len(), theirs.len(), "{}: size of {case}", self.backend.name());
        let cols = (theirs.len() / rows.max(1)).max(1);
        for (row, (ours, theirs)) in ours.chunks(cols).zip(theirs.chunks(cols)).enumerate() {
            let largest = theirs.iter().fold(0.0f32, |largest, value| largest.max(value.abs()));
            for (col, (&ours, &theirs)) in ours.iter().zip(theirs).enumerate() {
                let good = match self.tolerance {
                    Tolerance::Exact => ours.to_bits() == theirs.to_bits(),
                    Tolerance::Relative(share) => (ours - theirs).abs() <= share * largest,
                };
                assert!(
                    good,
                    "{}: {case}: row {row}, column {col} is {ours:e}, reference {theirs:e}",
                    self.backend.name()
                );
            }
        }
    }

    fn rows_move_in_and_out(&self) {
        let values: Vec<f32> = (0..35).map(|i| i as f32 - 17.5).collect();
        // Room for more rows than are written, and rows of another width than it was made for.
        let mut both = self.unwritten(12, 10);
        self.backend.write(&mut both.ours, 7, &values);
        self.reference.write(&mut both.theirs, 7, &values);
        self.compare(&both, 5, "write and read");
        let mut read = vec![1.0; 3];
        self.backend.read(&both.ours, 2, &mut read).expect("the device is there");
        assert_eq!(read, values[..14], "read replaces what the vector held");
    }

    fn norms(&self) {
        let mut random = Random::new(4);
        for cols in COLS {
            for rows in [1, 3, 40] {
                let x = self.buffer(rows, cols, &random.activations(rows * cols));
                let (ours, theirs) = self.norm(&mut random, cols);
                let mut out = self.unwritten(rows, cols);
                self.backend.rms_norm(&x.ours, rows, &ours, &mut out.ours);
                self.reference.rms_norm(&x.theirs, rows, &theirs, &mut out.theirs);
                self.compare(&out, rows, &format!("rms_norm of {rows} x {cols}"));
            }
        }
        for (heads, head_size, rows) in [(1, 4, 1), (3, 100, 2), (5, 128, 40)] {
            let cols = heads * head_size;
            let mut x = self.buffer(rows, cols, &random.activations(rows * cols));
            let (ours, theirs) = self.norm(&mut random, head_size);
            self.backend.head_norm(&mut x.ours, rows, &ours, head_size);
            self.reference.head_norm(&mut x.theirs, rows, &theirs, head_size);
            self.compare(&x, rows, &format!("head_norm of {heads} heads of {head_size}"));
        }
    }

    fn rope(&self) {
        let mut random = Random::new(5);
        for (heads, head_size, rows) in [(1, 2, 1), (2, 6, 3), (3, 100, 2), (5, 128, 40)] {
            let frequencies = numerics::rope_inverse_frequencies(10_000.0, head_size);
            let angles = (0..rows).flat_map(|row| {
                frequencies.iter().map(move |&f| numerics::rope_angle(91 * row + 3, f))
            });
            let (cos, sin): (Vec<f32>, Vec<f32>) = angles.unzip();
            let (cos, sin) =
                (self.buffer(rows, head_size / 2, &cos), self.buffer(rows, head_size / 2, &sin));
            let cols = heads * head_size;
            let mut x = self.buffer(rows, cols, &random.activations(rows * cols));
            self.backend.rope(&mut x.ours, rows, head_size, &cos.ours, &sin.ours);
            self.reference.rope(&mut x.theirs, rows, head_size, &cos.theirs, &sin.theirs);
            self.compare(&x, rows, &format!("rope of {heads} heads of {head_size}"));
        }
    }

    fn elementwise(&self) {
        let mut random = Random::new(6);
        for (rows, cols) in [(1, 1), (1, 7), (2, 33), (3, 100), (40, 1040)] {
            let mut values = random.activations(rows * cols);
            for special in [-0.0, 1e-30, -1e-30, 60.0, -100.0, 100.0] {
                let place = random.below(values.len());
                values[place] = special;
            }
            let y = self.buffer(rows, cols, &random.activations(rows * cols));
            for activation in [Activation::Relu2, Activation::Silu, Activation::GeluTanh] {
                let mut x = self.buffer(rows, cols, &values);
                self.backend.gate(&mut x.ours, &y.ours, rows, activation);
                self.reference.gate(&mut x.theirs, &y.theirs, rows, activation);
                self.compare(&x, rows, &format!("gate {activation:?} of {rows} x {cols}"));
            }
            let mut x = self.buffer(rows, cols, &values);
            self.backend.add(&mut x.ours, &y.ours, rows);
            self.reference.add(&mut x.theirs, &y.theirs, rows);
            self.compare(&x, rows, &format!("add of {rows} x {cols}"));
        }
    }
}
