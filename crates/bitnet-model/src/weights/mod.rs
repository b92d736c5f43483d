//! Tensors of a checkpoint to a decoder in a backend's memory.
//!
//! One matrix at a time per thread passes through the neutral form
//! ([`TernaryMatrix`]), so loading needs little memory besides what the backend keeps.

mod loader;
mod places;

use std::collections::BTreeMap;
use std::path::Path;

use bitnet_core::backend::{ActivationPrecision, Backend, Norm};
use bitnet_core::{DType, Tensor, TernaryMatrix, budget};
use bitnet_quant::packing::i2_s::I2sLayout;
use bitnet_quant::screen;
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::decoder::Decoder;
use crate::error::Error;
use crate::formats::Tensors;

pub(crate) use loader::Loader;
use places::linears;
pub use places::{PartKind, PartPlace, part_places};

/// Choices that a file cannot make for us.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LoadOptions {
    /// Which of the three I2_S layouts the file has.
    pub i2s_layout: I2sLayout,
    /// How linear layers take their input, against what the file or its form says.
    pub precision: Option<ActivationPrecision>,
}

/// Loads a decoder. `path` is the model's, for error messages; what was decided for want of a word
/// in the file is added to `notes`.
///
/// The model is refused before anything is allocated if its weights cannot fit in memory.
pub fn load<B: Backend>(
    backend: B,
    path: &Path,
    config: &ModelConfig,
    tensors: &Tensors,
    options: LoadOptions,
    notes: &mut Vec<String>,
) -> Result<Decoder<B>, Error> {
    let loader = Loader::new(path, config, tensors, options);
    if !loader.is_tiled() {
        budget::require(&format!("loading {}", path.display()), packed_bytes(config))?;
    }
    let precision = loader.precision(notes)?;

    let Tables { embedding, head } = loader.tables()?;
    if !loader.is_tiled() {
        loader.check_tables(&embedding, head.as_ref())?;
    }
    let weight = backend.load_vector(&loader.final_norm()?)?;
    let final_norm = Norm { weight, eps: config.norm_eps };
    // Few threads: each holds one unpacked matrix, and the total is promised to stay small.
    let threads = rayon::ThreadPoolBuilder::new()
        .num_threads(std::thread::available_parallelism().map_or(1, |n| n.get().min(4)))
        .build()
        .map_err(|error| Error::file(path, format!("cannot start loading threads: {error}")))?;
    let layers = threads.install(|| {
        config
            .layers
            .par_iter()
            .enumerate()
            .map(|(index, kind)| loader.layer(&backend, index, *kind, precision))
            .collect::<Vec<_>>()
    });
    // The first layer's error is the one that is told, whichever thread was first.
    let layers = layers.into_iter().collect::<Result<Vec<_>, _>>()?;
    let stored_screen = loader.screen(embedding.rows())?;
    loader.refuse_unknown()?;
    let inverse_frequencies =
        config.ropes.iter().map(|rope| rope.inverse_frequencies(config.head_size)).collect();
    let screen = match stored_screen {
        Some(screen) => backend.load_screen(&screen)?,
        None if backend.wants_screen() && config.pooling.is_none() => {
            backend.load_screen(&screen::build(head.as_ref().unwrap_or(&embedding))?)?
        }
        None => None,
    };
    Ok(Decoder {
        vocab_size: embedding.rows(),
        embedding: backend.load_table(&embedding)?,
        head: head.map(|head| backend.load_table(&head)).transpose()?,
        screen,
        final_norm,
        layers,
        inverse_frequencies,
        config: config.clone(),
        backend,
    })
}

/// Number of ternary weights, from the description alone.
pub fn ternary_weights(config: &ModelConfig) -> u64 {
    let c = |n: usize| n as u128;
    let (hidden, attention) = (c(config.hidden_size), c(config.heads) * c(config.head_size));
    let kv = c(config.kv_heads) * c(config.head_size);
    let layer = hidden * (2 * attention + 2 * kv) + 3 * hidden * c(config.intermediate_size);
    u64::try_from(layer * c(config.layers.len())).unwrap_or(u64::MAX)
}

/// Bytes of all ternary weights at two bits each, from the description alone.
pub fn packed_bytes(config: &ModelConfig) -> u64 {
    ternary_weights(config) / 4
}

/// The embedding and, where it is not the embedding itself, the output head.
pub struct Tables {
    /// `[vocabulary, hidden]`.
    pub embedding: Tensor,
    /// `[vocabulary, hidden]`.
    pub head: Option<Tensor>,
}

/// The embedding and head of a checkpoint, as they are stored.
pub fn tables(path: &Path, config: &ModelConfig, tensors: &Tensors) -> Result<Tables, Error> {
    Loader::new(path, config, tensors, LoadOptions::default()).tables()
}

/// How many of the linear layers are stored in which element type.
pub fn linear_types(
    path: &Path,
    config: &ModelConfig,
    tensors: &Tensors,
) -> BTreeMap<String, usize> {
    let loader = Loader::new(path, config, tensors, LoadOptions::default());
    let mut types = BTreeMap::new();
    if loader.is_tiled() {
        types.insert("2-bit tiles".to_owned(), 7 * config.layers.len());
        return types;
    }
    for layer in 0..config.layers.len() {
        for linear in linears(config) {
            let weight = format!("{}.weight", loader.module(layer, linear.name));
            let dtype = match tensors.get(&weight) {
                Ok(Some(tensor)) if tensor.dtype() == DType::U8 => "packed 2-bit".to_owned(),
                Ok(Some(tensor)) => tensor.dtype().to_string(),
                Ok(None) => "missing".to_owned(),
                Err(_) => "unreadable".to_owned(),
            };
            *types.entry(dtype).or_default() += 1;
        }
    }
    types
}

/// One ternary matrix `[rows, cols]` of a checkpoint by its module's full name
/// (`model.layers.0.mlp.up_proj`), its rows as they are stored.
pub fn matrix_by_name(
    path: &Path,
    config: &ModelConfig,
    tensors: &Tensors,
    module: &str,
    rows: usize,
    cols: usize,
) -> Result<TernaryMatrix, Error> {
    Loader::new(path, config, tensors, LoadOptions::default()).stored_matrix(module, rows, cols)
}
