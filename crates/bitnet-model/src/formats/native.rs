//! The native `.bitnet` file: a safetensors container whose tensors lie as the kernels read them, so
//! that loading it is mapping it. `docs/formats.md` describes it byte by byte.
//!
//! What had to be worked out or checked about the weights was worked out and checked when the file
//! was written. Reading looks at the header and at what is as small as a norm; a changed weight is
//! found by [`verify`], which reads it all, and otherwise gives other numbers, but is never unsound.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_core::backend::{Activation, ActivationPrecision};
use bitnet_core::mmap::map_file;
use bitnet_core::{
    ColumnCopy, DType, RunCodes, Screen, Tensor, TileLayout, TiledMatrix, WeightScale,
};
use bytes::Bytes;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{Tensors, safetensors};
use crate::arch;
use crate::chat::ChatTemplate;
use crate::config::{
    LayerConfig, ModelConfig, Pooling, Precision, Rope, RopeScaling, TensorNames, WeightRule,
};
use crate::error::{Error, excerpt};
use crate::output::OutputFile;
use crate::source::{Checkpoint, Description};
use crate::tokenizer::{StoredTokenizer, Tokenizer};

/// What a native file has at byte 8, behind the length of its header.
pub const MAGIC: &[u8] = br#"{"__metadata__":{"format":"bitnet","version":""#;

/// The version this program writes.
pub const VERSION: &str = "4";

/// The versions this program reads. Version 3 is the same without quintuples, version 2 without triples
/// too.
const READ: [&str; 3] = ["2", "3", VERSION];

/// The extension of native files, by which a folder's is found.
pub const EXTENSION: &str = "bitnet";

/// Tensors of at least so many bytes begin on a multiple of it in the file.
const PAGE: usize = 4096;

/// Entries of the header's metadata.
const MODEL: &str = "model";
const TOKENIZER: &str = "tokenizer";
/// What a tensor's or entry's digest is filed under, before its name.
const DIGEST: &str = "sha256:";

/// Tensors that are no part of the decoder.
const PADDING: &str = "padding.";
const TOKENIZER_TABLE: &str = "tokenizer.";

/// Whether the bytes of a file begin as a native file's do.
pub fn is_native(bytes: &[u8]) -> bool {
    bytes.get(8..).is_some_and(|header| header.starts_with(MAGIC))
}

/// Whether a tensor of a native file is there for something else than the decoder.
pub(crate) fn is_apart(name: &str) -> bool {
    name.starts_with(PADDING) || name.starts_with(TOKENIZER_TABLE)
}

/// The description of a model: nothing is left to be worked out.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Model {
    architecture: String,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    context_length: usize,
    vocab_size: usize,
    norm_eps: f32,
    #[serde(with = "ActivationName")]
    activation: Activation,
    #[serde(with = "PrecisionName")]
    linear_input: ActivationPrecision,
    embedding_scale: f32,
    attention_scale: f32,
    ropes: Vec<Rope>,
    layers: Vec<LayerConfig>,
    sub_norms: bool,
    head_norms: bool,
    post_norms: bool,
    projection_norm_eps: Option<f32>,
    pooling: Option<Pooling>,
    /// Element type of the embedding.
    embedding: String,
    /// Element type of the output head, if it is not the embedding.
    head: Option<String>,
    chat_template: Option<String>,
    end_ids: BTreeSet<u32>,
    notes: Vec<String>,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "Activation", rename_all = "snake_case")]
enum ActivationName {
    Relu2,
    Silu,
    GeluTanh,
}

#[derive(Serialize, Deserialize)]
#[serde(remote = "ActivationPrecision", rename_all = "snake_case")]
enum PrecisionName {
    Int8,
    F32,
}

/// Element types of tables, by their names in the description.
const TABLE_TYPES: [DType; 6] =
    [DType::F32, DType::F16, DType::BF16, DType::Q8_0, DType::Q4K, DType::Q6K];

fn table_type(name: &str) -> Option<DType> {
    TABLE_TYPES.into_iter().find(|dtype| dtype.to_string() == name)
}

