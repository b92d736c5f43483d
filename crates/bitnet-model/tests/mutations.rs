//! Damaged files: whatever is done to a good file, reading it ends in a result or in an error with
//! a message, and takes no more memory than [`ALLOCATION_PER_BYTE`] and [`ALLOCATION`] allow.
//!
//! The damage is deterministic. `BITNET_MUTATIONS=20000` asks for more of it than the
//! [`MUTATIONS`] of every day. To cover another reader, add a [`Target`].

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::Range;
use std::panic::catch_unwind;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Mutex, PoisonError};

use bitnet_core::backend::{KvType, Span};
use bitnet_cpu::{CpuBackend, CpuOptions};
use bitnet_model::convert;
use bitnet_model::decoder::Step;
use bitnet_model::formats::index::ShardIndex;
use bitnet_model::formats::{Tensors, gguf, native, onnx, pickle, safetensors};
use bitnet_model::source::{self, Checkpoint, Sidecars, Vocabulary};
use bitnet_model::tokenizer::Special;
use bitnet_model::weights::{self, LoadOptions};
use bitnet_testing::{golden, shared_data, tiny_model};
use bytes::Bytes;

/// Mutations in all, over all targets, when the environment does not say otherwise.
const MUTATIONS: usize = 1500;

/// A reader may allocate this many bytes at a time, ...
const ALLOCATION: usize = 64 << 20;

/// ... and so many more for every byte of the file.
const ALLOCATION_PER_BYTE: usize = 8;

/// Reads a file and uses what it read. The error is the message a user would see.
type Read = fn(&[u8]) -> Result<(), String>;

/// A reader, and good files for it.
struct Target {
    name: &'static str,
    seeds: Vec<Seed>,
    read: Read,
}

/// A good file and where its structure is; the rest are numbers that a reader only passes on.
struct Seed {
    bytes: Vec<u8>,
    structure: Vec<Range<usize>>,
}

impl Seed {
    fn new(bytes: Vec<u8>, structure: Vec<Range<usize>>) -> Self {
        assert!(structure.iter().all(|part| part.start < part.end && part.end <= bytes.len()));
        Seed { bytes, structure }
    }
}

