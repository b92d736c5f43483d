//! Whether a format can hold a model: what would be read from the file that is to be written must
//! describe the model that is converted.

use bitnet_core::backend::ActivationPrecision;
use bitnet_core::{TernaryMatrix, WeightScale};

use super::Source;
use crate::arch::{self, Architecture};
use crate::config::{ModelConfig, Precision};
use crate::error::Error;

/// The architecture that a description was made by.
pub(super) fn architecture(config: &ModelConfig) -> &'static Architecture {
    let mut all = arch::ALL.iter();
    all.find(|known| known.name == config.architecture).expect("descriptions come from one of them")
}

/// An error about a model that a format does not hold.
pub(super) fn refused(source: &Source<'_>, format: &str, what: impl std::fmt::Display) -> Error {
    Error::file(&source.description.path, format!("{format} cannot hold this model: {what}"))
}

/// Checks that `read`, which a format's reader makes of what is to be written, describes the model.
/// How weights are stored, and what they are called, may differ.
pub(super) fn check(source: &Source<'_>, read: &ModelConfig, format: &str) -> Result<(), Error> {
    let wanted = &source.config;
    macro_rules! same {
        ($($field:ident: $what:literal),* $(,)?) => {$(
            if read.$field != wanted.$field {
                return Err(refused(source, format, format!("{} would be lost", $what)));
            }
        )*};
    }
    same! {
        activation: "its activation",
        sub_norms: "the norms before its output and down projections",
        head_norms: "the norms of its heads",
        post_norms: "the norms of its results",
        projection_norm_eps: "the norms before its projections",
        attention_scale: "its attention scale",
        embedding_scale: "its embedding scale",
        ropes: "its rotation",
        layers: "what its layers see",
        architecture: "its architecture",
        hidden_size: "its hidden size",
        intermediate_size: "its feed-forward size",
        heads: "its number of heads",
        kv_heads: "its number of key/value heads",
        head_size: "its head size",
        context_length: "its context length",
        norm_eps: "its norm epsilon",
        pooling: "its pooling",
    }
    // A format that leaves it to the scales is looked at with them.
    if read.precision != wanted.precision && read.precision != Precision::ByScale {
        let what = match source.precision {
            ActivationPrecision::F32 => "its linear layers have f32 inputs, which would be int8",
            ActivationPrecision::Int8 => "its linear layers have int8 inputs, which would be f32",
        };
        return Err(refused(source, format, what));
    }
    Ok(())
}

/// The matrix with one scale for all of it, if its rows or groups have one in common.
pub(super) fn with_one_scale(matrix: TernaryMatrix) -> Result<TernaryMatrix, Error> {
    let per_scale = match matrix.scale() {
        WeightScale::Multiply(_) | WeightScale::Divide(_) => return Ok(matrix),
        WeightScale::Rows(_) => matrix.cols(),
        WeightScale::Groups { len, .. } => *len,
    };
    let values = matrix.scale().values();
    let mut nonzero = values.iter().filter(|&&value| value != 0.0);
    let first = nonzero.next().copied().unwrap_or(0.0);
    // The scale of nothing but zeros is 0, whatever the others are.
    let is_void = |index: usize| {
        let (row, first) = (index * per_scale / matrix.cols(), index * per_scale % matrix.cols());
        (first..first + per_scale).all(|col| matrix.code(row, col) == 1)
    };
    let zeros = values.iter().enumerate().filter(|(_, value)| **value == 0.0);
    if nonzero.any(|&value| value != first) || !zeros.into_iter().all(|(index, _)| is_void(index)) {
        return Ok(matrix);
    }
    Ok(matrix.with_scale(WeightScale::Multiply(first))?)
}