// Reading.

/// Opens a native file whose bytes are given, mapped or in memory; `path` is for error messages.
///
/// # Errors
/// The file is of another version, damaged where it was looked at, or does not fit its description.
pub fn from_bytes(bytes: Bytes, path: &Path) -> Result<Checkpoint, Error> {
    check_version(&bytes, path)?;
    let mut stored = Tensors::default();
    let metadata = safetensors::with_metadata(bytes, path, &mut stored)?;
    let entry = |key: &str| {
        metadata
            .get(key)
            .ok_or_else(|| Error::file(path, format!("has no entry `{key}` in its metadata")))
    };
    let model: Model = serde_json::from_str(entry(MODEL)?)
        .map_err(|error| Error::file(path, format!("its description is broken: {error}")))?;
    let config = model.config().map_err(|reason| Error::file(path, reason))?;

    let table = |name: &str| stored.get(&format!("{TOKENIZER_TABLE}{name}")).ok()?;
    let tokenizer = Tokenizer::from_stored(entry(TOKENIZER)?, table)
        .map_err(|error| Error::file(path, error))?;
    let template = model
        .chat_template
        .as_deref()
        .map(ChatTemplate::new)
        .transpose()
        .map_err(|error| Error::file(path, error))?;

    let mut tensors = Tensors::default();
    for name in stored.names() {
        let tensor = stored.get(name)?.expect("it was listed");
        let dtype = match name.strip_suffix(".weight") {
            Some("embedding") => Some(&model.embedding),
            Some("head") => model.head.as_ref(),
            _ => None,
        };
        let tensor = match dtype {
            Some(dtype) => as_table(&tensor, dtype, config.hidden_size)
                .map_err(|reason| Error::tensor(path, name, reason))?,
            None => tensor.clone(),
        };
        tensors.insert(path, name.to_owned(), Ok(tensor))?;
    }
    let description = Description {
        path: path.to_owned(),
        format: "native",
        config,
        tokenizer: Arc::new(tokenizer),
        template,
        end_ids: model.end_ids,
        notes: model.notes,
    };
    Ok(Checkpoint { description, tensors })
}

/// Files of other versions are told apart from damaged ones.
fn check_version(bytes: &[u8], path: &Path) -> Result<(), Error> {
    if !is_native(bytes) {
        let reason = "is not a .bitnet file: it does not begin like one; convert the model again";
        return Err(Error::file(path, reason));
    }
    let rest = &bytes[8 + MAGIC.len()..];
    let end = rest.iter().take(32).position(|&byte| byte == b'"').unwrap_or(0);
    if !READ.iter().any(|version| version.as_bytes() == &rest[..end]) {
        let reason = format!(
            "is a .bitnet file of version `{}` and this program reads versions {}: update the \
             program, or convert the model again",
            excerpt(&String::from_utf8_lossy(&rest[..end])),
            READ.join(", ")
        );
        return Err(Error::file(path, reason));
    }
    Ok(())
}

/// A table whose element type safetensors cannot say.
fn as_table(tensor: &Tensor, dtype: &str, cols: usize) -> Result<Tensor, String> {
    let dtype = table_type(dtype)
        .ok_or_else(|| format!("its element type `{}` is not read", excerpt(dtype)))?;
    let stored_as = if dtype.is_float() { dtype } else { DType::U8 };
    if tensor.dtype() != stored_as || tensor.shape().len() != 2 {
        return Err(format!(
            "is {} {:?}: a matrix of {dtype} stored as {stored_as} is needed",
            tensor.dtype(),
            tensor.shape()
        ));
    }
    let rows = tensor.shape()[0];
    Tensor::new(dtype, vec![rows, cols], tensor.data().clone()).map_err(|error| error.to_string())
}

