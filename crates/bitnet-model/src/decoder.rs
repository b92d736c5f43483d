//! The transformer's forward pass, written once for every backend and every architecture.
//!
//! A decoder is a pipeline of one or more stages: consecutive layers on a backend of their own. The
//! embedding is on the first one's backend, the output head on the last one's. From stage to stage
//! the residual stream goes as the f32 numbers it is, so that the cut changes no bit.

use std::ops::Range;
use std::sync::Arc;

use bitnet_core::Error as CoreError;
use bitnet_core::backend::{
    AttentionShape, Backend, BitLinear, GatedFfn, KvLayout, KvType, Norm, Scratch, Span, Weigh,
};
use bitnet_core::numerics::rope_angle;
use bitnet_core::{Candidate, Pick, WeightBytes};

use crate::config::{LayerConfig, ModelConfig};

/// A loaded model: weights in the memory of backends and the description they are used by.
pub struct Decoder<B: Backend> {
    /// One for each stage.
    backends: Vec<B>,
    weights: Arc<Weights<B>>,
}

/// What a decoder computes with: the same for all its replicas.
pub(crate) struct Weights<B: Backend> {
    pub(crate) config: ModelConfig,
    pub(crate) vocab_size: usize,
    /// On the first stage.
    pub(crate) embedding: B::Table,
    /// The output head, on the last stage; `None` where it is the embedding, on the same stage.
    pub(crate) head: Option<B::Table>,
    /// The reduced-precision copy of the head, where there is one.
    pub(crate) screen: Option<B::Screen>,
    pub(crate) final_norm: Norm<B>,
    pub(crate) layers: Vec<Layer<B>>,
    /// The layers of each stage, one stage after the other.
    pub(crate) stages: Vec<Range<usize>>,
    /// Inverse frequencies of each kind of rotation, `[head_size / 2]`.
    pub(crate) inverse_frequencies: Vec<Vec<f32>>,
}

pub(crate) struct Layer<B: Backend> {
    pub kind: LayerConfig,
    pub attention_norm: Norm<B>,
    pub q: BitLinear<B>,
    pub k: BitLinear<B>,
    pub v: BitLinear<B>,
    pub o: BitLinear<B>,
    pub q_norm: Option<Norm<B>>,
    pub k_norm: Option<Norm<B>>,
    pub attention_sub_norm: Option<Norm<B>>,
    pub post_attention_norm: Option<Norm<B>>,
    pub ffn_norm: Norm<B>,
    pub ffn: GatedFfn<B>,
    pub post_ffn_norm: Option<Norm<B>>,
}

impl<B: Backend> Layer<B> {
    fn weight_bytes(&self) -> WeightBytes {
        let GatedFfn { gate, up, down, sub_norm, .. } = &self.ffn;
        let linears = [&self.q, &self.k, &self.v, &self.o, gate, up, down];
        let norms = [Some(&self.attention_norm), Some(&self.ffn_norm), sub_norm.as_ref()];
        let optional = [
            &self.q_norm,
            &self.k_norm,
            &self.attention_sub_norm,
            &self.post_attention_norm,
            &self.post_ffn_norm,
        ];
        let norms = norms.into_iter().chain(optional.map(Option::as_ref)).flatten();
        let linears = linears.into_iter().map(BitLinear::weight_bytes);
        linears.chain(norms.map(Norm::weight_bytes)).sum()
    }
}

/// The keys and values of a decoder's sequences: of each stage those of its layers.
pub struct Kv<B: Backend> {
    stages: Vec<B::Kv>,
}

/// The activations of one step. Made once for the largest step, used for all.
pub struct Workspace<B: Backend> {
    stages: Vec<Activations<B>>,
    logits: B::Buffer,
    angle_values: (Vec<f32>, Vec<f32>),
    /// The residual stream on its way from one stage to the next.
    passed_on: Vec<f32>,
    /// Rows of the last step.
    rows: usize,
    max_rows: usize,
    max_picks: usize,
}

