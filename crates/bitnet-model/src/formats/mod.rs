//! File formats. Every reader turns a file into [`Tensors`] by name; what the names mean is the
//! business of the architectures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use bitnet_core::Tensor;

use crate::error::Error;

/// The tensors of a checkpoint, by the names its files give them.
#[derive(Debug, Default)]
pub struct Tensors {
    entries: BTreeMap<String, Entry>,
}

#[derive(Debug)]
struct Entry {
    /// The file that holds the tensor, for error messages.
    path: PathBuf,
    /// The tensor, or why it cannot be used: an element type we do not read is an error only when
    /// the tensor is asked for.
    tensor: Result<Tensor, String>,
}

impl Tensors {
    /// Adds a tensor, or the reason why this one cannot be used. A name twice is an error.
    pub fn insert(
        &mut self,
        path: &Path,
        name: String,
        tensor: Result<Tensor, String>,
    ) -> Result<(), Error> {
        let entry = Entry { path: path.to_owned(), tensor };
        match self.entries.insert(name.clone(), entry) {
            None => Ok(()),
            Some(_) => Err(Error::tensor(path, &name, "appears twice")),
        }
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether a tensor of this name exists (usable or not).
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The tensor of that name; `None` if there is none, an error if it cannot be used.
    pub fn get(&self, name: &str) -> Result<Option<&Tensor>, Error> {
        match self.entries.get(name) {
            None => Ok(None),
            Some(Entry { tensor: Ok(tensor), .. }) => Ok(Some(tensor)),
            Some(Entry { tensor: Err(reason), path }) => Err(Error::tensor(path, name, reason)),
        }
    }

    /// The file that holds a tensor, for error messages.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).map(|entry| entry.path.as_path())
    }
}