fn targets() -> Vec<Target> {
    let read = |path: Option<std::path::PathBuf>| path.map(|path| std::fs::read(path).unwrap());
    let safetensors = ["bitnet-packed/model.safetensors", "llama-1.58-rmsnorm/model.safetensors"]
        .into_iter()
        .filter_map(|path| read(golden(path)))
        .map(|bytes| {
            let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize + 8;
            Seed::new(bytes, vec![0..8, 0..header])
        })
        .collect();
    let ggufs =
        [golden("gguf/bitnet-packed-TQ2_0.gguf"), shared_data("gguf/tiny-trained-I2_S.gguf")]
            .into_iter()
            .filter_map(read)
            .map(|bytes| {
                let place =
                    |text: &[u8]| bytes.windows(text.len()).position(|w| w == text).unwrap();
                let tokens = place(b"tokenizer.ggml.tokens");
                let table = place(b"token_embd.weight");
                let data = place(b"output_norm.weight") + 50;
                Seed::new(bytes, vec![0..tokens + 60, tokens..table, table..data])
            })
            .collect();
    let pickles = [golden("bitnet-bf16-bin/pytorch_model.bin")]
        .into_iter()
        .filter_map(read)
        .map(|bytes| {
            let directory = bytes.windows(4).position(|w| w == b"PK\x01\x02").unwrap();
            let end = bytes.len();
            Seed::new(bytes, vec![0..2600, directory..end, end - 120..end])
        })
        .collect();
    let indices = [golden("bitnet-sharded/model.safetensors.index.json")]
        .into_iter()
        .filter_map(read)
        .map(|bytes| {
            let end = bytes.len();
            Seed::new(bytes, vec![0..end / 2, end / 2..end])
        })
        .collect();
    let onnxes = ["onnx/llama3-rope-torchscript.onnx", "onnx/bitnet-dynamo.onnx"]
        .into_iter()
        .filter_map(|path| read(golden(path)))
        .map(|bytes| {
            // Nodes come first, then initializers.
            let end = bytes.len();
            Seed::new(bytes, vec![0..end / 3, 0..end])
        })
        .collect();
    let models = [golden("gguf/bitnet-packed-TQ2_0.gguf")]
        .into_iter()
        .filter_map(read)
        .map(|bytes| {
            let place = |text: &[u8]| bytes.windows(text.len()).position(|w| w == text).unwrap();
            let (tokens, table) = (place(b"tokenizer.ggml.tokens"), place(b"token_embd.weight"));
            let data = place(b"output_norm.weight") + 50;
            let end = bytes.len();
            Seed::new(bytes, vec![0..tokens, tokens..table, table..data, data..end])
        })
        .collect();
    let tiny = |name: &str| std::fs::read(tiny_model().join(name)).unwrap();
    let whole = |bytes: Vec<u8>| {
        let end = bytes.len();
        vec![Seed::new(bytes, vec![0..end / 2, end / 2..end])]
    };
    let weights = tiny("model.safetensors");
    let header = u64::from_le_bytes(weights[..8].try_into().unwrap()) as usize + 8;
    let end = weights.len();
    let weights = vec![Seed::new(weights, vec![0..header, header..end])];
    let natives = vec![native_seed()];
    vec![
        Target { name: "native model", seeds: natives, read: load_native },
        Target { name: "GGUF model", seeds: models, read: load_gguf },
        Target { name: "weights of a model", seeds: weights, read: load_weights },
        Target { name: "config.json", seeds: whole(tiny("config.json")), read: load_config },
        Target {
            name: "tokenizer.json",
            seeds: whole(tiny("tokenizer.json")),
            read: load_tokenizer,
        },
        Target {
            name: "tokenizer_config.json",
            seeds: whole(tiny("tokenizer_config.json")),
            read: load_tokenizer_config,
        },
        Target { name: "safetensors", seeds: safetensors, read: read_safetensors },
        Target { name: "gguf", seeds: ggufs, read: read_gguf },
        Target { name: "onnx", seeds: onnxes, read: read_onnx },
        Target { name: "pickle", seeds: pickles, read: read_pickle },
        Target { name: "index", seeds: indices, read: read_index },
    ]
}

/// The built-in model as a native file.
fn native_seed() -> Seed {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("m.bitnet");
    let tiny = source::open(source::TINY).unwrap();
    convert::to(
        &tiny,
        &path,
        &convert::Target::Native { compact: true },
        convert::Options::default(),
        |_, _| (),
    )
    .unwrap();
    let bytes = std::fs::read(path).unwrap();
    let place = |text: &[u8]| bytes.windows(text.len()).position(|w| w == text).unwrap();
    let (digests, table) = (place(b"sha256:"), place(b"\"tokenizer.bytes\""));
    let spaces = place(b"}    ");
    let data = spaces + bytes[spaces..].iter().position(|&byte| byte == 0).unwrap_or(0);
    let end = bytes.len();
    // The vocabulary comes first in the data.
    let vocabulary = data..(data + (1 << 18)).min(end);
    Seed::new(bytes, vec![0..digests, table..spaces, vocabulary, data..end])
}

fn load_native(bytes: &[u8]) -> Result<(), String> {
    load(native::from_bytes(Bytes::copy_from_slice(bytes), Path::new("m.bitnet")))
}

/// Looks at every tensor, as loading a model would.
fn use_tensors(tensors: &Tensors) -> Result<(), String> {
    for name in tensors.names() {
        if let Some(tensor) = tensors.get(name).map_err(|error| error.to_string())? {
            let ends = (tensor.data().first(), tensor.data().last());
            assert_eq!(ends.0.is_none(), tensor.is_empty());
        }
    }
    Ok(())
}

fn read_safetensors(bytes: &[u8]) -> Result<(), String> {
    let (bytes, path) = (Bytes::copy_from_slice(bytes), Path::new("m.safetensors"));
    let mut tensors = Tensors::default();
    safetensors::from_bytes(bytes.clone(), path, &mut tensors).map_err(|e| e.to_string())?;
    safetensors::metadata(&bytes, path).map_err(|e| e.to_string())?;
    use_tensors(&tensors)
}

