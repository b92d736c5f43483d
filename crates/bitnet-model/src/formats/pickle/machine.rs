//! The stack machine of a pickle.
//!
//! A pickle is a program for a stack machine that can import and call anything. The machine
//! here knows only the instructions that a state dictionary needs, and of all importable names only
//! those that make tensors; anything else is refused by name. It works on indices into flat lists:
//! deep nesting and cycles cost no stack, and what it builds is counted against a budget.
//!
//! Instructions: CPython's `Lib/pickletools.py`. Calls: torch's `torch/_utils.py`.

use super::{Storage, View};
use crate::error::excerpt;
use crate::formats::MAX_RANK;
use crate::formats::cursor::Cursor;

/// Longest pickle in bytes. A tensor takes about 100.
pub(super) const MAX_PICKLE_BYTES: usize = 8 << 20;

/// Most values on the stack. Writers put at most some thousands there.
pub(super) const MAX_STACK: usize = 1 << 18;

/// Bytes that a pickle may make the machine allocate, besides its stack: this and
/// [`BUDGET_PER_BYTE`] for each of its own. A tensor takes some 120 bytes of pickle and 1800 of
/// budget, so a file can have tens of thousands.
const BUDGET: usize = 20 << 20;
const BUDGET_PER_BYTE: usize = 10;

/// What the machine's stack holds.
#[derive(Debug, Clone, Copy)]
pub(super) enum Value<'a> {
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
pub(super) enum Global<'a> {
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
pub(super) struct Machine<'a> {
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
    pub(super) fn run(code: &'a [u8]) -> Result<Self, String> {
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
    pub(super) fn state_dictionary(&self) -> Result<Vec<(&'a str, Value<'a>)>, String> {
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
    pub(super) fn view(&self, value: Value<'a>) -> Result<&View<'a>, String> {
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
