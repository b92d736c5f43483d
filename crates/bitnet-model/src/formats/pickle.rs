//! `pytorch_model.bin`: a zip archive with a pickle (`data.pkl`) that describes the tensors, and
//! one entry (`data/KEY`) of plain numbers per storage.
//!
//! A pickle is a program for a stack machine that can import and call anything. The machine
//! here knows only the instructions that a state dictionary needs, and of all importable names only
//! those that make tensors; anything else is refused by name. It works on indices into flat lists:
//! deep nesting and cycles cost no stack, and what it builds is counted against a budget.
//!
//! Instructions: CPython's `Lib/pickletools.py`. Archive and calls: torch's
//! `torch/serialization.py` and `torch/_utils.py`.

use std::ops::Range;
use std::path::Path;

use bitnet_core::mmap::map_file;
use bitnet_core::{DType, Tensor};
use bytes::Bytes;

use super::cursor::Cursor;
use super::{DOWNLOAD_AGAIN, MAX_RANK, Tensors, index, refuse_stand_in, zip};
use crate::error::{Error, excerpt};

/// Longest pickle in bytes. A tensor takes about 100.
const MAX_PICKLE_BYTES: usize = 8 << 20;

/// Most values on the stack. Writers put at most some thousands there.
const MAX_STACK: usize = 1 << 18;

/// Bytes that a pickle may make the machine allocate, besides its stack: this and
/// [`BUDGET_PER_BYTE`] for each of its own. A tensor takes some 120 bytes of pickle and 1800 of
/// budget, so a file can have tens of thousands.
const BUDGET: usize = 20 << 20;
const BUDGET_PER_BYTE: usize = 10;

/// Adds all tensors of a `pytorch_model.bin`. Their data stays in the mapped file.
pub fn read(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    from_bytes(map_file(path)?, path, into)
}

/// Adds all tensors of the files that a `pytorch_model.bin.index.json` names. They lie in the
/// index's own folder, and each must have the tensors that the index promises.
pub fn read_index(path: &Path, into: &mut Tensors) -> Result<(), Error> {
    index::read(path, into, read)
}

/// Whether a file begins like one that torch wrote, of today or before version 1.6.
pub(super) fn is_torch(bytes: &[u8]) -> bool {
    bytes.starts_with(b"PK\x03\x04") || is_legacy(bytes)
}

/// Before version 1.6 torch wrote a row of pickles, the first of them this number, or a tar
/// archive.
fn is_legacy(bytes: &[u8]) -> bool {
    bytes.starts_with(b"\x80\x02\x8a\x0al\xfc\x9cF\xf9\x20j\xa8P\x19.")
        || bytes.get(257..262) == Some(b"ustar")
}

/// Adds all tensors of a `pytorch_model.bin` that is in memory; `path` is for error messages.
pub fn from_bytes(bytes: Bytes, path: &Path, into: &mut Tensors) -> Result<(), Error> {
    let error = |reason: String| Error::file(path, reason);
    refuse_stand_in(&bytes, path)?;
    if is_legacy(&bytes) {
        let reason = "is a torch file from before version 1.6; load it and save it again with a newer torch, or as safetensors";
        return Err(error(reason.to_owned()));
    }
    if !bytes.starts_with(b"PK\x03\x04") {
        return Err(error("is not a file written by `torch.save`".to_owned()));
    }
    let directory = zip::directory(&bytes).map_err(error)?;
    let mut pickles = directory.iter().filter_map(|(name, range)| {
        let root = name.strip_suffix("/data.pkl")?;
        (!root.contains('/')).then_some((root, range))
    });
    let (Some((root, range)), None) = (pickles.next(), pickles.next()) else {
        return Err(error("is a zip archive without exactly one `data.pkl`".to_owned()));
    };
    if let Some(order) = directory.get(format!("{root}/byteorder").as_str())
        && &bytes[order.clone()] != b"little"
    {
        return Err(error("its byte order is not `little`, the only one read".to_owned()));
    }

    let machine = Machine::run(&bytes[range.clone()])
        .map_err(|reason| error(format!("its pickle cannot be read: {reason}")))?;
    for (name, value) in machine.state_dictionary().map_err(error)? {
        let tensor = match machine.view(value) {
            Err(reason) => Err(reason),
            Ok(view) => {
                let entry = directory.get(format!("{root}/data/{}", view.storage.key).as_str());
                view.tensor(&bytes, entry).map_err(|reason| Error::tensor(path, name, reason))?
            }
        };
        into.insert(path, name.to_owned(), tensor)?;
    }
    Ok(())
}

/// The numbers that tensors look at: an entry of the archive.
#[derive(Debug, Clone, Copy)]
struct Storage<'a> {
    /// torch's class, such as `BFloat16Storage`.
    class: &'a str,
    key: &'a str,
    elements: u64,
}

