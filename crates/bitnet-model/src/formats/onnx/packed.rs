//! Matrices that an ONNX file holds in another form than checkpoints do.

use bitnet_core::{DType, Tensor, TernaryMatrix, WeightScale};
use bitnet_quant::packing::blocks::decode_row;
use bitnet_quant::packing::hf;
use bitnet_quant::packing::nbits::Blocks;

use super::Constants;
use super::proto::Node;

/// Free texts of a `MatMulNBits` that `convert` writes: the columns of the matrix, how many of them
/// are in a block, and how many have a scale in common. Without them every code is a column.
pub(crate) const COLUMNS: &str = "bitnet.columns";
pub(crate) const BLOCK_COLUMNS: &str = "bitnet.columns_per_block";
pub(crate) const SCALE_COLUMNS: &str = "bitnet.columns_per_scale";

/// The second operand of ONNX Runtime's `MatMulNBits`: rows of blocks of codes, the first in the
/// low bits. A weight is `(code - zero point) * scale`.
#[derive(Clone)]
pub(super) struct Packed {
    /// U8 `[rows, blocks, bytes]`.
    pub(super) codes: Tensor,
    /// Float, one per row and block.
    pub(super) scales: Tensor,
    /// U8, of each row the codes of its blocks' zero points; if absent they are in the middle.
    zero_points: Option<Tensor>,
    /// Columns of the matrix.
    cols: usize,
    layout: Blocks,
    /// Columns that have a scale in common, where that is known.
    scale_cols: Option<usize>,
    /// Whether the matrix has a scale apart, so that those of the blocks are 1.
    scaled_apart: bool,
}

impl Packed {
    /// The operand of a node, or why it cannot be used.
    pub(super) fn of_node(
        node: &Node<'_>,
        constants: &Constants<'_>,
        scaled_apart: bool,
    ) -> Result<Self, String> {
        let input = |index: usize| match node.inputs.get(index) {
            None | Some(&"") => Ok(None),
            Some(name) => match constants.get(name) {
                Some(Ok(tensor)) => Ok(Some(tensor.clone())),
                Some(Err(reason)) => Err(reason.clone()),
                None => Err(format!("input {index} of its MatMulNBits is computed")),
            },
        };
        let missing = |what| format!("its MatMulNBits has no {what}");
        let number = |name| node.integer(name).and_then(|value| usize::try_from(value).ok());
        let codes = input(1)?.ok_or_else(|| missing("codes"))?;
        let scales = input(2)?.ok_or_else(|| missing("scales"))?;
        let zero_points = input(3)?;
        if !matches!(input(4), Ok(None)) {
            return Err("its MatMulNBits has an order of columns, which is not read".to_owned());
        }
        let bits = number("bits").unwrap_or(4);
        let block = number("block_size").ok_or_else(|| missing("block_size"))?;
        let padded = number("K").ok_or_else(|| missing("K"))?;
        let cols = node.number(COLUMNS).unwrap_or(padded);
        let block_cols = node.number(BLOCK_COLUMNS).unwrap_or(block);
        let scale_cols = node.number(SCALE_COLUMNS);
        let layout = Blocks { bits, len: block, cols: block_cols };
        if !matches!(bits, 2 | 4 | 8) {
            return Err(format!("its MatMulNBits has {bits} bits; 2, 4 and 8 are read"));
        }
        let [rows, blocks, bytes] = *codes.shape() else {
            return Err(format!("its MatMulNBits has codes of shape {:?}", codes.shape()));
        };
        let zero_bytes = (blocks * bits).div_ceil(8);
        let is_whole = codes.dtype() == DType::U8
            && bytes.checked_mul(8 / bits) == Some(block)
            && (1..=block).contains(&block_cols)
            && layout.per_row(cols) == blocks
            && cols > 0
            && scales.dtype().is_float()
            && Some(scales.len()) == rows.checked_mul(blocks)
            && zero_points.as_ref().is_none_or(|points| {
                points.dtype() == DType::U8 && Some(points.len()) == rows.checked_mul(zero_bytes)
            });
        if !is_whole {
            return Err(format!(
                "the operands of its MatMulNBits do not fit {cols} columns in blocks of \
                 {block_cols}: codes {:?}, scales {:?}",
                codes.shape(),
                scales.shape()
            ));
        }
        Ok(Packed { codes, scales, zero_points, cols, layout, scale_cols, scaled_apart })
    }

    fn rows(&self) -> usize {
        self.codes.shape()[0]
    }

    fn blocks(&self) -> usize {
        self.codes.shape()[1]
    }

    fn scale_values(&self) -> Vec<f32> {
        let mut values = vec![0.0; self.scales.len()];
        decode_row(self.scales.dtype(), self.scales.data(), &mut values);
        values
    }