/// The part of a workspace that one stage computes in.
struct Activations<B: Backend> {
    /// Residual stream `[rows, hidden]`.
    hidden: B::Buffer,
    q: B::Buffer,
    k: B::Buffer,
    v: B::Buffer,
    /// Attention output `[rows, heads * head_size]`.
    attended: B::Buffer,
    /// Result of attention or feed-forward before it is added `[rows, hidden]`.
    branch: B::Buffer,
    /// `branch` after its own norm.
    normed_branch: B::Buffer,
    scratch: Scratch<B>,
    /// Cosines and sines of this step's positions, for each kind of rotation.
    angles: Vec<(B::Buffer, B::Buffer)>,
}

/// The tokens of one step: any number of sequences, each with any number of tokens.
#[derive(Debug, Clone)]
pub struct Step<'a> {
    /// Token ids of all rows.
    pub tokens: &'a [u32],
    /// Which rows belong to which sequence, in ascending order and without gaps.
    pub spans: &'a [Span<'a>],
}

/// A place in the forward pass at which an observer may look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Point {
    /// The embedding `[rows, hidden]`.
    Embedding,
    /// The result of a layer's attention, after the output projection.
    Attention(usize),
    /// The residual stream that a layer's feed-forward network takes in, before its norm.
    FeedForwardInput(usize),
    /// The result of a layer's feed-forward network.
    FeedForward(usize),
    /// The residual stream after a layer.
    Layer(usize),
}

impl<B: Backend> Decoder<B> {
    /// Puts a decoder together; a backend for each stage of the weights.
    pub(crate) fn new(backends: Vec<B>, weights: Weights<B>) -> Self {
        assert_eq!(backends.len(), weights.stages.len());
        Decoder { backends, weights: Arc::new(weights) }
    }

    /// A decoder that shares this one's weights and computes on backends of its own (see
    /// [`Backend::replica`]), at the same time as this one.
    ///
    /// # Errors
    /// If one of the backends cannot have a replica.
    pub fn replica(&self) -> Result<Self, CoreError> {
        let backends = self.backends.iter().map(B::replica).collect::<Result<_, _>>()?;
        Ok(Decoder { backends, weights: Arc::clone(&self.weights) })
    }

    /// The description the decoder runs by.
    pub fn config(&self) -> &ModelConfig {
        &self.weights.config
    }

    /// The backend of the first stage, which is the only one unless the decoder was split.
    pub fn backend(&self) -> &B {
        &self.backends[0]
    }

    /// The backends of all stages.
    pub fn backends(&self) -> &[B] {
        &self.backends
    }

    /// The layers of each stage.
    pub fn stages(&self) -> &[Range<usize>] {
        &self.weights.stages
    }

    /// Number of token ids: rows of the embedding and of the logits.
    pub fn vocab_size(&self) -> usize {
        self.weights.vocab_size
    }

    /// Memory that the weights take. A table that is both embedding and head counts for each device
    /// that it was loaded on.
    pub fn weight_bytes(&self) -> WeightBytes {
        let Weights { embedding, head, screen, final_norm, layers, .. } = &*self.weights;
        let tables = [Some(embedding), head.as_ref()].into_iter().flatten();
        let tables = tables.map(B::Table::weight_bytes);
        let screen = screen.iter().map(B::Screen::weight_bytes);
        let layers = layers.iter().map(Layer::weight_bytes);
        tables.chain(screen).chain([final_norm.weight_bytes()]).chain(layers).sum()
    }

    /// Bytes of all layers' matrices of `gate`, which are read whole, and of `up`, which shortcuts may
    /// read by rows.
    pub fn gate_and_up_bytes(&self) -> [u64; 2] {
        let layers = self.weights.layers.iter();
        layers.fold([0; 2], |[gates, ups], Layer { ffn, .. }| {
            let bytes = |linear: &BitLinear<B>| linear.weight.weight_bytes().total();
            [gates + bytes(&ffn.gate), ups + bytes(&ffn.up)]
        })
    }

