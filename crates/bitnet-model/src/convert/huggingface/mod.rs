//! To a Hugging Face checkpoint: configuration, tokenizer and weights in one folder.

mod config;
mod shards;

use std::fs;
use std::path::Path;

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{DType, Tensor, TernaryMatrix, WeightScale};
use bitnet_quant::packing::blocks::encode_row;
use bitnet_quant::packing::hf;
use bitnet_quant::ternary;
use serde_json::{Map, Value, json};

pub(super) use self::config::config;
use self::shards::Shards;
use super::holds::{self, refused, with_one_scale};
use super::{Part, Source, check_table, write_table};
use crate::config::{Hyperparameters, ModelConfig, Pooling, WeightRule};
use crate::error::Error;
use crate::formats::Tensors;
use crate::output::OutputFolder;
use crate::weights::{PartKind, PartPlace};

/// The format's name in messages.
const FORMAT: &str = "a Hugging Face checkpoint";

/// Files of a source in this format that are copied as they are.
const COPIED: [&str; 8] = [
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
];

/// How the weights of linear layers are stored.
#[derive(Clone, Copy, PartialEq)]
enum Storage {
    /// Two bits each, with a `weight_scale` beside them.
    Packed,
    /// BF16 weights that are ternarised when they are loaded.
    Master,
    /// Float weights that are ternary as they are, for models whose inputs are not quantised.
    Exact,
}

/// Writes a folder with the linear layers packed or as float weights, and the embedding and head in
/// `head` or as they are.
pub(super) fn write(
    source: &Source<'_>,
    path: &Path,
    packed: bool,
    head: Option<DType>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    if packed && source.precision == ActivationPrecision::F32 {
        let what = "packed weights mean int8 inputs, and its linear layers have f32 inputs";
        return Err(refused(source, FORMAT, what));
    }
    let storage = match (packed, source.precision) {
        (true, _) => Storage::Packed,
        (false, ActivationPrecision::Int8) => Storage::Master,
        (false, ActivationPrecision::F32) => Storage::Exact,
    };
    let mut config = config(source, packed, packed && divides(source)?);
    let read = described(source, &config)?;
    holds::check(source, &read, FORMAT)?;
    check_first_layer(source, storage)?;
    let table_type = |table: &Tensor| table_type(table, head);
    let tables = [Some(&source.tables.embedding), source.tables.head.as_ref()];
    for table in tables.into_iter().flatten() {
        check_table(source, table, table_type(table))?;
    }

    let (_, mut places) = source.renamed(read.names);
    places.retain(|(place, _)| !matches!(place.kind, PartKind::Screen));
    let prefix = if source.config.pooling.is_some() { "" } else { "model." };
    let name = |place: &PartPlace| match place.name == read.names.head {
        true => place.full_name(&read.names),
        false => format!("{prefix}{}", place.full_name(&read.names)),
    };
    let encode = |place: &PartPlace, part: Part| {
        let module = name(place);
        let weight = format!("{module}.weight");
        match part {
            Part::Table(table) => Ok(vec![(weight, Body::Table(table))]),
            Part::Norm(values) => {
                let of_projection =
                    matches!(place.kind, PartKind::Norm { of_projection: true, .. });
                let offset = if of_projection { 0.0 } else { read.norm_offset };
                Ok(vec![(weight, Body::Tensor(norm(&values, offset)))])
            }
            Part::Matrix(matrix, _) => {
                let tensors = linear(&module, with_one_scale(matrix)?, storage, read.weights);
                tensors.map_err(|error| Error::tensor(path, &weight, error))
            }
            Part::Screen(_) => unreachable!("left out above"),
        }
    };

    let folder = OutputFolder::create(path)?;
    let names: usize = places.iter().map(|(_, place)| 2 * name(place).len() + 32).sum();
    let mut shards = Shards::new(&folder, 2 * places.len(), names);
    let mut widest = DType::BF16;
    for part in source.parts(&places, encode, progress)? {
        for (name, body) in part? {
            match body {
                Body::Tensor(tensor) => {
                    widest = wider(widest, tensor.dtype());
                    shards.begin(&name, tensor.dtype(), tensor.shape())?;
                    shards.write(tensor.data())?;
                }
                Body::Table(table) => {
                    let dtype = table_type(&table);
                    widest = wider(widest, dtype);
                    shards.begin(&name, dtype, table.shape())?;
                    write_table(&table, dtype, |bytes| shards.write(bytes))?;
                }
            }
        }
    }
    shards.finish()?;
    let dtype = match widest {
        DType::F32 => "float32",
        DType::F16 => "float16",
        _ => "bfloat16",
    };
    config.insert("torch_dtype".to_owned(), dtype.into());
    write_description(source, &folder, config)?;
    folder.finish()
}

