//! What every backend must compute: one set of cases for each operation, compared with the
//! reference.
//!
//! A backend's own test calls [`backend_matches_reference`]. Shapes are the odd ones on purpose:
//! kernels fail at their tails.

use bitnet_core::backend::{
    Activation, ActivationPrecision, AttentionShape, Backend, BitLinear, GatedFfn, KvLayout,
    KvType, Norm, Scratch, Span,
};
use bitnet_core::numerics::{self, ATTENTION_SPLIT};
use bitnet_core::{
    DType, Keep, LinearUse, Pick, Tensor, TernaryMatrix, TileOrder, TiledMatrix, WeightScale,
};
use bitnet_quant::packing::tile;
use bitnet_quant::reference::ReferenceBackend;
use bitnet_quant::screen;

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

fn matrix(random: &mut Random, rows: usize, cols: usize, scale: WeightScale) -> TernaryMatrix {
    TernaryMatrix::from_rows(rows, cols, scale, |_, codes| {
        codes.iter_mut().for_each(|code| *code = random.below(3) as u8);
    })
    .expect("a valid matrix")
}

/// A scale of each kind that fits the shape.
fn scales(random: &mut Random, rows: usize, cols: usize) -> Vec<WeightScale> {
    let mut scales = vec![
        WeightScale::Multiply(0.037),
        WeightScale::Divide(23.7),
        WeightScale::Rows((0..rows).map(|_| random.signed()).collect()),
    ];
    for len in [4, 16, 20, 64, 80, 100, 128, 320] {
        if cols.is_multiple_of(len) {
            let values = (0..rows * (cols / len)).map(|_| random.signed()).collect();
            scales.push(WeightScale::Groups { len, values });
        }
    }
    scales
}

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

    fn linear_case(
        &self,
        random: &mut Random,
        tokens: usize,
        matrix: &TernaryMatrix,
        precision: ActivationPrecision,
        normed: bool,
    ) {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let values = match random.below(3) {
            0 => random.near_ties(tokens * cols, cols),
            _ => random.activations(tokens * cols),
        };
        let x = self.buffer(tokens + 1, cols, &values);
        let (ours, theirs) = self.norm(random, cols);
        let mut out = self.unwritten(tokens, rows);
        let linear =
            self.backend.load_linear(matrix, precision, LinearUse::Dense).expect("a linear");
        let norm = normed.then_some(&ours);
        self.backend.linears(&x.ours, tokens, norm, &[&linear], &mut [&mut out.ours]);
        let linear =
            self.reference.load_linear(matrix, precision, LinearUse::Dense).expect("a linear");
        let norm = normed.then_some(&theirs);
        self.reference.linears(&x.theirs, tokens, norm, &[&linear], &mut [&mut out.theirs]);
        let scale = match matrix.scale() {
            WeightScale::Multiply(_) => "multiply".to_owned(),
            WeightScale::Divide(_) => "divide".to_owned(),
            WeightScale::Rows(_) => "rows".to_owned(),
            WeightScale::Groups { len, .. } => format!("groups of {len}"),
        };
        let case = format!("{rows} x {cols}, {tokens} tokens, {precision:?}, {scale}");
        self.compare(&out, tokens, &case);
    }

    fn linears(&self) {
        let mut random = Random::new(1);
        let precisions = [ActivationPrecision::Int8, ActivationPrecision::F32];
        for cols in COLS {
            for rows in ROWS {
                for scale in scales(&mut random, rows, cols) {
                    let matrix = matrix(&mut random, rows, cols, scale);
                    for precision in precisions {
                        let tokens = TOKENS[random.below(TOKENS.len())];
                        let normed = random.below(2) == 0;
                        self.linear_case(&mut random, tokens, &matrix, precision, normed);
                    }
                }
            }
        }
        // Every count of tokens, more than a cache block holds among them, on one shape.
        for scale in scales(&mut random, 33, 320) {
            let matrix = matrix(&mut random, 33, 320, scale);
            for tokens in TOKENS.into_iter().chain([64, 65, 131]) {
                for precision in precisions {
                    self.linear_case(&mut random, tokens, &matrix, precision, true);
                }
            }
        }
        // Wide and tall enough to be shared among threads; 8640 columns are those of 1bitLLM-3B.
        for (rows, cols) in [(1000, 640), (70, 8640)] {
            let matrix = matrix(&mut random, rows, cols, WeightScale::Divide(31.0));
            for tokens in [1, 5] {
                for precision in precisions {
                    self.linear_case(&mut random, tokens, &matrix, precision, true);
                }
            }
        }
    }

    /// Five matrices of different heights, scales and precisions with one input.
    fn linears_together(&self) {
        let mut random = Random::new(2);
        let cols = 640;
        let group = |random: &mut Random, rows: usize, len: usize| WeightScale::Groups {
            len,
            values: (0..rows * (cols / len)).map(|_| random.signed()).collect(),
        };
        let matrices = [
            matrix(&mut random, 200, cols, WeightScale::Multiply(0.1)),
            {
                let scale = group(&mut random, 17, 128);
                matrix(&mut random, 17, cols, scale)
            },
            matrix(&mut random, 1, cols, WeightScale::Divide(3.0)),
            {
                let scale = group(&mut random, 330, 20);
                matrix(&mut random, 330, cols, scale)
            },
            matrix(&mut random, 31, cols, WeightScale::Rows(vec![0.3; 31])),
        ];
        let precision = |j: usize| match j {
            0 | 1 | 3 => ActivationPrecision::Int8,
            _ => ActivationPrecision::F32,
        };
        for tokens in [1, 6] {
            let x = self.buffer(tokens, cols, &random.activations(tokens * cols));
            let mut outs: Vec<Both<B>> =
                matrices.iter().map(|matrix| self.unwritten(tokens, matrix.rows())).collect();
            let load = |j: usize, m| {
                self.backend.load_linear(m, precision(j), LinearUse::Dense).expect("a linear")
            };
            let ours: Vec<B::Linear> =
                matrices.iter().enumerate().map(|(j, m)| load(j, m)).collect();
            let load = |j: usize, m| {
                self.reference.load_linear(m, precision(j), LinearUse::Dense).expect("a linear")
            };
            let theirs: Vec<_> = matrices.iter().enumerate().map(|(j, m)| load(j, m)).collect();
            let (our_norm, their_norm) = self.norm(&mut random, cols);
            let (mut our_outs, mut their_outs): (Vec<_>, Vec<_>) =
                outs.iter_mut().map(|both| (&mut both.ours, &mut both.theirs)).unzip();
            let ours: Vec<&B::Linear> = ours.iter().collect();
            self.backend.linears(&x.ours, tokens, Some(&our_norm), &ours, &mut our_outs);
            let theirs: Vec<_> = theirs.iter().collect();
            self.reference.linears(&x.theirs, tokens, Some(&their_norm), &theirs, &mut their_outs);
            for (j, out) in outs.iter().enumerate() {
                self.compare(out, tokens, &format!("matrix {j} of five, {tokens} tokens"));
            }
        }
    }

    /// Matrices loaded for each use, and from tiles of each order whatever their scales and precision.
    fn layouts(&self) {
        use LinearUse::{Dense, SparseInputs, SparseOutputs};
        let mut random = Random::new(11);
        for (rows, cols) in [(1, 3), (17, 100), (33, 320), (100, 1040), (300, 16)] {
            for scale in scales(&mut random, rows, cols) {
                let m = matrix(&mut random, rows, cols, scale);
                for precision in [ActivationPrecision::Int8, ActivationPrecision::F32] {
                    let mut linears: Vec<B::Linear> = [Dense, SparseOutputs, SparseInputs]
                        .map(|usage| self.backend.load_linear(&m, precision, usage))
                        .into_iter()
                        .collect::<Result<_, _>>()
                        .expect("a linear");
                    for order in [TileOrder::Bands, TileOrder::Rows] {
                        let mut tiles = vec![0; tile::byte_len(rows, cols).expect("a small one")];
                        tile::pack(&m, order, &mut tiles);
                        let mut columns = vec![0; cols * tile::column_bytes(rows)];
                        tile::pack_columns(&m, &mut columns);
                        let (scale, columns) = (m.scale().clone(), Some(columns.into()));
                        let tiled =
                            TiledMatrix::new(rows, cols, scale, order, tiles.into(), columns);
                        let tiled = tiled.expect("a matrix in tiles");
                        assert_eq!(tile::untiled(&tiled).expect("the same matrix"), m);
                        linears.push(self.backend.load_tiled(&tiled, precision).expect("tiles"));
                    }
                    let theirs = self.reference.load_linear(&m, precision, Dense).expect("linear");
                    for tokens in [1, 2, 7, 70] {
                        let x = self.buffer(tokens, cols, &random.activations(tokens * cols));
                        let mut out = self.unwritten(tokens, rows);
                        let outs = &mut [&mut out.theirs];
                        self.reference.linears(&x.theirs, tokens, None, &[&theirs], outs);
                        for (i, linear) in linears.iter().enumerate() {
                            let outs = &mut [&mut out.ours];
                            self.backend.linears(&x.ours, tokens, None, &[linear], outs);
                            let case = format!("{rows} x {cols}, {precision:?}, layout {i}");
                            self.compare(&out, tokens, &case);
                        }
                    }
                }
            }
        }
    }

    /// Networks of relu² from all gates dead to all live, in shapes with and without tails.
    fn feed_forward_of_zeros(&self) {
        let mut random = Random::new(12);
        let shapes = [(3, 5), (16, 33), (68, 132), (100, 300), (320, 1040), (20, 8640), (516, 640)];
        for (hidden, intermediate) in shapes {
            for (case, precision) in [
                ("all dead", ActivationPrecision::Int8),
                ("one live", ActivationPrecision::Int8),
                ("few live", ActivationPrecision::Int8),
                ("random", ActivationPrecision::Int8),
                ("all live", ActivationPrecision::Int8),
                ("random", ActivationPrecision::F32),
            ] {
                // Inputs are positive, so that a row of one sign decides its gate's.
                let one = random.below(intermediate);
                let row_of = |random: &mut Random, row: usize| match case {
                    "all dead" => 0,
                    "one live" => 2 * usize::from(row == one),
                    "few live" => 2 * usize::from(random.below(10) == 0),
                    "all live" => 2,
                    _ => random.below(3),
                };
                let gate = TernaryMatrix::from_rows(
                    intermediate,
                    hidden,
                    WeightScale::Multiply(0.1),
                    |row, codes| match (case, row_of(&mut random, row)) {
                        ("random", _) => {
                            codes.iter_mut().for_each(|code| *code = random.below(3) as u8);
                        }
                        (_, code) => codes.fill(code as u8),
                    },
                )
                .expect("a valid matrix");
                let scale = match hidden % 3 {
                    0 => WeightScale::Divide(3.0),
                    1 => WeightScale::Rows((0..intermediate).map(|_| random.signed()).collect()),
                    _ => WeightScale::Multiply(0.3),
                };
                let up = matrix(&mut random, intermediate, hidden, scale);
                let scale = match hidden % 3 {
                    0 => WeightScale::Rows((0..hidden).map(|_| random.signed()).collect()),
                    _ => WeightScale::Divide(0.7),
                };
                let down = matrix(&mut random, hidden, intermediate, scale);
                let norms = random.below(2) == 0;
                for tokens in [1, 2, 5] {
                    let values = random.activations(tokens * hidden);
                    let values: Vec<f32> = values.iter().map(|v| v.abs()).collect();
                    let case = format!(
                        "zeros: {hidden} to {intermediate}, {case}, {precision:?}, norms: {norms}"
                    );
                    let matrices = [&gate, &up, &down];
                    self.relu2_case(
                        &mut random,
                        matrices,
                        precision,
                        norms,
                        tokens,
                        &values,
                        &case,
                    );
                }
            }
        }
    }

    #[allow(clippy::too_many_arguments)] // what makes a case
    fn relu2_case(
        &self,
        random: &mut Random,
        [gate, up, down]: [&TernaryMatrix; 3],
        precision: ActivationPrecision,
        norms: bool,
        tokens: usize,
        values: &[f32],
        case: &str,
    ) {
        let (hidden, intermediate) = (gate.cols(), gate.rows());
        let x = self.buffer(tokens, hidden, values);
        let (our_norm, their_norm) = self.norm(random, hidden);
        let (our_sub, their_sub) = self.norm(random, intermediate);
        let mut out = self.unwritten(tokens, hidden);
        fn run<B: Backend>(
            backend: &B,
            [gate, up, down]: [(&TernaryMatrix, LinearUse); 3],
            precision: ActivationPrecision,
            [norm, sub_norm]: [Option<Norm<B>>; 2],
            x: &B::Buffer,
            tokens: usize,
            out: &mut B::Buffer,
        ) {
            let layer = |(matrix, usage): (&TernaryMatrix, LinearUse)| BitLinear::<B> {
                weight: backend.load_linear(matrix, precision, usage).expect("a linear"),
                norm: None,
            };
            let buffer = || backend.buffer(tokens, gate.0.rows()).expect("a buffer");
            let mut scratch = Scratch::<B> { normed: buffer(), gate: buffer(), up: buffer() };
            let ffn = GatedFfn::<B> {
                gate: layer(gate),
                up: layer(up),
                down: layer(down),
                activation: Activation::Relu2,
                sub_norm,
            };
            backend.gated_ffn(x, tokens, norm.as_ref(), &ffn, &mut scratch, out);
        }
        let uses = [
            (gate, LinearUse::Dense),
            (up, LinearUse::SparseOutputs),
            (down, LinearUse::SparseInputs),
        ];
        let ours = [norms.then_some(our_norm), norms.then_some(our_sub)];
        run(self.backend, uses, precision, ours, &x.ours, tokens, &mut out.ours);
        let theirs = [norms.then_some(their_norm), norms.then_some(their_sub)];
        run(self.reference, uses, precision, theirs, &x.theirs, tokens, &mut out.theirs);
        self.compare(&out, tokens, &format!("{case}, {tokens} tokens"));
    }

    /// The composed operations, with and without the norms that some models have.
    fn projections_and_feed_forward(&self) {
        let mut random = Random::new(3);
        let (hidden, intermediate, tokens) = (68, 132, 3);
        for own_norms in [false, true] {
            let mut layer = |rows: usize, cols: usize| {
                let matrix = matrix(&mut random, rows, cols, WeightScale::Multiply(0.2));
                let (our_norm, their_norm) = self.norm(&mut random, cols);
                let precision = ActivationPrecision::Int8;
                let ours = BitLinear::<B> {
                    weight: self
                        .backend
                        .load_linear(&matrix, precision, LinearUse::Dense)
                        .expect("a linear"),
                    norm: own_norms.then_some(our_norm),
                };
                let theirs = BitLinear::<ReferenceBackend> {
                    weight: self
                        .reference
                        .load_linear(&matrix, precision, LinearUse::Dense)
                        .expect("a linear"),
                    norm: own_norms.then_some(their_norm),
                };
                (ours, theirs)
            };
            let (gate, up, down) = (
                layer(intermediate, hidden),
                layer(intermediate, hidden),
                layer(hidden, intermediate),
            );
            let (our_sub, their_sub) = self.norm(&mut random, intermediate);
            let (our_norm, their_norm) = self.norm(&mut random, hidden);
            let x = self.buffer(tokens, hidden, &random.activations(tokens * hidden));
            let mut out = self.unwritten(tokens, hidden);
            let mut ours = Scratch::<B> {
                normed: self.backend.buffer(tokens, intermediate).expect("a buffer"),
                gate: self.backend.buffer(tokens, intermediate).expect("a buffer"),
                up: self.backend.buffer(tokens, intermediate).expect("a buffer"),
            };
            let ffn = GatedFfn::<B> {
                gate: gate.0,
                up: up.0,
                down: down.0,
                activation: Activation::Relu2,
                sub_norm: Some(our_sub),
            };
            let norm = Some(&our_norm);
            self.backend.gated_ffn(&x.ours, tokens, norm, &ffn, &mut ours, &mut out.ours);
            let mut theirs = Scratch::<ReferenceBackend> {
                normed: self.reference.buffer(tokens, intermediate).expect("a buffer"),
                gate: self.reference.buffer(tokens, intermediate).expect("a buffer"),
                up: self.reference.buffer(tokens, intermediate).expect("a buffer"),
            };
            let ffn = GatedFfn::<ReferenceBackend> {
                gate: gate.1,
                up: up.1,
                down: down.1,
                activation: Activation::Relu2,
                sub_norm: Some(their_sub),
            };
            let norm = Some(&their_norm);
            self.reference.gated_ffn(&x.theirs, tokens, norm, &ffn, &mut theirs, &mut out.theirs);
            self.compare(&out, tokens, &format!("gated feed-forward, own norms: {own_norms}"));
        }
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

    /// Embeddings and heads of every type that they come in.
    fn tables(&self) {
        let mut random = Random::new(7);
        let cases = [
            (DType::F32, 37, 100),
            (DType::F32, 1000, 64),
            (DType::F16, 37, 1),
            (DType::F16, 37, 100),
            (DType::F16, 1000, 127),
            (DType::BF16, 37, 99),
            (DType::BF16, 1000, 64),
            (DType::Q8_0, 37, 96),
            (DType::Q4K, 19, 512),
            (DType::Q6K, 19, 768),
        ];
        for (dtype, vocabulary, hidden) in cases {
            let table = table(&mut random, dtype, vocabulary, hidden);
            let ours = self.backend.load_table(&table).expect("a table");
            let theirs = self.reference.load_table(&table).expect("a table");
            for scale in [1.0, 8.062_258] {
                let tokens: Vec<u32> = (0..5).map(|_| random.below(vocabulary) as u32).collect();
                let mut out = self.unwritten(6, hidden);
                self.backend.embed(&ours, &tokens, scale, &mut out.ours);
                self.reference.embed(&theirs, &tokens, scale, &mut out.theirs);
                self.compare(&out, 5, &format!("embed from {dtype}, scale {scale}"));
            }
            let x = self.buffer(40, hidden, &random.activations(40 * hidden));
            let (our_norm, their_norm) = self.norm(&mut random, hidden);
            let all: Vec<usize> = (0..40).collect();
            for picks in [&[2usize][..], &[4, 0, 4], &all[3..39]] {
                let mut out = self.unwritten(picks.len(), vocabulary);
                self.backend.head(&x.ours, picks, &our_norm, &ours, &mut out.ours);
                self.reference.head(&x.theirs, picks, &their_norm, &theirs, &mut out.theirs);
                let case = format!("head {dtype} {vocabulary} x {hidden}, {} picks", picks.len());
                self.compare(&out, picks.len(), &case);
            }
            let screen = screen::build(&table).expect("a screen");
            let Some(screen) = self.backend.load_screen(&screen).expect("a screen") else {
                continue;
            };
            for keep in [Keep::Largest(1), Keep::Largest(7), Keep::Within(2.0)] {
                let ids = [0, 5, vocabulary as u32 - 1, vocabulary as u32];
                for ids in [&[][..], &ids[..]] {
                    // Rows that ask for different things share a pass.
                    let picks = [
                        Pick { row: 3, keep, exact_ids: ids },
                        Pick { row: 0, keep: Keep::Largest(2), exact_ids: &[1] },
                        Pick { row: 3, keep: Keep::Largest(1), exact_ids: &[] },
                    ];
                    for picks in [&picks[..1], &picks] {
                        let mut found = vec![Vec::new(); picks.len()];
                        let mut expected = found.clone();
                        let (ours_x, norm) = (&x.ours, &our_norm);
                        self.backend
                            .screened_head(ours_x, picks, norm, &ours, &screen, &mut found)
                            .expect("a device");
                        let (their_x, norm) = (&x.theirs, &their_norm);
                        self.reference
                            .screened_head(their_x, picks, norm, &theirs, &(), &mut expected)
                            .expect("no device to lose");
                        // A screen may let more through, and all that it lets through is exact.
                        let case =
                            format!("screened head {dtype} {vocabulary} x {hidden}, {picks:?}");
                        for (expected, found) in expected.iter().zip(&found) {
                            let missing = expected.iter().find(|c| !found.contains(c));
                            assert_eq!(missing, None, "{case}");
                        }
                    }
                }
            }
        }
    }

    fn kv(&self, layout: KvLayout, blocks: usize) -> Stores<B> {
        Stores {
            ours: self.backend.kv_allocate(layout, blocks).expect("room for keys and values"),
            theirs: self.reference.kv_allocate(layout, blocks).expect("room for keys and values"),
        }
    }

    /// Stores keys and values of a step and attends in one layer.
    fn step(
        &self,
        random: &mut Random,
        shape: AttentionShape,
        layout: KvLayout,
        layer: usize,
        kv: &mut Stores<B>,
        spans: &[Span<'_>],
    ) -> Both<B> {
        let rows = spans.iter().map(|span| span.rows.end).max().unwrap_or(0);
        let width = layout.kv_heads * layout.head_size;
        let k = self.buffer(rows, width, &random.activations(rows * width));
        let v = self.buffer(rows, width, &random.near_ties(rows * width, layout.head_size));
        self.backend.kv_write(&mut kv.ours, layer, &k.ours, &v.ours, spans);
        self.reference.kv_write(&mut kv.theirs, layer, &k.theirs, &v.theirs, spans);
        let width = shape.heads * layout.head_size;
        let q = self.buffer(rows, width, &random.activations(rows * width));
        let mut out = self.unwritten(rows, width);
        self.backend.attention(shape, layer, &q.ours, &kv.ours, spans, &mut out.ours);
        self.reference.attention(shape, layer, &q.theirs, &kv.theirs, spans, &mut out.theirs);
        out
    }

    /// Steps of a batch: three sequences of different ages, blocks out of order, both layers.
    fn attention(&self) {
        let mut random = Random::new(8);
        for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
            for (heads, kv_heads, head_size) in [(4, 2, 16), (3, 1, 100), (2, 2, 6), (20, 5, 128)] {
                let layout = KvLayout { layers: 2, kv_heads, head_size, block_tokens: 4, kv_type };
                let scale = 1.0 / (head_size as f32).sqrt();
                for window in [None, Some(1), Some(5)] {
                    let shape = AttentionShape { heads, scale, window };
                    let mut kv = self.kv(layout, 12);
                    let (a, b, c) = ([7, 2, 11, 0], [5, 9, 1], [3, 10]);
                    for layer in 0..2 {
                        let case = |step: &str| {
                            format!(
                                "attention, {step}, {kv_type:?}, {heads}/{kv_heads} heads of \
                                 {head_size}, window {window:?}, layer {layer}"
                            )
                        };
                        let prompts = [
                            Span { rows: 0..9, position: 0, blocks: &a },
                            Span { rows: 9..12, position: 0, blocks: &b },
                            Span { rows: 12..13, position: 0, blocks: &c },
                        ];
                        let out = self.step(&mut random, shape, layout, layer, &mut kv, &prompts);
                        self.compare(&out, 13, &case("prompts"));
                        let next = [
                            Span { rows: 0..1, position: 9, blocks: &a },
                            Span { rows: 1..7, position: 3, blocks: &b },
                            Span { rows: 7..8, position: 1, blocks: &c },
                        ];
                        let out = self.step(&mut random, shape, layout, layer, &mut kv, &next);
                        self.compare(&out, 8, &case("next tokens"));
                    }
                }
            }
        }
    }

    /// Head sizes of models and around the width of a register, with every number of query heads that
    /// a register block may have, in blocks that are narrower than a register, as wide, and neither.
    fn attention_shapes(&self) {
        let mut random = Random::new(11);
        let shapes = [(64, 1), (80, 2), (96, 3), (100, 4), (256, 5), (12, 6), (34, 7), (48, 9)];
        for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
            for (index, (head_size, shared)) in shapes.into_iter().enumerate() {
                let kv_heads = 1 + index % 3;
                let block_tokens = [1, 5, 16, 24, 40][index % 5];
                let layout = KvLayout { layers: 2, kv_heads, head_size, block_tokens, kv_type };
                let blocks: Vec<u32> = (0..90u32.div_ceil(block_tokens as u32)).rev().collect();
                let mut kv = self.kv(layout, blocks.len());
                let scale = 1.0 / (head_size as f32).sqrt();
                let mut position = 0;
                for (end, window) in [(37, None), (38, None), (41, Some(3)), (90, Some(20))] {
                    let spans = [Span { rows: 0..end - position, position, blocks: &blocks }];
                    let shape = AttentionShape { heads: kv_heads * shared, scale, window };
                    let out = self.step(&mut random, shape, layout, 1, &mut kv, &spans);
                    let case = format!(
                        "attention at {position}..{end}, {kv_type:?}, {shared} heads share each of \
                         {kv_heads} of {head_size}, blocks of {block_tokens}, window {window:?}"
                    );
                    self.compare(&out, end - position, &case);
                    position = end;
                }
            }
        }
    }

    /// Contexts that end just before, at and after the ends of splits, and steps that span several.
    fn long_attention(&self) {
        const SPLIT: usize = ATTENTION_SPLIT;
        let mut random = Random::new(9);
        for (kv_type, head_size, block_tokens) in [
            (KvType::F32, 20, 16),
            (KvType::F16, 8, 16),
            (KvType::Int8, 12, 16),
            (KvType::F32, 6, 7),
            (KvType::Int8, 10, 24),
        ] {
            let layout = KvLayout { layers: 1, kv_heads: 2, head_size, block_tokens, kv_type };
            let tokens = 5 * SPLIT + 40;
            let blocks: Vec<u32> = (0..tokens.div_ceil(block_tokens) as u32).rev().collect();
            let shape = AttentionShape { heads: 4, scale: 0.3, window: None };
            let mut kv = self.kv(layout, blocks.len());
            let mut position = 0;
            let ends = [
                (SPLIT - 2, None),
                (SPLIT - 1, None),
                (SPLIT, None),
                (SPLIT + 1, Some(SPLIT + 7)),
                // Every row of a step sees more, and with a window less, than the one before.
                (2 * SPLIT - 1, Some(SPLIT / 2 + 3)),
                (2 * SPLIT, None),
                (2 * SPLIT + 6, Some(SPLIT + 7)),
                (4 * SPLIT + 3, None),
                (5 * SPLIT + 30, Some(2 * SPLIT + 1)),
                (5 * SPLIT + 32, Some(3 * SPLIT)),
                (tokens, Some(5)),
            ];
            for (end, window) in ends {
                let spans = [Span { rows: 0..end - position, position, blocks: &blocks }];
                let shape = AttentionShape { window, ..shape };
                let out = self.step(&mut random, shape, layout, 0, &mut kv, &spans);
                let case = format!("attention at {position}..{end}, {kv_type:?}, {window:?}");
                self.compare(&out, end - position, &case);
                position = end;
            }
            // Two sequences, one long and one that shares its first blocks.
            let spans = [
                Span { rows: 0..1, position: position - 1, blocks: &blocks },
                Span {
                    rows: 1..3,
                    position: 30,
                    blocks: &blocks[..33usize.div_ceil(block_tokens)],
                },
            ];
            let out = self.step(&mut random, shape, layout, 0, &mut kv, &spans[..1]);
            self.compare(&out, 1, &format!("one token far on, {kv_type:?}"));
            let out = self.step(&mut random, shape, layout, 0, &mut kv, &spans);
            self.compare(&out, 3, &format!("a long and a short sequence, {kv_type:?}"));
        }
    }

    /// Half-precision keys and values take the largest finite number in place of an infinity, so that
    /// a large value is large and not the end of the sequence.
    fn large_values(&self) {
        let layout = KvLayout {
            layers: 1,
            kv_heads: 1,
            head_size: 4,
            block_tokens: 4,
            kv_type: KvType::F16,
        };
        let mut kv = self.kv(layout, 1);
        let values = [65_504.0, 65_519.0, 65_520.0, -1e9, 1e-7, -7e4, 3.0, f32::INFINITY];
        let (k, v) = (self.buffer(2, 4, &[0.0; 8]), self.buffer(2, 4, &values));
        let spans = [Span { rows: 0..2, position: 0, blocks: &[0] }];
        self.backend.kv_write(&mut kv.ours, 0, &k.ours, &v.ours, &spans);
        self.reference.kv_write(&mut kv.theirs, 0, &k.theirs, &v.theirs, &spans);
        let q = self.buffer(2, 4, &[1.0; 8]);
        let mut out = self.unwritten(2, 4);
        // A window of one token shows each value as it is stored.
        let shape = AttentionShape { heads: 1, scale: 1.0, window: Some(1) };
        self.backend.attention(shape, 0, &q.ours, &kv.ours, &spans, &mut out.ours);
        self.reference.attention(shape, 0, &q.theirs, &kv.theirs, &spans, &mut out.theirs);
        self.compare(&out, 2, "values beyond half precision");
        let mut read = Vec::new();
        self.reference.read(&out.theirs, 2, &mut read).expect("memory is there");
        let stored =
            [65_504.0, 65_504.0, 65_504.0, -65_504.0, 1.192_092_9e-7, -65_504.0, 3.0, 65_504.0];
        assert_eq!(read, stored);
    }

    /// Copied, exported and imported blocks hold what the original ones do.
    fn blocks_move(&self) {
        let mut random = Random::new(10);
        for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
            let layout =
                KvLayout { layers: 2, kv_heads: 2, head_size: 10, block_tokens: 4, kv_type };
            let shape = AttentionShape { heads: 2, scale: 0.4, window: None };
            let mut kv = self.kv(layout, 8);
            for layer in 0..2 {
                let spans = [Span { rows: 0..8, position: 0, blocks: &[6, 1] }];
                self.step(&mut random, shape, layout, layer, &mut kv, &spans);
            }
            self.backend.kv_copy(&mut kv.ours, &[(6, 3), (1, 0)]);
            self.reference.kv_copy(&mut kv.theirs, &[(6, 3), (1, 0)]);
            let spans = [Span { rows: 0..1, position: 8, blocks: &[3, 0, 2] }];
            let out = self.step(&mut random, shape, layout, 1, &mut kv, &spans);
            self.compare(&out, 1, &format!("attention over copied blocks, {kv_type:?}"));

            let ours = self.backend.kv_export(&kv.ours, &[3, 0]).expect("an export");
            let theirs = self.reference.kv_export(&kv.theirs, &[3, 0]).expect("an export");
            assert_eq!(ours.len(), 2 * layout.block_bytes(), "bytes of two blocks, {kv_type:?}");
            let mut kv = self.kv(layout, 6);
            self.backend.kv_import(&mut kv.ours, &[5, 2], &ours).expect("an import");
            self.reference.kv_import(&mut kv.theirs, &[5, 2], &theirs).expect("an import");
            assert!(
                self.backend.kv_import(&mut kv.ours, &[5, 2], &ours[1..]).is_err(),
                "an import of another size is refused"
            );
            for layer in 0..2 {
                let spans = [Span { rows: 0..1, position: 8, blocks: &[5, 2, 0] }];
                let out = self.step(&mut random, shape, layout, layer, &mut kv, &spans);
                self.compare(&out, 1, &format!("attention over imported blocks, {kv_type:?}"));
            }
        }
    }
}

