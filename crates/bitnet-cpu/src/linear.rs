//! A ternary matrix as the kernels want it.

use bitnet_core::backend::{ActivationPrecision, Weigh};
use bitnet_core::{DType, Error, TileOrder, TiledMatrix, WeightBytes, WeightScale};
use bitnet_quant::packing::tile;
use bytes::Bytes;

use std::ops::Range;

use crate::arch::{Kernels, OutputScale, Tile};

/// The widest matrix whose sums of code times activation, at most 2 * 128 each, fit 32 bits.
const MOST_COLUMNS: usize = (i32::MAX / 256) as usize;

/// A loaded ternary matrix in tiles.
#[derive(Debug)]
pub struct Linear {
    rows: usize,
    cols: usize,
    /// See [`bitnet_quant::packing::tile`].
    tiles: Bytes,
    order: TileOrder,
    columns: Option<Bytes>,
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

impl Weigh for Linear {
    fn weight_bytes(&self) -> WeightBytes {
        let scales = match &self.scale {
            Scale::Multiply(_) | Scale::Divide(_) => 0,
            Scale::Rows(values) | Scale::Groups { values, .. } => size_of_val(&values[..]),
        };
        let scales = WeightBytes { mapped: 0, own: scales as u64 };
        let copies = [Some(&self.tiles), self.columns.as_ref()].into_iter().flatten();
        copies.map(|bytes| WeightBytes::of(bytes)).chain([scales]).sum()
    }
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
        let (tiles, columns) = (matrix.tiles().clone(), matrix.columns().cloned());
        Ok(Linear { rows, cols, tiles, order: matrix.order(), columns, scale, precision })
    }

    /// Output features.
    pub(crate) fn rows(&self) -> usize {
        self.rows
    }

    /// Input features.
    pub(crate) fn cols(&self) -> usize {
        self.cols
    }

    /// Bytes of the codes.
    pub(crate) fn byte_len(&self) -> usize {
        self.tiles.len()
    }

    /// The tiles of sixteen rows, which a matrix in row order gets put together in `room`.
    pub(crate) fn band<'a>(
        &'a self,
        band: usize,
        kernels: &Kernels,
        room: &'a mut Vec<Tile>,
    ) -> &'a [Tile] {
        let len = tile::tiles_per_band(self.cols);
        let bytes = &self.tiles[band * len * tile::BYTES..][..len * tile::BYTES];
        match self.order {
            TileOrder::Bands => bytes.as_chunks().0,
            TileOrder::Rows => {
                room.resize(len, [0; tile::BYTES]);
                kernels.band_of_rows(bytes, room);
                room
            }
        }
    }

    /// Whether outputs are made of one exact integer sum each, which may leave zeros out.
    fn exact(&self) -> bool {
        self.precision == ActivationPrecision::Int8 && !matches!(self.scale, Scale::Groups { .. })
    }

    /// The scales of outputs that are made of one sum each.
    pub(crate) fn output_scale(&self, features: Range<usize>) -> OutputScale<'_> {
        match &self.scale {
            Scale::Multiply(scale) => OutputScale::Multiply(*scale),
            Scale::Divide(scale) => OutputScale::Divide(*scale),
            Scale::Rows(scales) => OutputScale::Rows(&scales.as_flattened()[features]),
            Scale::Groups { .. } => unreachable!("outputs of several sums"),
        }
    }

    /// The tiles of band after band, if that is how the matrix lies and outputs are made of one sum
    /// each.
    pub(crate) fn by_band(&self, bands: Range<usize>) -> Option<impl Iterator<Item = &[Tile]>> {
        let fits = self.order == TileOrder::Bands && self.exact();
        let len = tile::tiles_per_band(self.cols);
        let (tiles, _) = self.tiles.as_chunks();
        fits.then(|| tiles[bands.start * len..bands.end * len].chunks_exact(len))
    }

    /// All rows one after another and the bytes of each, if that is how the matrix lies and rows may
    /// be computed by themselves.
    pub(crate) fn by_row(&self) -> Option<(&[u8], usize)> {
        let fits = self.order == TileOrder::Rows && self.exact();
        fits.then(|| (&self.tiles[..], 4 * tile::tiles_per_band(self.cols)))
    }

    /// All columns one after another and the bytes of each, if there is such a copy and zero inputs
    /// may be left out.
    pub(crate) fn by_column(&self) -> Option<(&[u8], usize)> {
        let columns = self.columns.as_ref().filter(|_| self.exact())?;
        Some((columns, tile::column_bytes(self.rows)))
    }
}