/// The type of the embedding or head: what is asked for, or as it is.
pub(super) fn table_type(table: &Tensor, head: Option<DType>) -> DType {
    match head {
        Some(head) => head,
        None if table.dtype().is_float() => table.dtype(),
        // The values of blocks have up to 24 significant bits.
        None => DType::F32,
    }
}

/// Writes all files of a checkpoint but its weights.
pub(super) fn write_description(
    source: &Source<'_>,
    folder: &OutputFolder,
    config: Map<String, Value>,
) -> Result<(), Error> {
    folder.write_json("config.json", &config.into())?;
    write_generation_config(source, folder)?;
    write_tokenizer(source, folder)?;
    if let Some(pooling) = source.config.pooling {
        let pooling = json!({
            "word_embedding_dimension": source.config.hidden_size,
            "pooling_mode_lasttoken": pooling == Pooling::Last,
            "pooling_mode_mean_tokens": pooling == Pooling::Mean,
        });
        folder.write_json("1_Pooling/config.json", &pooling)?;
    }
    Ok(())
}

/// A tensor, or what it is made of while it is written.
enum Body {
    Tensor(Tensor),
    Table(Tensor),
}

/// The type that transformers should compute in so that nothing stored is rounded.
fn wider(a: DType, b: DType) -> DType {
    match (a, b) {
        (a, b) if a == b => a,
        (a, DType::U8) => a,
        // Neither of the 16-bit types holds the other's numbers.
        _ => DType::F32,
    }
}

/// Whether the scales of the packed weights are best stored as divisors: those of the source are.
pub(super) fn divides(source: &Source<'_>) -> Result<bool, Error> {
    let places = source.places();
    let first = places.iter().find(|place| matches!(place.kind, PartKind::Matrix { .. }));
    let Some(first) = first else { return Ok(false) };
    Ok(matches!(
        source.part(first)?,
        Part::Matrix(matrix, _) if matches!(matrix.scale(), WeightScale::Divide(_))
    ))
}

/// What our reader makes of a `config.json`.
pub(super) fn described(
    source: &Source<'_>,
    json: &Map<String, Value>,
) -> Result<ModelConfig, Error> {
    let path = &source.description.path;
    let mut tensors = Tensors::default();
    if source.config.pooling.is_some() {
        // By which the reader knows that projections have norms.
        let norm = Tensor::from_f32(vec![1], &[1.0]);
        tensors.insert(path, "layers.0.self_attn.q_proj.norm.weight".to_owned(), Ok(norm))?;
    }
    let json = Value::Object(json.clone());
    let h = Hyperparameters::from_json(path, &json, &tensors);
    let mut read = (holds::architecture(&source.config).describe)(&h, &mut Vec::new())?;
    // It stands in a file of its own.
    read.pooling = read.pooling.and(source.config.pooling);
    Ok(read)
}

/// Checks what the matrices of the first layer tell of all: that they can be stored.
fn check_first_layer(source: &Source<'_>, storage: Storage) -> Result<(), Error> {
    for place in source.places().iter().filter(|place| place.layer == Some(0)) {
        let PartKind::Matrix { rows, .. } = place.kind else { continue };
        let Part::Matrix(matrix, _) = source.part(place)? else { unreachable!("it is a matrix") };
        let matrix = with_one_scale(matrix)?;
        let one = matches!(matrix.scale(), WeightScale::Multiply(_) | WeightScale::Divide(_));
        if storage != Storage::Exact && !one {
            let what = "its matrices have several scales each, and there is room for one";
            return Err(refused(source, FORMAT, what));
        }
        if storage == Storage::Packed && !rows.is_multiple_of(4) {
            let what = format!(
                "four rows are packed into one, which {rows} rows of `{}` do not fill: use `hf`",
                place.name
            );
            return Err(refused(source, FORMAT, what));
        }
        if storage == Storage::Master {
            ternary::master(&matrix).map_err(|error| refused(source, FORMAT, error))?;
        }
    }
    Ok(())
}

/// The tensors of a linear layer's weights.
fn linear(
    module: &str,
    matrix: TernaryMatrix,
    storage: Storage,
    rule: WeightRule,
) -> Result<Vec<(String, Body)>, bitnet_core::Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let weight = format!("{module}.weight");
    match storage {
        Storage::Packed => {
            let packed =
                Tensor::new(DType::U8, vec![rows.div_ceil(4), cols], hf::encode(&matrix).into())?;
            let scale = match (matrix.scale(), rule) {
                (WeightScale::Multiply(value), WeightRule::Multiply)
                | (WeightScale::Divide(value), WeightRule::Divide) => *value,
                (WeightScale::Multiply(value) | WeightScale::Divide(value), _) => 1.0 / value,
                (WeightScale::Rows(_) | WeightScale::Groups { .. }, _) => {
                    let reason = "one scale per matrix can be stored".to_owned();
                    return Err(bitnet_core::Error::WeightScale { rows, cols, reason });
                }
            };
            let scale = floats(vec![1], &[scale]);
            let scale_name = format!("{module}.weight_scale");
            Ok(vec![(weight, Body::Tensor(packed)), (scale_name, Body::Tensor(scale))])
        }
        Storage::Master => {
            let weights =
                Tensor::new(DType::BF16, vec![rows, cols], ternary::master(&matrix)?.into())?;
            Ok(vec![(weight, Body::Tensor(weights))])
        }
        Storage::Exact => Ok(vec![(weight, Body::Tensor(values(&matrix)?))]),
    }
}

