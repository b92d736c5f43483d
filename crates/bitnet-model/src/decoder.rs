//! The transformer's forward pass, written once for every backend and every architecture.

use bitnet_core::Error as CoreError;
use bitnet_core::backend::{
    AttentionShape, Backend, BitLinear, GatedFfn, KvLayout, KvType, Norm, Scratch, Span,
};
use bitnet_core::numerics::rope_angle;
use bitnet_core::{Candidate, Pick};

use crate::config::{LayerConfig, ModelConfig};

/// A loaded model: weights in a backend's memory and the description they are used by.
pub struct Decoder<B: Backend> {
    pub(crate) backend: B,
    pub(crate) config: ModelConfig,
    pub(crate) vocab_size: usize,
    pub(crate) embedding: B::Table,
    /// The output head, where it is not the embedding itself.
    pub(crate) head: Option<B::Table>,
    /// The reduced-precision copy of the head, where there is one.
    pub(crate) screen: Option<B::Screen>,
    pub(crate) final_norm: Norm<B>,
    pub(crate) layers: Vec<Layer<B>>,
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

/// The activations of one step. Made once for the largest step, used for all.
pub struct Workspace<B: Backend> {
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
    logits: B::Buffer,
    scratch: Scratch<B>,
    /// Cosines and sines of this step's positions, for each kind of rotation.
    angles: Vec<(B::Buffer, B::Buffer)>,
    angle_values: (Vec<f32>, Vec<f32>),
    /// Rows of the last step.
    rows: usize,
    max_rows: usize,
    max_picks: usize,
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
pub enum Stage {
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
    /// The description the decoder runs by.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// The backend that holds the weights.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Number of token ids: rows of the embedding and of the logits.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// Layout of a KV store for this model.
    pub fn kv_layout(&self, kv_type: KvType, block_tokens: usize) -> KvLayout {
        self.config.kv_layout(kv_type, block_tokens)
    }

    /// Buffers for steps of up to `rows` tokens and `picks` rows of logits.
    pub fn workspace(&self, rows: usize, picks: usize) -> Result<Workspace<B>, CoreError> {
        let c = &self.config;
        let buffer = |cols| self.backend.buffer(rows, cols);
        let attention = c.heads * c.head_size;
        let angles = (0..c.ropes.len())
            .map(|_| Ok((buffer(c.head_size / 2)?, buffer(c.head_size / 2)?)))
            .collect::<Result<_, CoreError>>()?;
        Ok(Workspace {
            hidden: buffer(c.hidden_size)?,
            q: buffer(attention)?,
            k: buffer(c.kv_heads * c.head_size)?,
            v: buffer(c.kv_heads * c.head_size)?,
            attended: buffer(attention)?,
            branch: buffer(c.hidden_size)?,
            normed_branch: buffer(c.hidden_size)?,
            logits: self.backend.buffer(picks, self.vocab_size)?,
            scratch: Scratch {
                normed: buffer(c.hidden_size.max(attention).max(c.intermediate_size))?,
                gate: buffer(c.intermediate_size)?,
                up: buffer(c.intermediate_size)?,
            },
            angles,
            angle_values: (Vec::new(), Vec::new()),
            rows: 0,
            max_rows: rows,
            max_picks: picks,
        })
    }

    /// Runs one step: embedding and all layers. The residual stream stays in the workspace, for
    /// [`logits`](Decoder::logits) or [`final_states`](Decoder::final_states).
    ///
    /// # Panics
    /// If the step is larger than the workspace, a token is not in the vocabulary, or a block
    /// table is too short: the caller has checked them.
    pub fn forward(&self, step: &Step<'_>, kv: &mut B::Kv, workspace: &mut Workspace<B>) {
        self.forward_observed(step, kv, workspace, |_, _| {});
    }

    /// As [`forward`](Decoder::forward), showing the intermediate results to `observe`.
    pub fn forward_observed(
        &self,
        step: &Step<'_>,
        kv: &mut B::Kv,
        workspace: &mut Workspace<B>,
        mut observe: impl FnMut(Stage, &B::Buffer),
    ) {
        let rows = step.tokens.len();
        assert!(rows <= workspace.max_rows, "more tokens than the workspace holds");
        debug_assert_eq!(step.spans.iter().map(|s| s.rows.len()).sum::<usize>(), rows);
        workspace.rows = rows;
        self.rotations(step, workspace);
        let scale = self.config.embedding_scale;
        self.backend.embed(&self.embedding, step.tokens, scale, &mut workspace.hidden);
        observe(Stage::Embedding, &workspace.hidden);
        for (index, layer) in self.layers.iter().enumerate() {
            self.attention(index, layer, step, kv, workspace);
            observe(Stage::Attention(index), &workspace.branch);
            self.add_branch(rows, layer.post_attention_norm.as_ref(), workspace);

            observe(Stage::FeedForwardInput(index), &workspace.hidden);

            let Workspace { hidden, branch, scratch, .. } = workspace;
            self.backend.gated_ffn(
                hidden,
                rows,
                Some(&layer.ffn_norm),
                &layer.ffn,
                scratch,
                branch,
            );
            observe(Stage::FeedForward(index), &workspace.branch);
            self.add_branch(rows, layer.post_ffn_norm.as_ref(), workspace);
            observe(Stage::Layer(index), &workspace.hidden);
        }
    }