fn read_gguf(bytes: &[u8]) -> Result<(), String> {
    let file = gguf::from_bytes(Bytes::copy_from_slice(bytes), Path::new("m.gguf"))
        .map_err(|e| e.to_string())?;
    let metadata = &file.metadata;
    for key in ["tokenizer.ggml.tokens", "tokenizer.ggml.merges"] {
        metadata.require::<Vec<&str>>(key).map_err(|e| e.to_string())?;
    }
    metadata.require::<Vec<i64>>("tokenizer.ggml.token_type").map_err(|e| e.to_string())?;
    use_tensors(&file.tensors)
}

fn read_pickle(bytes: &[u8]) -> Result<(), String> {
    let mut tensors = Tensors::default();
    pickle::from_bytes(Bytes::copy_from_slice(bytes), Path::new("m.bin"), &mut tensors)
        .map_err(|e| e.to_string())?;
    use_tensors(&tensors)
}

fn read_onnx(bytes: &[u8]) -> Result<(), String> {
    let mut tensors = Tensors::default();
    // Where the external data of one of the seeds is.
    let folder = golden("onnx").expect("it is in the project");
    onnx::from_bytes(Bytes::copy_from_slice(bytes), &folder.join("m.onnx"), &mut tensors)
        .map_err(|e| e.to_string())?;
    use_tensors(&tensors)
}

fn read_index(bytes: &[u8]) -> Result<(), String> {
    let index = ShardIndex::from_bytes(bytes, Path::new("m.json")).map_err(|e| e.to_string())?;
    assert!(index.shards().all(|(shard, _)| !shard.contains(['/', '\\']) && shard != ".."));
    Ok(())
}

/// Loads a checkpoint and runs two tokens through it.
fn load(checkpoint: Result<Checkpoint, bitnet_model::Error>) -> Result<(), String> {
    let Checkpoint { mut description, tensors } = checkpoint.map_err(|e| e.to_string())?;
    let (config, notes) = (&description.config, &mut description.notes);
    let options = LoadOptions::default();
    let decoder = weights::load(cpu(), &description.path, config, &tensors, options, notes)
        .map_err(|e| e.to_string())?;
    let text = description.tokenizer.encode("Once upon", true, Special::Recognised);
    let _ = text.and_then(|ids| description.tokenizer.decode(&ids, true));
    let blocks = [0];
    let layout = decoder.kv_layout(KvType::F32, 16);
    let mut kv = decoder.kv_allocate(layout, 1).map_err(|e| e.to_string())?;
    let mut workspace = decoder.workspace(2, 1).map_err(|e| e.to_string())?;
    let last = decoder.vocab_size() as u32 - 1;
    let spans = [Span { rows: 0..2, position: 0, blocks: &blocks }];
    let step = Step { tokens: &[0, last], spans: &spans };
    decoder.forward(&step, &mut kv, &mut workspace).map_err(|e| e.to_string())?;
    let mut logits = Vec::new();
    decoder.logits(&mut workspace, &[1], &mut logits).map_err(|e| e.to_string())
}

fn cpu() -> CpuBackend {
    CpuBackend::new(CpuOptions { threads: Some(1), isa: None, ..CpuOptions::default() }).unwrap()
}

fn load_gguf(bytes: &[u8]) -> Result<(), String> {
    let path = Path::new("m.gguf");
    let file = gguf::from_bytes(Bytes::copy_from_slice(bytes), path).map_err(|e| e.to_string())?;
    load(source::describe_gguf(file, path))
}