    /// Layout of the keys and values of all layers.
    pub fn kv_layout(&self, kv_type: KvType, block_tokens: usize) -> KvLayout {
        self.config().kv_layout(kv_type, block_tokens)
    }

    /// Storage for `blocks` blocks of a [layout](Decoder::kv_layout), cut up for the stages.
    pub fn kv_allocate(&self, layout: KvLayout, blocks: usize) -> Result<Kv<B>, CoreError> {
        let stages = self.backends.iter().zip(self.stages());
        let stages = stages.map(|(backend, layers)| {
            backend.kv_allocate(KvLayout { layers: layers.len(), ..layout }, blocks)
        });
        Ok(Kv { stages: stages.collect::<Result<_, _>>()? })
    }

    /// Copies whole blocks, `(from, to)`, in all layers.
    pub fn kv_copy(&self, kv: &mut Kv<B>, pairs: &[(u32, u32)]) {
        for (backend, kv) in self.backends.iter().zip(&mut kv.stages) {
            backend.kv_copy(kv, pairs);
        }
    }

    /// Copies the contents of blocks into the same blocks of another store of the same layout.
    pub fn kv_transfer(
        &self,
        from: &Kv<B>,
        to: &mut Kv<B>,
        blocks: &[u32],
    ) -> Result<(), CoreError> {
        for (backend, (from, to)) in
            self.backends.iter().zip(from.stages.iter().zip(&mut to.stages))
        {
            // A block at a time, so that the copy needs no room of its own.
            for block in blocks {
                let contents = backend.kv_export(from, &[*block])?;
                backend.kv_import(to, &[*block], &contents)?;
            }
        }
        Ok(())
    }

    /// Appends the contents of a block to `out`, layer after layer: the same whatever the stages are.
    pub fn kv_export(&self, kv: &Kv<B>, block: u32, out: &mut Vec<u8>) -> Result<(), CoreError> {
        for (backend, kv) in self.backends.iter().zip(&kv.stages) {
            out.extend_from_slice(&backend.kv_export(kv, &[block])?);
        }
        Ok(())
    }

    /// Restores a block that [`kv_export`](Decoder::kv_export) wrote, into the one given.
    ///
    /// # Errors
    /// If `data` has another length than a block of the store.
    pub fn kv_import(&self, kv: &mut Kv<B>, block: u32, data: &[u8]) -> Result<(), CoreError> {
        let layers = self.config().layers.len();
        let mut rest = data;
        for ((backend, kv), stage) in self.backends.iter().zip(&mut kv.stages).zip(self.stages()) {
            let (taken, after) = match stage.end == layers {
                true => (rest, &[][..]),
                false => rest.split_at((data.len() / layers * stage.len()).min(rest.len())),
            };
            backend.kv_import(kv, &[block], taken)?;
            rest = after;
        }
        Ok(())
    }

    /// Buffers for steps of up to `rows` tokens and `picks` rows of logits.
    pub fn workspace(&self, rows: usize, picks: usize) -> Result<Workspace<B>, CoreError> {
        let stages = self.backends.iter().map(|backend| self.activations(backend, rows));
        let passed_on = if self.backends.len() > 1 { rows * self.config().hidden_size } else { 0 };
        Ok(Workspace {
            stages: stages.collect::<Result<_, _>>()?,
            logits: self.last_backend().buffer(picks, self.vocab_size())?,
            angle_values: (Vec::new(), Vec::new()),
            passed_on: Vec::with_capacity(passed_on),
            rows: 0,
            max_rows: rows,
            max_picks: picks,
        })
    }