    fn zero_point(&self, row: usize, block: usize) -> u8 {
        match &self.zero_points {
            None => self.layout.zero(),
            Some(points) => {
                let row_bytes = (self.blocks() * self.layout.bits).div_ceil(8);
                self.layout.code(&points.data()[row * row_bytes..], block)
            }
        }
    }

    /// The codes as transformers packs them.
    pub(super) fn weight(&self) -> Result<Tensor, String> {
        if self.scaled_apart && self.scale_values().iter().any(|&scale| scale != 1.0) {
            return Err("its blocks have scales, and so has the whole".to_owned());
        }
        let (rows, bytes) = (self.rows(), self.codes.shape()[2]);
        packed(rows, self.cols, |row, codes| {
            for (block, codes) in codes.chunks_mut(self.layout.cols).enumerate() {
                let stored = &self.codes.data()[(row * self.blocks() + block) * bytes..][..bytes];
                let zero = self.zero_point(row, block);
                for (index, out) in codes.iter_mut().enumerate() {
                    *out = self.layout.code(stored, index).wrapping_add(1).wrapping_sub(zero);
                }
            }
        })
    }

    /// The scales, `[rows, groups]`: one per row where all of its blocks have the same.
    pub(super) fn scale(&self) -> Result<Tensor, String> {
        let values = self.scale_values();
        let (rows, blocks) = (self.rows(), self.blocks());
        let is_shared = |len: usize| {
            values.chunks(len).all(|group| group.iter().all(|scale| *scale == group[0]))
        };
        let len = match self.scale_cols {
            Some(cols) if cols > 0 && cols.is_multiple_of(self.layout.cols) => {
                cols / self.layout.cols
            }
            None if is_shared(blocks) => blocks,
            _ => 1,
        };
        let tiles = len == blocks || blocks * self.layout.cols == self.cols;
        if !tiles || !blocks.is_multiple_of(len) || !is_shared(len) {
            let cols = len * self.layout.cols;
            return Err(format!("groups of {cols} do not tile {} columns", self.cols));
        }
        let values: Vec<f32> = values.into_iter().step_by(len).collect();
        Ok(Tensor::from_f32(vec![rows, blocks / len], &values))
    }
}

/// Weights one by one, each -1, 0 or 1, as transformers packs them.
pub(super) fn of_ternary(weights: &Tensor, is_transposed: bool) -> Result<Tensor, String> {
    let turned = is_transposed.then(|| transposed(weights)).transpose()?;
    let weights = turned.as_ref().unwrap_or(weights);
    let (rows, cols) = (weights.rows(), weights.cols());
    let mut values = vec![0.0; cols];
    packed(rows, cols, |row, codes| {
        match weights.dtype() {
            DType::I8 => {
                for (value, &byte) in values.iter_mut().zip(weights.row(row)) {
                    *value = f32::from(byte as i8);
                }
            }
            dtype => decode_row(dtype, weights.row(row), &mut values),
        }
        for (code, value) in codes.iter_mut().zip(&values) {
            *code = match value {
                -1.0 => 0,
                0.0 => 1,
                1.0 => 2,
                _ => 3,
            };
        }
    })
}

/// Packs the codes that `fill` writes for each row. Their scale is apart.
fn packed(rows: usize, cols: usize, fill: impl FnMut(usize, &mut [u8])) -> Result<Tensor, String> {
    let matrix = TernaryMatrix::from_rows(rows, cols, WeightScale::Multiply(1.0), fill)
        .map_err(|error| format!("is not ternary: {error}"))?;
    let shape = vec![rows.div_ceil(4), cols];
    Tensor::new(DType::U8, shape, hf::encode(&matrix).into()).map_err(|error| error.to_string())
}

/// A matrix turned around.
pub(super) fn transposed(tensor: &Tensor) -> Result<Tensor, String> {
    // Cache lines are read and written whole within a square of this many rows and columns.
    const SQUARE: usize = 64;
    let (rows, cols) = (tensor.rows(), tensor.cols());
    let width = tensor.dtype().block_bytes();
    let from = tensor.data();
    let mut to = vec![0; from.len()];
    for top in (0..rows).step_by(SQUARE) {
        for left in (0..cols).step_by(SQUARE) {
            for row in top..rows.min(top + SQUARE) {
                for col in left..cols.min(left + SQUARE) {
                    let element = &from[(row * cols + col) * width..][..width];
                    to[(col * rows + row) * width..][..width].copy_from_slice(element);
                }
            }
        }
    }
    Tensor::new(tensor.dtype(), vec![cols, rows], to.into()).map_err(|error| error.to_string())
}