    /// Share of the gates of all feed-forward networks that are zero or less in one step. Runs the
    /// step as [`forward`](Decoder::forward) does, and computes each gate a second time.
    pub fn closed_gates(
        &self,
        step: &Step<'_>,
        kv: &mut B::Kv,
        workspace: &mut Workspace<B>,
    ) -> Result<f64, CoreError> {
        let c = &self.config;
        let rows = step.tokens.len();
        let mut gate = self.backend.buffer(rows, c.intermediate_size)?;
        let mut normed = self.backend.buffer(rows, c.hidden_size)?;
        let mut values = Vec::new();
        let (mut closed, mut all) = (0, 0);
        let mut read = Ok(());
        self.forward_observed(step, kv, workspace, |stage, hidden| {
            let Stage::FeedForwardInput(index) = stage else { return };
            let layer = &self.layers[index];
            let norm = Some(&layer.ffn_norm);
            let outs = &mut [&mut gate];
            self.backend.project(hidden, rows, norm, &[&layer.ffn.gate], outs, &mut normed);
            if read.is_ok() {
                read = self.backend.read(&gate, rows, &mut values);
            }
            closed += values.iter().filter(|&&gate| gate <= 0.0).count();
            all += values.len();
        });
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
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let Workspace { hidden, logits: out, .. } = workspace;
        self.backend.head(hidden, picks, &self.final_norm, head, out);
        self.backend.read(out, picks.len(), logits)
    }

    /// Whether there is a screen of the output head, so that
    /// [`candidates`](Decoder::candidates) serves.
    pub fn has_screen(&self) -> bool {
        self.screen.is_some()
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
        let Some(screen) = &self.screen else { return Ok(false) };
        let head = self.head.as_ref().unwrap_or(&self.embedding);
        let (hidden, norm) = (&workspace.hidden, &self.final_norm);
        self.backend.screened_head(hidden, picks, norm, head, screen, candidates)?;
        Ok(true)
    }

    /// Final hidden states `[rows, hidden]` of the last step, after the final norm.
    pub fn final_states(
        &self,
        workspace: &mut Workspace<B>,
        states: &mut Vec<f32>,
    ) -> Result<(), CoreError> {
        let Workspace { hidden, branch, rows, .. } = workspace;
        self.backend.rms_norm(hidden, *rows, &self.final_norm, branch);
        self.backend.read(branch, *rows, states)
    }

    /// `branch = o(sub_norm(attention(rope(qkv(norm(hidden))))))`
    fn attention(
        &self,
        index: usize,
        layer: &Layer<B>,
        step: &Step<'_>,
        kv: &mut B::Kv,
        workspace: &mut Workspace<B>,
    ) {
        let Workspace { hidden, q, k, v, attended, branch, scratch, angles, .. } = workspace;
        let backend = &self.backend;
        let rows = step.tokens.len();
        let head_size = self.config.head_size;
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
        backend.kv_write(kv, index, k, v, step.spans);
        let shape = AttentionShape {
            heads: self.config.heads,
            scale: self.config.attention_scale,
            window: layer.kind.window,
        };
        backend.attention(shape, index, q, kv, step.spans, attended);
        backend.project(
            attended,
            rows,
            layer.attention_sub_norm.as_ref(),
            &[&layer.o],
            &mut [branch],
            &mut scratch.normed,
        );
    }

    /// `hidden += norm(branch)`
    fn add_branch(&self, rows: usize, norm: Option<&Norm<B>>, workspace: &mut Workspace<B>) {
        let Workspace { hidden, branch, normed_branch, .. } = workspace;
        match norm {
            Some(norm) => {
                self.backend.rms_norm(branch, rows, norm, normed_branch);
                self.backend.add(hidden, normed_branch, rows);
            }
            None => self.backend.add(hidden, branch, rows),
        }
    }

    /// Writes the cosines and sines of this step's positions.
    fn rotations(&self, step: &Step<'_>, workspace: &mut Workspace<B>) {
        let Workspace { angles, angle_values: (cos, sin), .. } = workspace;
        for (frequencies, buffers) in self.inverse_frequencies.iter().zip(angles) {
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
            self.backend.write(&mut buffers.0, frequencies.len(), cos);
            self.backend.write(&mut buffers.1, frequencies.len(), sin);
        }
    }
}