/// Loads the built-in model with one of its files replaced.
fn load_tiny(replaced: &str, bytes: &[u8]) -> Result<(), String> {
    let file = |name: &str| match name == replaced {
        true => bytes.to_vec(),
        false => std::fs::read(tiny_model().join(name)).unwrap(),
    };
    let mut tensors = Tensors::default();
    safetensors::from_bytes(file("model.safetensors").into(), Path::new("m"), &mut tensors)
        .map_err(|e| e.to_string())?;
    let sidecars = Sidecars {
        path: Path::new("m"),
        config: &file("config.json"),
        generation_config: Some(&file("generation_config.json")),
        vocabulary: Vocabulary::Json(&file("tokenizer.json")),
        tokenizer_config: Some(&file("tokenizer_config.json")),
        special_tokens_map: None,
        chat_template: None,
        pooling: None,
    };
    load(source::describe(sidecars, tensors, "Hugging Face"))
}

fn load_weights(bytes: &[u8]) -> Result<(), String> {
    load_tiny("model.safetensors", bytes)
}

fn load_config(bytes: &[u8]) -> Result<(), String> {
    load_tiny("config.json", bytes)
}

fn load_tokenizer(bytes: &[u8]) -> Result<(), String> {
    load_tiny("tokenizer.json", bytes)
}

fn load_tokenizer_config(bytes: &[u8]) -> Result<(), String> {
    load_tiny("tokenizer_config.json", bytes)
}

/// Deterministic numbers (SplitMix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, from: &'a [T]) -> &'a T {
        &from[self.below(from.len())]
    }

    /// A position in a seed: nearly always in its structure.
    fn place(&mut self, seed: &Seed) -> usize {
        if self.below(16) == 0 {
            return self.below(seed.bytes.len());
        }
        let part = self.pick(&seed.structure).clone();
        part.start + self.below(part.len())
    }
}

/// Numbers that break sums, products and conversions.
const EXTREMES: [u64; 14] = [
    0,
    1,
    0x7f,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0xffff_ffff,
    1 << 32,
    1 << 40,
    i64::MAX as u64,
    1 << 63,
    u64::MAX - 7,
    u64::MAX,
];

/// One to three changes to a seed, drawn from `random`.
fn damage(seed: &Seed, random: &mut Random) -> Vec<u8> {
    let mut bytes = seed.bytes.clone();
    for _ in 0..=random.below(3) {
        let at = random.place(seed).min(bytes.len().saturating_sub(1));
        if bytes.is_empty() {
            break;
        }
        match random.below(8) {
            0 | 1 => bytes[at] ^= 1 << random.below(8),
            2 => bytes[at] = random.next() as u8,
            3 => bytes.truncate(at),
            4 | 5 => {
                // A field set to an extreme: binary, or as digits where the file has digits.
                let value = *random.pick(&EXTREMES);
                if bytes[at].is_ascii_digit() {
                    let digits = bytes[at..].iter().take_while(|b| b.is_ascii_digit()).count();
                    bytes.splice(at..at + digits, value.to_string().into_bytes());
                } else {
                    let width = (1 << random.below(4)).min(bytes.len() - at);
                    bytes[at..at + width].copy_from_slice(&value.to_le_bytes()[..width]);
                }
            }
            6 => {
                // A piece of the file somewhere else.
                let from = random.place(seed).min(bytes.len() - 1);
                let length = (1 + random.below(64)).min(bytes.len() - from.max(at));
                bytes.copy_within(from..from + length, at);
            }
            _ => {
                // A piece twice, or missing.
                let length = (1 + random.below(64)).min(bytes.len() - at);
                if random.below(2) == 0 {
                    let piece = bytes[at..at + length].to_vec();
                    bytes.splice(at..at, piece);
                } else {
                    bytes.drain(at..at + length);
                }
            }
        }
    }
    bytes
}