    fn activations(&self, backend: &B, rows: usize) -> Result<Activations<B>, CoreError> {
        let c = self.config();
        let buffer = |cols| backend.buffer(rows, cols);
        let attention = c.heads * c.head_size;
        let angles = (0..c.ropes.len())
            .map(|_| Ok((buffer(c.head_size / 2)?, buffer(c.head_size / 2)?)))
            .collect::<Result<_, CoreError>>()?;
        Ok(Activations {
            hidden: buffer(c.hidden_size)?,
            q: buffer(attention)?,
            k: buffer(c.kv_heads * c.head_size)?,
            v: buffer(c.kv_heads * c.head_size)?,
            attended: buffer(attention)?,
            branch: buffer(c.hidden_size)?,
            normed_branch: buffer(c.hidden_size)?,
            scratch: Scratch {
                normed: buffer(c.hidden_size.max(attention).max(c.intermediate_size))?,
                gate: buffer(c.intermediate_size)?,
                up: buffer(c.intermediate_size)?,
            },
            angles,
        })
    }

    fn last_backend(&self) -> &B {
        self.backends.last().expect("a decoder has a stage")
    }

    /// Runs one step: embedding and all layers, one stage after the other. The residual stream stays
    /// in the workspace, for [`logits`](Decoder::logits) or
    /// [`final_states`](Decoder::final_states).
    ///
    /// # Errors
    /// If a device was lost, which shows where one stage hands over to the next. Where there is one
    /// stage, it shows when results are read.
    ///
    /// # Panics
    /// If the step is larger than the workspace, a token is not in the vocabulary, or a block
    /// table is too short: the caller has checked them.
    pub fn forward(
        &self,
        step: &Step<'_>,
        kv: &mut Kv<B>,
        workspace: &mut Workspace<B>,
    ) -> Result<(), CoreError> {
        self.forward_observed(step, kv, workspace, |_, _| {})
    }

    /// As [`forward`](Decoder::forward), showing the intermediate results to `observe`.
    pub fn forward_observed(
        &self,
        step: &Step<'_>,
        kv: &mut Kv<B>,
        workspace: &mut Workspace<B>,
        mut observe: impl FnMut(Point, &B::Buffer),
    ) -> Result<(), CoreError> {
        let Weights { config, embedding, stages, .. } = &*self.weights;
        let rows = step.tokens.len();
        assert!(rows <= workspace.max_rows, "more tokens than the workspace holds");
        debug_assert_eq!(step.spans.iter().map(|s| s.rows.len()).sum::<usize>(), rows);
        workspace.rows = rows;
        self.rotations(step, workspace);
        let Workspace { stages: activations, passed_on, .. } = workspace;
        for (stage, layers) in stages.iter().enumerate() {
            let backend = &self.backends[stage];
            let (kv, activations) = (&mut kv.stages[stage], &mut activations[stage]);
            if stage == 0 {
                let scale = config.embedding_scale;
                backend.embed(embedding, step.tokens, scale, &mut activations.hidden);
                observe(Point::Embedding, &activations.hidden);
            } else {
                backend.write(&mut activations.hidden, config.hidden_size, passed_on);
            }
            for index in layers.clone() {
                self.layer((stage, index), step, kv, activations, &mut observe);
            }
            if stage + 1 < stages.len() {
                backend.read(&activations.hidden, rows, passed_on)?;
            }
        }
        Ok(())
    }

    /// Runs a layer, which is on that stage.
    fn layer(
        &self,
        (stage, index): (usize, usize),
        step: &Step<'_>,
        kv: &mut B::Kv,
        activations: &mut Activations<B>,
        observe: &mut impl FnMut(Point, &B::Buffer),
    ) {
        let (backend, layer) = (&self.backends[stage], &self.weights.layers[index]);
        let rows = step.tokens.len();
        self.attention((stage, index), step, kv, activations);
        observe(Point::Attention(index), &activations.branch);
        add_branch(backend, rows, layer.post_attention_norm.as_ref(), activations);

        observe(Point::FeedForwardInput(index), &activations.hidden);

        let Activations { hidden, branch, scratch, .. } = activations;
        backend.gated_ffn(hidden, rows, Some(&layer.ffn_norm), &layer.ffn, scratch, branch);
        observe(Point::FeedForward(index), &activations.branch);
        add_branch(backend, rows, layer.post_ffn_norm.as_ref(), activations);
        observe(Point::Layer(index), &activations.hidden);
    }

