//! A ternary matrix as the kernels want it.

use bitnet_core::backend::{ActivationPrecision, Weigh};
use bitnet_core::{
    ColumnCopy, DType, Error, RunCodes, TileLayout, TiledMatrix, WeightBytes, WeightScale,
};
use bitnet_quant::packing::tile::{self, Tile, runs, triples};
use bytes::Bytes;

use std::ops::Range;

use crate::arch::{Band, Kernels, OutputScale, Runs};

/// The widest matrix whose sums of code times activation, at most 2 * 128 each, fit 32 bits.
const MOST_COLUMNS: usize = (i32::MAX / 256) as usize;

/// A loaded ternary matrix in tiles.
#[derive(Debug)]
pub struct Linear {
    rows: usize,
    cols: usize,
    /// See [`bitnet_quant::packing::tile`].
    tiles: Bytes,
    layout: TileLayout,
    columns: Option<ColumnCopy>,
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
        let columns = self.columns.as_ref().map(|copy| &copy.bytes);
        let copies = [Some(&self.tiles), columns].into_iter().flatten();
        copies.map(|bytes| WeightBytes::of(bytes)).chain([scales]).sum()
    }
}

impl Linear {
    /// Takes a matrix as it lies, or laid out anew if `kernels` do not take its layouts.
    pub(crate) fn new(
        matrix: &TiledMatrix,
        precision: ActivationPrecision,
        kernels: &Kernels,
    ) -> Result<Self, Error> {
        let (rows, cols) = (matrix.rows(), matrix.cols());
        if cols > MOST_COLUMNS {
            return Err(Error::TensorShape {
                dtype: DType::I8,
                shape: vec![rows, cols],
                reason: "sums of so many products do not fit 32 bits".to_owned(),
            });
        }
        tile::check_len(matrix)?;
        let portable;
        let takes = kernels.take_compact() && tile::sums_exactly(matrix.scale(), precision);
        let matrix = if takes || !tile::is_compact(matrix) {
            matrix
        } else {
            portable = tile::portable(matrix, precision)?;
            &portable
        };
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
        Ok(Linear { rows, cols, tiles, layout: matrix.layout(), columns, scale, precision })
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

    /// The bytes of some bands, if these lie one after another.
    fn band_bytes(&self, bands: Range<usize>) -> &[u8] {
        let len = tile::band_len(self.layout, self.cols).expect("a band is no longer than all");
        &self.tiles[bands.start * len..bands.end * len]
    }

    /// A band for the kernels. One that lies row after row is put together in `room`.
    pub(crate) fn band<'a>(
        &'a self,
        band: usize,
        kernels: &Kernels,
        room: &'a mut Vec<Tile>,
    ) -> Band<'a> {
        let bytes = self.band_bytes(band..band + 1);
        let TileLayout::Rows(codes) = self.layout else { return self.as_it_lies(bytes) };
        let tiles = tile::tiles_per_band(self.cols);
        match codes {
            RunCodes::TwoBits => {
                room.resize(tiles, [0; tile::BYTES]);
                kernels.band_of_rows(bytes, room);
                Band { blocks: &[], tiles: room }
            }
            RunCodes::Quintuples => {
                let words = runs::words_per_band(self.cols);
                room.resize(words + tiles, [0; tile::BYTES]);
                let (words, tiles) = room.split_at_mut(words);
                kernels.band_of_rows(bytes, words);
                kernels.tiles_of_quintuples(words, tiles);
                Band { blocks: &[], tiles }
            }
        }
    }

    /// The bytes of a band that does not lie row after row.
    fn as_it_lies<'a>(&self, bytes: &'a [u8]) -> Band<'a> {
        let (blocks, tiles) = match self.layout {
            TileLayout::Triples => triples::blocks_and_tiles(bytes, self.cols),
            TileLayout::Bands | TileLayout::Rows(_) => (&[][..], bytes.as_chunks().0),
        };
        Band { blocks, tiles }
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

    /// Band after band, if that is how they lie and outputs are made of one sum each.
    pub(crate) fn by_band(&self, bands: Range<usize>) -> Option<impl Iterator<Item = Band<'_>>> {
        let fits = self.exact() && !matches!(self.layout, TileLayout::Rows(_));
        let bytes = self.band_bytes(bands.clone());
        let len = (bytes.len() / bands.len().max(1)).max(1);
        fits.then(|| bytes.chunks_exact(len).map(|band| self.as_it_lies(band)))
    }

    /// All rows one after another, if that is how the matrix lies and rows may be computed by
    /// themselves.
    pub(crate) fn by_row(&self) -> Option<Runs<'_>> {
        let TileLayout::Rows(codes) = self.layout else { return None };
        let len = runs::row_bytes(codes, self.cols);
        self.exact().then(|| Runs { codes, bytes: &self.tiles, len })
    }

    /// All columns one after another, if there is such a copy and zero inputs may be left out.
    pub(crate) fn by_column(&self) -> Option<Runs<'_>> {
        let ColumnCopy { codes, bytes } = self.columns.as_ref().filter(|_| self.exact())?;
        Some(Runs { codes: *codes, bytes, len: runs::column_bytes(*codes, self.rows) })
    }
}
