//! The index of a sharded checkpoint (`*.index.json`): which file holds which tensor.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Component, Path};

use bitnet_core::mmap::map_file;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, Visitor};

use super::{DOWNLOAD_AGAIN, MAX_TENSORS, ReadFile, Tensors, refuse_stand_in};
use crate::error::{Error, excerpt};

/// The shards of a checkpoint and the tensors that each must have.
#[derive(Debug)]
pub struct ShardIndex {
    shards: BTreeMap<String, Vec<String>>,
}

impl ShardIndex {
    /// Reads the JSON text of an index; `path` is for error messages. Every shard is a plain file
    /// name: an index cannot name a file outside its own folder.
    pub fn from_bytes(bytes: &[u8], path: &Path) -> Result<Self, Error> {
        #[derive(Deserialize)]
        struct Json {
            weight_map: WeightMap,
        }

        refuse_stand_in(bytes, path)?;
        let json: Json = serde_json::from_slice(bytes).map_err(|error| {
            Error::file(path, format!("is not an index: {}", excerpt(&error.to_string())))
        })?;
        let shards = json.weight_map.0;
        if let Some(name) = shards.keys().find(|name| !is_plain_file_name(name)) {
            let reason =
                format!("names the shard `{}`, which is not a plain file name", excerpt(name));
            return Err(Error::file(path, reason));
        }
        Ok(ShardIndex { shards })
    }

    /// The shards' file names with the names of their tensors.
    pub fn shards(&self) -> impl Iterator<Item = (&str, &[String])> {
        self.shards.iter().map(|(shard, tensors)| (shard.as_str(), tensors.as_slice()))
    }
}

/// Reads the index at `path` and then, with `read_shard`, every shard it names.
pub(super) fn read(path: &Path, into: &mut Tensors, read_shard: ReadFile) -> Result<(), Error> {
    let index = ShardIndex::from_bytes(&map_file(path)?, path)?;
    let folder = path.parent().unwrap_or(Path::new(""));
    let missing: Vec<_> =
        index.shards().map(|(shard, _)| shard).filter(|s| !folder.join(s).is_file()).collect();
    if let Some(first) = missing.first() {
        let reason = format!(
            "{} of {} shards are not in its folder, the first is `{}`; download them",
            missing.len(),
            index.shards.len(),
            excerpt(first)
        );
        return Err(Error::file(path, reason));
    }
    for (shard, tensors) in index.shards() {
        let shard = folder.join(shard);
        read_shard(&shard, into)?;
        if let Some(name) = tensors.iter().find(|name| into.path_of(name) != Some(&shard)) {
            let reason =
                format!("is not there although {} says so; {DOWNLOAD_AGAIN}", path.display());
            return Err(Error::tensor(&shard, name, reason));
        }
    }
    Ok(())
}

/// Whether joining `name` to a folder gives a file in just this folder, on every system.
pub(super) fn is_plain_file_name(name: &str) -> bool {
    let mut components = Path::new(name).components();
    matches!((components.next(), components.next()), (Some(Component::Normal(_)), None))
        && !name.contains(['/', '\\', ':', '\0'])
}

/// `weight_map`, turned around: the tensors of each shard.
struct WeightMap(BTreeMap<String, Vec<String>>);

impl<'de> Deserialize<'de> for WeightMap {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = WeightMap;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to file names")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<WeightMap, A::Error> {
                let mut shards: BTreeMap<String, Vec<String>> = BTreeMap::new();
                let mut count = 0;
                while let Some((tensor, shard)) = map.next_entry()? {
                    shards.entry(shard).or_default().push(tensor);
                    count += 1;
                    if count > MAX_TENSORS {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                }
                Ok(WeightMap(shards))
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<ShardIndex, String> {
        ShardIndex::from_bytes(json.as_bytes(), Path::new("i.json")).map_err(|e| e.to_string())
    }

    #[test]
    fn an_index_gives_the_tensors_of_each_shard() {
        let json =
            r#"{"metadata":{"total_size":1},"weight_map":{"a":"1.bin","c":"2.bin","b":"1.bin"}}"#;
        let index = parse(json).unwrap();
        let shards: Vec<_> = index.shards().collect();
        assert_eq!(shards[0], ("1.bin", &["a".to_owned(), "b".to_owned()][..]));
        assert_eq!(shards[1], ("2.bin", &["c".to_owned()][..]));
    }

    #[test]
    fn a_shard_outside_the_folder_is_refused() {
        for name in ["../m", "/m", "a/b", "..", ".", "", "a\\\\b", "C:m", "m\\u0000"] {
            let error = parse(&format!(r#"{{"weight_map":{{"w":"{name}"}}}}"#)).unwrap_err();
            assert!(error.contains("not a plain file name"), "{name}: {error}");
        }
    }

    #[test]
    fn text_that_is_no_index_is_refused() {
        for json in ["{}", "[]", "nul", r#"{"weight_map":[1]}"#, r#"{"weight_map":{"a":1}}"#] {
            assert!(parse(json).unwrap_err().contains("is not an index"), "{json}");
        }
        let deep = "[".repeat(100_000);
        assert!(parse(&format!(r#"{{"metadata":{deep}"#)).is_err());
    }
}