    /// Share of the gates of all feed-forward networks that are zero or less in one step. Runs the
    /// step as [`forward`](Decoder::forward) does, and computes each gate a second time.
    pub fn closed_gates(
        &self,
        step: &Step<'_>,
        kv: &mut Kv<B>,
        workspace: &mut Workspace<B>,
    ) -> Result<f64, CoreError> {
        let c = self.config();
        let rows = step.tokens.len();
        let rooms = self.backends.iter().map(|backend| {
            Ok((backend.buffer(rows, c.intermediate_size)?, backend.buffer(rows, c.hidden_size)?))
        });
        let mut rooms = rooms.collect::<Result<Vec<_>, CoreError>>()?;
        let mut values = Vec::new();
        let (mut closed, mut all) = (0, 0);
        let mut read = Ok(());
        self.forward_observed(step, kv, workspace, |point, hidden| {
            let Point::FeedForwardInput(index) = point else { return };
            let stage = self.stages().partition_point(|layers| layers.end <= index);
            let (backend, (gate, normed)) = (&self.backends[stage], &mut rooms[stage]);
            let layer = &self.weights.layers[index];
            let norm = Some(&layer.ffn_norm);
            backend.project(hidden, rows, norm, &[&layer.ffn.gate], &mut [&mut *gate], normed);
            if read.is_ok() {
                read = backend.read(gate, rows, &mut values);
            }
            closed += values.iter().filter(|&&gate| gate <= 0.0).count();
            all += values.len();
        })?;
        read?;
        Ok(closed as f64 / all as f64)
    }

    /// Logits `[picks, vocabulary]` of chosen rows of the last step.
    ///
    /// # Panics
    /// If there are more picks than the workspace has room for, or one is not a row of the step.
    pub fn logits(
        &self,
        workspace: &mut Workspace<B>,
        picks: &[usize],
        logits: &mut Vec<f32>,
    ) -> Result<(), CoreError> {
        assert!(picks.len() <= workspace.max_picks, "more logits than the workspace holds");
        assert!(picks.iter().all(|&pick| pick < workspace.rows), "a pick outside the step");
        let Workspace { stages, logits: out, .. } = workspace;
        let (backend, weights) = (self.last_backend(), &*self.weights);
        backend.head(final_hidden(stages), picks, &weights.final_norm, weights.head(), out);
        backend.read(out, picks.len(), logits)
    }

    /// Whether there is a screen of the output head, so that
    /// [`candidates`](Decoder::candidates) serves.
    pub fn has_screen(&self) -> bool {
        self.weights.screen.is_some()
    }