impl Model {
    fn of(described: &Described<'_>, embedding: DType, head: Option<DType>) -> Option<Self> {
        let c = described.config;
        let Precision::Known(linear_input) = c.precision else { return None };
        Some(Model {
            architecture: c.architecture.to_owned(),
            hidden_size: c.hidden_size,
            intermediate_size: c.intermediate_size,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_size: c.head_size,
            context_length: c.context_length,
            vocab_size: c.vocab_size?,
            norm_eps: c.norm_eps,
            activation: c.activation,
            linear_input,
            embedding_scale: c.embedding_scale,
            attention_scale: c.attention_scale,
            ropes: c.ropes.clone(),
            layers: c.layers.clone(),
            sub_norms: c.sub_norms,
            head_norms: c.head_norms,
            post_norms: c.post_norms,
            projection_norm_eps: c.projection_norm_eps,
            pooling: c.pooling,
            embedding: embedding.to_string(),
            head: head.map(|head| head.to_string()),
            chat_template: described.template.map(|template| template.source().to_owned()),
            end_ids: described.end_ids.clone(),
            notes: described.notes.to_vec(),
        })
    }

    /// The description that the decoder runs by, if it is one that an architecture could have made.
    fn config(&self) -> Result<ModelConfig, String> {
        let known = arch::ALL.iter().find(|known| known.name == self.architecture);
        let Some(architecture) = known.map(|known| known.name) else {
            return Err(format!(
                "its architecture is `{}`, which is not supported",
                excerpt(&self.architecture)
            ));
        };
        let attention = self.heads.saturating_mul(self.head_size);
        let sizes = [
            ("hidden_size", self.hidden_size, arch::WIDEST),
            ("intermediate_size", self.intermediate_size, arch::WIDEST),
            ("heads", self.heads, arch::WIDEST),
            ("kv_heads", self.kv_heads, self.heads),
            ("head_size", self.head_size, arch::WIDEST),
            ("heads * head_size", attention, arch::WIDEST),
            ("context_length", self.context_length, 1 << 31),
            ("vocab_size", self.vocab_size, 1 << 31),
            ("layers", self.layers.len(), arch::MOST_LAYERS),
            ("ropes", self.ropes.len(), self.layers.len()),
        ];
        let wrong = sizes.iter().find(|(_, size, most)| !(1..=*most).contains(size));
        if let Some((name, size, most)) = wrong {
            return Err(format!("its description has `{name}` {size}: 1 to {most} are possible"));
        }
        if !self.heads.is_multiple_of(self.kv_heads) || !self.head_size.is_multiple_of(2) {
            return Err(format!(
                "its description has {} heads of {} for {} key/value heads, which do not fit",
                self.heads, self.head_size, self.kv_heads
            ));
        }
        let mut numbers = vec![self.norm_eps, self.embedding_scale, self.attention_scale];
        numbers.extend(self.projection_norm_eps);
        for rope in &self.ropes {
            numbers.push(rope.theta);
            match rope.scaling {
                RopeScaling::None => {}
                RopeScaling::Linear { factor } => numbers.push(factor),
                RopeScaling::Llama3 { factor, low, high, original_context } => {
                    numbers.extend([factor, low, high, original_context, high - low]);
                }
            }
        }
        if let Some(number) = numbers.iter().find(|number| !(number.is_finite() && **number > 0.0))
        {
            return Err(format!("its description has {number} where a positive number is needed"));
        }
        let fits = |layer: &LayerConfig| layer.rope < self.ropes.len() && layer.window != Some(0);
        if let Some(layer) = self.layers.iter().position(|layer| !fits(layer)) {
            return Err(format!("its description of layer {layer} is impossible"));
        }
        Ok(ModelConfig {
            architecture,
            hidden_size: self.hidden_size,
            intermediate_size: self.intermediate_size,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_size: self.head_size,
            context_length: self.context_length,
            vocab_size: Some(self.vocab_size),
            tied: Some(self.head.is_none()),
            norm_eps: self.norm_eps,
            norm_offset: 0.0,
            activation: self.activation,
            precision: Precision::Known(self.linear_input),
            embedding_scale: self.embedding_scale,
            attention_scale: self.attention_scale,
            ropes: self.ropes.clone(),
            layers: self.layers.clone(),
            sub_norms: self.sub_norms,
            head_norms: self.head_norms,
            post_norms: self.post_norms,
            projection_norm_eps: self.projection_norm_eps,
            weights: WeightRule::Tiled,
            interleaved_rope_rows: false,
            names: TensorNames::NATIVE,
            pooling: self.pooling,
        })
    }
}

