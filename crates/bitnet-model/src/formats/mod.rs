//! File formats. Every reader turns a file into [`Tensors`] by name; what the names mean is the
//! business of the architectures.
//!
//! Files are taken as hostile: a size is compared with the bytes that are there before it is used,
//! and what a reader allocates is bounded by the file's length. Tensor data is never copied: it
//! stays in the mapped file.

mod cursor;
pub mod gguf;
pub mod index;
pub mod native;
pub mod pickle;
pub mod safetensors;
mod zip;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::{Path, PathBuf};

use bitnet_core::Tensor;
use bitnet_core::mmap::map_file;

use crate::error::Error;

/// Most tensors in one checkpoint. The largest published mixtures of experts have about 140
/// thousand; with this limit a table of empty tensors cannot take much more memory than its file.
const MAX_TENSORS: usize = 1 << 18;

/// Longest tensor name in bytes (ggml itself stops at 63).
const MAX_NAME_BYTES: usize = 1024;

/// Most extents of a tensor; ggml has 4.
const MAX_RANK: usize = 8;

/// What to do about a file that ends too early.
const DOWNLOAD_AGAIN: &str = "download the file again";

/// The tensors of a checkpoint, by the names its files give them.
#[derive(Debug, Default)]
pub struct Tensors {
    entries: BTreeMap<String, Entry>,
    /// The files read so far. Entries refer to them by position: there are few files and many
    /// tensors.
    files: Vec<PathBuf>,
}

#[derive(Debug)]
struct Entry {
    /// The file that holds the tensor, for error messages.
    file: usize,
    /// The tensor, or why it cannot be used: an element type we do not read is an error only when
    /// the tensor is asked for.
    tensor: Result<Tensor, String>,
}

impl Tensors {
    /// Adds a tensor of the file `path`, or the reason why this one cannot be used. A name twice
    /// is an error, and so is a name that no checkpoint has any use for: empty, or longer than
    /// 1024 bytes.
    pub fn insert(
        &mut self,
        path: &Path,
        name: String,
        tensor: Result<Tensor, String>,
    ) -> Result<(), Error> {
        if name.is_empty() || name.len() > MAX_NAME_BYTES {
            let reason = format!("a name of {} bytes; 1 to {MAX_NAME_BYTES} are read", name.len());
            return Err(Error::tensor(path, &name, reason));
        }
        if self.entries.len() == MAX_TENSORS {
            return Err(Error::file(path, format!("more than {MAX_TENSORS} tensors")));
        }
        if self.entries.contains_key(&name) {
            return Err(Error::tensor(path, &name, "appears twice"));
        }
        let file = self.file(path);
        self.entries.insert(name, Entry { file, tensor });
        Ok(())
    }

    fn file(&mut self, path: &Path) -> usize {
        // Readers add all tensors of a file in a row, so the last file is nearly always the one.
        self.files.iter().rposition(|file| file == path).unwrap_or_else(|| {
            self.files.push(path.to_owned());
            self.files.len() - 1
        })
    }

    /// How many tensors have names that begin with `prefix`, and the bytes of those that can be
    /// used.
    pub fn size(&self, prefix: &str) -> (usize, u64) {
        let entries = self.entries.range::<str, _>((Bound::Included(prefix), Bound::Unbounded));
        let entries = entries.take_while(|(name, _)| name.starts_with(prefix));
        entries.fold((0, 0), |(count, bytes), (_, entry)| {
            let more = entry.tensor.as_ref().map_or(0, |tensor| tensor.data().len() as u64);
            (count + 1, bytes + more)
        })
    }

    /// All names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The files that were read.
    pub fn files(&self) -> impl Iterator<Item = &Path> {
        self.files.iter().map(PathBuf::as_path)
    }

    /// Number of tensors, usable or not.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are no tensors.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
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
            Some(Entry { tensor: Err(reason), file }) => {
                Err(Error::tensor(&self.files[*file], name, reason))
            }
        }
    }

    /// The file that holds a tensor, for error messages.
    pub fn path_of(&self, name: &str) -> Option<&Path> {
        self.entries.get(name).map(|entry| self.files[entry.file].as_path())
    }
}

/// Reads one file into the tensors.
type ReadFile = fn(&Path, &mut Tensors) -> Result<(), Error>;

/// The names a Hugging Face checkpoint can have, best first, and who reads them.
const CHECKPOINT_FILES: [(&str, ReadFile); 4] = [
    ("model.safetensors", safetensors::read),
    ("model.safetensors.index.json", safetensors::read_index),
    ("pytorch_model.bin", pickle::read),
    ("pytorch_model.bin.index.json", pickle::read_index),
];

/// The names of the files that [`read_checkpoint`] looks for, best first.
#[cfg(feature = "hub")]
pub(crate) fn checkpoint_files() -> impl Iterator<Item = &'static str> {
    CHECKPOINT_FILES.iter().map(|(name, _)| *name)
}

