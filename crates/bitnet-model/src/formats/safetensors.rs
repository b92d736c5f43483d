//! Safetensors: eight bytes of header length, a JSON header, then the tensors' bytes.
//!
//! The header is read here rather than by the `safetensors` crate because a message must name the
//! tensor that is cut off, a type we do not know must not make the rest unreadable, and a name that
//! appears twice must not pass.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use bitnet_core::mmap::map_file;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;
use serde::Deserialize;
use serde::de::{Deserializer, Error as _, MapAccess, SeqAccess, Visitor};

use super::{DOWNLOAD_AGAIN, MAX_RANK, MAX_TENSORS, Tensors, index, refuse_stand_in};
use crate::error::{Error, excerpt};

/// Longest header in bytes: the limit of the format's own implementation.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// Most entries of the header's free metadata.
const MAX_METADATA_ENTRIES: usize = 1 << 16;

/// Adds all tensors of a safetensors file. Their data stays in the mapped file.
pub fn read(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    from_bytes(map_file(path)?, path, into)
}

/// Adds all tensors of the shards that a `model.safetensors.index.json` names. The shards lie in
/// the index's own folder, and each must have the tensors that the index promises.
pub fn read_index(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    index::read(path, into, read)
}

/// Adds all tensors of a safetensors file that is in memory; `path` is for error messages.
pub fn from_bytes(bytes: Bytes, path: &Path, into: &mut Tensors) -> Result<(), Error> {
    with_metadata(bytes, path, into).map(drop)
}

/// As [`from_bytes`], with the free texts of the header.
pub(super) fn with_metadata(
    bytes: Bytes,
    path: &Path,
    into: &mut Tensors,
) -> Result<BTreeMap<String, String>, Error> {
    let (header, data_start) = read_header(&bytes, path)?;
    let data = bytes.slice(data_start..);
    let mut tensors = header.tensors;
    tensors.sort_by_key(|(_, entry)| entry.data_offsets);

    // The format allows neither holes nor overlaps: bytes that no tensor claims could hide
    // anything.
    let mut filled = 0;
    for (name, entry) in tensors {
        let error = |reason: String| Error::tensor(path, &name, reason);
        let (begin, end) = entry.data_offsets;
        if end < begin {
            return Err(error(format!("ends at byte {end} of the data, before its begin {begin}")));
        }
        if end > data.len() as u64 {
            return Err(error(format!(
                "truncated: it ends at byte {} but the file has {} bytes; {DOWNLOAD_AGAIN}",
                end.saturating_add(data_start as u64),
                bytes.len()
            )));
        }
        if begin != filled {
            let fault = if begin < filled { "overlaps" } else { "leaves a hole after" };
            return Err(error(format!("its data at byte {begin} {fault} the tensor before it")));
        }
        filled = end;
        let tensor = match element_type(&entry.dtype) {
            // Both offsets are at most `data.len()`, so they fit usize.
            Some(dtype) => {
                let data = data.slice(begin as usize..end as usize);
                Ok(Tensor::new(dtype, entry.shape.0, data).map_err(|e| error(e.to_string()))?)
            }
            None => Err(format!("its element type {} is not read", excerpt(&entry.dtype))),
        };
        into.insert(path, name, tensor)?;
    }
    if filled != data.len() as u64 {
        let surplus = data.len() as u64 - filled;
        return Err(Error::file(path, format!("{surplus} bytes follow the last tensor")));
    }
    Ok(header.metadata)
}

/// The free text entries (`__metadata__`) in the header of a safetensors file.
pub fn metadata(bytes: &[u8], path: &Path) -> Result<BTreeMap<String, String>, Error> {
    Ok(read_header(bytes, path)?.0.metadata)
}

/// The header, and the position of the first byte of data.
fn read_header<'a>(bytes: &'a [u8], path: &Path) -> Result<(Header<'a>, usize), Error> {
    refuse_stand_in(bytes, path)?;
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(Error::file(path, "is too short to be a safetensors file"));
    };
    let length = u64::from_le_bytes(*length);
    if length > MAX_HEADER_BYTES {
        let reason = format!(
            "is not a safetensors file: its header would have {length} bytes, more than {MAX_HEADER_BYTES}"
        );
        return Err(Error::file(path, reason));
    }
    let Some(text) = rest.get(..length as usize) else {
        let reason = format!(
            "truncated: its header ends at byte {} but the file has {} bytes; {DOWNLOAD_AGAIN}",
            length + 8,
            bytes.len()
        );
        return Err(Error::file(path, reason));
    };
    let header = serde_json::from_slice(text).map_err(|error| {
        let reason = excerpt(&error.to_string());
        Error::file(path, format!("is not a safetensors file: its header: {reason}"))
    })?;
    Ok((header, length as usize + 8))
}

