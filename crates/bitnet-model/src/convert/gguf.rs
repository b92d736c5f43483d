//! To a GGUF file that other engines load: metadata and tensors as llama.cpp's converters name them
//! and lay them out.

use std::path::Path;

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{DType, Tensor};
use bitnet_quant::packing::i2_s::I2sLayout;
use bitnet_quant::packing::{decode_ternary, encode_ternary};

use super::holds::{self, refused, with_one_scale};
use super::{Part, Source, check_table, write_table};
use crate::config::{Hyperparameters, ModelConfig, Pooling, Precision, RopeScaling, TensorNames};
use crate::error::Error;
use crate::formats::Tensors;
use crate::formats::gguf::{self, Entries, Line, Writer};
use crate::weights::{PartKind, PartPlace, has_one_scale};

/// The format's name in messages.
const FORMAT: &str = "a GGUF file";

/// Writes a GGUF file with its linear layers in `packing`, one of the ternary types, and its embedding
/// and head in `head` or as they are. Adds to `notes` what the format made necessary.
pub(super) fn write(
    source: &Source<'_>,
    path: &Path,
    packing: DType,
    head: Option<DType>,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let read = described(source)?;
    holds::check(source, &read, FORMAT)?;
    check_first_layer(source, &read, packing)?;
    let table_type = |table: &Tensor| head.unwrap_or(table.dtype());
    let tables = [Some(&source.tables.embedding), source.tables.head.as_ref()];
    for table in tables.into_iter().flatten() {
        check_table(source, table, table_type(table))?;
    }

    let (_, mut places) = source.renamed(TensorNames::GGUF);
    places.retain(|(place, _)| !matches!(place.kind, PartKind::Screen));
    let line = |(_, place): &(PartPlace, PartPlace)| {
        let (dtype, shape) = match place.kind {
            PartKind::Table => {
                let table = match place.name == TensorNames::GGUF.head {
                    true => source.tables.head.as_ref().expect("a head of its own"),
                    false => &source.tables.embedding,
                };
                (table_type(table), table.shape().to_vec())
            }
            PartKind::Norm { len, .. } => (DType::F32, vec![len]),
            PartKind::Matrix { rows, cols, .. } => (packing, vec![rows, cols]),
            PartKind::Screen => unreachable!("left out above"),
        };
        Line { name: format!("{}.weight", place.full_name(&TensorNames::GGUF)), dtype, shape }
    };
    let table: Vec<Line> = places.iter().map(line).collect();
    let mut entries = entries(source);
    entries.u32("general.file_type", file_type(packing));
    tokenizer(source, &mut entries, notes)?;
    let header = gguf::header(&entries, &table)
        .map_err(|(name, reason)| refused(source, FORMAT, format!("tensor `{name}`: {reason}")))?;

    let body = |place: &PartPlace, part: Part| {
        Ok(match part {
            Part::Table(table) => Body::Table(table),
            Part::Norm(mut weight) => {
                let of_projection =
                    matches!(place.kind, PartKind::Norm { of_projection: true, .. });
                let offset = if of_projection { 0.0 } else { read.norm_offset };
                weight.iter_mut().for_each(|value| *value -= offset);
                Body::Bytes(weight.iter().flat_map(|value| value.to_le_bytes()).collect())
            }
            Part::Matrix(matrix, _) => {
                let names = &TensorNames::GGUF;
                let matrix = match place.name == names.q || place.name == names.k {
                    true if read.interleaved_rope_rows => {
                        matrix.reorder_rows(&interleaved_order(matrix.rows(), read.head_size))
                    }
                    _ => matrix,
                };
                let name = format!("{}.weight", place.full_name(names));
                let bytes = encode_ternary(&with_one_scale(matrix)?, packing);
                Body::Bytes(bytes.map_err(|error| Error::tensor(path, &name, error))?)
            }
            Part::Screen(_) => unreachable!("left out above"),
        })
    };
    let mut writer = Writer::create(path, &header)?;
    for part in source.parts(&places, body, progress)? {
        match part? {
            Body::Bytes(bytes) => writer.write(&bytes)?,
            Body::Table(table) => {
                write_table(&table, table_type(&table), |bytes| writer.write(bytes))?;
            }
        }
        writer.next()?;
    }
    writer.finish()
}

