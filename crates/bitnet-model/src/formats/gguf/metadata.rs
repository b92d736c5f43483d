//! Metadata of a GGUF file: values of types that the file names.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;

use crate::error::{Error, excerpt};
use crate::formats::cursor::Cursor;

/// Metadata of a GGUF file. Texts and arrays are slices of the file, checked to lie in it.
#[derive(Debug)]
pub struct Metadata {
    pub(super) path: PathBuf,
    pub(super) entries: BTreeMap<String, Value>,
}

impl Metadata {
    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// The value as it is stored.
    pub fn value(&self, key: &str) -> Option<&Value> {
        self.entries.get(key)
    }

    /// The value of `key` as a `T`, or `None` if the file does not have the key.
    ///
    /// # Errors
    /// The value is there and is not a `T`.
    pub fn get<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<Option<T>, Error> {
        let Some(value) = self.entries.get(key) else { return Ok(None) };
        match T::from_value(value) {
            Some(value) => Ok(Some(value)),
            None => {
                let reason = format!(
                    "metadata `{}` is {}, not {}",
                    excerpt(key),
                    value.description(),
                    T::DESCRIPTION
                );
                Err(Error::file(&self.path, reason))
            }
        }
    }

    /// The value of `key` as a `T`.
    ///
    /// # Errors
    /// The file does not have the key, or its value is not a `T`.
    pub fn require<'a, T: FromValue<'a>>(&'a self, key: &str) -> Result<T, Error> {
        self.get(key)?.ok_or_else(|| {
            Error::file(&self.path, format!("metadata `{}` is missing", excerpt(key)))
        })
    }
}

/// A metadata value.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// An unsigned integer of any width.
    Unsigned(u64),
    /// A signed integer of any width.
    Signed(i64),
    /// A 32-bit float.
    F32(f32),
    /// A 64-bit float.
    F64(f64),
    /// A truth value.
    Bool(bool),
    /// A text, which should be UTF-8.
    String(Bytes),
    /// A list of values of one type.
    Array(Array),
}

impl Value {
    fn description(&self) -> String {
        match self {
            Value::Unsigned(value) => format!("the number {value}"),
            Value::Signed(value) => format!("the number {value}"),
            Value::F32(value) => format!("the number {value}"),
            Value::F64(value) => format!("the number {value}"),
            Value::Bool(value) => value.to_string(),
            Value::String(text) => match std::str::from_utf8(text) {
                Ok(text) => format!("the text \"{}\"", excerpt(text)),
                Err(_) => "a text that is not UTF-8".to_owned(),
            },
            Value::Array(array) => {
                format!("a list of {} values of type {:?}", array.len, array.element)
            }
        }
    }
}

/// A metadata array: the elements as they are encoded.
#[derive(Debug, Clone, PartialEq)]
pub struct Array {
    pub(super) element: ElementType,
    pub(super) len: usize,
    pub(super) data: Bytes,
}

impl Array {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are no elements.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements, if they are texts.
    fn texts(&self) -> Option<impl Iterator<Item = &[u8]>> {
        let mut cursor = Cursor::new(&self.data, 0);
        let next = move || {
            let length = cursor.u64()?;
            cursor.take(length)
        };
        (self.element == ElementType::String).then(|| std::iter::from_fn(next))
    }

    /// The elements, if they are numbers or truth values.
    fn scalars(&self) -> Option<impl Iterator<Item = Value>> {
        let width = self.element.width()?;
        Some(self.data.chunks_exact(width).map(|bytes| self.element.scalar(bytes)))
    }
}

/// Types of metadata values, by GGUF's numbers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ElementType {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    F32,
    Bool,
    String,
    Array,
    U64,
    I64,
    F64,
}

impl ElementType {
    pub(super) fn from_id(id: u32) -> Option<Self> {
        use ElementType::*;
        [U8, I8, U16, I16, U32, I32, F32, Bool, String, Array, U64, I64, F64]
            .get(usize::try_from(id).ok()?)
            .copied()
    }

