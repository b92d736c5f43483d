//! Errors of reading a model. Each message is one sentence: file, tensor or field, reason.

use std::path::{Path, PathBuf};

/// Why a model could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file as a whole is not what it should be.
    #[error("{}: {reason}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// What is wrong, and what to do where that is known.
        reason: String,
    },
    /// One tensor is missing, broken, or contradicts the configuration.
    #[error("{}: tensor `{tensor}`: {reason}", path.display())]
    Tensor {
        /// The file.
        path: PathBuf,
        /// The tensor's name in the file, cut and escaped where printing it would do harm.
        tensor: String,
        /// What is wrong.
        reason: String,
    },
    /// More devices than layers, or none.
    #[error(
        "{}: its {layers} layers cannot be spread over {devices} devices: give 1 to {layers}",
        path.display()
    )]
    Devices {
        /// The model.
        path: PathBuf,
        /// Layers of its decoder.
        layers: usize,
        /// Devices they were to be spread over.
        devices: usize,
    },
    /// Whoever asked for the model does not want it any more.
    #[error("{}: loading was cancelled", path.display())]
    Cancelled {
        /// The model.
        path: PathBuf,
    },
    /// A model of the hub that cannot be had.
    #[cfg(feature = "hub")]
    #[error(transparent)]
    Hub(#[from] crate::hub::HubError),
    /// A failure below: mapping, memory, tensor sizes.
    #[error(transparent)]
    Core(#[from] bitnet_core::Error),
}

impl Error {
    /// An error about a whole file.
    pub fn file(path: &Path, reason: impl ToString) -> Self {
        Error::File { path: path.to_owned(), reason: printable(&reason.to_string()) }
    }

    /// An error about one tensor.
    pub fn tensor(path: &Path, tensor: &str, reason: impl ToString) -> Self {
        Error::Tensor {
            path: path.to_owned(),
            tensor: excerpt(tensor),
            reason: printable(&reason.to_string()),
        }
    }
}

/// A reason, which may quote a file, without control characters and not longer than a screen.
fn printable(reason: &str) -> String {
    const CHARS: usize = 1000;
    let escaped = |c: char| -> String {
        if c.is_control() { c.escape_debug().to_string() } else { c.to_string() }
    };
    let mut text: String = reason.chars().take(CHARS).map(escaped).collect();
    if reason.chars().nth(CHARS).is_some() {
        text.push_str("...");
    }
    text
}

/// The beginning of a text from a file, safe to print: a message should neither fill the screen
/// nor send it control characters.
pub(crate) fn excerpt(text: &str) -> String {
    const CHARS: usize = 120;
    match text.char_indices().nth(CHARS) {
        None => text.escape_debug().to_string(),
        Some((end, _)) => format!("{}...", text[..end].escape_debug()),
    }
}

#[cfg(test)]
mod tests {
    use super::{excerpt, printable};

    #[test]
    fn texts_from_files_are_cut_and_escaped_in_messages() {
        assert_eq!(excerpt("a\u{1b}[2J"), "a\\u{1b}[2J");
        assert_eq!(printable("says \u{1b}[2J `é`"), "says \\u{1b}[2J `é`");
        assert_eq!(printable(&"é".repeat(2000)).chars().count(), 1003);
        assert_eq!(excerpt(&"é".repeat(500)).chars().count(), 123);
    }
}
