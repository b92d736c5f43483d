//! The forward pass of a model by its float weights, before they are ternarised: plain sums in f32, a
//! matrix in memory at a time. It is what a conversion that ternarises is measured against, and nothing
//! runs on it.

use std::path::Path;

use bitnet_core::Tensor;
use bitnet_core::backend::Activation;
use bitnet_core::numerics::{dot, gelu_tanh, rms_norm, rope_angle, silu};
use bitnet_quant::packing::blocks::decode_row;
use bitnet_quant::ternary;
use rayon::prelude::*;

use crate::config::{ModelConfig, WeightRule};
use crate::error::Error;
use crate::source::Checkpoint;
use crate::weights::{LoadOptions, Loader};

/// What ternarising does to the weights, and what the weights make of a text before it.
#[derive(Debug, Clone, PartialEq)]
pub struct DenseReport {
    /// By kind of linear layer: the norm of what ternarising changes, relative to the weights' norm,
    /// over all layers.
    pub weight_errors: Vec<(&'static str, f64)>,
    /// `-ln p` of each token after the first.
    pub losses: Vec<f64>,
}

/// Reads a dense model's text, and measures how far its weights are from ternary ones. `progress` is
/// told how many layers of how many are done.
///
/// # Errors
/// The model is ternary already, in its form or in its weights; a tensor is missing or wrong; or there are
/// fewer than two tokens, or one that is not in the vocabulary.
pub fn report(
    checkpoint: &Checkpoint,
    tokens: &[u32],
    progress: impl FnMut(usize, usize),
) -> Result<DenseReport, Error> {
    let path = &checkpoint.description.path;
    let config = &checkpoint.description.config;
    let refused = |reason: &str| Error::file(path, reason);
    if config.weights != WeightRule::Exact {
        return Err(refused("is a ternary model already: leave out --ternarise"));
    }
    let model = Dense::open(checkpoint)?;
    let rows = config.heads * config.head_size;
    let q = model.loader.dense(0, config.names.q, rows, config.hidden_size)?;
    if ternary::exact(&q).is_ok() {
        return Err(refused("has weights that are ternary already: leave out --ternarise"));
    }
    if tokens.len() < 2 {
        return Err(refused("cannot be measured with a text of fewer than two tokens"));
    }
    let mut errors = Errors::default();
    let states = model.states(tokens, &mut errors, progress)?;
    let losses = model.losses(&states, tokens)?;
    Ok(DenseReport { weight_errors: errors.relative(), losses })
}

/// Sums of squares by kind of linear layer: of the weights, and of what ternarising changes.
#[derive(Default)]
struct Errors(Vec<(&'static str, f64, f64)>);

impl Errors {
    fn add(&mut self, kind: &'static str, weights: &Tensor) -> Result<(), Error> {
        let matrix = ternary::absmean(weights)?;
        let scale = 1.0 / matrix.scale().values()[0];
        let row = |row: usize| {
            let values = floats(weights, row);
            let (mut whole, mut changed) = (0.0, 0.0);
            for (col, value) in values.into_iter().enumerate() {
                let ternary = f32::from(matrix.weight(row, col)) * scale;
                whole += f64::from(value).powi(2);
                changed += f64::from(value - ternary).powi(2);
            }
            (whole, changed)
        };
        let rows: Vec<_> = (0..weights.rows()).into_par_iter().map(row).collect();
        let (whole, changed) =
            rows.iter().fold((0.0, 0.0), |sum, row| (sum.0 + row.0, sum.1 + row.1));
        match self.0.iter_mut().find(|(known, ..)| *known == kind) {
            Some((_, all, all_changed)) => {
                *all += whole;
                *all_changed += changed;
            }
            None => self.0.push((kind, whole, changed)),
        }
        Ok(())
    }

    fn relative(&self) -> Vec<(&'static str, f64)> {
        self.0.iter().map(|&(kind, whole, changed)| (kind, (changed / whole).sqrt())).collect()
    }
}

fn floats(tensor: &Tensor, row: usize) -> Vec<f32> {
    let mut values = vec![0.0; tensor.cols()];
    decode_row(tensor.dtype(), tensor.row(row), &mut values);
    values
}

/// A dense checkpoint of the plain form: norms before attention and feed-forward, and none of results.
struct Dense<'a> {
    path: &'a Path,
    config: &'a ModelConfig,
    loader: Loader<'a>,
}

impl<'a> Dense<'a> {
    fn open(checkpoint: &'a Checkpoint) -> Result<Self, Error> {
        let path = &checkpoint.description.path;
        let config = &checkpoint.description.config;
        if config.sub_norms || config.post_norms || config.projection_norm_eps.is_some() {
            let reason = "cannot be ternarised: it has norms that no dense model has";
            return Err(Error::file(path, reason));
        }
        let options = LoadOptions { ternarise: true, ..LoadOptions::default() };
        let loader = Loader::new(path, config, &checkpoint.tensors, options);
        Ok(Dense { path, config, loader })
    }

    /// The products of `x`, rows of `cols`, with a linear layer `[rows, cols]`.
    fn linear(
        &self,
        layer: usize,
        name: &'static str,
        [rows, cols]: [usize; 2],
        x: &[f32],
        errors: &mut Errors,
    ) -> Result<Vec<f32>, Error> {
        let weights = self.loader.dense(layer, name, rows, cols)?;
        errors.add(name, &weights)?;
        let by_row: Vec<Vec<f32>> = (0..rows)
            .into_par_iter()
            .map(|row| {
                let weights = floats(&weights, row);
                x.chunks_exact(cols).map(|x| dot(x, &weights)).collect()
            })
            .collect();
        let tokens = x.len() / cols;
        Ok((0..tokens).flat_map(|token| by_row.iter().map(move |row| row[token])).collect())
    }

    fn norm(&self, x: &[f32], weight: &[f32]) -> Vec<f32> {
        let mut out = vec![0.0; x.len()];
        for (x, out) in x.chunks_exact(weight.len()).zip(out.chunks_exact_mut(weight.len())) {
            rms_norm(x, weight, self.config.norm_eps, out);
        }
        out
    }

    /// Rotates the heads of every token, pairs half a head apart.
    fn rotate(&self, x: &mut [f32], heads: usize, inverse_frequencies: &[f32]) {
        let half = self.config.head_size / 2;
        for (position, row) in x.chunks_exact_mut(heads * 2 * half).enumerate() {
            for head in row.chunks_exact_mut(2 * half) {
                for (i, &frequency) in inverse_frequencies.iter().enumerate() {
                    let (cos, sin) = rope_angle(position, frequency);
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * cos - b * sin;
                    head[i + half] = b * cos + a * sin;
                }
            }
        }
    }

    /// What each token takes from those before it, `[tokens, heads * head size]`.
    fn attention(&self, q: &[f32], k: &[f32], v: &[f32], window: Option<usize>) -> Vec<f32> {
        let c = self.config;
        let (size, kv) = (c.head_size, c.kv_heads * c.head_size);
        let one = |index: usize| {
            let (token, head) = (index / c.heads, index % c.heads);
            let shared = head / (c.heads / c.kv_heads) * size;
            let at = |other: usize| other * kv + shared..other * kv + shared + size;
            let q = &q[index * size..][..size];
            let first = window.map_or(0, |window| (token + 1).saturating_sub(window));
            let scores: Vec<f32> =
                (first..=token).map(|other| dot(q, &k[at(other)]) * c.attention_scale).collect();
            let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let shares: Vec<f32> = scores.iter().map(|score| (score - largest).exp()).collect();
            let total: f32 = shares.iter().sum();
            let mut out = vec![0.0; size];
            for (other, share) in (first..).zip(shares) {
                for (out, value) in out.iter_mut().zip(&v[at(other)]) {
                    *out += share / total * value;
                }
            }
            out
        };
        let heads = q.len() / size;
        (0..heads).into_par_iter().flat_map_iter(one).collect()
    }

    /// The hidden states of all tokens before the last norm, `[tokens, hidden]`.
    fn states(
        &self,
        tokens: &[u32],
        errors: &mut Errors,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Vec<f32>, Error> {
        let (c, n) = (self.config, &self.config.names);
        let (hidden, attention, kv) =
            (c.hidden_size, c.heads * c.head_size, c.kv_heads * c.head_size);
        let embedding = self.loader.tables()?.embedding;
        if let Some(token) = tokens.iter().find(|&&token| token as usize >= embedding.rows()) {
            return Err(Error::file(self.path, format!("has no token {token}")));
        }
        let mut x: Vec<f32> =
            tokens.iter().flat_map(|&token| floats(&embedding, token as usize)).collect();
        x.iter_mut().for_each(|value| *value *= c.embedding_scale);
        let frequencies: Vec<Vec<f32>> =
            c.ropes.iter().map(|rope| rope.inverse_frequencies(c.head_size)).collect();
        for (index, layer) in c.layers.iter().enumerate() {
            let norm = |name, len| self.loader.layer_norm(index, name, len);
            let a = self.norm(&x, &norm(n.attention_norm, hidden)?);
            let mut q = self.linear(index, n.q, [attention, hidden], &a, errors)?;
            let mut k = self.linear(index, n.k, [kv, hidden], &a, errors)?;
            let v = self.linear(index, n.v, [kv, hidden], &a, errors)?;
            if c.head_norms {
                q = self.norm(&q, &norm(n.q_norm, c.head_size)?);
                k = self.norm(&k, &norm(n.k_norm, c.head_size)?);
            }
            self.rotate(&mut q, c.heads, &frequencies[layer.rope]);
            self.rotate(&mut k, c.kv_heads, &frequencies[layer.rope]);
            let mixed = self.attention(&q, &k, &v, layer.window);
            let o = self.linear(index, n.o, [hidden, attention], &mixed, errors)?;
            x.iter_mut().zip(o).for_each(|(x, o)| *x += o);

            let a = self.norm(&x, &norm(n.ffn_norm, hidden)?);
            let ffn = c.intermediate_size;
            let mut gate = self.linear(index, n.gate, [ffn, hidden], &a, errors)?;
            let up = self.linear(index, n.up, [ffn, hidden], &a, errors)?;
            for (gate, up) in gate.iter_mut().zip(up) {
                *gate = up
                    * match c.activation {
                        Activation::Relu2 => gate.max(0.0).powi(2),
                        Activation::Silu => silu(*gate),
                        Activation::GeluTanh => gelu_tanh(*gate),
                    };
            }
            let down = self.linear(index, n.down, [hidden, ffn], &gate, errors)?;
            x.iter_mut().zip(down).for_each(|(x, down)| *x += down);
            progress(index + 1, c.layers.len());
        }
        Ok(x)
    }

    /// `-ln p` of each token after the first.
    fn losses(&self, states: &[f32], tokens: &[u32]) -> Result<Vec<f64>, Error> {
        let states = self.norm(states, &self.loader.final_norm()?);
        let tables = self.loader.tables()?;
        let head = tables.head.as_ref().unwrap_or(&tables.embedding);
        let hidden = self.config.hidden_size;
        let by_row: Vec<Vec<f32>> = (0..head.rows())
            .into_par_iter()
            .map(|row| {
                let weights = floats(head, row);
                states.chunks_exact(hidden).map(|state| dot(state, &weights)).collect()
            })
            .collect();
        let loss = |(position, &token): (usize, &u32)| {
            let logits = by_row.iter().map(|row| f64::from(row[position]));
            let largest = logits.clone().fold(f64::NEG_INFINITY, f64::max);
            let total: f64 = logits.map(|logit| (logit - largest).exp()).sum();
            largest + total.ln() - f64::from(by_row[token as usize][position])
        };
        Ok(tokens[1..].iter().enumerate().map(loss).collect())
    }
}

#[cfg(test)]
mod tests {
    use bitnet_testing::golden::{GoldenModel, log_softmax};

    use super::*;
    use crate::source;

    /// A model whose weights are ternary as floats and whose inputs are not quantised computes the same by
    /// its floats.
    #[test]
    fn float_weights_give_the_losses_that_the_reference_gives() {
        for name in ["trilm", "llama3-rope", "bonsai"] {
            let Some(path) = bitnet_testing::golden(name) else { continue };
            let checkpoint = source::open(path.to_str().unwrap()).unwrap();
            let golden = GoldenModel::read(&path);
            let ids = &golden.prompts[1].ids;
            let rows = golden.f32("logits.all.1").unwrap();
            let model = Dense::open(&checkpoint).unwrap();
            if checkpoint.description.config.weights != WeightRule::Exact {
                continue;
            }
            let states = model.states(ids, &mut Errors::default(), |_, _| ()).unwrap();
            let losses = model.losses(&states, ids).unwrap();
            let vocabulary = rows.len() / ids.len();
            for (position, loss) in losses.into_iter().enumerate() {
                let row = &rows[position * vocabulary..][..vocabulary];
                let expected = -log_softmax(row)[ids[position + 1] as usize];
                assert!((loss - expected).abs() < 1e-4, "{name} {position}: {loss} {expected}");
            }
            let error = report(&checkpoint, ids, |_, _| ()).unwrap_err().to_string();
            assert!(error.contains("ternary already"), "{error}");
        }
    }

    #[test]
    fn ternary_models_are_not_ternarised() {
        let tiny = source::open(source::TINY).unwrap();
        let error = report(&tiny, &[1, 2], |_, _| ()).unwrap_err().to_string();
        assert!(error.contains("is a ternary model already"), "{error}");
    }
}