/// The bytes of a tensor, or what they are made of while they are written.
enum Body {
    Bytes(Vec<u8>),
    Table(Tensor),
}

/// llama.cpp's number for a file mostly of one type (`enum llama_ftype`; I2_S is bitnet.cpp's).
fn file_type(packing: DType) -> u32 {
    match packing {
        DType::Tq1_0 => 36,
        DType::Tq2_0 => 37,
        DType::I2S => 40,
        // "Guessed": by the tensors.
        _ => 1024,
    }
}

/// All entries but those of the tokenizer.
fn entries(source: &Source<'_>) -> Entries {
    let c = &source.config;
    let name = holds::architecture(c).gguf[0];
    let mut entries = Entries::default();
    entries.text("general.architecture", name);
    entries.text("general.type", "model");
    let file_stem = source.description.path.file_stem();
    if let Some(model) = file_stem.and_then(|stem| stem.to_str()) {
        entries.text("general.name", model);
    }
    entries.u32("general.quantization_version", 2);
    let key = |key: &str| format!("{name}.{key}");
    // Extents of a description are below 2^31.
    let mut size = |name: &str, value: usize| entries.u32(&key(name), value as u32);
    size("context_length", c.context_length);
    size("embedding_length", c.hidden_size);
    size("block_count", c.layers.len());
    size("feed_forward_length", c.intermediate_size);
    size("attention.head_count", c.heads);
    size("attention.head_count_kv", c.kv_heads);
    size("attention.key_length", c.head_size);
    size("attention.value_length", c.head_size);
    size("rope.dimension_count", c.head_size);
    size("vocab_size", source.tables.embedding.rows());
    if let Some(window) = c.layers.iter().find_map(|layer| layer.window) {
        size("attention.sliding_window", window);
    }
    match c.pooling {
        Some(Pooling::Mean) => size("pooling_type", 1),
        Some(Pooling::Last) => size("pooling_type", 3),
        None => {}
    }
    entries.f32(&key("attention.layer_norm_rms_epsilon"), c.norm_eps);
    entries.f32(&key("rope.freq_base"), c.ropes[0].theta);
    if let RopeScaling::Linear { factor } = c.ropes[0].scaling {
        entries.text(&key("rope.scaling.type"), "linear");
        entries.f32(&key("rope.scaling.factor"), factor);
    }
    entries
}

/// What our reader makes of the entries.
fn described(source: &Source<'_>) -> Result<ModelConfig, Error> {
    let c = &source.config;
    let path = &source.description.path;
    if c.ropes.iter().any(|rope| matches!(rope.scaling, RopeScaling::Llama3 { .. })) {
        let what = "Llama 3's scaling of rotation is a tensor there, which is not read";
        return Err(refused(source, FORMAT, what));
    }
    let architecture = holds::architecture(c);
    let header = gguf::header(&entries(source), &[]).expect("there is no tensor to be wrong");
    let file = gguf::from_bytes(header.into(), path)?;
    let mut tensors = Tensors::default();
    if c.projection_norm_eps.is_some() {
        // By which the reader knows that projections have norms.
        let norm = Tensor::from_f32(vec![1], &[1.0]);
        tensors.insert(path, "blk.0.attn_q_norm_in.weight".to_owned(), Ok(norm))?;
    }
    let h = Hyperparameters::from_gguf(path, &file.metadata, architecture.gguf[0], &tensors);
    (architecture.describe)(&h, &mut Vec::new())
}

