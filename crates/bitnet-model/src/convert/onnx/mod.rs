//! To a folder with an ONNX model: `model.onnx` has the graph, `model.onnx.data` the weights, and beside
//! them lies what a Hugging Face checkpoint has.
//!
//! Weights are operands of ONNX Runtime's `MatMulNBits`: 2 bits each where inputs are int8, 4 where
//! they are f32 or the matrix has scales per group of columns, for which there are fast kernels.
//! docs/formats.md says how exact the graph is.

mod decoder;
mod graph;

use std::iter::repeat_n;
use std::path::Path;

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{DType, Tensor, TernaryMatrix, WeightScale};
use bitnet_quant::packing::nbits::Blocks;

use super::{Part, Source, holds, huggingface, write_table};
use crate::config::{ModelConfig, WeightRule};
use crate::error::Error;
use crate::output::{FolderFile, OutputFolder};
use crate::weights::{PartKind, PartPlace};
use decoder::{INT8_BLOCKS, Matrix, Scale, Weights};
use graph::{Graph, Place};

/// The format's name in messages.
const FORMAT: &str = "an ONNX folder";

/// The file of the graph.
const MODEL: &str = "model.onnx";

/// The file of the weights.
const DATA: &str = "model.onnx.data";

/// Where weights begin in their file: on a page, so that they can be mapped.
const ALIGNMENT: u64 = 4096;

/// Blocks of a matrix with f32 inputs.
const F32_BLOCKS: Blocks = Blocks { bits: 4, len: 128, cols: 128 };

/// Writes a folder, with the embedding and head in `head` or as they are.
pub(super) fn write(
    source: &Source<'_>,
    path: &Path,
    head: Option<DType>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let description = huggingface::config(source, true, huggingface::divides(source)?);
    let read = huggingface::described(source, &description)?;
    holds::check(source, &read, FORMAT)?;
    let (config, mut places) = source.renamed(read.names);
    places.retain(|(_, place)| !matches!(place.kind, PartKind::Screen));
    let encode = |place: &PartPlace, part| {
        let name = place.full_name(&config.names);
        Ok((name, Encoded::new(part, place, &read, source.precision)))
    };

    let folder = OutputFolder::create(path)?;
    let mut graph = Graph::default();
    let mut data = DataFile { file: folder.file(DATA)?, length: 0 };
    let mut weights = Weights::default();
    for part in source.parts(&places, encode, progress)? {
        let (name, part) = part?;
        let parameter = match name == config.names.head {
            true => name.clone(),
            false => format!("model.{name}"),
        };
        match part {
            Encoded::Table(table) => {
                let dtype = huggingface::table_type(&table, head);
                let table = data.table(&mut graph, &parameter, &table, dtype)?;
                weights.tables.insert(name, (table, dtype));
            }
            Encoded::Norm(values) => {
                let (shape, bytes) = ([values.len()], bytes_of(&values));
                let weight = format!("{parameter}.weight");
                weights.norms.insert(name, graph.initializer(weight, DType::F32, &shape, &bytes));
            }
            Encoded::Matrix(matrix) => {
                let matrix = data.matrix(&mut graph, &parameter, &matrix)?;
                weights.matrices.insert(name, matrix);
            }
        }
    }
    data.file.finish()?;
    let vocabulary = source.tables.embedding.rows();
    decoder::build(&mut graph, &config, source.precision, &weights, vocabulary);
    folder.write(MODEL, &graph.into_model())?;
    huggingface::write_description(source, &folder, description)?;
    folder.finish()
}

/// A part as the files hold it.
enum Encoded {
    /// As it is stored.
    Table(Tensor),
    /// The weight less the model's offset.
    Norm(Vec<f32>),
    Matrix(EncodedMatrix),
}

struct EncodedMatrix {
    rows: usize,
    cols: usize,
    blocks: Blocks,
    codes: Vec<u8>,
    scale: WeightScale,
}

impl Encoded {
    /// A part as `read`, which the description of the written files gives, wants it.
    fn new(
        part: Part,
        place: &PartPlace,
        read: &ModelConfig,
        precision: ActivationPrecision,
    ) -> Self {
        let offset = match place.kind {
            PartKind::Norm { of_projection: false, .. } => read.norm_offset,
            _ => 0.0,
        };
        match part {
            Part::Table(table) => Encoded::Table(table),
            Part::Norm(weight) => {
                Encoded::Norm(weight.into_iter().map(|weight| weight - offset).collect())
            }
            Part::Matrix(matrix, _) => {
                Encoded::Matrix(EncodedMatrix::new(&matrix, read.weights, precision))
            }
            Part::Screen(_) => unreachable!("screens are left out"),
        }
    }
}