    /// Bytes of one value; `None` for those that bring their own length.
    pub(super) fn width(self) -> Option<usize> {
        use ElementType::*;
        match self {
            U8 | I8 | Bool => Some(1),
            U16 | I16 => Some(2),
            U32 | I32 | F32 => Some(4),
            U64 | I64 | F64 => Some(8),
            String | Array => None,
        }
    }

    /// Decodes a number or truth value of exactly [`width`](Self::width) bytes.
    pub(super) fn scalar(self, bytes: &[u8]) -> Value {
        let mut raw = [0; 8];
        raw[..bytes.len()].copy_from_slice(bytes);
        let bits = u64::from_le_bytes(raw);
        match self {
            ElementType::I8 => Value::Signed(bits as i8 as i64),
            ElementType::I16 => Value::Signed(bits as i16 as i64),
            ElementType::I32 => Value::Signed(bits as i32 as i64),
            ElementType::I64 => Value::Signed(bits as i64),
            ElementType::F32 => Value::F32(f32::from_bits(bits as u32)),
            ElementType::F64 => Value::F64(f64::from_bits(bits)),
            ElementType::Bool => Value::Bool(bits != 0),
            _ => Value::Unsigned(bits),
        }
    }
}

/// What a metadata value can be read as. Integers convert where their value fits, floats to f32 or
/// f64, texts where they are UTF-8.
pub trait FromValue<'a>: Sized {
    /// The kind of value in words, for messages.
    const DESCRIPTION: &'static str;

    /// The value, if it is of this kind.
    fn from_value(value: &'a Value) -> Option<Self>;
}

fn integer<T: TryFrom<u64> + TryFrom<i64>>(value: &Value) -> Option<T> {
    match *value {
        Value::Unsigned(value) => value.try_into().ok(),
        Value::Signed(value) => value.try_into().ok(),
        _ => None,
    }
}

fn float(value: &Value) -> Option<f64> {
    match *value {
        Value::F32(value) => Some(value.into()),
        Value::F64(value) => Some(value),
        _ => None,
    }
}

/// Reads numbers of a type by a function.
macro_rules! numbers {
    ($($type:ty, $description:literal, $read:expr;)*) => {
        $(impl FromValue<'_> for $type {
            const DESCRIPTION: &'static str = $description;

            fn from_value(value: &Value) -> Option<Self> {
                $read(value)
            }
        })*
    };
}

numbers! {
    u64, "an unsigned integer", integer;
    u32, "an unsigned integer of 32 bits", integer;
    usize, "an unsigned integer", integer;
    i64, "an integer", integer;
    f64, "a float", float;
    f32, "a float", |value| float(value).map(|value| value as f32);
}

impl FromValue<'_> for bool {
    const DESCRIPTION: &'static str = "a truth value";

    fn from_value(value: &Value) -> Option<Self> {
        match value {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for &'a str {
    const DESCRIPTION: &'static str = "a text";

    fn from_value(value: &'a Value) -> Option<Self> {
        match value {
            Value::String(text) => std::str::from_utf8(text).ok(),
            _ => None,
        }
    }
}

impl<'a> FromValue<'a> for Vec<&'a str> {
    const DESCRIPTION: &'static str = "a list of UTF-8 texts";

    fn from_value(value: &'a Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.texts()?.map(|text| std::str::from_utf8(text).ok()).collect()
    }
}

impl FromValue<'_> for Vec<i64> {
    const DESCRIPTION: &'static str = "a list of integers";

    fn from_value(value: &Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.scalars()?.map(|value| integer(&value)).collect()
    }
}

impl FromValue<'_> for Vec<f32> {
    const DESCRIPTION: &'static str = "a list of floats";

    fn from_value(value: &Value) -> Option<Self> {
        let Value::Array(array) = value else { return None };
        array.scalars()?.map(|value| float(&value).map(|value| value as f32)).collect()
    }
}
