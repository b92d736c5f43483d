//! From one format to another.
//!
//! A `Source` gives the parts of any checkpoint in neutral form, one per thread in memory at a time;
//! each format has a file here that writes them, and a [`Target`] that asks for it.

mod gguf;
mod holds;
mod huggingface;
mod native;
mod onnx;

use std::path::{Path, PathBuf};

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::mmap::map_file;
use bitnet_core::{DType, LinearUse, Screen, Tensor, TernaryMatrix};
use bitnet_quant::packing::blocks::{decode_row, encode_row};
use bitnet_quant::packing::tile::Reader;
use bitnet_quant::screen;
use rayon::prelude::*;

use crate::config::{ModelConfig, Precision, TensorNames};
use crate::error::Error;
use crate::formats::gguf::MAGIC;
use crate::formats::native::is_native;
use crate::output::{failed, part_of};
use crate::source::{Checkpoint, Description};
use crate::weights::{LoadOptions, Loader, PartKind, PartPlace, Tables, part_places};

/// A format to write, with what it leaves to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// A `.bitnet` file.
    Native {
        /// Whether weights take fewer than two bits each. Every CPU computes the same from both; those
        /// with AVX-512 VBMI (Ice Lake, Zen 4 and later) decode faster from these, others lay them out
        /// anew when they load them.
        compact: bool,
    },
    /// A folder as transformers reads it.
    HuggingFace {
        /// Whether linear layers have two bits per weight (`weight_scale` beside them), not BF16
        /// weights that are ternarised when they are loaded.
        packed: bool,
        /// Type of the embedding and the head: F32, F16 or BF16. As they are if `None`, or F32 if
        /// they are of a block type.
        head: Option<DType>,
    },
    /// A GGUF file.
    Gguf {
        /// Type of the linear layers: I2_S, TQ1_0, TQ2_0 or Q2_0.
        packing: DType,
        /// Type of the embedding and the head: F32, F16, BF16, Q8_0 or Q6_K. As they are if `None`.
        head: Option<DType>,
    },
    /// A folder with `model.onnx`, for ONNX Runtime.
    Onnx {
        /// Type of the embedding and the head: F32, F16 or BF16. As they are if `None`, or F32 if
        /// they are of a block type.
        head: Option<DType>,
    },
}

impl Target {
    fn is_folder(&self) -> bool {
        matches!(self, Target::HuggingFace { .. } | Target::Onnx { .. })
    }
}

/// Choices that hold for every format.
#[derive(Debug, Clone, Copy, Default)]
pub struct Options {
    /// How the checkpoint is read.
    pub load: LoadOptions,
}

/// Writes a model in another format, every weight checked. `progress` is told how many parts of how
/// many are written. Returns what was decided for want of a word in the checkpoint, and what the
/// format made necessary, for people.
///
/// One matrix per thread is in memory at a time. `path` is whole afterwards, or after an error what
/// it was before.
///
/// # Errors
/// The checkpoint is refused for what loading it would refuse, the format cannot hold the model, or
/// `path` cannot be written: it is one of the checkpoint's own files, or there is something that no
/// conversion to this format wrote.
pub fn to(
    checkpoint: &Checkpoint,
    path: &Path,
    target: &Target,
    options: Options,
    mut progress: impl FnMut(usize, usize),
) -> Result<Vec<String>, Error> {
    check_path(checkpoint, path, target)?;
    let source = Source::open(checkpoint, options.load)?;
    let mut notes = source.notes.clone();
    match *target {
        Target::Native { compact } => {
            let reader = Reader { copies: true, compact };
            native::write(&source, path, reader, &mut progress)?;
        }
        Target::HuggingFace { packed, head } => {
            huggingface::write(&source, path, packed, head, &mut progress)?;
        }
        Target::Gguf { packing, head } => {
            gguf::write(&source, path, packing, head, &mut notes, &mut progress)?;
        }
        Target::Onnx { head } => onnx::write(&source, path, head, &mut progress)?,
    }
    Ok(notes)
}

