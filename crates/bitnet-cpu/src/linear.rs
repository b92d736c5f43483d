//! A ternary matrix as the kernels want it.

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{DType, Error, TiledMatrix, WeightScale};
use bitnet_quant::packing::tile;
use bytes::Bytes;

use crate::arch::Tile;

/// The widest matrix whose sums of code times activation, at most 2 * 128 each, fit 32 bits.
const MOST_COLUMNS: usize = (i32::MAX / 256) as usize;

/// A loaded ternary matrix in tiles.
#[derive(Debug)]
pub struct Linear {
    rows: usize,
    cols: usize,
    /// See [`bitnet_quant::packing::tile`].
    tiles: Bytes,
    pub(crate) scale: Scale,
    pub(crate) precision: ActivationPrecision,
}

/// [`WeightScale`] in the order in which the kernels meet it.
#[derive(Debug)]
pub(crate) enum Scale {
    Multiply(f32),
    Divide(f32),
    /// Scales `[bands]` of the sixteen rows of a band; rows of padding have 0.
    Rows(Vec<[f32; tile::ROWS]>),
    /// Scales `[bands, groups]` of the sixteen rows of a band; rows of padding have 0.
    Groups {
        len: usize,
        values: Vec<[f32; tile::ROWS]>,
    },
}

impl Linear {
    pub(crate) fn new(matrix: &TiledMatrix, precision: ActivationPrecision) -> Result<Self, Error> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if cols > MOST_COLUMNS {
            return Err(Error::TensorShape {
                dtype: DType::I8,
                shape: vec![rows, cols],
                reason: "sums of so many products do not fit 32 bits".to_owned(),
            });
        }
        tile::check_len(matrix)?;
        let scale = match matrix.scale() {
            WeightScale::Multiply(scale) => Scale::Multiply(*scale),
            WeightScale::Divide(scale) => Scale::Divide(*scale),
            WeightScale::Rows(values) => {
                let scale = |row: usize| values.get(row).copied().unwrap_or(0.0);
                let band = |band| std::array::from_fn(|row| scale(band * tile::ROWS + row));
                Scale::Rows((0..rows.div_ceil(tile::ROWS)).map(band).collect())
            }
            WeightScale::Groups { len, values } => {
                let groups = cols / len;
                let scale = |band, group, row| {
                    let row = band * tile::ROWS + row;
                    if row < rows { values[row * groups + group] } else { 0.0 }
                };
                let values = (0..rows.div_ceil(tile::ROWS))
                    .flat_map(|band| (0..groups).map(move |group| (band, group)))
                    .map(|(band, group)| std::array::from_fn(|row| scale(band, group, row)))
                    .collect();
                Scale::Groups { len: *len, values }
            }
        };
        Ok(Linear { rows, cols, tiles: matrix.tiles().clone(), scale, precision })
    }

    /// Output features.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// The tiles of sixteen rows.
    pub(crate) fn band(&self, band: usize) -> &[Tile] {
        let (tiles, _) = self.tiles.as_chunks();
        let len = tile::tiles_per_band(self.cols);
        &tiles[band * len..(band + 1) * len]
    }
}