/// The element type of that name, if we read it. Booleans are their bytes.
fn element_type(name: &str) -> Option<DType> {
    Some(match name {
        "F64" => DType::F64,
        "F32" => DType::F32,
        "F16" => DType::F16,
        "BF16" => DType::BF16,
        "U8" | "BOOL" => DType::U8,
        "I8" => DType::I8,
        "I32" => DType::I32,
        "I64" => DType::I64,
        _ => return None,
    })
}

/// The JSON header. Unlike a map it keeps a name that appears twice, for [`Tensors`] to refuse.
struct Header<'a> {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorEntry<'a>)>,
}

#[derive(Deserialize)]
struct TensorEntry<'a> {
    #[serde(borrow)]
    dtype: Cow<'a, str>,
    shape: Shape,
    /// First byte and the byte after the last, counted from the end of the header.
    data_offsets: (u64, u64),
}

/// Extents, at most [`MAX_RANK`].
struct Shape(Vec<usize>);

/// `__metadata__`: texts, at most [`MAX_METADATA_ENTRIES`].
struct Metadata(BTreeMap<String, String>);

impl<'de: 'a, 'a> Deserialize<'de> for Header<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Entries;

        impl<'de> Visitor<'de> for Entries {
            type Value = Header<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensor names to their type, shape and offsets")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
                let mut header = Header { metadata: BTreeMap::new(), tensors: Vec::new() };
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        header.metadata = map.next_value::<Metadata>()?.0;
                    } else if header.tensors.len() < MAX_TENSORS {
                        header.tensors.push((name, map.next_value()?));
                    } else {
                        return Err(A::Error::custom(format!("more than {MAX_TENSORS} tensors")));
                    }
                }
                Ok(header)
            }
        }

        deserializer.deserialize_map(Entries)
    }
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Extents;

        impl<'de> Visitor<'de> for Extents {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of extents")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Shape, A::Error> {
                let mut extents = Vec::new();
                while let Some(extent) = seq.next_element()? {
                    if extents.len() == MAX_RANK {
                        return Err(A::Error::custom(format!("more than {MAX_RANK} extents")));
                    }
                    extents.push(extent);
                }
                Ok(Shape(extents))
            }
        }

        deserializer.deserialize_seq(Extents)
    }
}

impl<'de> Deserialize<'de> for Metadata {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Texts;