/// Reads the tensors of a Hugging Face checkpoint: a directory, or one of its files.
///
/// In a directory `model.safetensors` comes first, then its index of shards, then
/// `pytorch_model.bin` and its index. A single file is told by its name (`*.index.json`) or by its
/// first bytes. GGUF has its own entry, [`gguf::read`], because it brings metadata.
///
/// # Errors
/// None of these files is there, or the one that is cannot be read.
pub fn read_checkpoint(path: &Path) -> Result<Tensors, Error> {
    let mut tensors = Tensors::default();
    if path.is_dir() {
        let found = CHECKPOINT_FILES.iter().find(|(name, _)| path.join(name).exists());
        let Some((name, read)) = found else {
            let names: Vec<_> = CHECKPOINT_FILES.iter().map(|(name, _)| *name).collect();
            return Err(Error::file(path, format!("has no weights: none of {}", names.join(", "))));
        };
        read(&path.join(name), &mut tensors)?;
        return Ok(tensors);
    }
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    if name.ends_with(".safetensors.index.json") {
        safetensors::read_index(path, &mut tensors)?;
    } else if name.ends_with(".bin.index.json") {
        pickle::read_index(path, &mut tensors)?;
    } else {
        let bytes = map_file(path)?;
        if bytes.starts_with(gguf::MAGIC) {
            return Err(Error::file(path, "is a GGUF file, not a Hugging Face checkpoint"));
        } else if pickle::is_torch(&bytes) {
            pickle::from_bytes(bytes, path, &mut tensors)?;
        } else {
            safetensors::from_bytes(bytes, path, &mut tensors)?;
        }
    }
    Ok(tensors)
}

/// Refuses what often lies where a model file should be: nothing, a Git LFS pointer, a web page.
fn refuse_stand_in(bytes: &[u8], path: &Path) -> Result<(), Error> {
    if bytes.is_empty() {
        Err(Error::file(path, format!("is empty; {DOWNLOAD_AGAIN}")))
    } else if bytes.starts_with(b"version https://git-lfs") {
        let reason = "is a Git LFS pointer, not the file itself; run `git lfs pull` in its folder";
        Err(Error::file(path, reason))
    } else if bytes.starts_with(b"<!DOCTYPE") || bytes.starts_with(b"<html") {
        let reason = format!("is a web page, not a model; {DOWNLOAD_AGAIN}");
        Err(Error::file(path, reason))
    } else {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bitnet_core::DType;

    fn one() -> Result<Tensor, String> {
        Ok(Tensor::from_f32(vec![1], &[1.0]))
    }

    #[test]
    fn a_name_twice_an_empty_one_and_an_endless_one_are_refused() {
        let (a, b) = (Path::new("a"), Path::new("b"));
        let mut tensors = Tensors::default();
        tensors.insert(a, "w".into(), one()).unwrap();
        let twice = tensors.insert(b, "w".into(), one()).unwrap_err();
        assert_eq!(twice.to_string(), "b: tensor `w`: appears twice");
        assert!(tensors.insert(a, String::new(), one()).is_err());
        let endless = tensors.insert(a, "x".repeat(1025), one()).unwrap_err().to_string();
        assert!(endless.contains("1025 bytes") && endless.len() < 250, "{endless}");
        assert_eq!(tensors.path_of("w"), Some(a));
        assert_eq!(tensors.len(), 1);
    }

    #[test]
    fn sizes_are_those_of_all_names_with_a_prefix() {
        let mut tensors = Tensors::default();
        for (name, len) in [("a.1", 1), ("a.1.x", 2), ("a.10", 4), ("b", 8)] {
            let tensor = Tensor::from_f32(vec![len], &vec![0.0; len]);
            tensors.insert(Path::new("f"), name.into(), Ok(tensor)).unwrap();
        }
        tensors.insert(Path::new("f"), "a.1.y".into(), Err("has type X".into())).unwrap();
        assert_eq!(tensors.size(""), (5, 4 * 15));
        assert_eq!(tensors.size("a.1"), (4, 4 * 7));
        assert_eq!(tensors.size("a.1."), (2, 4 * 2));
        assert_eq!(tensors.size("c"), (0, 0));
    }

    #[test]
    fn an_unusable_tensor_is_an_error_only_when_it_is_asked_for() {
        let mut tensors = Tensors::default();
        tensors.insert(Path::new("f"), "w".into(), Err("has type X".into())).unwrap();
        assert!(tensors.contains("w"));
        assert_eq!(tensors.get("w").unwrap_err().to_string(), "f: tensor `w`: has type X");
        assert!(tensors.get("v").unwrap().is_none());
    }

    #[test]
    fn what_lies_where_a_model_should_be_is_called_by_its_name() {
        let path = Path::new("model.safetensors");
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n";
        for (bytes, word) in
            [(&b""[..], "empty"), (pointer, "git lfs pull"), (b"<!DOCTYPE html>", "web page")]
        {
            let error = refuse_stand_in(bytes, path).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        refuse_stand_in(b"GGUF", path).unwrap();
    }

    #[test]
    fn a_folder_without_weights_is_told_what_was_looked_for() {
        let folder = tempfile::tempdir().unwrap();
        let error = read_checkpoint(folder.path()).unwrap_err().to_string();
        assert!(error.contains("none of model.safetensors, model.safetensors.index.json"));
        let gguf = folder.path().join("x.gguf");
        std::fs::write(&gguf, b"GGUF").unwrap();
        assert!(read_checkpoint(&gguf).unwrap_err().to_string().contains("is a GGUF file"));
        assert!(read_checkpoint(&folder.path().join("absent")).is_err());
    }

    #[test]
    fn a_checkpoint_file_is_told_by_its_first_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("weights");
        let header = br#"{"w":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}}"#;
        let mut file = (header.len() as u64).to_le_bytes().to_vec();
        file.extend_from_slice(header);
        file.extend_from_slice(&[7, 8]);
        std::fs::write(&path, file).unwrap();
        let tensors = read_checkpoint(&path).unwrap();
        let tensor = tensors.get("w").unwrap().unwrap();
        assert_eq!((tensor.dtype(), &tensor.data()[..]), (DType::U8, &[7u8, 8][..]));
    }
}