/// A part of a decoder in neutral form.
enum Part {
    /// The embedding or the head `[vocabulary, hidden]`, as it is stored.
    Table(Tensor),
    /// The weight of a norm, any offset added.
    Norm(Vec<f32>),
    /// A linear layer's weights, and how it is used.
    Matrix(TernaryMatrix, LinearUse),
    /// The screen of the output head.
    Screen(Screen),
}

/// A checkpoint of any format on its way into a file: its parts, and all that was decided about it.
struct Source<'a> {
    description: &'a Description,
    /// The description with what the tensors told: the number of tokens, whether the head is the
    /// embedding, and how linear layers take their input.
    config: ModelConfig,
    tables: Tables,
    precision: ActivationPrecision,
    /// The description's notes and those of what was decided since.
    notes: Vec<String>,
    loader: Loader<'a>,
}

impl<'a> Source<'a> {
    fn open(checkpoint: &'a Checkpoint, options: LoadOptions) -> Result<Self, Error> {
        let Checkpoint { description, tensors } = checkpoint;
        let loader = Loader::new(&description.path, &description.config, tensors, options);
        let mut notes = description.notes.clone();
        let precision = loader.precision(&mut notes)?;
        let tables = loader.tables()?;
        loader.check_tables(&tables.embedding, tables.head.as_ref())?;
        let config = ModelConfig {
            vocab_size: Some(tables.embedding.rows()),
            tied: Some(tables.head.is_none()),
            precision: Precision::Known(precision),
            ..description.config.clone()
        };
        Ok(Source { description, config, tables, precision, notes, loader })
    }

    /// Where every part is in the checkpoint.
    fn places(&self) -> Vec<PartPlace> {
        part_places(&self.config)
    }

    /// The description with other names for its tensors, and every part by the checkpoint's name and
    /// by the other.
    fn renamed(&self, names: TensorNames) -> (ModelConfig, Vec<(PartPlace, PartPlace)>) {
        let renamed = ModelConfig { names, ..self.config.clone() };
        let places = self.places().into_iter().zip(part_places(&renamed)).collect();
        (renamed, places)
    }

    /// The parts at `places`, in order: each is read from where the first half of its pair says and
    /// goes through `make` with the second, on as many threads as there are few. At the end, a tensor
    /// of the checkpoint that nobody asked for is an error.
    fn parts<'s, P: Sync, T: Send + 's>(
        &'s self,
        places: &'s [(PartPlace, P)],
        make: impl Fn(&P, Part) -> Result<T, Error> + Sync + 's,
        progress: &'s mut dyn FnMut(usize, usize),
    ) -> Result<impl Iterator<Item = Result<T, Error>> + 's, Error> {
        let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
        let pool =
            rayon::ThreadPoolBuilder::new().num_threads(threads).build().map_err(|error| {
                Error::file(&self.description.path, format!("cannot start threads: {error}"))
            })?;
        let mut written = 0;
        let parts = places
            .chunks(threads)
            .flat_map(move |places| {
                let read = |(from, to): &(PartPlace, P)| make(to, self.part(from)?);
                pool.install(|| places.par_iter().map(read).collect::<Vec<_>>())
            })
            .inspect(move |_| {
                written += 1;
                progress(written, places.len());
            });
        let mut checked = false;
        let unknown = std::iter::from_fn(move || {
            let first = !std::mem::replace(&mut checked, true);
            first.then(|| self.loader.refuse_unknown().err().map(Err)).flatten()
        });
        Ok(parts.chain(unknown))
    }

    /// One part of the checkpoint.
    fn part(&self, place: &PartPlace) -> Result<Part, Error> {
        let &PartPlace { layer, name, kind } = place;
        let (loader, tables) = (&self.loader, &self.tables);
        Ok(match (kind, layer) {
            (PartKind::Table, _) => {
                let is_head = name == loader.names().head;
                let table = tables.head.as_ref().filter(|_| is_head).unwrap_or(&tables.embedding);
                Part::Table(table.clone())
            }
            (PartKind::Screen, _) => {
                let head = tables.head.as_ref().unwrap_or(&tables.embedding);
                let stored = loader.screen(head.rows())?;
                Part::Screen(stored.map_or_else(|| screen::build(head), Ok)?)
            }
            (PartKind::Norm { .. }, None) => Part::Norm(loader.final_norm()?),
            (PartKind::Norm { len, of_projection: false }, Some(layer)) => {
                Part::Norm(loader.layer_norm(layer, name, len)?)
            }
            (PartKind::Norm { len, of_projection: true }, Some(layer)) => {
                Part::Norm(loader.projection_norm(layer, name, len)?)
            }
            (PartKind::Matrix { rows, cols, usage }, layer) => {
                let layer = layer.expect("every matrix is in a layer");
                Part::Matrix(loader.matrix(layer, name, rows, cols)?, usage)
            }
        })
    }
}