/// Names of the tensors that a matrix is stored in, after its module's name.
const TILES: [(&str, TileLayout); 4] = [
    (".tiles.bands", TileLayout::Bands),
    (".tiles.triples", TileLayout::Triples),
    (".tiles.rows", TileLayout::Rows(RunCodes::TwoBits)),
    (".tiles.rows.quintuples", TileLayout::Rows(RunCodes::Quintuples)),
];
const COLUMNS: [(&str, RunCodes); 2] =
    [(".tiles.columns", RunCodes::TwoBits), (".tiles.columns.quintuples", RunCodes::Quintuples)];
const MULTIPLY: &str = ".scale.multiply";
const DIVIDE: &str = ".scale.divide";
const ROW_SCALES: &str = ".scale.rows";
const GROUP_SCALES: &str = ".scale.groups";

/// The matrix `[rows, cols]` of a module, put together from the tensors that `find` finds. The error
/// is the name of a tensor and what is wrong with it.
pub(crate) fn matrix(
    module: &str,
    [rows, cols]: [usize; 2],
    find: impl Fn(&str) -> Result<Option<Tensor>, Error>,
    error: impl Fn(&str, String) -> Error,
) -> Result<TiledMatrix, Error> {
    let bytes = |suffix: &str| -> Result<Option<Bytes>, Error> {
        let name = format!("{module}{suffix}");
        match find(&name)? {
            Some(tensor) if tensor.dtype() != DType::U8 => {
                Err(error(&name, format!("is {}: tiles are U8", tensor.dtype())))
            }
            found => Ok(found.map(|tensor| tensor.data().clone())),
        }
    };
    let twice =
        |suffix: &str| error(&format!("{module}{suffix}"), "is there in two layouts".to_owned());
    let mut tiles = None;
    for (suffix, layout) in TILES {
        if let Some(bytes) = bytes(suffix)?
            && tiles.replace((layout, bytes)).is_some()
        {
            return Err(twice(suffix));
        }
    }
    let mut columns = None;
    for (suffix, codes) in COLUMNS {
        if let Some(bytes) = bytes(suffix)?
            && columns.replace(ColumnCopy { codes, bytes }).is_some()
        {
            return Err(twice(suffix));
        }
    }
    let Some((layout, tiles)) = tiles else {
        return Err(error(&format!("{module}{}", TILES[0].0), "is missing".to_owned()));
    };
    let mut scale = None;
    for suffix in [MULTIPLY, DIVIDE, ROW_SCALES, GROUP_SCALES] {
        let name = format!("{module}{suffix}");
        let Some(tensor) = find(&name)? else { continue };
        let wrong = |reason: String| error(&name, reason);
        if tensor.dtype() != DType::F32 {
            return Err(wrong(format!("is {}: scales are F32", tensor.dtype())));
        }
        let (numbers, _) = tensor.data().as_chunks::<4>();
        let values: Vec<f32> = numbers.iter().map(|&number| f32::from_le_bytes(number)).collect();
        let found = match (suffix, tensor.shape()) {
            (MULTIPLY, [1]) => WeightScale::Multiply(values[0]),
            (DIVIDE, [1]) => WeightScale::Divide(values[0]),
            (ROW_SCALES, _) => WeightScale::Rows(values),
            (GROUP_SCALES, &[_, groups]) if groups > 0 && cols.is_multiple_of(groups) => {
                WeightScale::Groups { len: cols / groups, values }
            }
            (_, shape) => {
                return Err(wrong(format!("has the shape {shape:?}, which fits nothing")));
            }
        };
        if scale.replace(found).is_some() {
            return Err(wrong("is a second scale of its matrix".to_owned()));
        }
    }
    let Some(scale) = scale else {
        return Err(error(
            &format!("{module}{MULTIPLY}"),
            "is missing, and so is any scale".into(),
        ));
    };
    TiledMatrix::new(rows, cols, scale, layout, tiles, columns)
        .map_err(|reason| error(&format!("{module}{}", TILES[0].0), reason.to_string()))
}

