//! Keys and values of a conversation in a file: what was read once need not be read again.
//!
//! The file has the token ids of a conversation, the keys and values of all of its whole blocks, and
//! what they depend on besides: the model, the type of storage and the size of a block. `docs/formats.md`
//! has every byte. Fewer tokens than a block has are left over at the end; their keys and values are
//! computed together with what comes after them.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_core::backend::{KvLayout, KvType};
use sha2::{Digest, Sha256};

use crate::error::Error;
use crate::grammar::Vocabulary;
use crate::session::{AnyDecoder, SessionOptions};

/// What the file begins with.
const MAGIC: [u8; 8] = *b"BITNETKV";
const VERSION: u32 = 1;

/// Bytes before the token ids.
const HEADER: usize = 68;
/// Bytes of a checksum.
const DIGEST: usize = 32;

/// Tokens by whose logits a model is told from others.
const PROBE: usize = 16;

/// Why a conversation cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum ConversationError {
    /// The file system's reason.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// A folder, a device or a pipe.
    #[error("it is not a file")]
    NotAFile,
    /// A file of something else.
    #[error("it is not a saved conversation")]
    NotAConversation,
    /// A file of another version of the format.
    #[error("its version is {0} and this program reads {VERSION}: save the conversation anew")]
    Version(u32),
    /// Keys and values of another model.
    #[error("it was saved with another model: load that one, or read the conversation anew")]
    OtherModel,
    /// Keys and values of another storage type.
    #[error("it holds keys and values of type {found} and the engine has {}: set the KV type to \
             {found}, or read the conversation anew", engine.name())]
    OtherKvType {
        /// The type of those in the file.
        found: String,
        /// The type of the engine.
        engine: KvType,
    },
    /// Blocks of another size. How a block is laid out depends on it.
    #[error(
        "its blocks have {found} tokens and those of the engine {engine}: set the tokens per KV \
             block to {found}, or read the conversation anew"
    )]
    OtherBlocks {
        /// Tokens of a block in the file.
        found: usize,
        /// Tokens of a block of the engine.
        engine: usize,
    },
    /// More tokens than the model's context.
    #[error("it claims {found} tokens and the model's context has {context_length}")]
    TooLong {
        /// Tokens that the file claims.
        found: usize,
        /// Tokens the model can hold.
        context_length: usize,
    },
    /// More or fewer bytes than the header says.
    #[error("it has {found} bytes where {expected} belong: it is cut short or damaged")]
    Length {
        /// Bytes by the header.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// Other bytes than were written.
    #[error("its checksum is wrong: it is damaged")]
    Checksum,
    /// More blocks than there are, or than nobody uses.
    #[error(
        "its {needed} blocks of keys and values find no room: give the KV cache more memory, or \
             try again when fewer requests run"
    )]
    NoRoom {
        /// Blocks that it takes.
        needed: usize,
    },
    /// Others have taken the place of what was to be saved.
    #[error("other requests have taken the place of its keys and values: try again when fewer run")]
    Displaced,
    /// An engine that finds no prefixes again.
    #[error("the engine does not use prefixes again: turn the shortcut `prefix` on")]
    NoPrefixes,
}

impl ConversationError {
    /// The error of this file.
    pub(crate) fn at(self, path: &Path) -> Error {
        Error::Conversation { path: path.to_owned(), reason: self }
    }
}

/// What an engine expects of a file.
#[derive(Clone, Copy)]
pub(crate) struct Expected {
    pub(crate) layout: KvLayout,
    pub(crate) context_length: usize,
    pub(crate) fingerprint: [u8; DIGEST],
}

/// What tells a model from others of the same shape, the same on every machine and for every format
/// of its file: a hash of its logits after some tokens. What these cannot show, the windows of the
/// layers, is hashed too.
pub(crate) fn fingerprint(
    decoder: &dyn AnyDecoder,
    vocabulary: Arc<Vocabulary>,
) -> Result<[u8; DIGEST], Error> {
    let (config, vocab_size) = (decoder.config(), decoder.vocab_size());
    let count = PROBE.min(config.context_length);
    let probe: Vec<u32> = (0..count).map(|i| (i * vocab_size / count) as u32).collect();
    let mut logits = Vec::new();
    decoder.session(SessionOptions::default(), vocabulary)?.feed(&probe, &mut logits)?;
    let mut digest = Sha256::new();
    for layer in &config.layers {
        digest.update((layer.window.unwrap_or(0) as u64).to_le_bytes());
    }
    for logit in logits {
        digest.update(logit.to_le_bytes());
    }
    Ok(digest.finalize().into())
}

fn kv_type_code(kv_type: KvType) -> u32 {
    match kv_type {
        KvType::F32 => 0,
        KvType::F16 => 1,
        // 2 had one row of a panel after another.
        KvType::Int8 => 3,
    }
}

/// A file that is being written: under another name, until all of it is on the disk.
pub(crate) struct Writer {
    file: BufWriter<File>,
    digest: Sha256,
    path: PathBuf,
    part: PathBuf,
    finished: bool,
}