        impl<'de> Visitor<'de> for Texts {
            type Value = Metadata;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from texts to texts")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Metadata, A::Error> {
                let mut texts = BTreeMap::new();
                while let Some((key, text)) = map.next_entry()? {
                    if texts.len() == MAX_METADATA_ENTRIES {
                        let reason = format!("more than {MAX_METADATA_ENTRIES} metadata entries");
                        return Err(A::Error::custom(reason));
                    }
                    texts.insert(key, text);
                }
                Ok(Metadata(texts))
            }
        }

        deserializer.deserialize_map(Texts)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, data: &[u8]) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.extend_from_slice(data);
        bytes
    }

    fn parse(bytes: Vec<u8>) -> Result<Tensors, String> {
        let mut tensors = Tensors::default();
        match from_bytes(bytes.into(), Path::new("m.safetensors"), &mut tensors) {
            Ok(()) => Ok(tensors),
            Err(error) => Err(error.to_string()),
        }
    }

    fn refusal(header: &str, data: &[u8]) -> String {
        parse(file(header, data)).expect_err("the file lies")
    }

    #[test]
    fn tensors_are_slices_of_the_file() {
        let header = r#"{"__metadata__":{"format":"pt"},
            "b":{"dtype":"F16","shape":[1,2],"data_offsets":[3,7]},
            "a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},
            "none":{"dtype":"F32","shape":[0,4],"data_offsets":[7,7]}}  "#;
        let bytes = Bytes::from(file(header, &[1, 2, 3, 4, 5, 6, 7]));
        let mut tensors = Tensors::default();
        from_bytes(bytes.clone(), Path::new("m"), &mut tensors).unwrap();
        let b = tensors.get("b").unwrap().unwrap();
        assert_eq!(
            (b.dtype(), b.shape(), &b.data()[..]),
            (DType::F16, &[1, 2][..], &[4, 5, 6, 7][..])
        );
        assert_eq!(b.data().as_ptr(), bytes[bytes.len() - 4..].as_ptr());
        assert_eq!(tensors.names().collect::<Vec<_>>(), ["a", "b", "none"]);
        assert_eq!(metadata(&bytes, Path::new("m")).unwrap()["format"], "pt");
    }

    #[test]
    fn a_cut_file_names_the_tensor_and_both_sizes() {
        let header = r#"{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#;
        let error = refusal(header, &[0; 5]);
        let expected = "m.safetensors: tensor `w`: truncated: it ends at byte 70 but the file has 67 bytes; download the file again";
        assert_eq!(error, expected);
    }

    #[test]
    fn a_header_that_is_cut_or_too_long_is_refused() {
        assert!(parse(vec![1; 7]).unwrap_err().contains("too short"));
        let mut cut = file("{}", b"");
        cut.pop();
        assert!(parse(cut).unwrap_err().contains("its header ends at byte 10 but the file has 9"));
        for length in [100_000_001, u64::MAX, i64::MAX as u64] {
            let error = parse([&length.to_le_bytes()[..], b"{}"].concat()).unwrap_err();
            assert!(error.contains("more than 100000000"), "{error}");
        }
    }

    #[test]
    fn a_header_that_is_not_the_json_of_tensors_is_refused() {
        for header in [
            "",
            "[]",
            "{",
            "\u{0}{}",
            "{}x",
            r#"{"w":1}"#,
            r#"{"w":{"dtype":"U8","shape":[1]}}"#,
            r#"{"w":{"dtype":"U8","shape":[-1],"data_offsets":[0,1]}}"#,
            r#"{"w":{"dtype":"U8","shape":[1.5],"data_offsets":[0,1]}}"#,
            r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1,2]}}"#,
            r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,99999999999999999999]}}"#,
            r#"{"__metadata__":{"a":1}}"#,
        ] {
            let error = refusal(header, &[0]);
            assert!(error.contains("its header: "), "{header}: {error}");
        }
        let deep = format!(r#"{{"w":{{"x":{}"#, "[".repeat(1_000_000));
        assert!(refusal(&deep, &[]).contains("its header: "));
        let extents = format!(r#"{{"w":{{"dtype":"U8","shape":[{}0]"#, "0,".repeat(1_000_000));
        assert!(refusal(&extents, &[]).contains("more than 8 extents"));
    }

    #[test]
    fn offsets_that_go_backwards_overlap_or_leave_holes_are_refused() {
        let one = |begin: u64, end: u64| {
            format!(r#""dtype":"U8","shape":[2],"data_offsets":[{begin},{end}]"#)
        };
        let backwards = format!("{{\"w\":{{{}}}}}", one(2, 0));
        assert!(refusal(&backwards, &[0; 2]).contains("before its begin"));
        for (second, fault) in [(one(1, 3), "overlaps"), (one(3, 5), "leaves a hole")] {
            let header = format!("{{\"a\":{{{}}},\"b\":{{{second}}}}}", one(0, 2));
            let error = refusal(&header, &[0; 5]);
            assert!(error.contains("tensor `b`") && error.contains(fault), "{error}");
        }
        let first = format!("{{\"a\":{{{}}}}}", one(1, 3));
        assert!(refusal(&first, &[0; 3]).contains("leaves a hole"));
        let surplus = format!("{{\"a\":{{{}}}}}", one(0, 2));
        assert!(refusal(&surplus, &[0; 3]).contains("1 bytes follow the last tensor"));
    }

    #[test]
    fn a_shape_that_does_not_fill_its_bytes_is_refused() {
        for shape in ["[3]", "[]", "[1,1]", "[4294967296,4294967296,4]", "[0]"] {
            let header =
                format!(r#"{{"w":{{"dtype":"F32","shape":{shape},"data_offsets":[0,8]}}}}"#);
            let error = refusal(&header, &[0; 8]);
            assert!(error.contains("tensor `w`"), "{error}");
        }
    }

    #[test]
    fn a_name_twice_is_refused() {
        let header = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
            "w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}}"#;
        assert!(refusal(header, &[0; 2]).contains("tensor `w`: appears twice"));
    }

    #[test]
    fn a_type_we_do_not_read_spoils_only_its_own_tensor() {
        let header = r#"{"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},
            "v":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[1,2]}}"#;
        let tensors = parse(file(header, &[0; 2])).unwrap();
        assert!(tensors.get("w").unwrap().is_some());
        let error = tensors.get("v").unwrap_err().to_string();
        assert!(error.contains("element type F8_E4M3 is not read"), "{error}");
    }

    #[test]
    fn sizes_whose_sum_passes_the_address_space_are_refused() {
        let half = u64::MAX / 2;
        let header = format!(
            r#"{{"a":{{"dtype":"U8","shape":[{half}],"data_offsets":[0,{half}]}},
                "b":{{"dtype":"U8","shape":[{half}],"data_offsets":[{half},{}]}}}}"#,
            u64::MAX
        );
        assert!(refusal(&header, &[]).contains("truncated"));
    }
}