/// How a matrix of a native file is stored, for people.
pub(crate) fn stored_as(module: &str, tensors: &Tensors) -> &'static str {
    let is_there = |(suffix, _): &&(&str, _)| tensors.contains(&format!("{module}{suffix}"));
    match TILES.iter().find(is_there).map(|(_, layout)| layout) {
        Some(TileLayout::Triples) => "5-bit triples",
        Some(TileLayout::Rows(RunCodes::Quintuples)) => "8-bit quintuples",
        _ => "2-bit tiles",
    }
}

/// Compares every tensor of a native file with the digest that was written with it, and returns how
/// many there are.
///
/// # Errors
/// The first one that differs, by name.
pub fn verify(path: &Path) -> Result<usize, Error> {
    let bytes = map_file(path)?;
    check_version(&bytes, path)?;
    let mut tensors = Tensors::default();
    let metadata = safetensors::with_metadata(bytes, path, &mut tensors)?;
    let check = |name: &str, bytes: &[u8]| {
        const AGAIN: &str = "copy the file again, or convert the model again";
        let wrong = |reason: String| Error::tensor(path, name, reason);
        match metadata.get(&format!("{DIGEST}{name}")) {
            None => Err(wrong("has no checksum".to_owned())),
            Some(digest) if *digest != hex(Sha256::digest(bytes).as_slice()) => {
                Err(wrong(format!("is damaged: its checksum differs; {AGAIN}")))
            }
            Some(_) => Ok(()),
        }
    };
    for key in [MODEL, TOKENIZER] {
        check(key, metadata.get(key).map_or(&[][..], |text| text.as_bytes()))?;
    }
    let names: Vec<&str> = tensors.names().filter(|name| !name.starts_with(PADDING)).collect();
    let outcomes: Vec<Result<(), Error>> = names
        .par_iter()
        .map(|name| check(name, tensors.get(name)?.expect("it was listed").data()))
        .collect();
    outcomes.into_iter().collect::<Result<(), _>>()?;
    Ok(names.len())
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

// Writing.

/// A part of a decoder on its way into a file.
pub enum Part {
    /// The embedding or the head `[vocabulary, hidden]`, in one of the types that
    /// [`load_table`](bitnet_core::backend::Backend::load_table) takes.
    Table(Tensor),
    /// The weight of a norm.
    Norm(Vec<f32>),
    /// A matrix from [`tile::tiled`](bitnet_quant::packing::tile::tiled).
    Matrix(TiledMatrix),
    /// The screen of the output head.
    Screen(Screen),
}

/// Everything about a model but its weights, for [`write()`].
#[derive(Clone, Copy)]
pub struct Described<'a> {
    /// Shape and rules. The number of tokens and the precision of linear inputs must be known; what
    /// it says about the weights of a file is not looked at.
    pub config: &'a ModelConfig,
    /// Text to tokens and back.
    pub tokenizer: &'a Tokenizer,
    /// The chat template, if there is one.
    pub template: Option<&'a ChatTemplate>,
    /// Ids that end a text or a turn.
    pub end_ids: &'a BTreeSet<u32>,
    /// What was corrected or decided, for people.
    pub notes: &'a [String],
}