#[test]
fn damaged_files_end_in_errors_and_take_bounded_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let mutations = match std::env::var("BITNET_MUTATIONS") {
        Ok(number) => number.parse().expect("BITNET_MUTATIONS is a number"),
        Err(_) => MUTATIONS,
    };
    let targets = targets();
    for target in &targets {
        let mut random = Random(0);
        let (mut refused, mut largest) = (0, 0);
        let count = if target.seeds.is_empty() { 0 } else { mutations / targets.len() };
        for seed in &target.seeds {
            assert_eq!((target.read)(&seed.bytes), Ok(()), "an undamaged {}", target.name);
        }
        for number in 0..count {
            let bytes = damage(&target.seeds[number % target.seeds.len()], &mut random);
            let allowed = bytes.len() * ALLOCATION_PER_BYTE + ALLOCATION;
            let name = target.name;
            let (outcome, allocated) = measure(|| catch_unwind(|| (target.read)(&bytes)));
            let outcome = outcome.unwrap_or_else(|_| panic!("{name}: mutation {number} panicked"));
            if let Err(message) = outcome {
                assert!(message.len() > 10, "{name}: mutation {number} has no message");
                assert!(message.len() < 2000, "{name}: mutation {number}: {message}");
                assert!(!message.contains(char::is_control), "{name}: {number}: {message:?}");
                refused += 1;
            }
            assert!(
                allocated <= allowed,
                "{name}: mutation {number} of {} bytes allocated {allocated}",
                bytes.len()
            );
            largest = largest.max(allocated);
        }
        println!("{}: {count} mutations, {refused} refused, {largest} bytes", target.name);
        // Much of the damage falls on names and texts and is none; but a harness that never
        // breaks anything tests nothing.
        assert!(refused >= count / 4, "{}: only {refused} of {count} refused", target.name);
    }
}

