//! From one format to another.

use std::path::{Path, PathBuf};

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::mmap::map_file;
use bitnet_quant::packing::tile;
use bitnet_quant::screen;
use rayon::prelude::*;

use crate::config::{ModelConfig, Precision, TensorNames};
use crate::error::Error;
use crate::formats::native::{self, Described, Part};
use crate::source::Checkpoint;
use crate::weights::{LoadOptions, Loader, PartKind, PartPlace, Tables, part_places};

/// Writes a model as a native file: every weight checked, ternary ones in the layout of the CPU
/// kernels, everything else as it is. What was decided for want of a word in the checkpoint becomes
/// one of the file's notes. `progress` is told how many parts of how many are written.
///
/// One matrix per thread is in memory at a time. `path` is a whole file afterwards, or after an error
/// what it was before.
///
/// # Errors
/// The checkpoint is refused for what loading it would refuse, or `path` cannot be written: it is
/// one of the checkpoint's own files, or there is a file that is no native one.
pub fn to_native(
    checkpoint: &Checkpoint,
    path: &Path,
    options: LoadOptions,
    mut progress: impl FnMut(usize, usize),
) -> Result<(), Error> {
    let Checkpoint { description, tensors } = checkpoint;
    check_target(checkpoint, path)?;
    let source = &description.config;
    let loader = Loader::new(&description.path, source, tensors, options);
    let mut notes = description.notes.clone();
    let precision = loader.precision(&mut notes)?;
    let tables = loader.tables()?;
    loader.check_tables(&tables.embedding, tables.head.as_ref())?;

    let known = ModelConfig {
        vocab_size: Some(tables.embedding.rows()),
        tied: Some(tables.head.is_none()),
        precision: Precision::Known(precision),
        ..source.clone()
    };
    let native = ModelConfig { names: TensorNames::NATIVE, ..known.clone() };
    // The same parts in the same order, by the checkpoint's names and by a native file's.
    let places: Vec<(PartPlace, PartPlace)> =
        part_places(&known).into_iter().zip(part_places(&native)).collect();
    let threads = std::thread::available_parallelism().map_or(1, |n| n.get().min(4));
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .build()
        .map_err(|error| Error::file(path, format!("cannot start threads: {error}")))?;
    let read = |(from, to): &(PartPlace, PartPlace)| {
        Ok((to.native_name(), part(&loader, &tables, from, precision)?))
    };
    let mut written = 0;
    let parts = places
        .chunks(threads)
        .flat_map(|places| pool.install(|| places.par_iter().map(read).collect::<Vec<_>>()))
        .inspect(|_| {
            written += 1;
            progress(written, places.len());
        })
        .chain(std::iter::from_fn(|| loader.refuse_unknown().err().map(Err)));
    let described = Described {
        config: &native,
        tokenizer: &description.tokenizer,
        template: description.template.as_ref(),
        end_ids: &description.end_ids,
        notes: &notes,
    };
    native::write(path, &described, parts)
}

/// One part of a checkpoint.
fn part(
    loader: &Loader<'_>,
    tables: &Tables,
    place: &PartPlace,
    precision: ActivationPrecision,
) -> Result<Part, Error> {
    let &PartPlace { layer, name, kind } = place;
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
            let matrix = loader.matrix(layer, name, rows, cols)?;
            Part::Matrix(tile::tiled(&matrix, precision, usage, true)?)
        }
    })
}

/// Refuses to write over the checkpoint itself, and over what a conversion did not write.
fn check_target(checkpoint: &Checkpoint, path: &Path) -> Result<(), Error> {
    let refused = |reason: &str| Err(Error::file(path, format!("cannot be written: {reason}")));
    let Ok(metadata) = std::fs::metadata(path) else { return Ok(()) };
    if metadata.is_dir() {
        return refused("it is a folder; give the name of a file, such as model.bitnet");
    }
    let real = |path: &Path| path.canonicalize().ok();
    let mut own: Vec<PathBuf> = checkpoint.tensors.files().filter_map(real).collect();
    own.extend(real(&checkpoint.description.path));
    if real(path).is_some_and(|path| own.contains(&path)) {
        return refused("it is the model that is to be converted; give another name");
    }
    if !map_file(path).is_ok_and(|bytes| native::is_native(&bytes)) {
        return refused("there is another file of this name; give another name, or remove it");
    }
    Ok(())
}
