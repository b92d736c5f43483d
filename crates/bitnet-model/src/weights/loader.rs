//! Finds the parts of a decoder among the tensors of a checkpoint, checks and decodes them.

use std::collections::BTreeSet;
use std::ops::{ControlFlow, Range};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::channel;

use bitnet_core::backend::{ActivationPrecision, Backend, BitLinear, GatedFfn, Norm};
use bitnet_core::mmap::unmapped;
use bitnet_core::{ColumnCopy, DType, Screen, Tensor, TernaryMatrix, TiledMatrix, WeightScale};
use bitnet_quant::packing::{self, blocks::decode_row, tile};
use bitnet_quant::ternary;
use rayon::prelude::*;

use super::places::{LinearPlace, SCREEN, linears, norms};
use super::{LoadOptions, Tables, packed_bytes};
use crate::config::{LayerConfig, ModelConfig, Precision, TensorNames, WeightRule};
use crate::decoder::Layer;
use crate::error::Error;
use crate::formats::{Tensors, native};

/// Finds and checks the parts of a decoder in a checkpoint.
pub(crate) struct Loader<'a> {
    path: &'a Path,
    config: &'a ModelConfig,
    tensors: &'a Tensors,
    options: LoadOptions,
    /// Names of the tensors that were read, to find those that nobody asked for.
    used: Mutex<BTreeSet<String>>,
}

impl<'a> Loader<'a> {
    /// `path` is the model's, for error messages.
    pub(crate) fn new(
        path: &'a Path,
        config: &'a ModelConfig,
        tensors: &'a Tensors,
        options: LoadOptions,
    ) -> Self {
        Loader { path, config, tensors, options, used: Mutex::default() }
    }

    /// Whether the weights were laid out and checked when their file was written.
    pub(super) fn is_tiled(&self) -> bool {
        self.config.weights == WeightRule::Tiled
    }

    /// The screen that a native file brings along for its head of so many rows.
    pub(crate) fn screen(&self, rows: usize) -> Result<Option<Screen>, Error> {
        if !self.is_tiled() {
            return Ok(None);
        }
        let Some(tensor) = self.find(SCREEN)? else { return Ok(None) };
        let screen = Screen::new(rows, self.config.hidden_size, tensor.data().clone());
        screen.map(Some).map_err(|error| self.error(SCREEN, error))
    }

    /// What the checkpoint calls its tensors.
    pub(crate) fn names(&self) -> &TensorNames {
        &self.config.names
    }

    fn error(&self, name: &str, reason: impl ToString) -> Error {
        Error::tensor(self.tensors.path_of(name).unwrap_or(self.path), name, reason)
    }

    /// Name of a tensor outside the layers. Base models leave out `model.`.
    fn top_level(&self, name: &str) -> String {
        let prefixed = format!("model.{name}.weight");
        if self.tensors.contains(&prefixed) { prefixed } else { format!("{name}.weight") }
    }

    /// Name of a layer's module, without suffix.
    pub(super) fn module(&self, layer: usize, name: &str) -> String {
        let plain = format!("{}.{layer}.{name}", self.config.names.layer);
        let prefixed = format!("model.{plain}");
        // The attention norm is there whatever else is, so it tells which form the names have.
        let probe = format!(
            "model.{}.{layer}.{}.weight",
            self.config.names.layer, self.config.names.attention_norm
        );
        if self.tensors.contains(&probe) { prefixed } else { plain }
    }

    fn find(&self, name: &str) -> Result<Option<Tensor>, Error> {
        let tensor = self.tensors.get(name)?;
        if tensor.is_some() {
            self.used.lock().expect("no panic while held").insert(name.to_owned());
        }
        Ok(tensor)
    }

    fn need(&self, name: &str) -> Result<Tensor, Error> {
        self.find(name)?.ok_or_else(|| {
            self.error(name, format!("is missing, but {} has it", self.config.architecture))
        })
    }