impl Writer {
    /// Begins a file with the header and the tokens.
    pub(crate) fn create(
        path: &Path,
        expected: &Expected,
        tokens: &[u32],
    ) -> Result<Self, ConversationError> {
        let name = path.file_name().ok_or(ConversationError::NotAFile)?;
        let mut part = name.to_owned();
        part.push(".part");
        let part = path.with_file_name(part);
        let mut writer = Writer {
            file: BufWriter::new(File::create(&part)?),
            digest: Sha256::new(),
            path: path.to_owned(),
            part,
            finished: false,
        };
        let KvLayout { layers, kv_heads, head_size, block_tokens, kv_type } = expected.layout;
        writer.write(&MAGIC)?;
        let numbers = [layers, kv_heads, head_size, block_tokens, tokens.len()];
        let numbers = numbers.map(|number| u32::try_from(number).expect("a model has fewer"));
        for number in [VERSION, kv_type_code(kv_type)].into_iter().chain(numbers) {
            writer.write(&number.to_le_bytes())?;
        }
        writer.write(&expected.fingerprint)?;
        for token in tokens {
            writer.write(&token.to_le_bytes())?;
        }
        Ok(writer)
    }

    /// Appends bytes.
    pub(crate) fn write(&mut self, bytes: &[u8]) -> Result<(), ConversationError> {
        self.digest.update(bytes);
        Ok(self.file.write_all(bytes)?)
    }

    /// Appends the checksum and gives the file its name.
    pub(crate) fn finish(mut self) -> Result<(), ConversationError> {
        let digest = std::mem::take(&mut self.digest).finalize();
        self.file.write_all(&digest)?;
        self.file.flush()?;
        self.file.get_ref().sync_all()?;
        fs::rename(&self.part, &self.path)?;
        self.finished = true;
        Ok(())
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        if !self.finished {
            let _ = fs::remove_file(&self.part);
        }
    }
}

/// A file whose header and tokens have been read and fit the engine.
pub(crate) struct Reader {
    file: File,
    digest: Sha256,
    /// The token ids.
    pub(crate) tokens: Vec<u32>,
}

impl fmt::Debug for Reader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reader").field("tokens", &self.tokens).finish_non_exhaustive()
    }
}

impl Reader {
    /// Reads the header and the tokens. Nothing is allocated that the file merely claims.
    pub(crate) fn open(path: &Path, expected: &Expected) -> Result<Self, ConversationError> {
        // To open a pipe would be to wait for whoever writes to it.
        if !fs::metadata(path)?.is_file() {
            return Err(ConversationError::NotAFile);
        }
        let file = File::open(path)?;
        let length = file.metadata()?.len();
        let mut reader = Reader { file, digest: Sha256::new(), tokens: Vec::new() };
        let mut header = [0; HEADER];
        if length < HEADER as u64 {
            return Err(ConversationError::NotAConversation);
        }
        reader.read(&mut header)?;
        let (magic, rest) = header.split_at(MAGIC.len());
        let (numbers, fingerprint) = rest.split_at(7 * 4);
        if magic != MAGIC {
            return Err(ConversationError::NotAConversation);
        }
        let number = |index: usize| {
            u32::from_le_bytes(numbers[4 * index..][..4].try_into().expect("four bytes"))
        };
        let extent = |index: usize| number(index) as usize;
        if number(0) != VERSION {
            return Err(ConversationError::Version(number(0)));
        }
        let KvLayout { layers, kv_heads, head_size, block_tokens, kv_type } = expected.layout;
        if [extent(2), extent(3), extent(4)] != [layers, kv_heads, head_size] {
            return Err(ConversationError::OtherModel);
        }
        if number(1) != kv_type_code(kv_type) {
            let all = [KvType::F32, KvType::F16, KvType::Int8];
            let found = all.into_iter().find(|kv_type| kv_type_code(*kv_type) == number(1));
            let found =
                found.map_or_else(|| format!("number {}", number(1)), |t| t.name().to_owned());
            return Err(ConversationError::OtherKvType { found, engine: kv_type });
        }
        if extent(5) != block_tokens {
            let found = extent(5);
            return Err(ConversationError::OtherBlocks { found, engine: block_tokens });
        }
        let (count, context_length) = (extent(6), expected.context_length);
        if count > context_length {
            return Err(ConversationError::TooLong { found: count, context_length });
        }
        // A context is short, and a block of the engine is there: neither can overflow.
        let blocks = count / block_tokens * expected.layout.block_bytes();
        let whole = (HEADER + 4 * count + blocks + DIGEST) as u64;
        if length != whole {
            return Err(ConversationError::Length { expected: whole, found: length });
        }
        if fingerprint != expected.fingerprint {
            return Err(ConversationError::OtherModel);
        }
        let mut bytes = vec![0; 4 * count];
        reader.read(&mut bytes)?;
        let ids = bytes.as_chunks::<4>().0.iter();
        reader.tokens = ids.map(|id| u32::from_le_bytes(*id)).collect();
        Ok(reader)
    }

    /// Reads the next bytes, all of them.
    pub(crate) fn read(&mut self, bytes: &mut [u8]) -> Result<(), ConversationError> {
        self.file.read_exact(bytes)?;
        self.digest.update(bytes);
        Ok(())
    }

    /// Compares what was read with the checksum.
    pub(crate) fn finish(mut self) -> Result<Vec<u32>, ConversationError> {
        let mut written = [0; DIGEST];
        self.file.read_exact(&mut written)?;
        match <[u8; DIGEST]>::from(self.digest.finalize()) == written {
            true => Ok(self.tokens),
            false => Err(ConversationError::Checksum),
        }
    }
}
