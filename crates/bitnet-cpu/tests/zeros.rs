//! What the counts say about the zeros of a feed-forward network that were left out.

use bitnet_core::backend::{
    Activation, ActivationPrecision, Backend, BitLinear, GatedFfn, Scratch,
};
use bitnet_core::{LinearUse, ShortcutCounts, Shortcuts, TernaryMatrix, WeightScale};
use bitnet_cpu::{CpuBackend, CpuOptions};

const HIDDEN: usize = 40;
const INTERMEDIATE: usize = 100;

/// Counts after steps of one and of three tokens through a network whose first `live` gates are
/// positive, and the outputs of both.
fn counts(live: usize, shortcuts: Shortcuts, copies: bool) -> (ShortcutCounts, Vec<f32>) {
    let backend =
        CpuBackend::new(CpuOptions { threads: Some(2), shortcuts, copies, ..Default::default() })
            .unwrap();
    let linear = |rows, cols, usage, code: &dyn Fn(usize, usize) -> u8| {
        let matrix =
            TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(0.5), |row, codes| {
                (0..cols).zip(codes).for_each(|(col, slot)| *slot = code(row, col));
            });
        let precision = ActivationPrecision::Int8;
        let weight = backend.load_linear(&matrix.unwrap(), precision, usage).unwrap();
        BitLinear::<CpuBackend> { weight, norm: None }
    };
    let ffn = GatedFfn::<CpuBackend> {
        gate: linear(INTERMEDIATE, HIDDEN, LinearUse::Dense, &|row, _| 2 * u8::from(row < live)),
        up: linear(INTERMEDIATE, HIDDEN, LinearUse::SparseOutputs, &|_, _| 2),
        down: linear(HIDDEN, INTERMEDIATE, LinearUse::SparseInputs, &|row, col| {
            ((row + col) % 3) as u8
        }),
        activation: Activation::Relu2,
        sub_norm: None,
    };
    let mut x = backend.buffer(3, HIDDEN).unwrap();
    backend.write(&mut x, HIDDEN, &[1.0; 3 * HIDDEN]);
    let wide = || backend.buffer(3, INTERMEDIATE).unwrap();
    let mut scratch = Scratch { normed: wide(), gate: wide(), up: wide() };
    let mut out = backend.buffer(3, HIDDEN).unwrap();
    let (mut one, mut three) = (Vec::new(), Vec::new());
    backend.gated_ffn(&x, 1, None, &ffn, &mut scratch, &mut out);
    backend.read(&out, 1, &mut one).unwrap();
    backend.gated_ffn(&x, 3, None, &ffn, &mut scratch, &mut out);
    backend.read(&out, 3, &mut three).unwrap();
    assert_eq!(one, three[..HIDDEN]);
    (backend.shortcut_counts(), one)
}

#[test]
fn rows_and_columns_that_zeros_made_needless_are_counted() {
    let (few, out) = counts(20, Shortcuts::ALL, true);
    let expected = ShortcutCounts {
        up_rows: 100,
        up_rows_skipped: 80,
        down_columns: 100,
        down_columns_skipped: 80,
        ..ShortcutCounts::default()
    };
    assert_eq!(few, expected);
    let (no_copy, same) = counts(20, Shortcuts::ALL, false);
    let expected = ShortcutCounts { down_columns: 0, down_columns_skipped: 0, ..expected };
    assert_eq!((no_copy, same), (expected, out.clone()));
    assert_eq!(counts(20, Shortcuts::NONE, true), (ShortcutCounts::default(), out));
}

#[test]
fn rows_that_were_looked_at_and_not_skipped_are_counted_too() {
    let (dense, _) = counts(95, Shortcuts::ALL, true);
    assert_eq!((dense.up_rows, dense.up_rows_skipped), (100, 0));
    assert_eq!((dense.down_columns, dense.down_columns_skipped), (100, 0));
    let (none, out) = counts(0, Shortcuts::ALL, true);
    assert_eq!((none.up_rows_skipped, none.down_columns_skipped), (100, 100));
    assert_eq!(out, [0.0; HIDDEN]);
}