impl EncodedMatrix {
    /// `rule` is what a single scale will be read as.
    fn new(matrix: &TernaryMatrix, rule: WeightRule, precision: ActivationPrecision) -> Self {
        use ActivationPrecision::{F32, Int8};
        let (rows, cols) = (matrix.rows(), matrix.cols());
        let (blocks, scale) = match (matrix.scale(), precision) {
            (WeightScale::Groups { len, values }, _) => {
                let scale = WeightScale::Groups { len: *len, values: values.clone() };
                (blocks_in(*len), scale)
            }
            (WeightScale::Multiply(scale), Int8) if rule == WeightRule::Divide => {
                (INT8_BLOCKS, WeightScale::Divide(1.0 / scale))
            }
            (WeightScale::Divide(scale), Int8) if rule != WeightRule::Divide => {
                (INT8_BLOCKS, WeightScale::Multiply(1.0 / scale))
            }
            (scale, Int8) => (INT8_BLOCKS, scale.clone()),
            // A scale per row says by itself that it multiplies.
            (WeightScale::Multiply(scale), F32) => {
                (F32_BLOCKS, WeightScale::Rows(vec![*scale; rows]))
            }
            (WeightScale::Divide(scale), F32) => {
                (F32_BLOCKS, WeightScale::Rows(vec![1.0 / scale; rows]))
            }
            (scale @ WeightScale::Rows(_), F32) => (F32_BLOCKS, scale.clone()),
        };
        EncodedMatrix { rows, cols, blocks, codes: blocks.encode(matrix), scale }
    }
}

/// Blocks for groups of `len` columns that have a scale each: the longest of which a group is whole
/// ones.
fn blocks_in(len: usize) -> Blocks {
    let cols = (4..=F32_BLOCKS.len).rev().find(|cols| len.is_multiple_of(*cols) && cols % 4 == 0);
    let cols = cols.expect("groups are multiples of 4");
    Blocks { bits: F32_BLOCKS.bits, len: cols.next_power_of_two().max(16), cols }
}

/// The growing file of the weights.
struct DataFile {
    file: FolderFile,
    length: u64,
}

impl DataFile {
    /// Begins a constant's numbers on a page.
    fn begin(&mut self) -> Result<u64, Error> {
        let padding = self.length.next_multiple_of(ALIGNMENT) - self.length;
        self.append(&[0; ALIGNMENT as usize][..padding as usize])?;
        Ok(self.length)
    }

    fn append(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.length += bytes.len() as u64;
        self.file.write(bytes)
    }

    /// Writes a constant in whose numbers are all in `bytes`.
    fn constant(
        &mut self,
        graph: &mut Graph,
        name: String,
        dtype: DType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<graph::Value, Error> {
        let offset = self.begin()?;
        self.append(bytes)?;
        let place = Place { offset, length: bytes.len() as u64 };
        Ok(graph.external(name, dtype, shape, DATA, place))
    }

    /// Writes a table in a float type.
    fn table(
        &mut self,
        graph: &mut Graph,
        module: &str,
        table: &Tensor,
        dtype: DType,
    ) -> Result<graph::Value, Error> {
        let offset = self.begin()?;
        write_table(table, dtype, |bytes| self.append(bytes))?;
        let place = Place { offset, length: self.length - offset };
        Ok(graph.external(format!("{module}.weight"), dtype, table.shape(), DATA, place))
    }

    fn matrix(
        &mut self,
        graph: &mut Graph,
        module: &str,
        matrix: &EncodedMatrix,
    ) -> Result<Matrix, Error> {
        let EncodedMatrix { rows, cols, blocks, ref codes, ref scale } = *matrix;
        let per_row = blocks.per_row(cols);
        let shape = [rows, per_row, blocks.bytes()];
        let name = format!("{module}.weight_q{}", blocks.bits);
        let codes = self.constant(graph, name, DType::U8, &shape, codes)?;
        let block_scales = match scale {
            WeightScale::Groups { len, values } => {
                let name = format!("{module}.weight_block_scales");
                let blocks = len / blocks.cols;
                let of_blocks = values.iter().flat_map(|&scale| repeat_n(scale, blocks));
                let bytes = bytes_of(&of_blocks.collect::<Vec<f32>>());
                self.constant(graph, name, DType::F32, &[rows, per_row], &bytes)?
            }
            _ => self.ones(graph, rows, per_row)?,
        };
        let scale = Scale::new(scale, |values| {
            let name = format!("{module}.weight_scale");
            graph.initializer(name, DType::F32, &[values.len()], &bytes_of(values))
        });
        Ok(Matrix { rows, cols, blocks, codes, block_scales, scale })
    }

    /// Factors of 1, which matrices of one shape share.
    fn ones(
        &mut self,
        graph: &mut Graph,
        rows: usize,
        per_row: usize,
    ) -> Result<graph::Value, Error> {
        let name = format!("ones_{rows}_{per_row}");
        if let Some(value) = graph.known(&name) {
            return Ok(value);
        }
        let bytes = bytes_of(&vec![1.0; rows * per_row]);
        let value = self.constant(graph, name, DType::F32, &[rows, per_row], &bytes)?;
        graph.know(&value);
        Ok(value)
    }
}

fn bytes_of(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}