    /// The embedding or the head, `[vocabulary, hidden]`.
    fn table(&self, name: &str) -> Result<Tensor, Error> {
        let name = self.top_level(name);
        let tensor = self.need(&name)?;
        let hidden = self.config.hidden_size;
        if tensor.shape().len() != 2 || tensor.cols() != hidden || tensor.rows() == 0 {
            return Err(self.error(
                &name,
                format!("has shape {:?} but [vocabulary, {hidden}] is needed", tensor.shape()),
            ));
        }
        let float = matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16);
        if !float && !matches!(tensor.dtype(), DType::Q8_0 | DType::Q4K | DType::Q6K) {
            return Err(self.error(
                &name,
                format!(
                    "is {}: an embedding or head must be F32, F16, BF16, Q8_0, Q4_K or Q6_K",
                    tensor.dtype()
                ),
            ));
        }
        Ok(tensor)
    }

    pub(crate) fn tables(&self) -> Result<Tables, Error> {
        let names = &self.config.names;
        let embedding = self.table(names.embedding)?;
        if let Some(stated) = self.config.vocab_size
            && stated != embedding.rows()
        {
            return Err(self.error(
                &self.top_level(names.embedding),
                format!("has {} rows but the configuration says {stated} tokens", embedding.rows()),
            ));
        }
        let head_name = self.top_level(names.head);
        let stored = self.tensors.contains(&head_name);
        if !stored && self.config.tied == Some(false) && self.config.pooling.is_none() {
            return Err(self.error(
                &head_name,
                "is missing, but config.json says that the head is not the embedding",
            ));
        }
        if !stored {
            return Ok(Tables { embedding, head: None });
        }
        if self.config.tied == Some(true) {
            // A stored copy of a tied head is known and not looked at, as in transformers.
            self.find(&head_name)?;
            return Ok(Tables { embedding, head: None });
        }
        let head = self.table(names.head)?;
        if head.rows() != embedding.rows() {
            return Err(self.error(
                &head_name,
                format!("has {} rows but the embedding has {}", head.rows(), embedding.rows()),
            ));
        }
        Ok(Tables { embedding, head: Some(head) })
    }

    /// Checks that the embedding and the head hold finite numbers.
    pub(crate) fn check_tables(
        &self,
        embedding: &Tensor,
        head: Option<&Tensor>,
    ) -> Result<(), Error> {
        let names = &self.config.names;
        self.check_finite(&self.top_level(names.embedding), embedding)?;
        head.map_or(Ok(()), |head| self.check_finite(&self.top_level(names.head), head))
    }

    /// Zero times a weight must be zero, which takes finite weights.
    fn check_finite(&self, name: &str, tensor: &Tensor) -> Result<(), Error> {
        let bad = (0..tensor.rows()).into_par_iter().find_first(|&row| {
            let mut values = vec![0.0f32; tensor.cols()];
            decode_row(tensor.dtype(), tensor.row(row), &mut values);
            !values.iter().all(|value| value.is_finite())
        });
        match bad {
            None => Ok(()),
            Some(row) => {
                Err(self.error(name, format!("row {row} holds a number that is not finite")))
            }
        }
    }

    /// The weight of a norm, `offset` added.
    fn norm(&self, name: &str, len: usize, offset: f32) -> Result<Vec<f32>, Error> {
        let tensor = self.need(name)?;
        if tensor.shape() != [len] {
            return Err(
                self.error(name, format!("has shape {:?} but [{len}] is needed", tensor.shape()))
            );
        }
        if !tensor.dtype().is_float() {
            return Err(self.error(name, format!("is {}: a norm must be float", tensor.dtype())));
        }
        let mut values = vec![0.0f32; len];
        decode_row(tensor.dtype(), tensor.data(), &mut values);
        values.iter_mut().for_each(|value| *value += offset);
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(self.error(name, format!("element {index} is not a finite number")));
        }
        Ok(values)
    }

    /// The weight of the norm before the head.
    pub(crate) fn final_norm(&self) -> Result<Vec<f32>, Error> {
        let name = self.top_level(self.config.names.final_norm);
        self.norm(&name, self.config.hidden_size, self.config.norm_offset)
    }

    /// The weight of one of the model's own norms in a layer.
    pub(crate) fn layer_norm(
        &self,
        layer: usize,
        name: &str,
        len: usize,
    ) -> Result<Vec<f32>, Error> {
        let name = format!("{}.weight", self.module(layer, name));
        self.norm(&name, len, self.config.norm_offset)
    }

    /// The weight of the norm that a projection has on its own input.
    pub(crate) fn projection_norm(
        &self,
        layer: usize,
        name: &str,
        len: usize,
    ) -> Result<Vec<f32>, Error> {
        let module = self.module(layer, name);
        let name = format!("{module}{}.weight", self.config.names.projection_norm);
        self.norm(&name, len, 0.0)
    }

    /// How linear layers take their input, decided once for the whole model.
    pub(crate) fn precision(&self, notes: &mut Vec<String>) -> Result<ActivationPrecision, Error> {
        if let Some(precision) = self.options.precision {
            return Ok(precision);
        }
        if self.options.ternarise {
            return Ok(ActivationPrecision::Int8);
        }
        let c = self.config;
        match c.precision {
            Precision::Known(precision) => Ok(precision),
            Precision::ByScale => {
                let down = self.matrix(0, c.names.down, c.hidden_size, c.intermediate_size)?;
                let (precision, word, reason) = if has_one_scale(down.scale()) {
                    (ActivationPrecision::Int8, "int8", "one scale")
                } else {
                    (ActivationPrecision::F32, "f32", "several scales")
                };
                notes.push(format!(
                    "the file does not say how inputs are quantised: {word} is used because each \
                     matrix has {reason}"
                ));
                Ok(precision)
            }
        }
    }

    /// Bytes of a layer's ternary weights.
    pub(super) fn layer_bytes(&self, layer: usize) -> u64 {
        match self.is_tiled() {
            true => self.tensors.size(&self.module(layer, "")).1,
            false => packed_bytes(self.config) / self.config.layers.len() as u64,
        }
    }

    /// All layers, each on the backend of its stage. `done` hears on this thread which one is there,
    /// in any order, and can end the loading.
    pub(super) fn layers<B: Backend>(
        &self,
        backends: &[B],
        stages: &[Range<usize>],
        precision: ActivationPrecision,
        mut done: impl FnMut(usize) -> ControlFlow<()>,
    ) -> Result<Vec<Layer<B>>, Error> {
        // Few threads: each holds one unpacked matrix, and the total is promised to stay small.
        let threads = rayon::ThreadPoolBuilder::new()
            .num_threads(std::thread::available_parallelism().map_or(1, |n| n.get().min(4)))
            .build()
            .map_err(|error| {
                Error::file(self.path, format!("cannot start loading threads: {error}"))
            })?;
        let cancelled = AtomicBool::new(false);
        let (sender, results) = channel();
        let mut layers: Vec<_> = self.config.layers.iter().map(|_| None).collect();
        threads.in_place_scope(|scope| {
            for (backend, range) in backends.iter().zip(stages) {
                for index in range.clone() {
                    let (sender, cancelled) = (sender.clone(), &cancelled);
                    scope.spawn(move |_| {
                        if !cancelled.load(Ordering::Relaxed) {
                            let kind = self.config.layers[index];
                            let layer = self.layer(backend, index, kind, precision);
                            // The receiver waits for every layer.
                            let _ = sender.send((index, layer));
                        }
                    });
                }
            }
            drop(sender);
            for (index, layer) in results {
                layers[index] = Some(layer);
                if !cancelled.load(Ordering::Relaxed) && done(index).is_break() {
                    cancelled.store(true, Ordering::Relaxed);
                }
            }
        });
        if cancelled.into_inner() {
            return Err(Error::Cancelled { path: self.path.to_owned() });
        }
        // The first layer's error is the one that is told, whichever thread was first.
        layers.into_iter().map(|layer| layer.expect("all of them were loaded")).collect()
    }

    /// A tensor as it is to be kept.
    pub(super) fn kept(&self, tensor: Tensor) -> Result<Tensor, Error> {
        if !self.options.in_memory {
            return Ok(tensor);
        }
        let bytes = unmapped(tensor.data())?;
        Ok(Tensor::new(tensor.dtype(), tensor.shape().to_vec(), bytes)?)
    }

    /// A screen as it is to be kept.
    pub(super) fn kept_screen(&self, screen: Screen) -> Result<Screen, Error> {
        if !self.options.in_memory {
            return Ok(screen);
        }
        Ok(Screen::new(screen.rows(), screen.cols(), unmapped(screen.data())?)?)
    }

    /// A matrix as it is to be kept.
    fn kept_matrix(&self, matrix: TiledMatrix) -> Result<TiledMatrix, Error> {
        if !self.options.in_memory {
            return Ok(matrix);
        }
        let tiles = unmapped(matrix.tiles())?;
        let columns = matrix.columns().map(|ColumnCopy { codes, bytes }| {
            Ok::<_, Error>(ColumnCopy { codes: *codes, bytes: unmapped(bytes)? })
        });
        let columns = columns.transpose()?;
        let (rows, cols, layout) = (matrix.rows(), matrix.cols(), matrix.layout());
        Ok(TiledMatrix::new(rows, cols, matrix.scale().clone(), layout, tiles, columns)?)
    }

    fn layer<B: Backend>(
        &self,
        backend: &B,
        index: usize,
        kind: LayerConfig,
        precision: ActivationPrecision,
    ) -> Result<Layer<B>, Error> {
        let c = self.config;
        let [attention_norm, q_norm, k_norm, attention_sub_norm, post_attention_norm, rest @ ..] =
            norms(c).map(|norm| {
                norm.map(|(name, len)| {
                    let weight = backend.load_vector(&self.layer_norm(index, name, len)?)?;
                    Ok::<_, Error>(Norm { weight, eps: c.norm_eps })
                })
                .transpose()
            });
        let [ffn_norm, ffn_sub_norm, post_ffn_norm] = rest;
        let always = "every model has it";
        let attention_norm = attention_norm?.expect(always);
        let [q, k, v, o, gate, up, down] =
            linears(c).map(|place| self.linear(backend, index, &place, precision));
        Ok(Layer {
            kind,
            attention_norm,
            q: q?,
            k: k?,
            v: v?,
            o: o?,
            q_norm: q_norm?,
            k_norm: k_norm?,
            attention_sub_norm: attention_sub_norm?,
            post_attention_norm: post_attention_norm?,
            ffn_norm: ffn_norm?.expect(always),
            ffn: GatedFfn {
                gate: gate?,
                up: up?,
                down: down?,
                activation: c.activation,
                sub_norm: ffn_sub_norm?,
            },
            post_ffn_norm: post_ffn_norm?,
        })
    }

    fn linear<B: Backend>(
        &self,
        backend: &B,
        layer: usize,
        place: &LinearPlace,
        precision: ActivationPrecision,
    ) -> Result<BitLinear<B>, Error> {
        let &LinearPlace { name, rows, cols, usage } = place;
        let norm = match self.config.projection_norm_eps {
            None => None,
            Some(eps) => {
                let weight = self.projection_norm(layer, name, cols)?;
                Some(Norm { weight: backend.load_vector(&weight)?, eps })
            }
        };
        let weight = if self.is_tiled() {
            let module = self.module(layer, name);
            let matrix = self.kept_matrix(self.tiled(&module, rows, cols)?)?;
            backend
                .load_tiled(&matrix, precision)
                .map_err(|error| self.error(&format!("{module}.tiles"), error))?
        } else {
            backend.load_linear(&self.matrix(layer, name, rows, cols)?, precision, usage)?
        };
        Ok(BitLinear { weight, norm })
    }

    /// A module's matrix as a native file has it.
    fn tiled(&self, module: &str, rows: usize, cols: usize) -> Result<TiledMatrix, Error> {
        native::matrix(
            module,
            [rows, cols],
            |name| self.find(name),
            |name, reason| self.error(name, reason),
        )
    }

    /// One ternary matrix, from whatever the checkpoint stores for it.
    pub(crate) fn matrix(
        &self,
        layer: usize,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<TernaryMatrix, Error> {
        let matrix = self.stored_matrix(&self.module(layer, name), rows, cols)?;
        let names = &self.config.names;
        if self.config.interleaved_rope_rows && (name == names.q || name == names.k) {
            return Ok(matrix.reorder_rows(&self.half_split_order(rows)));
        }
        Ok(matrix)
    }

    /// The float weights `[rows, cols]` of one linear layer of a dense model.
    pub(crate) fn dense(
        &self,
        layer: usize,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Tensor, Error> {
        let full_name = format!("{}.weight", self.module(layer, name));
        let weight = self.need(&full_name)?;
        if weight.shape() != [rows, cols] || !weight.dtype().is_float() {
            return Err(self.error(
                &full_name,
                format!("is {} {:?}: floats are needed", weight.dtype(), weight.shape()),
            ));
        }
        let names = &self.config.names;
        if !(self.config.interleaved_rope_rows && (name == names.q || name == names.k)) {
            return Ok(weight.clone());
        }
        let order = self.half_split_order(rows);
        let data: Vec<u8> = order.iter().flat_map(|&row| weight.row(row)).copied().collect();
        Ok(Tensor::new(weight.dtype(), vec![rows, cols], data.into())?)
    }

    /// A module's matrix with its rows as they are stored.
    pub(super) fn stored_matrix(
        &self,
        module: &str,
        rows: usize,
        cols: usize,
    ) -> Result<TernaryMatrix, Error> {
        if self.is_tiled() {
            let matrix = self.tiled(module, rows, cols)?;
            return tile::untiled(&matrix)
                .map_err(|error| self.error(&format!("{module}.tiles"), error));
        }
        let weight_name = format!("{module}.weight");
        let weight = self.need(&weight_name)?;
        let packed = weight.dtype() == DType::U8;
        let shape = if packed { [rows.div_ceil(4), cols] } else { [rows, cols] };
        if weight.shape() != shape {
            return Err(self.error(
                &weight_name,
                format!("has shape {:?} but the configuration makes it {shape:?}", weight.shape()),
            ));
        }
        let failed = |error: bitnet_core::Error| self.error(&weight_name, error);
        let rule = self.config.weights;
        match weight.dtype() {
            DType::U8 => {
                let scale = self.scale(module, rows, cols)?;
                packing::hf::decode(&weight, rows, scale).map_err(failed)
            }
            dtype if dtype.is_ternary() => {
                packing::decode_ternary(&weight, self.options.i2s_layout).map_err(failed)
            }
            dtype if !dtype.is_float() => Err(self.error(
                &weight_name,
                format!("is {dtype}: a linear layer must be ternary or float"),
            )),
            _ if rule == WeightRule::Exact && self.options.ternarise => {
                ternary::absmean(&weight).map_err(failed)
            }
            _ if rule == WeightRule::Exact => ternary::exact(&weight).map_err(|error| {
                self.error(
                    &weight_name,
                    format!(
                        "{error}; this is a dense model, and only ternary models run here; \
                         `bitnet convert --ternarise` makes one of it"
                    ),
                )
            }),
            // A float GGUF holds either weights that were ternarised before, or master weights.
            _ if self.config.names.layer == "blk" => {
                ternary::exact(&weight).or_else(|_| ternary::absmean(&weight)).map_err(failed)
            }
            _ => ternary::absmean(&weight).map_err(failed),
        }
    }

    /// GGUF's `llama` stores the two halves of each head's rows interleaved: row `2i + half` of a
    /// head is row `half * head_size/2 + i` of the original.
    fn half_split_order(&self, rows: usize) -> Vec<usize> {
        let head_size = self.config.head_size;
        (0..rows)
            .map(|row| {
                let (head, within) = (row / head_size, row % head_size);
                let (half, i) = (within / (head_size / 2), within % (head_size / 2));
                head * head_size + 2 * i + half
            })
            .collect()
    }

    /// The `weight_scale` of a packed matrix: one number, which multiplies or divides as the
    /// checkpoint says, or one per row or per group of columns, which multiply.
    fn scale(&self, module: &str, rows: usize, cols: usize) -> Result<WeightScale, Error> {
        let name = format!("{module}.weight_scale");
        let tensor = self.need(&name)?;
        let unusable = || {
            let (dtype, shape) = (tensor.dtype(), tensor.shape());
            let needed = "one float is needed, or one per row or group of columns";
            self.error(&name, format!("is {dtype} {shape:?}: {needed}"))
        };
        if !tensor.dtype().is_float() {
            return Err(unusable());
        }
        let mut values = vec![0.0f32; tensor.len()];
        decode_row(tensor.dtype(), tensor.data(), &mut values);
        match *tensor.shape() {
            _ if values.len() == 1 => match self.config.weights {
                WeightRule::Multiply => Ok(WeightScale::Multiply(values[0])),
                WeightRule::Divide => Ok(WeightScale::Divide(values[0])),
                WeightRule::Exact | WeightRule::Tiled => Err(self.error(
                    &format!("{module}.weight"),
                    "is packed, but config.json has no quantization_config that says how its \
                     scale is meant",
                )),
            },
            [n] | [n, 1] if n == rows => Ok(WeightScale::Rows(values)),
            [n, groups] if n == rows && groups > 0 => {
                Ok(WeightScale::Groups { len: cols / groups, values })
            }
            _ => Err(unusable()),
        }
    }

    /// A tensor of a layer, the embedding, the head or the final norm that the description does not
    /// know means that the description is wrong.
    pub(crate) fn refuse_unknown(&self) -> Result<(), Error> {
        let used = self.used.lock().expect("no panic while held");
        let names = &self.config.names;
        let modules = [names.layer, names.embedding, names.head, names.final_norm, "rope_freqs"];
        let unknown = self.tensors.names().find(|name| {
            let name_in_model = name.strip_prefix("model.").unwrap_or(name);
            let module = name_in_model.split('.').next().unwrap_or(name_in_model);
            let harmless = name.ends_with("rotary_emb.inv_freq");
            let matters = match self.is_tiled() {
                // The screen is made of the head, and not every use of a file needs it.
                true => !native::is_apart(name) && *name != SCREEN,
                false => modules.contains(&module) && !harmless,
            };
            matters && !used.contains(*name)
        });
        match unknown {
            None => Ok(()),
            Some(name) => Err(self.error(
                name,
                format!(
                    "is not part of the architecture {}: the result would be wrong without it",
                    self.config.architecture
                ),
            )),
        }
    }
}

/// Whether all weights that are not zero have one magnitude, in whatever form their scales are:
/// float files give one per row, and rows of zeros give 0.
pub(crate) fn has_one_scale(scale: &WeightScale) -> bool {
    let mut values = scale.values().iter().filter(|&&value| value != 0.0);
    let first = values.next();
    values.all(|value| Some(value) == first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_scales_of_all_rows_are_one_scale() {
        assert!(has_one_scale(&WeightScale::Multiply(0.5)));
        assert!(has_one_scale(&WeightScale::Rows(vec![0.5, 0.0, 0.5])));
        assert!(!has_one_scale(&WeightScale::Rows(vec![0.5, 0.25])));
        assert!(!has_one_scale(&WeightScale::Groups { len: 4, values: vec![0.5, 0.0, 0.25] }));
    }
}