/// The smallest float type that holds all values as they are.
fn smallest(values: &[f32]) -> DType {
    let exact = |dtype: DType| {
        let mut bytes = Vec::with_capacity(4 * values.len());
        encode_row(dtype, values, &mut bytes);
        let mut back = vec![0.0; values.len()];
        bitnet_quant::packing::blocks::decode_row(dtype, &bytes, &mut back);
        back == values
    };
    [DType::BF16, DType::F16].into_iter().find(|&dtype| exact(dtype)).unwrap_or(DType::F32)
}

/// Values in the smallest float type that holds them.
fn floats(shape: Vec<usize>, values: &[f32]) -> Tensor {
    let dtype = smallest(values);
    let mut bytes = Vec::new();
    encode_row(dtype, values, &mut bytes);
    Tensor::new(dtype, shape, bytes.into()).expect("values fill the shape")
}

/// A norm's weight without what its reader adds.
fn norm(values: &[f32], offset: f32) -> Tensor {
    let values: Vec<f32> = values.iter().map(|value| value - offset).collect();
    floats(vec![values.len()], &values)
}

/// The weights of a matrix times their scales.
fn values(matrix: &TernaryMatrix) -> Result<Tensor, bitnet_core::Error> {
    let (rows, cols) = (matrix.rows(), matrix.cols());
    let scale = |row: usize, col: usize| match matrix.scale() {
        WeightScale::Multiply(value) => *value,
        WeightScale::Divide(value) => 1.0 / value,
        WeightScale::Rows(values) => values[row],
        WeightScale::Groups { len, values } => values[row * (cols / len) + col / len],
    };
    let dtype = match matrix.scale() {
        WeightScale::Divide(value) => smallest(&[1.0 / value]),
        scale => smallest(scale.values()),
    };
    let mut bytes = Vec::with_capacity(rows * cols * dtype.block_bytes());
    let mut row_values = vec![0.0; cols];
    for row in 0..rows {
        for (col, value) in row_values.iter_mut().enumerate() {
            *value = f32::from(matrix.weight(row, col)) * scale(row, col);
        }
        encode_row(dtype, &row_values, &mut bytes);
    }
    Tensor::new(dtype, vec![rows, cols], bytes.into())
}

/// A JSON file of the source, if it is a checkpoint of this format that has it.
fn json_of_source(source: &Source<'_>, name: &str) -> Option<Map<String, Value>> {
    let bytes = fs::read(source.description.path.join(name)).ok()?;
    serde_json::from_slice(&bytes).ok()
}

/// The source's settings of generation, if it has any, with all its end tokens.
fn write_generation_config(source: &Source<'_>, folder: &OutputFolder) -> Result<(), Error> {
    let mut json = json_of_source(source, "generation_config.json").unwrap_or_default();
    if let Some(bos) = source.description.tokenizer.bos() {
        json.insert("bos_token_id".to_owned(), bos.into());
    }
    json.insert("eos_token_id".to_owned(), json!(source.description.end_ids));
    folder.write_json("generation_config.json", &json.into())
}

/// Copies the files of the tokenizer where the source has them, and makes them where it has not.
fn write_tokenizer(source: &Source<'_>, folder: &OutputFolder) -> Result<(), Error> {
    let description = source.description;
    let from = &description.path;
    if from.join("config.json").is_file() && from.is_dir() {
        for name in COPIED {
            let path = from.join(name);
            if path.is_file() {
                let bytes = fs::read(&path)
                    .map_err(|error| Error::file(&path, format!("cannot be read: {error}")))?;
                folder.write(name, &bytes)?;
            }
        }
        return Ok(());
    }
    let mut files = description
        .tokenizer
        .to_hugging_face()
        .map_err(|error| Error::file(&description.path, error))?;
    if let Some(template) = &description.template {
        files.config.insert("chat_template".to_owned(), template.source().into());
    }
    files.config.insert("clean_up_tokenization_spaces".to_owned(), false.into());
    files.config.insert("model_max_length".to_owned(), source.config.context_length.into());
    folder.write(files.vocabulary_name, &files.vocabulary)?;
    folder.write_json("tokenizer_config.json", &files.config.into())?;
    folder.write_json("special_tokens_map.json", &files.special_tokens.into())
}