    /// The logits of some rows of the last step that can matter (see
    /// [`Backend::screened_head`]): those of `picks[j]` into `candidates[j]`. Returns false, and
    /// leaves `candidates` alone, for a model without a screen: ask for all
    /// [`logits`](Decoder::logits) then.
    ///
    /// # Panics
    /// If a pick is not a row of the step.
    pub fn candidates(
        &self,
        workspace: &Workspace<B>,
        picks: &[Pick<'_>],
        candidates: &mut [Vec<Candidate>],
    ) -> Result<bool, CoreError> {
        assert!(picks.iter().all(|pick| pick.row < workspace.rows), "a pick outside the step");
        let Weights { screen: Some(screen), final_norm, .. } = &*self.weights else {
            return Ok(false);
        };
        let (hidden, head) = (final_hidden(&workspace.stages), self.weights.head());
        self.last_backend().screened_head(hidden, picks, final_norm, head, screen, candidates)?;
        Ok(true)
    }

    /// Final hidden states `[rows, hidden]` of the last step, after the final norm.
    pub fn final_states(
        &self,
        workspace: &mut Workspace<B>,
        states: &mut Vec<f32>,
    ) -> Result<(), CoreError> {
        let Workspace { stages, rows, .. } = workspace;
        let Activations { hidden, branch, .. } = stages.last_mut().expect("a decoder has a stage");
        self.last_backend().rms_norm(hidden, *rows, &self.weights.final_norm, branch);
        self.last_backend().read(branch, *rows, states)
    }

    /// `branch = o(sub_norm(attention(rope(qkv(norm(hidden))))))`
    fn attention(
        &self,
        (stage, index): (usize, usize),
        step: &Step<'_>,
        kv: &mut B::Kv,
        activations: &mut Activations<B>,
    ) {
        let Activations { hidden, q, k, v, attended, branch, scratch, angles, .. } = activations;
        let (backend, layer) = (&self.backends[stage], &self.weights.layers[index]);
        let index_in_stage = index - self.stages()[stage].start;
        let rows = step.tokens.len();
        let ModelConfig { heads, head_size, attention_scale, .. } = *self.config();
        backend.project(
            hidden,
            rows,
            Some(&layer.attention_norm),
            &[&layer.q, &layer.k, &layer.v],
            &mut [q, k, v],
            &mut scratch.normed,
        );
        if let Some(norm) = &layer.q_norm {
            backend.head_norm(q, rows, norm, head_size);
        }
        if let Some(norm) = &layer.k_norm {
            backend.head_norm(k, rows, norm, head_size);
        }
        let (cos, sin) = &angles[layer.kind.rope];
        backend.rope(q, rows, head_size, cos, sin);
        backend.rope(k, rows, head_size, cos, sin);
        backend.kv_write(kv, index_in_stage, k, v, step.spans);
        let shape = AttentionShape { heads, scale: attention_scale, window: layer.kind.window };
        backend.attention(shape, index_in_stage, q, kv, step.spans, attended);
        backend.project(
            attended,
            rows,
            layer.attention_sub_norm.as_ref(),
            &[&layer.o],
            &mut [branch],
            &mut scratch.normed,
        );
    }

    /// Writes the cosines and sines of this step's positions.
    fn rotations(&self, step: &Step<'_>, workspace: &mut Workspace<B>) {
        let Workspace { stages, angle_values: (cos, sin), .. } = workspace;
        for (rope, frequencies) in self.weights.inverse_frequencies.iter().enumerate() {
            cos.clear();
            sin.clear();
            for span in step.spans {
                for position in (span.position..).take(span.rows.len()) {
                    for &frequency in frequencies {
                        let (c, s) = rope_angle(position, frequency);
                        cos.push(c);
                        sin.push(s);
                    }
                }
            }
            for (backend, activations) in self.backends.iter().zip(&mut *stages) {
                let buffers = &mut activations.angles[rope];
                backend.write(&mut buffers.0, frequencies.len(), cos);
                backend.write(&mut buffers.1, frequencies.len(), sin);
            }
        }
    }
}

impl<B: Backend> Weights<B> {
    /// The output head.
    fn head(&self) -> &B::Table {
        self.head.as_ref().unwrap_or(&self.embedding)
    }
}

/// The residual stream after the last layer.
fn final_hidden<B: Backend>(stages: &[Activations<B>]) -> &B::Buffer {
    &stages.last().expect("a decoder has a stage").hidden
}

/// `hidden += norm(branch)`
fn add_branch<B: Backend>(
    backend: &B,
    rows: usize,
    norm: Option<&Norm<B>>,
    activations: &mut Activations<B>,
) {
    let Activations { hidden, branch, normed_branch, .. } = activations;
    match norm {
        Some(norm) => {
            backend.rms_norm(branch, rows, norm, normed_branch);
            backend.add(hidden, normed_branch, rows);
        }
        None => backend.add(hidden, branch, rows),
    }
}