impl Storage<'_> {
    /// The element type, if we read it. Booleans are their bytes.
    fn dtype(&self) -> Option<DType> {
        Some(match self.class {
            "DoubleStorage" => DType::F64,
            "FloatStorage" => DType::F32,
            "HalfStorage" => DType::F16,
            "BFloat16Storage" => DType::BF16,
            "ByteStorage" | "BoolStorage" => DType::U8,
            "CharStorage" => DType::I8,
            "IntStorage" => DType::I32,
            "LongStorage" => DType::I64,
            _ => return None,
        })
    }
}

/// A tensor as the pickle describes it: a strided view of a storage, in elements.
#[derive(Debug)]
struct View<'a> {
    storage: Storage<'a>,
    offset: u64,
    shape: Vec<usize>,
    strides: Vec<usize>,
}

impl View<'_> {
    /// The tensor, with the storage in `entry` of the archive `bytes`. `Err` means that the file is
    /// broken, `Ok(Err)` that this one tensor cannot be used.
    fn tensor(
        &self,
        bytes: &Bytes,
        entry: Option<&Range<usize>>,
    ) -> Result<Result<Tensor, String>, String> {
        let Storage { class, key, elements } = self.storage;
        let Some(dtype) = self.storage.dtype() else {
            return Ok(Err(format!("its storage type {} is not read", excerpt(class))));
        };
        let size = dtype.byte_len(&self.shape)?;
        let width = dtype.block_bytes() as u64;
        let entry =
            entry.ok_or_else(|| format!("its storage `{}` is not in the file", excerpt(key)))?;
        if elements.checked_mul(width) != Some(entry.len() as u64) {
            return Err(format!(
                "its storage should have {elements} values of {width} bytes and has {} bytes; {DOWNLOAD_AGAIN}",
                entry.len()
            ));
        }
        if !self.is_contiguous() {
            return Ok(Err(format!(
                "is not contiguous (shape {:?}, strides {:?}); call `.contiguous()` before saving",
                self.shape, self.strides
            )));
        }
        let range = self
            .offset
            .checked_mul(width)
            .and_then(|begin| usize::try_from(begin).ok())
            .and_then(|begin| Some(begin..begin.checked_add(size)?))
            .filter(|range| range.end <= entry.len())
            .ok_or_else(|| {
                format!(
                    "{size} bytes from value {} on reach past its storage of {elements} values",
                    self.offset
                )
            })?;
        let data = bytes.slice(entry.start + range.start..entry.start + range.end);
        Ok(Ok(Tensor::new(dtype, self.shape.clone(), data).map_err(|e| e.to_string())?))
    }

    /// Whether the elements lie one after another in row-major order. Only called with shapes whose
    /// size does not overflow.
    fn is_contiguous(&self) -> bool {
        if self.shape.contains(&0) {
            return true;
        }
        let mut expected = 1;
        self.shape.iter().zip(&self.strides).rev().all(|(&extent, &stride)| {
            let fits = extent == 1 || stride == expected;
            expected *= extent;
            fits
        })
    }
}

