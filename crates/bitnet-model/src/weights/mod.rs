//! Tensors of a checkpoint to a decoder in a backend's memory.
//!
//! One matrix at a time per thread passes through the neutral form
//! ([`TernaryMatrix`]), so loading needs little memory besides what the backend keeps.

mod loader;
mod places;

use std::collections::BTreeMap;
use std::ops::ControlFlow;
use std::path::Path;

use bitnet_core::backend::{ActivationPrecision, Backend, Norm};
use bitnet_core::{DType, Tensor, TernaryMatrix, budget};
use bitnet_quant::packing::i2_s::I2sLayout;
use bitnet_quant::screen;

use crate::config::ModelConfig;
use crate::decoder::{Decoder, Weights};
use crate::error::Error;
use crate::formats::{Tensors, native};
use crate::pipeline;

pub(crate) use loader::{Loader, has_one_scale};
use places::linears;
pub use places::{PartKind, PartPlace, part_places};

/// Choices that a file cannot make for us.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct LoadOptions {
    /// Which of the three I2_S layouts the file has.
    pub i2s_layout: I2sLayout,
    /// How linear layers take their input, against what the file or its form says.
    pub precision: Option<ActivationPrecision>,
    /// Copies into memory what would stay in the mapped files.
    pub in_memory: bool,
    /// Ternarises the weights of a dense model, and quantises its inputs, where they would be refused.
    pub ternarise: bool,
}

/// How far loading has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LoadProgress {
    /// Tensors of the files that are done.
    pub tensors: usize,
    /// Tensors of the files in all.
    pub total_tensors: usize,
    /// Bytes of the tensors that are done, as the files hold them.
    pub bytes: u64,
    /// Bytes of all tensors.
    pub total_bytes: u64,
}

impl LoadProgress {
    fn add(&mut self, (tensors, bytes): (usize, u64)) {
        self.tensors += tensors;
        self.bytes += bytes;
    }
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
    let progress = &mut |_| ControlFlow::Continue(());
    load_stages(vec![backend], path, config, tensors, options, notes, progress)
}

/// As [`load`], in as many stages as there are backends, such that the fullest stage holds as few
/// bytes of layers, tables and screen as can be. `progress` is called on this thread after each layer and when
/// everything is done, and can end the loading.
///
/// # Errors
/// As [`load`]; [`Error::Devices`] if there are no backends, or more of them than layers;
/// [`Error::Cancelled`] if `progress` said so.
pub fn load_stages<B: Backend>(
    backends: Vec<B>,
    path: &Path,
    config: &ModelConfig,
    tensors: &Tensors,
    options: LoadOptions,
    notes: &mut Vec<String>,
    progress: &mut dyn FnMut(LoadProgress) -> ControlFlow<()>,
) -> Result<Decoder<B>, Error> {
    let layers = config.layers.len();
    let (Some(first), Some(last)) = (backends.first(), backends.last()) else {
        return Err(Error::Devices { path: path.to_owned(), layers, devices: 0 });
    };
    if backends.len() > layers {
        return Err(Error::Devices { path: path.to_owned(), layers, devices: backends.len() });
    }
    let loader = Loader::new(path, config, tensors, options);
    let Tables { embedding, head } = loader.tables()?;
    let needed = match (options.in_memory, loader.is_tiled()) {
        (true, _) => least_bytes(path, config, tensors)?,
        (false, true) => 0,
        (false, false) => packed_bytes(config),
    };
    budget::require(&format!("loading {}", path.display()), needed)?;
    let precision = loader.precision(notes)?;
    if !loader.is_tiled() {
        loader.check_tables(&embedding, head.as_ref())?;
    }
    let stored_screen = loader.screen(embedding.rows())?;
    let makes_screen = stored_screen.is_none() && last.wants_screen() && config.pooling.is_none();

    let screen_bytes = match &stored_screen {
        Some(screen) => screen.data().len(),
        None if makes_screen => {
            bitnet_core::screen::byte_len(embedding.rows(), embedding.cols()).unwrap_or(0)
        }
        None => 0,
    };
    let head_bytes = head.as_ref().unwrap_or(&embedding).data().len();
    let layer_bytes: Vec<u64> = (0..layers).map(|layer| loader.layer_bytes(layer)).collect();
    let stages = pipeline::cut(
        &layer_bytes,
        embedding.data().len() as u64,
        (head_bytes + screen_bytes) as u64,
        backends.len(),
    );

    let weight = last.load_vector(&loader.final_norm()?)?;
    let final_norm = Norm { weight, eps: config.norm_eps };
    let (total_tensors, total_bytes) = tensors.size("");
    let mut done = LoadProgress { tensors: 0, total_tensors, bytes: 0, total_bytes };
    let layers = loader.layers(&backends, &stages, precision, |layer| {
        done.add(tensors.size(&loader.module(layer, "")));
        progress(done)
    })?;
    loader.refuse_unknown()?;
    let inverse_frequencies =
        config.ropes.iter().map(|rope| rope.inverse_frequencies(config.head_size)).collect();
    let screen = match stored_screen {
        Some(screen) => last.load_screen(&loader.kept_screen(screen)?)?,
        None if makes_screen => {
            last.load_screen(&screen::build(head.as_ref().unwrap_or(&embedding))?)?
        }
        None => None,
    };
    let embedding = loader.kept(embedding)?;
    let head = match head {
        Some(head) => Some(last.load_table(&loader.kept(head)?)?),
        // The last stage cannot reach what is on the first.
        None if backends.len() > 1 => Some(last.load_table(&embedding)?),
        None => None,
    };
    let weights = Weights {
        vocab_size: embedding.rows(),
        embedding: first.load_table(&embedding)?,
        head,
        screen,
        final_norm,
        layers,
        stages,
        inverse_frequencies,
        config: config.clone(),
    };
    let all = LoadProgress { tensors: total_tensors, bytes: total_bytes, ..done };
    match progress(all) {
        ControlFlow::Continue(()) => Ok(Decoder::new(backends, weights)),
        ControlFlow::Break(()) => Err(Error::Cancelled { path: path.to_owned() }),
    }
}

/// Bytes that the weights of a checkpoint take at least, mapped or not: the ternary ones at two bits
/// each, and the tables as they are stored.
pub fn least_bytes(path: &Path, config: &ModelConfig, tensors: &Tensors) -> Result<u64, Error> {
    let Tables { embedding, head } = tables(path, config, tensors)?;
    let tables = embedding.data().len() + head.map_or(0, |head| head.data().len());
    Ok(packed_bytes(config).saturating_add(tables as u64))
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
    for layer in 0..config.layers.len() {
        for linear in linears(config) {
            let module = loader.module(layer, linear.name);
            let weight = format!("{module}.weight");
            let dtype = match tensors.dtype(&weight) {
                _ if loader.is_tiled() => native::stored_as(&module, tensors).to_owned(),
                Some(DType::U8) => "packed 2-bit".to_owned(),
                Some(dtype) => dtype.to_string(),
                None if tensors.contains(&weight) => "unreadable".to_owned(),
                None => "missing".to_owned(),
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
