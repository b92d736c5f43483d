//! Weights as safetensors files of bounded size, whose headers are written last.

use std::io::{Seek, SeekFrom, Write};

use bitnet_core::DType;
use serde_json::{Map, Value, json};

use crate::error::Error;
use crate::output::{FolderFile, OutputFolder};

/// Bytes of a file's tensors, unless one alone has more: as transformers cuts checkpoints.
const SHARD_BYTES: u64 = 5_000_000_000;

/// What a checkpoint's files of weights are called; `of` is how many there are.
fn name(index: usize, of: usize) -> String {
    match of {
        1 => "model.safetensors".to_owned(),
        _ => format!("model-{index:05}-of-{of:05}.safetensors"),
    }
}

/// What a file is called while the number of files is not known.
fn unnamed(index: usize) -> String {
    format!("model-{index:05}.safetensors")
}

/// Files that are being written.
pub(super) struct Shards<'a> {
    folder: &'a OutputFolder,
    /// Room for the header of a file with all tensors.
    header_bytes: usize,
    shard_bytes: u64,
    /// The last file, if it was begun.
    open: Option<Shard>,
    /// Names of the tensors of each file that was finished or begun.
    names: Vec<Vec<String>>,
    total_bytes: u64,
}

struct Shard {
    file: FolderFile,
    entries: Map<String, Value>,
    position: u64,
}

impl<'a> Shards<'a> {
    /// `names_bytes` are in the names of all `count` tensors together.
    pub(super) fn new(folder: &'a OutputFolder, count: usize, names_bytes: usize) -> Self {
        // Beside its name, an entry has a type, two extents and two offsets.
        let header_bytes = (64 + names_bytes + 160 * count).next_multiple_of(8);
        Shards {
            folder,
            header_bytes,
            shard_bytes: SHARD_BYTES,
            open: None,
            names: Vec::new(),
            total_bytes: 0,
        }
    }

    /// Begins a tensor, whose bytes come with [`write`](Self::write).
    pub(super) fn begin(&mut self, name: &str, dtype: DType, shape: &[usize]) -> Result<(), Error> {
        let bytes = dtype.byte_len(shape).map_err(|reason| self.failed(reason))? as u64;
        if self.open.as_ref().is_some_and(|shard| shard.position + bytes > self.shard_bytes) {
            self.close()?;
        }
        if self.open.is_none() {
            let mut file = self.folder.file(&unnamed(self.names.len() + 1))?;
            let begun = file.file.seek(SeekFrom::Start(8 + self.header_bytes as u64));
            begun.map_err(|error| file.failed(error))?;
            self.open = Some(Shard { file, entries: Map::new(), position: 0 });
            self.names.push(Vec::new());
        }
        let shard = self.open.as_mut().expect("opened above");
        let offsets = [shard.position, shard.position + bytes];
        let entry = json!({"dtype": dtype.to_string(), "shape": shape, "data_offsets": offsets});
        shard.entries.insert(name.to_owned(), entry);
        shard.position += bytes;
        self.total_bytes += bytes;
        self.names.last_mut().expect("pushed above").push(name.to_owned());
        Ok(())
    }

    /// Appends bytes to the tensor that was begun last.
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<(), Error> {
        self.open.as_mut().expect("a tensor was begun").file.write(bytes)
    }

    fn failed(&self, reason: String) -> Error {
        crate::output::failed(self.folder.path(), reason)
    }

    /// Writes the header of the last file.
    fn close(&mut self) -> Result<(), Error> {
        let Some(Shard { mut file, mut entries, .. }) = self.open.take() else { return Ok(()) };
        entries.insert("__metadata__".to_owned(), json!({"format": "pt"}));
        let mut header = Value::from(entries).to_string().into_bytes();
        assert!(header.len() <= self.header_bytes, "room was left for all tensors");
        header.resize(self.header_bytes, b' ');
        let write = |file: &mut std::fs::File| {
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&(header.len() as u64).to_le_bytes())?;
            file.write_all(&header)
        };
        write(&mut file.file).map_err(|error| file.failed(error))?;
        file.finish()
    }

    /// Finishes the last file, gives all their names and, if there are several, writes the index.
    pub(super) fn finish(mut self) -> Result<(), Error> {
        self.close()?;
        let count = self.names.len();
        let mut weight_map = Map::new();
        for (index, tensors) in self.names.iter().enumerate() {
            let file = name(index + 1, count);
            self.folder.rename(&unnamed(index + 1), &file)?;
            weight_map.extend(tensors.iter().map(|tensor| (tensor.clone(), file.clone().into())));
        }
        if count > 1 {
            let metadata = json!({"total_size": self.total_bytes});
            let index = json!({"metadata": metadata, "weight_map": weight_map});
            self.folder.write_json("model.safetensors.index.json", &index)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::formats;

    #[test]
    fn tensors_that_fill_a_file_go_on_in_the_next() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("model");
        let folder = OutputFolder::create(&path).unwrap();
        let mut shards = Shards { shard_bytes: 20, ..Shards::new(&folder, 4, 4) };
        for (index, len) in [3usize, 2, 8, 1].into_iter().enumerate() {
            shards.begin(&format!("t{index}"), DType::F32, &[len]).unwrap();
            shards.write(&vec![index as u8; 4 * len]).unwrap();
        }
        shards.finish().unwrap();
        folder.finish().unwrap();
        let tensors = formats::read_checkpoint(&path).unwrap();
        for (index, len) in [3usize, 2, 8, 1].into_iter().enumerate() {
            let tensor = tensors.get(&format!("t{index}")).unwrap().unwrap();
            assert_eq!(tensor.data()[..], vec![index as u8; 4 * len]);
        }
        // 12 + 8 bytes, 32 alone, 4.
        let files = std::fs::read_dir(&path).unwrap().count();
        assert_eq!(files, 4, "three files and their index");
    }
}
