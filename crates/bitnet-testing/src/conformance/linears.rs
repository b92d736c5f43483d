//! Linear layers, alone and composed.

use bitnet_core::backend::{
    Activation, ActivationPrecision, Backend, BitLinear, GatedFfn, Norm, Scratch,
};
use bitnet_core::{
    ColumnCopy, LinearUse, RunCodes, TernaryMatrix, TileLayout, TiledMatrix, WeightScale,
};
use bitnet_quant::packing::tile::{self, runs};
use bitnet_quant::reference::ReferenceBackend;

use super::{Both, COLS, Pair, ROWS, TOKENS};
use crate::random::Random;

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

    pub(super) fn linears(&self) {
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
    pub(super) fn linears_together(&self) {
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

    /// Matrices loaded for each use, and from tiles of each layout whatever their scales and precision.
    pub(super) fn layouts(&self) {
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
                    for (layout, codes) in [
                        (TileLayout::Bands, RunCodes::TwoBits),
                        (TileLayout::Triples, RunCodes::Quintuples),
                        (TileLayout::Rows(RunCodes::TwoBits), RunCodes::Quintuples),
                        (TileLayout::Rows(RunCodes::Quintuples), RunCodes::TwoBits),
                    ] {
                        let len = tile::byte_len(layout, rows, cols).expect("a small one");
                        let mut tiles = vec![0; len];
                        tile::pack(&m, layout, &mut tiles);
                        let mut columns = vec![0; cols * runs::column_bytes(codes, rows)];
                        runs::pack_columns(&m, codes, &mut columns);
                        let (scale, bytes) = (m.scale().clone(), columns.into());
                        let copy = Some(ColumnCopy { codes, bytes });
                        let tiled = TiledMatrix::new(rows, cols, scale, layout, tiles.into(), copy);
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
    pub(super) fn feed_forward_of_zeros(&self) {
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
    pub(super) fn projections_and_feed_forward(&self) {
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
}