/// Writes a native file from a description and its parts in any order. Each part comes with its
/// [`full_name`](crate::weights::PartPlace::full_name);
/// [`part_places`](crate::weights::part_places) lists which there must be.
///
/// The file grows under another name (`PATH.part`) and is renamed when all of it is on the disk, so
/// that `path` is a whole file or what it was before.
///
/// # Errors
/// A part that is an error, a description that leaves something to be worked out, or a file that
/// cannot be written.
pub fn write(
    path: &Path,
    described: &Described<'_>,
    parts: impl IntoIterator<Item = Result<(String, Part), Error>>,
) -> Result<(), Error> {
    let StoredTokenizer { settings, tables: stored } = described.tokenizer.to_stored();
    let mut writer = Writer::create(path, header_bound(described, &settings))?;
    let mut tables = [None, None];
    for (name, tensor) in &stored {
        writer.tensor(&format!("{TOKENIZER_TABLE}{name}"), tensor)?;
    }
    for part in parts {
        let (name, part) = part?;
        match part {
            Part::Table(table) => {
                tables[usize::from(name != "embedding")] = Some(table.dtype());
                // Safetensors has no block types: a row of blocks is a row of bytes.
                let stored = match table.dtype().is_float() {
                    true => table,
                    false => {
                        let rows = table.rows().max(1);
                        let shape = vec![table.rows(), table.data().len() / rows];
                        Tensor::new(DType::U8, shape, table.data().clone())?
                    }
                };
                writer.tensor(&format!("{name}.weight"), &stored)?;
            }
            Part::Norm(values) => {
                let tensor = Tensor::from_f32(vec![values.len()], &values);
                writer.tensor(&format!("{name}.weight"), &tensor)?;
            }
            Part::Matrix(matrix) => writer.matrix(&name, &matrix)?,
            Part::Screen(screen) => {
                let bytes = screen.data().clone();
                writer.tensor(&name, &Tensor::new(DType::U8, vec![bytes.len()], bytes)?)?;
            }
        }
    }
    let [Some(embedding), head] = tables else {
        return Err(Error::file(path, "cannot be written: there is no embedding"));
    };
    let model = Model::of(described, embedding, head).ok_or_else(|| {
        Error::file(path, "cannot be written: its description leaves something open")
    })?;
    model.config().map_err(|reason| Error::file(path, format!("cannot be written: {reason}")))?;
    let model = serde_json::to_string(&model).expect("texts and numbers");
    writer.finish(&[(MODEL, model), (TOKENIZER, settings)])
}

/// Bytes that the header of such a model fits.
fn header_bound(described: &Described<'_>, settings: &str) -> usize {
    // A name, a type, a shape, two offsets and a digest under the name.
    const ENTRY: usize = 420;
    // Seven matrices of tiles, columns and scales, each with its padding, their norms, and eight
    // norms of the layer.
    const LAYER: usize = 7 * 7 + 8;
    let template = described.template.map_or(0, |template| template.source().len());
    let notes: usize = described.notes.iter().map(|note| note.len() + 4).sum();
    let layers = described.config.layers.len();
    // A control character takes six bytes as JSON, and its backslash two in JSON inside of JSON.
    let texts = 12 * (template + notes) + 7 * settings.len();
    let lists = 16 * described.end_ids.len() + 64 * layers;
    (64 + LAYER * layers) * ENTRY + texts + lists + PAGE
}

/// A file that is being written.
struct Writer {
    output: OutputFile,
    path: PathBuf,
    /// Where the data begins: the header, which is written last, has to fit before.
    data_start: usize,
    position: usize,
    /// Entries of the header.
    entries: Vec<String>,
    /// Digests by name.
    digests: Vec<(String, String)>,
    paddings: usize,
}

impl Writer {
    fn create(path: &Path, header_bytes: usize) -> Result<Self, Error> {
        let data_start = (8 + header_bytes).next_multiple_of(PAGE);
        let mut output = OutputFile::create(path)?;
        let begun = output.file.seek(SeekFrom::Start(data_start as u64));
        begun.map_err(|error| output.failed(error))?;
        Ok(Writer {
            output,
            path: path.to_owned(),
            data_start,
            position: data_start,
            entries: Vec::new(),
            digests: Vec::new(),
            paddings: 0,
        })
    }

