//! To a native file.

use std::path::Path;

use bitnet_quant::packing::tile::{self, Reader};

use super::{Part, Source};
use crate::config::TensorNames;
use crate::error::Error;
use crate::formats::native::{self, Described};
use crate::weights::PartPlace;

/// Writes a native file: ternary weights in the layout of the CPU kernels, as their reader makes most of
/// them, everything else as it is, notes included.
pub(super) fn write(
    source: &Source<'_>,
    path: &Path,
    reader: Reader,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<(), Error> {
    let (config, places) = source.renamed(TensorNames::NATIVE);
    let part = |place: &PartPlace, part| {
        let part = match part {
            Part::Table(table) => native::Part::Table(table),
            Part::Norm(weight) => native::Part::Norm(weight),
            Part::Matrix(matrix, usage) => {
                native::Part::Matrix(tile::tiled(&matrix, source.precision, usage, reader)?)
            }
            Part::Screen(screen) => native::Part::Screen(screen),
        };
        Ok((place.full_name(&TensorNames::NATIVE), part))
    };
    let description = source.description;
    let described = Described {
        config: &config,
        tokenizer: &description.tokenizer,
        template: description.template.as_ref(),
        end_ids: &description.end_ids,
        notes: &source.notes,
    };
    native::write(path, &described, source.parts(&places, part, progress)?)
}
