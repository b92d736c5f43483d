//! The parts that a decoder has: what they are called, and their shapes.

use bitnet_core::LinearUse;
use bitnet_core::backend::Activation;

use crate::config::{ModelConfig, TensorNames};

/// One of the seven linear layers of a decoder layer.
#[derive(Debug, Clone, Copy)]
pub(super) struct LinearPlace {
    /// What the checkpoint calls it.
    pub(super) name: &'static str,
    pub(super) rows: usize,
    pub(super) cols: usize,
    pub(super) usage: LinearUse,
}

/// q, k, v, o, gate, up and down.
pub(super) fn linears(c: &ModelConfig) -> [LinearPlace; 7] {
    let n = &c.names;
    let (attention, kv) = (c.heads * c.head_size, c.kv_heads * c.head_size);
    // The square of a negative gate is exactly zero.
    let (up_use, down_use) = match c.activation {
        Activation::Relu2 => (LinearUse::SparseOutputs, LinearUse::SparseInputs),
        Activation::Silu | Activation::GeluTanh => (LinearUse::Dense, LinearUse::Dense),
    };
    [
        (n.q, attention, c.hidden_size, LinearUse::Dense),
        (n.k, kv, c.hidden_size, LinearUse::Dense),
        (n.v, kv, c.hidden_size, LinearUse::Dense),
        (n.o, c.hidden_size, attention, LinearUse::Dense),
        (n.gate, c.intermediate_size, c.hidden_size, LinearUse::Dense),
        (n.up, c.intermediate_size, c.hidden_size, up_use),
        (n.down, c.hidden_size, c.intermediate_size, down_use),
    ]
    .map(|(name, rows, cols, usage)| LinearPlace { name, rows, cols, usage })
}

/// Names and lengths of the norms of a decoder layer, those that a model may lack as `None`: before
/// attention, of q, of k, sub-norm, after attention; before feed-forward, sub-norm, after it.
pub(super) fn norms(c: &ModelConfig) -> [Option<(&'static str, usize)>; 8] {
    let n = &c.names;
    [
        Some((n.attention_norm, c.hidden_size)),
        c.head_norms.then_some((n.q_norm, c.head_size)),
        c.head_norms.then_some((n.k_norm, c.head_size)),
        c.sub_norms.then_some((n.attention_sub_norm, c.heads * c.head_size)),
        c.post_norms.then_some((n.post_attention_norm, c.hidden_size)),
        Some((n.ffn_norm, c.hidden_size)),
        c.sub_norms.then_some((n.ffn_sub_norm, c.intermediate_size)),
        c.post_norms.then_some((n.post_ffn_norm, c.hidden_size)),
    ]
}

/// What a native file calls the screen of the output head. No other file has one.
pub(super) const SCREEN: &str = "screen";

/// A part of a decoder that a file holds.
#[derive(Debug, Clone, Copy)]
pub struct PartPlace {
    /// Its layer; `None` outside the layers.
    pub layer: Option<usize>,
    /// What the checkpoint that the description is of calls it.
    pub name: &'static str,
    /// What it is, and its shape.
    pub kind: PartKind,
}

/// What a part of a decoder is.
#[derive(Debug, Clone, Copy)]
pub enum PartKind {
    /// `[vocabulary, hidden]`.
    Table,
    /// The weight of a norm, one per element.
    Norm {
        /// Elements.
        len: usize,
        /// Whether it is a projection's own, called after it.
        of_projection: bool,
    },
    /// A ternary matrix `[rows, cols]`.
    Matrix {
        /// Output features.
        rows: usize,
        /// Input features.
        cols: usize,
        /// How it is used.
        usage: LinearUse,
    },
    /// The screen of the output head.
    Screen,
}

impl PartPlace {
    /// Its full name in a file that calls its tensors `names`, of which `name` is one, without
    /// `.weight` or what else the format puts behind it.
    pub fn full_name(&self, names: &TensorNames) -> String {
        let suffix = match self.kind {
            PartKind::Norm { of_projection: true, .. } => names.projection_norm,
            _ => "",
        };
        match self.layer {
            Some(layer) => format!("{}.{layer}.{}{suffix}", names.layer, self.name),
            None => self.name.to_owned(),
        }
    }
}

/// Every part of a decoder, in an order that depends on the description's shape and not on its
/// names. The head is among them unless [`ModelConfig::tied`] is true; its screen is, unless the
/// model makes embeddings.
pub fn part_places(config: &ModelConfig) -> Vec<PartPlace> {
    let n = &config.names;
    let top = |name, kind| PartPlace { layer: None, name, kind };
    let norm = |len, of_projection| PartKind::Norm { len, of_projection };
    let mut places = vec![top(n.embedding, PartKind::Table)];
    if config.tied != Some(true) {
        places.push(top(n.head, PartKind::Table));
    }
    if config.pooling.is_none() {
        places.push(top(SCREEN, PartKind::Screen));
    }
    places.push(top(n.final_norm, norm(config.hidden_size, false)));
    for layer in 0..config.layers.len() {
        let place = |name, kind| PartPlace { layer: Some(layer), name, kind };
        for LinearPlace { name, rows, cols, usage } in linears(config) {
            places.push(place(name, PartKind::Matrix { rows, cols, usage }));
            if config.projection_norm_eps.is_some() {
                places.push(place(name, norm(cols, true)));
            }
        }
        let norms = norms(config).into_iter().flatten();
        places.extend(norms.map(|(name, len)| place(name, norm(len, false))));
    }
    places
}