    /// Appends a tensor, on a page of its own if it fills one.
    fn tensor(&mut self, name: &str, tensor: &Tensor) -> Result<(), Error> {
        let padding = self.position.next_multiple_of(PAGE) - self.position;
        if tensor.data().len() >= PAGE && padding > 0 {
            self.paddings += 1;
            self.entry(&format!("{PADDING}{}", self.paddings), "U8", &[padding], padding);
            self.output.write(&[0; PAGE][..padding])?;
        }
        self.entry(name, &tensor.dtype().to_string(), tensor.shape(), tensor.data().len());
        let mut digest = Sha256::new();
        for piece in tensor.data().chunks(1 << 20) {
            digest.update(piece);
            self.output.write(piece)?;
        }
        self.digests.push((name.to_owned(), hex(digest.finalize().as_slice())));
        Ok(())
    }

    fn entry(&mut self, name: &str, dtype: &str, shape: &[usize], len: usize) {
        let begin = self.position - self.data_start;
        self.position += len;
        let (name, end) = (json(name), begin + len);
        self.entries.push(format!(
            "{name}:{{\"dtype\":\"{dtype}\",\"shape\":{shape:?},\"data_offsets\":[{begin},{end}]}}"
        ));
    }

    fn matrix(&mut self, module: &str, matrix: &TiledMatrix) -> Result<(), Error> {
        let bytes = |bytes: &Bytes| Tensor::new(DType::U8, vec![bytes.len()], bytes.clone());
        const NAMED: &str = "every layout has a name";
        let suffix = TILES.iter().find(|(_, layout)| *layout == matrix.layout());
        let (suffix, _) = suffix.expect(NAMED);
        self.tensor(&format!("{module}{suffix}"), &bytes(matrix.tiles())?)?;
        if let Some(copy) = matrix.columns() {
            let (suffix, _) = COLUMNS.iter().find(|(_, codes)| *codes == copy.codes).expect(NAMED);
            self.tensor(&format!("{module}{suffix}"), &bytes(&copy.bytes)?)?;
        }
        let (suffix, shape) = match matrix.scale() {
            WeightScale::Multiply(_) => (MULTIPLY, vec![1]),
            WeightScale::Divide(_) => (DIVIDE, vec![1]),
            WeightScale::Rows(values) => (ROW_SCALES, vec![values.len()]),
            WeightScale::Groups { len, .. } => {
                (GROUP_SCALES, vec![matrix.rows(), matrix.cols() / len])
            }
        };
        let scales = Tensor::from_f32(shape, matrix.scale().values());
        self.tensor(&format!("{module}{suffix}"), &scales)
    }

    /// Writes the header and gives the file its name.
    fn finish(mut self, texts: &[(&str, String)]) -> Result<(), Error> {
        let mut header = String::from_utf8(MAGIC.to_vec()).expect("ASCII");
        header += &format!("{VERSION}\"");
        for (key, text) in texts {
            self.digests.push(((*key).to_owned(), hex(Sha256::digest(text).as_slice())));
            header += &format!(",{}:{}", json(key), json(text));
        }
        for (name, digest) in &self.digests {
            header += &format!(",{}:\"{digest}\"", json(&format!("{DIGEST}{name}")));
        }
        header.push('}');
        for entry in &self.entries {
            header.push(',');
            header += entry;
        }
        header.push('}');
        let length = self.data_start - 8;
        if header.len() > length {
            return Err(Error::file(
                &self.path,
                format!("cannot be written: its header of {} bytes is too long", header.len()),
            ));
        }
        header.extend(std::iter::repeat_n(' ', length - header.len()));
        let write = |file: &mut File| {
            file.seek(SeekFrom::Start(8))?;
            file.write_all(header.as_bytes())?;
            // All else is on the disk before the length makes it a header.
            file.sync_data()?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&(length as u64).to_le_bytes())
        };
        write(&mut self.output.file).map_err(|error| self.output.failed(error))?;
        self.output.finish()
    }
}

fn json(text: &str) -> String {
    serde_json::to_string(text).expect("a text")
}