/// Refuses to write over the checkpoint itself, and over what a conversion did not write.
fn check_path(checkpoint: &Checkpoint, path: &Path, target: &Target) -> Result<(), Error> {
    let real = |path: &Path| path.canonicalize().ok();
    let mut own: Vec<PathBuf> = checkpoint.tensors.files().filter_map(real).collect();
    own.extend(real(&checkpoint.description.path));
    let part = part_of(path)?;
    let is_own = |path: &Path| real(path).is_some_and(|path| own.contains(&path));
    if is_own(path) && (path.is_file() || target.is_folder()) {
        let reason = "it is the model that is to be converted; give another name";
        return Err(failed(path, reason));
    }
    if is_own(&part) {
        let reason = format!(
            "the model that is to be converted lies where it would grow, {}; give another name",
            part.display()
        );
        return Err(failed(path, reason));
    }
    if target.is_folder() {
        let is_empty = |path: &Path| path.read_dir().is_ok_and(|mut names| names.next().is_none());
        if path.exists() && !is_empty(path) {
            let reason = "there is something of this name; give another name, or remove it";
            return Err(failed(path, reason));
        }
        return Ok(());
    }
    if path.is_dir() {
        let reason = "it is a folder; give the name of a file, such as model.bitnet";
        return Err(failed(path, reason));
    }
    let is_replaced = |bytes: &[u8]| match target {
        Target::Native { .. } => is_native(bytes),
        Target::Gguf { .. } => bytes.starts_with(MAGIC),
        Target::HuggingFace { .. } | Target::Onnx { .. } => false,
    };
    if path.exists() && !map_file(path).is_ok_and(|bytes| is_replaced(&bytes)) {
        let reason = "there is another file of this name; give another name, or remove it";
        return Err(failed(path, reason));
    }
    Ok(())
}

/// Refuses a type that a table's rows do not fill.
fn check_table(source: &Source<'_>, table: &Tensor, dtype: DType) -> Result<(), Error> {
    dtype.byte_len(table.shape()).map(drop).map_err(|reason| {
        let reason = format!("the embedding and the head cannot be {dtype}: {reason}");
        Error::file(&source.description.path, reason)
    })
}

/// Hands the bytes of a table to `write`, in another type or as they are, a few rows at a time.
fn write_table(
    table: &Tensor,
    dtype: DType,
    mut write: impl FnMut(&[u8]) -> Result<(), Error>,
) -> Result<(), Error> {
    const ROWS: usize = 64;
    if dtype == table.dtype() {
        return table.data().chunks(1 << 20).try_for_each(write);
    }
    let encode = |rows: std::ops::Range<usize>| {
        let mut bytes = Vec::new();
        let mut values = vec![0.0; table.cols()];
        for row in rows {
            decode_row(table.dtype(), table.row(row), &mut values);
            encode_row(dtype, &values, &mut bytes);
        }
        bytes
    };
    for first in (0..table.rows()).step_by(16 * ROWS) {
        let last = table.rows().min(first + 16 * ROWS);
        let blocks: Vec<_> =
            (first..last).step_by(ROWS).map(|row| row..last.min(row + ROWS)).collect();
        let blocks: Vec<Vec<u8>> = blocks.into_par_iter().map(encode).collect();
        blocks.iter().try_for_each(|bytes| write(bytes))?;
    }
    Ok(())
}