/// Files that are small for what they make a careless reader build, near each reader's limits.
fn swollen() -> Vec<(&'static str, Read, Vec<u8>)> {
    let safetensors =
        |header: String| [&(header.len() as u64).to_le_bytes()[..], header.as_bytes()].concat();
    let tensors: String = (0..262_144)
        .map(|n| format!(r#","{n:x}":{{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    let unknown: String = (0..262_144)
        .map(|n| format!(r#","{n:x}":{{"dtype":"","shape":[0],"data_offsets":[0,0]}}"#))
        .collect();
    let texts: String = (0..65_536).map(|n| format!(r#","{n:x}":"""#)).collect();
    let map: String = (0..262_144).map(|n| format!(r#","{n:x}":"{n:x}""#)).collect();

    let gguf = |tensors: u64, entries: u64, rest: Vec<u8>| {
        let counts = [tensors, entries].map(u64::to_le_bytes).concat();
        [b"GGUF\x03\0\0\0".to_vec(), counts, rest, vec![0; 64]].concat()
    };
    let text = |n: u64| [&4u64.to_le_bytes()[..], &(n as u32 | 0x4040_4040).to_le_bytes()].concat();
    let spread = |n: u64| (n & 0x3f) | (n & 0xfc0) << 2 | (n & 0x3f000) << 4;
    let table = (0..262_144).flat_map(|n| {
        [text(spread(n)), vec![0; 4], 2u32.to_le_bytes().to_vec(), vec![0; 8]].concat()
    });
    let entries = (0..65_536)
        .flat_map(|n| [text(spread(n)), 9u32.to_le_bytes().to_vec(), vec![0; 12]].concat());
    let strings = [text(0), 9u32.to_le_bytes().to_vec(), 8u32.to_le_bytes().to_vec()].concat();
    let strings = [strings, 1_000_000u64.to_le_bytes().to_vec(), vec![0; 8_000_000]].concat();

    let pickle = |unit: &[u8], count: usize| {
        let code = [&unit.repeat(count)[..], b"."].concat();
        let mut writer = zip::ZipWriter::new(std::io::Cursor::new(Vec::new()));
        let options = zip::write::SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Stored);
        writer.start_file("m/data.pkl", options).unwrap();
        std::io::Write::write_all(&mut writer, &code).unwrap();
        writer.finish().unwrap().into_inner()
    };
    let field = |number: u8, bytes: &[u8]| {
        let mut length = bytes.len();
        let mut message = vec![number << 3 | 2];
        while length >= 0x80 {
            message.push(length as u8 | 0x80);
            length >>= 7;
        }
        [&message[..], &[length as u8], bytes].concat()
    };
    let onnx = |number, part: &dyn Fn(usize) -> Vec<u8>| {
        let graph: Vec<u8> = (0..262_144).flat_map(|n| field(number, &part(n))).collect();
        field(7, &graph)
    };
    let parameter = |n: usize| {
        let empty_floats = [0x10, 1, 0x08, 0];
        [&empty_floats[..], &field(8, format!("layers.{n}.a").as_bytes())].concat()
    };
    let node = |n: usize| {
        let op = if n.is_multiple_of(2) { &b"Cast"[..] } else { b"MatMulNBits" };
        [field(1, b"a"), field(2, n.to_string().as_bytes()), field(4, op)].concat()
    };
    let inputs = [field(1, b"").repeat(1_000_000), field(4, b"Cast")].concat();
    let wide = [&b"("[..], &b"N".repeat(200_000), b"t"].concat();
    let dictionary = [&b"}("[..], &b"N".repeat(200_000), b"u"].concat();
    vec![
        ("many tensors", read_safetensors, safetensors(format!("{{{}}}", &tensors[1..]))),
        ("many unknown types", read_safetensors, safetensors(format!("{{{}}}", &unknown[1..]))),
        (
            "much metadata",
            read_safetensors,
            safetensors(format!(r#"{{"__metadata__":{{{}}}}}"#, &texts[1..])),
        ),
        ("many initializers", read_onnx, onnx(5, &parameter)),
        ("many nodes", read_onnx, onnx(1, &node)),
        ("many inputs", read_onnx, field(7, &field(1, &inputs))),
        ("deep graph", read_onnx, (0..1000).fold(vec![], |graph, _| field(7, &graph))),
        ("deep header", read_safetensors, safetensors(r#"{"a":["#.repeat(1_000_000))),
        ("many shards", read_index, format!(r#"{{"weight_map":{{{}}}}}"#, &map[1..]).into()),
        ("long table", read_gguf, gguf(262_144, 0, table.collect())),
        ("many entries", read_gguf, gguf(0, 65_536, entries.collect())),
        ("many texts", read_gguf, gguf(0, 1, strings)),
        ("dictionaries", read_pickle, pickle(b"}", 8_000_000)),
        ("pairs", read_pickle, pickle(b"))\x86", 2_000_000)),
        ("nested", read_pickle, pickle(b"\x85", 8_000_000)),
        ("wide tuples", read_pickle, pickle(&wide, 40)),
        ("wide dictionaries", read_pickle, pickle(&dictionary, 40)),
        ("memo", read_pickle, pickle(b"N\x94", 4_000_000)),
        ("marks", read_pickle, pickle(b"(", 8_000_000)),
    ]
}

#[test]
fn files_made_to_swell_take_bounded_memory() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    for (name, read, bytes) in swollen() {
        let (outcome, allocated) = measure(|| read(&bytes));
        println!("{name}: {} bytes, {allocated} allocated, {outcome:?}", bytes.len());
        assert!(
            allocated <= bytes.len() * ALLOCATION_PER_BYTE + ALLOCATION,
            "{name}: {} bytes allocated {allocated}",
            bytes.len()
        );
    }
}

/// Held by each test from beginning to end, because the counters are the whole program's.
static ALONE: Mutex<()> = Mutex::new(());

/// Runs `work` and measures how many bytes more than before were in use at its peak.
fn measure<T>(work: impl FnOnce() -> T) -> (T, usize) {
    let before = LIVE.load(Relaxed);
    PEAK.store(before, Relaxed);
    let result = work();
    (result, PEAK.load(Relaxed).saturating_sub(before))
}

static LIVE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The system's allocator, which counts the bytes in use.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

// SAFETY: every call is passed on unchanged to the system's allocator, which keeps the contract;
// the counters are plain atomics and allocate nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let live = LIVE.fetch_add(layout.size(), Relaxed) + layout.size();
        PEAK.fetch_max(live, Relaxed);
        // SAFETY: the caller's promises about `layout` are those that `System` asks for.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        LIVE.fetch_sub(layout.size(), Relaxed);
        // SAFETY: `pointer` came from `System` through `alloc` above, with this layout.
        unsafe { System.dealloc(pointer, layout) }
    }
}