/// Key/value stores of the same contents on both backends.
struct Stores<B: Backend> {
    ours: B::Kv,
    theirs: <ReferenceBackend as Backend>::Kv,
}

/// A table of random values. Block formats take random bytes, with scales that stay finite.
fn table(random: &mut Random, dtype: DType, vocabulary: usize, hidden: usize) -> Tensor {
    let len = dtype.byte_len(&[vocabulary, hidden]).expect("a shape that the type can have");
    let mut data: Vec<u8> = match dtype {
        DType::F32 => {
            random.activations(vocabulary * hidden).iter().flat_map(|v| v.to_le_bytes()).collect()
        }
        DType::BF16 => random
            .activations(vocabulary * hidden)
            .iter()
            .flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes())
            .collect(),
        _ => (0..len).map(|_| random.bits() as u8).collect(),
    };
    // Where half-precision numbers stand: their exponent must not be all ones.
    let halves: &[usize] = match dtype {
        DType::F16 => &[0],
        DType::Q8_0 => &[0],
        DType::Q4K => &[0, 2],
        DType::Q6K => &[208],
        _ => &[],
    };
    for block in data.chunks_exact_mut(dtype.block_bytes()) {
        for &at in halves {
            block[at + 1] &= 0b1011_1111;
        }
    }
    Tensor::new(dtype, vec![vocabulary, hidden], data.into()).expect("bytes fill the shape")
}