/// Checks what the matrices of the first layer tell of all: that they fill the blocks of the packing,
/// that it holds their scales, and that their scales say how inputs are taken where nothing else does.
fn check_first_layer(source: &Source<'_>, read: &ModelConfig, packing: DType) -> Result<(), Error> {
    let (_, places) = source.renamed(TensorNames::GGUF);
    for (from, place) in places.iter().filter(|(place, _)| place.layer == Some(0)) {
        let PartKind::Matrix { rows, cols, .. } = place.kind else { continue };
        let block = if packing == DType::I2S { 128 } else { packing.block_len() };
        let fits = match packing {
            DType::I2S => (rows * cols).is_multiple_of(block),
            _ => cols.is_multiple_of(block),
        };
        if !fits {
            let what = format!(
                "{packing} has blocks of {block} weights, which `{}` of {rows} x {cols} does not \
                 fill",
                place.name
            );
            return Err(refused(source, FORMAT, what));
        }
        let Part::Matrix(matrix, _) = source.part(from)? else { unreachable!("it is a matrix") };
        let matrix = with_one_scale(matrix)?;
        let bytes = encode_ternary(&matrix, packing)
            .map_err(|error| refused(source, FORMAT, format!("{packing}: {error}")))?;
        if place.name == TensorNames::GGUF.down && read.precision == Precision::ByScale {
            let stored = Tensor::new(packing, vec![rows, cols], bytes.into())?;
            let scale = decode_ternary(&stored, I2sLayout::X86)?;
            let implied = match has_one_scale(scale.scale()) {
                true => ActivationPrecision::Int8,
                false => ActivationPrecision::F32,
            };
            if implied != source.precision {
                let what = match source.precision {
                    ActivationPrecision::F32 => {
                        "f32 inputs are known by several scales per matrix, and it has one"
                    }
                    ActivationPrecision::Int8 => {
                        "int8 inputs are known by one scale per matrix, and it has several"
                    }
                };
                return Err(refused(source, FORMAT, what));
            }
        }
    }
    Ok(())
}

/// The order in which GGUF's `llama` stores rows of q and k: the two halves of each head interleaved.
fn interleaved_order(rows: usize, head_size: usize) -> Vec<usize> {
    (0..rows)
        .map(|row| {
            let (head, within) = (row / head_size, row % head_size);
            head * head_size + within % 2 * (head_size / 2) + within / 2
        })
        .collect()
}

/// The entries of the tokenizer, the end tokens and the template.
fn tokenizer(
    source: &Source<'_>,
    entries: &mut Entries,
    notes: &mut Vec<String>,
) -> Result<(), Error> {
    let description = source.description;
    let vocabulary = description
        .tokenizer
        .to_gguf(source.tables.embedding.rows())
        .map_err(|error| Error::file(&description.path, error))?;
    entries.text("tokenizer.ggml.model", &vocabulary.model);
    if let Some(pre) = &vocabulary.pre {
        entries.text("tokenizer.ggml.pre", pre);
    }
    entries.texts("tokenizer.ggml.tokens", &vocabulary.tokens);
    if !vocabulary.scores.is_empty() {
        entries.f32s("tokenizer.ggml.scores", &vocabulary.scores);
    }
    let types = vocabulary.token_types.iter().map(|&kind| kind as i32);
    entries.i32s("tokenizer.ggml.token_type", types);
    if !vocabulary.merges.is_empty() {
        entries.texts("tokenizer.ggml.merges", &vocabulary.merges);
    }
    let flags = [
        ("add_bos_token", vocabulary.add_bos),
        ("add_eos_token", vocabulary.add_eos),
        ("add_space_prefix", vocabulary.add_space_prefix),
        ("remove_extra_whitespaces", vocabulary.remove_extra_whitespaces),
    ];
    for (key, flag) in flags.into_iter().filter_map(|(key, flag)| Some((key, flag?))) {
        entries.bool(&format!("tokenizer.ggml.{key}"), flag);
    }

    // The reader adds the end token and special tokens that end turns by their name.
    let known = description.tokenizer.end_ids(&[]);
    let mut others = description.end_ids.iter().copied().filter(|id| !known.contains(id));
    let eos = vocabulary.eos.or_else(|| known.first().copied()).or_else(|| others.next());
    // Other engines are told of one of those, too.
    let turn_end = known.iter().copied().find(|&id| Some(id) != eos);
    let eot = others.next().or(turn_end);
    let eom = others.next();
    for (key, id) in [
        ("bos", vocabulary.bos),
        ("eos", eos),
        ("eot", eot),
        ("eom", eom),
        ("unknown", vocabulary.unknown),
    ] {
        if let Some(id) = id {
            entries.u32(&format!("tokenizer.ggml.{key}_token_id"), id);
        }
    }
    if others.next().is_some() {
        notes.push("the model has more end tokens than a GGUF file names: three are kept".into());
    }
    if let Some(template) = &description.template {
        entries.text("tokenizer.chat_template", template.source());
    }
    Ok(())
}