/// What the machine's stack holds.
#[derive(Debug, Clone, Copy)]
enum Value<'a> {
    None,
    Bool,
    Int(i64),
    Float,
    Text(&'a str),
    Global(Global<'a>),
    /// An index into [`Machine::objects`].
    Object(usize),
}

/// The importable names that are known.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Global<'a> {
    OrderedDict,
    RebuildTensor,
    RebuildParameter,
    /// A storage class of torch, by name.
    Storage(&'a str),
}

impl<'a> Global<'a> {
    fn find(module: &str, name: &'a str) -> Result<Self, String> {
        match (module, name) {
            ("collections", "OrderedDict") => Ok(Global::OrderedDict),
            ("torch._utils", "_rebuild_tensor_v2") => Ok(Global::RebuildTensor),
            ("torch._utils", "_rebuild_parameter") => Ok(Global::RebuildParameter),
            ("torch", class)
                if class.ends_with("Storage")
                    && class.bytes().all(|byte| byte.is_ascii_alphanumeric()) =>
            {
                Ok(Global::Storage(class))
            }
            _ => Err(format!(
                "it imports `{}.{}`, which could run code; only tensors are read",
                excerpt(module),
                excerpt(name)
            )),
        }
    }
}

/// What the machine has built.
#[derive(Debug)]
enum Object<'a> {
    Tuple(Vec<Value<'a>>),
    List,
    Dict(Vec<(Value<'a>, Value<'a>)>),
    Storage(Storage<'a>),
    Tensor(Box<View<'a>>),
}

/// The stack machine of a pickle.
struct Machine<'a> {
    stack: Vec<Value<'a>>,
    /// Stack heights at the open marks.
    marks: Vec<usize>,
    memo: Vec<Value<'a>>,
    objects: Vec<Object<'a>>,
    /// Bytes that may still be allocated.
    budget: usize,
}

/// A pickle that ends in the middle of an instruction.
const CUT: &str = "it ends too early";

impl<'a> Machine<'a> {
    /// Runs the pickle `code`. Afterwards the stack holds its result alone.
    fn run(code: &'a [u8]) -> Result<Self, String> {
        if code.len() > MAX_PICKLE_BYTES {
            return Err(format!("it has {} bytes, more than {MAX_PICKLE_BYTES}", code.len()));
        }
        let mut machine = Machine {
            stack: Vec::new(),
            marks: Vec::new(),
            memo: Vec::new(),
            objects: Vec::new(),
            budget: BUDGET + BUDGET_PER_BYTE * code.len(),
        };
        let mut cursor = Cursor::new(code, 0);
        loop {
            let at = cursor.position();
            let instruction = cursor.u8().ok_or(CUT)?;
            if instruction == b'.' {
                break;
            }
            machine
                .step(instruction, &mut cursor)
                .map_err(|reason| format!("at byte {at}: {reason}"))?;
        }
        if machine.stack.len() != 1 || !machine.marks.is_empty() {
            return Err("it ends without a single result".to_owned());
        }
        Ok(machine)
    }

    fn step(&mut self, instruction: u8, code: &mut Cursor<'a>) -> Result<(), String> {
        match instruction {
            // PROTO
            0x80 => match code.u8().ok_or(CUT)? {
                2..=5 => Ok(()),
                other => Err(format!("pickle protocol {other}; 2 to 5 are read")),
            },
            // FRAME: only advice for buffering
            0x95 => code.u64().map(drop).ok_or_else(|| CUT.to_owned()),
            // MARK
            b'(' => {
                if self.marks.len() == MAX_STACK {
                    return Err("too many marks".to_owned());
                }
                self.marks.push(self.stack.len());
                Ok(())
            }
            // NONE, NEWTRUE, NEWFALSE
            b'N' => self.push(Value::None),
            0x88 | 0x89 => self.push(Value::Bool),
            // BININT, BININT1, BININT2
            b'J' => {
                let bits = code.u32().ok_or(CUT)?;
                self.push(Value::Int((bits as i32).into()))
            }
            b'K' => {
                let value = code.u8().ok_or(CUT)?;
                self.push(Value::Int(value.into()))
            }
            b'M' => {
                let value = code.u16().ok_or(CUT)?;
                self.push(Value::Int(value.into()))
            }
            // LONG1: little-endian two's complement
            0x8a => {
                let length = code.u8().ok_or(CUT)?;
                let digits = code.take(length.into()).ok_or(CUT)?;
                self.push(Value::Int(long(digits)?))
            }
            // BINFLOAT
            b'G' => {
                code.take(8).ok_or(CUT)?;
                self.push(Value::Float)
            }
            // BINUNICODE, SHORT_BINUNICODE, BINUNICODE8
            b'X' => {
                let length = code.u32().ok_or(CUT)?;
                self.push_text(code.take(length.into()))
            }
            0x8c => {
                let length = code.u8().ok_or(CUT)?;
                self.push_text(code.take(length.into()))
            }
            0x8d => {
                let length = code.u64().ok_or(CUT)?;
                self.push_text(code.take(length))
            }
            // EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE
            b'}' => self.push_object(Object::Dict(Vec::new())),
            b']' => self.push_object(Object::List),
            b')' => self.push_object(Object::Tuple(Vec::new())),
            // TUPLE, TUPLE1, TUPLE2, TUPLE3
            b't' => {
                let items = self.pop_to_mark()?;
                self.push_tuple(items)
            }
            0x85..=0x87 => {
                let items = self.pop_many(usize::from(instruction - 0x84))?;
                self.push_tuple(items)
            }
            // APPEND, APPENDS: what a list holds is of no interest
            b'a' => {
                self.pop()?;
                self.expect_list()
            }
            b'e' => {
                self.pop_to_mark()?;
                self.expect_list()
            }
            // SETITEM, SETITEMS
            b's' => {
                let items = self.pop_many(2)?;
                self.set_items(&items)
            }
            b'u' => {
                let items = self.pop_to_mark()?;
                self.set_items(&items)
            }
            // GLOBAL, STACK_GLOBAL
            b'c' => {
                let (module, name) = (line(code)?, line(code)?);
                self.push(Value::Global(Global::find(module, name)?))
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                let (Value::Text(module), Value::Text(name)) = (module, name) else {
                    return Err("an import whose names are not texts".to_owned());
                };
                self.push(Value::Global(Global::find(module, name)?))
            }
            // REDUCE, BUILD, BINPERSID
            b'R' => self.call(),
            b'b' => self.build(),
            b'Q' => self.load_storage(),
            // BINPUT, LONG_BINPUT, MEMOIZE
            b'q' => {
                let key = code.u8().ok_or(CUT)?;
                self.remember(key.into())
            }
            b'r' => {
                let key = code.u32().ok_or(CUT)?;
                self.remember(key as usize)
            }
            0x94 => self.remember(self.memo.len()),
            // BINGET, LONG_BINGET
            b'h' => {
                let key = code.u8().ok_or(CUT)?;
                self.recall(key.into())
            }
            b'j' => {
                let key = code.u32().ok_or(CUT)?;
                self.recall(key as usize)
            }
            other => {
                Err(format!("instruction 0x{other:02x} is not one that a table of tensors needs"))
            }
        }
    }

    /// Counts an allocation against the budget.
    fn spend(&mut self, bytes: usize) -> Result<(), String> {
        self.budget = self
            .budget
            .checked_sub(bytes)
            .ok_or("it builds more than a table of tensors of its size could need")?;
        Ok(())
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), String> {
        if self.stack.len() == MAX_STACK {
            return Err(format!("more than {MAX_STACK} values on the stack"));
        }
        self.stack.push(value);
        Ok(())
    }

    fn push_text(&mut self, text: Option<&'a [u8]>) -> Result<(), String> {
        let text = std::str::from_utf8(text.ok_or(CUT)?).map_err(|_| "a text is not UTF-8")?;
        self.push(Value::Text(text))
    }

    fn push_object(&mut self, object: Object<'a>) -> Result<(), String> {
        // Twice, because growing vectors leave room.
        self.spend(2 * size_of::<Object<'_>>())?;
        self.objects.push(object);
        self.push(Value::Object(self.objects.len() - 1))
    }

    fn push_tuple(&mut self, items: Vec<Value<'a>>) -> Result<(), String> {
        self.spend(size_of_val(&items[..]))?;
        self.push_object(Object::Tuple(items))
    }

    /// Takes the top value. Values below an open mark are out of reach.
    fn pop(&mut self) -> Result<Value<'a>, String> {
        let floor = self.marks.last().copied().unwrap_or(0);
        if self.stack.len() <= floor {
            return Err("it takes a value from an empty stack".to_owned());
        }
        Ok(self.stack.pop().expect("the stack is higher than its floor"))
    }

    /// Takes the top `count` values, in the order they were pushed.
    fn pop_many(&mut self, count: usize) -> Result<Vec<Value<'a>>, String> {
        let mut items: Vec<_> = (0..count).map(|_| self.pop()).collect::<Result<_, _>>()?;
        items.reverse();
        Ok(items)
    }

    /// Takes all values above the last mark, and the mark.
    fn pop_to_mark(&mut self) -> Result<Vec<Value<'a>>, String> {
        let mark = self.marks.pop().ok_or("it closes a mark that is not open")?;
        Ok(self.stack.split_off(mark))
    }

    /// The object that the top of the stack refers to.
    fn top(&mut self) -> Result<&mut Object<'a>, String> {
        let value = self.pop()?;
        self.push(value)?;
        match value {
            Value::Object(index) => Ok(&mut self.objects[index]),
            _ => Err("a number or text where a container should be".to_owned()),
        }
    }

    fn expect_list(&mut self) -> Result<(), String> {
        match self.top()? {
            Object::List => Ok(()),
            _ => Err("it appends to something that is not a list".to_owned()),
        }
    }

    fn set_items(&mut self, items: &[Value<'a>]) -> Result<(), String> {
        if !items.len().is_multiple_of(2) {
            return Err("a key without a value".to_owned());
        }
        self.spend(2 * size_of_val(items))?;
        match self.top()? {
            Object::Dict(entries) => {
                entries.extend(items.chunks_exact(2).map(|pair| (pair[0], pair[1])));
                Ok(())
            }
            _ => Err("it sets items of something that is not a dictionary".to_owned()),
        }
    }

    fn remember(&mut self, key: usize) -> Result<(), String> {
        let value = self.pop()?;
        self.push(value)?;
        match key.cmp(&self.memo.len()) {
            std::cmp::Ordering::Less => self.memo[key] = value,
            std::cmp::Ordering::Equal => {
                self.spend(2 * size_of::<Value<'_>>())?;
                self.memo.push(value);
            }
            // Writers count up.
            std::cmp::Ordering::Greater => return Err(format!("memo {key} comes too early")),
        }
        Ok(())
    }

    fn recall(&mut self, key: usize) -> Result<(), String> {
        let value = self.memo.get(key).ok_or_else(|| format!("memo {key} is empty"))?;
        self.push(*value)
    }

    /// REDUCE: calls one of the known functions.
    fn call(&mut self) -> Result<(), String> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let arguments = self.tuple(arguments)?;
        match function {
            Value::Global(Global::OrderedDict) if arguments.is_empty() => {
                self.push_object(Object::Dict(Vec::new()))
            }
            // Storage, offset, shape, strides; then whether it needs a gradient, hooks, and maybe
            // metadata, none of which concern us.
            Value::Global(Global::RebuildTensor) if (6..=7).contains(&arguments.len()) => {
                let view = self.rebuild_tensor(arguments)?;
                self.spend(size_of::<View<'_>>() + 2 * MAX_RANK * size_of::<usize>())?;
                self.push_object(Object::Tensor(Box::new(view)))
            }
            // Tensor, whether it needs a gradient, hooks.
            Value::Global(Global::RebuildParameter) if arguments.len() == 3 => match arguments[0] {
                tensor @ Value::Object(index)
                    if matches!(self.objects[index], Object::Tensor(_)) =>
                {
                    self.push(tensor)
                }
                _ => Err("a parameter that is not a tensor".to_owned()),
            },
            Value::Global(global) => {
                Err(format!("it calls {global:?} with {} arguments", arguments.len()))
            }
            _ => Err("it calls something that is not a function".to_owned()),
        }
    }

    fn rebuild_tensor(&self, arguments: &[Value<'a>]) -> Result<View<'a>, String> {
        let &[Value::Object(storage), Value::Int(offset), shape, strides, ..] = arguments else {
            return Err("a tensor without storage, offset, shape and strides".to_owned());
        };
        let Object::Storage(storage) = self.objects[storage] else {
            return Err("a tensor without a storage".to_owned());
        };
        let (shape, strides) = (self.extents(shape)?, self.extents(strides)?);
        if shape.len() != strides.len() {
            return Err(format!("a tensor of shape {shape:?} with strides {strides:?}"));
        }
        let offset = offset.try_into().map_err(|_| format!("a tensor at offset {offset}"))?;
        Ok(View { storage, offset, shape, strides })
    }

    /// A tuple of at most [`MAX_RANK`] numbers that are not negative.
    fn extents(&self, tuple: Value<'a>) -> Result<Vec<usize>, String> {
        let items = self.tuple(tuple)?;
        if items.len() > MAX_RANK {
            return Err(format!("{} extents; at most {MAX_RANK} are read", items.len()));
        }
        let extent = |item: &Value<'_>| match *item {
            Value::Int(value) => usize::try_from(value).ok(),
            _ => None,
        };
        let extents: Option<_> = items.iter().map(extent).collect();
        extents.ok_or_else(|| "an extent or stride that is not a size".to_owned())
    }

    fn tuple(&self, value: Value<'a>) -> Result<&[Value<'a>], String> {
        match value {
            Value::Object(index) => match &self.objects[index] {
                Object::Tuple(items) => Ok(items),
                _ => Err("something else where a tuple should be".to_owned()),
            },
            _ => Err("a single value where a tuple should be".to_owned()),
        }
    }

    /// BUILD: torch hangs its version numbers (`_metadata`) on the dictionary; they are dropped.
    fn build(&mut self) -> Result<(), String> {
        self.pop()?;
        match self.top()? {
            Object::Dict(_) => Ok(()),
            _ => Err("it sets the state of something that is not a dictionary".to_owned()),
        }
    }

    /// BINPERSID: `("storage", class, key, device, number of elements)`.
    fn load_storage(&mut self) -> Result<(), String> {
        let id = self.pop()?;
        let &[
            Value::Text("storage"),
            Value::Global(Global::Storage(class)),
            Value::Text(key),
            Value::Text(_),
            Value::Int(elements),
        ] = self.tuple(id)?
        else {
            return Err("a persistent id that is not a storage".to_owned());
        };
        let elements =
            elements.try_into().map_err(|_| format!("a storage of {elements} elements"))?;
        self.push_object(Object::Storage(Storage { class, key, elements }))
    }

    /// The entries of the result, which must be a dictionary with texts as keys.
    fn state_dictionary(&self) -> Result<Vec<(&'a str, Value<'a>)>, String> {
        let [Value::Object(root)] = self.stack[..] else {
            return Err("its pickle is a single value, not a dictionary of tensors".to_owned());
        };
        let Object::Dict(entries) = &self.objects[root] else {
            return Err("its pickle is not a dictionary of tensors".to_owned());
        };
        let named = |&(key, value)| match key {
            Value::Text(name) => Ok((name, value)),
            _ => Err("its dictionary has a key that is not a text".to_owned()),
        };
        entries.iter().map(named).collect()
    }

    /// The tensor that an entry of the state dictionary is, or what it is instead.
    fn view(&self, value: Value<'a>) -> Result<&View<'a>, String> {
        let kind = match value {
            Value::None => "nothing",
            Value::Bool => "a truth value",
            Value::Int(_) | Value::Float => "a number",
            Value::Text(_) => "a text",
            Value::Global(_) => "a class",
            Value::Object(index) => match &self.objects[index] {
                Object::Tensor(view) => return Ok(view),
                Object::Tuple(_) | Object::List => "a list",
                Object::Dict(_) => "a dictionary",
                Object::Storage(_) => "a storage",
            },
        };
        Err(format!("is {kind}, not a tensor"))
    }
}

/// The rest of a line, as GLOBAL writes its two names.
fn line<'a>(code: &mut Cursor<'a>) -> Result<&'a str, String> {
    let rest = code.clone().take(code.remaining() as u64).unwrap_or_default();
    let end = rest.iter().position(|&byte| byte == b'\n').ok_or(CUT)?;
    code.take(end as u64 + 1);
    std::str::from_utf8(&rest[..end]).map_err(|_| "a name is not UTF-8".to_owned())
}

/// A little-endian number in two's complement.
fn long(digits: &[u8]) -> Result<i64, String> {
    if digits.len() > 8 {
        return Err(format!("a number of {} bytes", digits.len()));
    }
    let negative = digits.last().is_some_and(|&top| top >= 0x80);
    let mut bytes = [if negative { 0xff } else { 0 }; 8];
    bytes[..digits.len()].copy_from_slice(digits);
    Ok(i64::from_le_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;

    /// An archive as torch writes it, with the given entries below `m/`.
    fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
        let mut writer = ::zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = ::zip::write::SimpleFileOptions::default()
            .compression_method(::zip::CompressionMethod::Stored);
        for (name, data) in entries {
            writer.start_file(format!("m/{name}"), options).unwrap();
            writer.write_all(data).unwrap();
        }
        writer.finish().unwrap().into_inner()
    }

    fn parse(bytes: Vec<u8>) -> Result<Tensors, String> {
        let mut tensors = Tensors::default();
        match from_bytes(bytes.into(), Path::new("m.bin"), &mut tensors) {
            Ok(()) => Ok(tensors),
            Err(error) => Err(error.to_string()),
        }
    }

    /// Reads a pickle next to one storage `0` of six bytes.
    fn run(pickle: &[u8]) -> Result<Tensors, String> {
        parse(archive(&[("data.pkl", pickle), ("data/0", &[1, 2, 3, 4, 5, 6])]))
    }

    fn refusal(pickle: &[u8]) -> String {
        run(pickle).expect_err("the pickle lies")
    }

    fn text(text: &str) -> Vec<u8> {
        [&[b'X'][..], &(text.len() as u32).to_le_bytes(), text.as_bytes()].concat()
    }

    /// Instructions that leave the tuple of those numbers on the stack.
    fn numbers(values: &[i32]) -> Vec<u8> {
        let pushes = values.iter().flat_map(|v| [&b"J"[..], &v.to_le_bytes()].concat());
        [b"(".to_vec(), pushes.collect(), b"t".to_vec()].concat()
    }

    fn storage(class: &str, key: &str, elements: i32) -> Vec<u8> {
        [
            b"(".to_vec(),
            text("storage"),
            format!("ctorch\n{class}\n").into_bytes(),
            text(key),
            text("cpu"),
            [&b"J"[..], &elements.to_le_bytes(), b"tQ"].concat(),
        ]
        .concat()
    }

    fn tensor(storage: Vec<u8>, offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
        [
            b"ctorch._utils\n_rebuild_tensor_v2\n(".to_vec(),
            storage,
            [&b"J"[..], &offset.to_le_bytes()].concat(),
            numbers(shape),
            numbers(strides),
            b"\x89ccollections\nOrderedDict\n)RtR".to_vec(),
        ]
        .concat()
    }

    /// A state dictionary with one entry `w`.
    fn state(value: Vec<u8>) -> Vec<u8> {
        [b"\x80\x02}(".to_vec(), text("w"), value, b"u.".to_vec()].concat()
    }

    fn bytes(offset: i32, shape: &[i32], strides: &[i32]) -> Vec<u8> {
        state(tensor(storage("ByteStorage", "0", 6), offset, shape, strides))
    }

    #[test]
    fn a_tensor_is_a_slice_of_its_storage() {
        let tensors = run(&bytes(2, &[2, 1, 2], &[2, 9, 1])).unwrap();
        let tensor = tensors.get("w").unwrap().unwrap();
        assert_eq!((tensor.dtype(), tensor.shape()), (DType::U8, &[2, 1, 2][..]));
        assert_eq!(tensor.data()[..], [3, 4, 5, 6]);
    }

    #[test]
    fn parameters_and_version_numbers_on_the_dictionary_are_read_through() {
        let inner = tensor(storage("HalfStorage", "0", 3), 0, &[3], &[1]);
        let parameter = [
            b"ctorch._utils\n_rebuild_parameter\n(".to_vec(),
            inner,
            b"\x88ccollections\nOrderedDict\n)RtR".to_vec(),
        ]
        .concat();
        let pickle = [
            b"\x80\x02ccollections\nOrderedDict\n)R(".to_vec(),
            text("w"),
            parameter,
            b"u}".to_vec(),
            text("_metadata"),
            b"}sb.".to_vec(),
        ]
        .concat();
        assert_eq!(run(&pickle).unwrap().get("w").unwrap().unwrap().dtype(), DType::F16);
    }

    #[test]
    fn protocol_4_says_the_same_with_other_instructions() {
        let short = |text: &str| [&[0x8c, text.len() as u8][..], text.as_bytes()].concat();
        let import =
            |module: &str, name: &str| [short(module), short(name), b"\x93\x94".to_vec()].concat();
        let pickle = [
            b"\x80\x04\x95\0\0\0\0\0\0\0\0}\x94".to_vec(),
            short("w"),
            import("torch._utils", "_rebuild_tensor_v2"),
            b"((".to_vec(),
            short("storage"),
            import("torch", "CharStorage"),
            short("0"),
            short("cpu"),
            b"K\x06tQK\0K\x06\x85\x8a\x01\x01\x85\x89]tRs.".to_vec(),
        ]
        .concat();
        let tensors = run(&pickle).unwrap();
        assert_eq!(tensors.get("w").unwrap().unwrap().dtype(), DType::I8);
    }

    #[test]
    fn a_table_of_twenty_thousand_tensors_is_within_the_budget() {
        let mut memo = 0u32;
        let mut put = || {
            memo += 1;
            [&b"r"[..], &(memo - 1).to_le_bytes()].concat()
        };
        let mut pickle = [&b"}"[..], &put(), b"("].concat();
        for number in 0..20_000 {
            // As torch does it: everything is remembered, whether it is needed again or not.
            for part in [
                text(&format!("model.layers.{number}.weight")),
                put(),
                b"ctorch._utils\n_rebuild_tensor_v2\n((".to_vec(),
                text("storage"),
                b"ctorch\nByteStorage\n".to_vec(),
                text("0"),
                put(),
                text("cpu"),
                b"K\x06t".to_vec(),
                put(),
                b"QK\0K\x06\x85".to_vec(),
                put(),
                b"K\x01\x85".to_vec(),
                put(),
                b"\x89ccollections\nOrderedDict\n)R".to_vec(),
                put(),
                b"t".to_vec(),
                put(),
                b"R".to_vec(),
                put(),
            ] {
                pickle.extend(part);
            }
        }
        pickle.extend(b"u.");
        assert_eq!(run(&pickle).unwrap().len(), 20_000);
    }

    #[test]
    fn whatever_could_run_code_is_refused_by_name() {
        let call = b"\x80\x02cos\nsystem\n(X\x02\0\0\0ls\x85R.";
        let error = refusal(call);
        let expected = "it imports `os.system`, which could run code; only tensors are read";
        assert!(error.contains(expected), "{error}");
        let stacked = b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93.";
        assert!(refusal(stacked).contains("`builtins.eval`"));
        for name in ["torch\nload\n", "torch\nx.Storage\n", "torch.Tensor\nStorage\n"] {
            assert!(refusal(format!("c{name}.").as_bytes()).contains("could run code"));
        }
        // INST, OBJ, NEWOBJ, NEWOBJ_EX, EXT1, PERSID, text-mode instructions
        for instruction in b"io\x81\x92\x82PILVFSpg012" {
            let error = refusal(&[*instruction, b'\n', b'.']);
            assert!(error.contains("is not one that a table of tensors needs"), "{error}");
        }
    }

    #[test]
    fn calls_of_known_names_with_other_arguments_are_refused() {
        for (pickle, word) in [
            (&b"ctorch\nFloatStorage\n)R."[..], "it calls Storage"),
            (b"ccollections\nOrderedDict\nN\x85R.", "it calls OrderedDict with 1"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n)R.", "with 0 arguments"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n(NNNNNNtR.", "a tensor without storage"),
            (b"ctorch._utils\n_rebuild_tensor_v2\n(}K\0))N}tR.", "without a storage"),
            (b"ctorch._utils\n_rebuild_parameter\nN)}\x87R.", "not a tensor"),
            (b"N)R.", "not a function"),
            (b"ccollections\nOrderedDict\n}R.", "should be"),
            (b")Q.", "persistent id"),
            (b"NQ.", "single value"),
            (b"]}b.", "state of something"),
        ] {
            let error = refusal(pickle);
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn a_machine_that_runs_wild_is_stopped() {
        let many = |unit: &[u8], count: usize| [&unit.repeat(count)[..], b"."].concat();
        for (pickle, word) in [
            (b"".to_vec(), "ends too early"),
            (b"}".to_vec(), "ends too early"),
            (b"X\xff\xff\xff\xff.".to_vec(), "ends too early"),
            (b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.".to_vec(), "ends too early"),
            (b"cos\n".to_vec(), "ends too early"),
            (b".".to_vec(), "without a single result"),
            (b"NN.".to_vec(), "without a single result"),
            (b"(N.".to_vec(), "without a single result"),
            (b"\x80\x06}.".to_vec(), "protocol 6"),
            (b"t.".to_vec(), "mark that is not open"),
            (b"N(s.".to_vec(), "empty stack"),
            (b"}NN(st.".to_vec(), "empty stack"),
            (b"}(Nu.".to_vec(), "key without a value"),
            (b"](u.".to_vec(), "not a dictionary"),
            (b"NNNs.".to_vec(), "container should be"),
            (b"}Na.".to_vec(), "not a list"),
            (b"h\0.".to_vec(), "memo 0 is empty"),
            (b"Nr\xff\xff\xff\x7f.".to_vec(), "comes too early"),
            (b"X\x01\0\0\0\xff.".to_vec(), "not UTF-8"),
            (b"\x8a\x09123456789.".to_vec(), "number of 9 bytes"),
            (many(b"N", MAX_STACK + 1), "values on the stack"),
            (many(b"(", MAX_STACK + 1), "too many marks"),
            (many(b"]]\x86", 1_000_000), "than a table of tensors"),
            (many(b")", MAX_PICKLE_BYTES), "more than 8388608"),
        ] {
            let error = refusal(&pickle);
            assert!(error.contains(word), "{word}: {error}");
        }
        // Nesting costs no stack of ours, neither to build nor to drop.
        assert!(refusal(&many(b")\x85", 1)).contains("not a dictionary"));
        let nested = [&b")"[..], &b"\x85".repeat(100_000), b"."].concat();
        assert!(refusal(&nested).contains("not a dictionary"));
    }

    #[test]
    fn views_that_reach_past_their_storage_are_refused() {
        for (offset, shape, strides) in [
            (0, &[7][..], &[1][..]),
            (1, &[6], &[1]),
            (i32::MAX, &[1], &[1]),
            (0, &[i32::MAX, i32::MAX, i32::MAX], &[1, 1, 1]),
        ] {
            let error = refusal(&bytes(offset, shape, strides));
            assert!(error.contains("tensor `w`"), "{error}");
        }
        for (offset, shape, strides) in
            [(-1, &[1][..], &[1][..]), (0, &[-1], &[1]), (0, &[1], &[-1]), (0, &[1], &[1, 1])]
        {
            assert!(refusal(&bytes(offset, shape, strides)).contains("its pickle cannot be read"));
        }
        assert!(refusal(&bytes(0, &[1; 9], &[1; 9])).contains("9 extents"));
        let missing = state(tensor(storage("ByteStorage", "1", 6), 0, &[1], &[1]));
        assert!(refusal(&missing).contains("storage `1` is not in the file"));
        for elements in [5, 7, i32::MAX] {
            let wrong = state(tensor(storage("ByteStorage", "0", elements), 0, &[1], &[1]));
            assert!(refusal(&wrong).contains("and has 6 bytes"));
        }
        let negative = state(tensor(storage("ByteStorage", "0", -1), 0, &[1], &[1]));
        assert!(refusal(&negative).contains("storage of -1 elements"));
    }

    #[test]
    fn what_is_no_contiguous_tensor_of_a_known_type_is_an_error_only_when_asked_for() {
        let short = state(tensor(storage("ShortStorage", "0", 3), 0, &[3], &[1]));
        for (pickle, word) in [
            (bytes(0, &[2, 3], &[1, 2]), "is not contiguous"),
            (short, "ShortStorage is not read"),
            (state(b"}".to_vec()), "is a dictionary, not a tensor"),
            (state(b"K\x01".to_vec()), "is a number"),
        ] {
            let tensors = run(&pickle).unwrap();
            let error = tensors.get("w").unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }

    #[test]
    fn what_is_not_a_dictionary_of_tensors_is_refused() {
        for pickle in [&b"N."[..], b"]."] {
            assert!(refusal(pickle).contains("not a dictionary"));
        }
        assert!(refusal(b"}(K\x01Nu.").contains("key that is not a text"));
        let twice = [b"}(".to_vec(), text("w"), b"N".to_vec(), text("w"), b"Nu.".to_vec()].concat();
        assert!(refusal(&twice).contains("appears twice"));
    }

    #[test]
    fn archives_that_torch_does_not_write_are_refused() {
        let good = bytes(0, &[6], &[1]);
        let order = archive(&[("data.pkl", &good), ("byteorder", b"big")]);
        assert!(parse(order).unwrap_err().contains("byte order"));
        let none = archive(&[("data/0", &[1])]);
        assert!(parse(none).unwrap_err().contains("exactly one `data.pkl`"));
        let legacy = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19.rest".to_vec();
        assert!(is_torch(&legacy));
        assert!(parse(legacy).unwrap_err().contains("before version 1.6"));
        assert!(parse(b"GGUF".to_vec()).unwrap_err().contains("not a file written by"));
        assert!(parse(b"PK\x03\x04".to_vec()).unwrap_err().contains("truncated"));
    }
}
