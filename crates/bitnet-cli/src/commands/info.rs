//! `bitnet info`: what a model is, without loading its weights.

use anyhow::Result;
use bitnet_core::Tensor;
use bitnet_core::backend::{Activation, ActivationPrecision, KvType};
use bitnet_core::budget::human_bytes;
use bitnet_model::config::{Pooling, Precision, Rope, RopeScaling};
use bitnet_model::source::{self, Checkpoint};
use bitnet_model::{Error, weights};
use serde::Serialize;

use crate::args::InfoArgs;
use crate::output;

pub fn run(args: InfoArgs) -> Result<()> {
    if args.verify_checksums {
        source::verify_checksums(&args.model.model)?;
    }
    let info = Info::of(&source::open(&args.model.model)?)?;
    if args.json {
        output::json(&info)?
    } else {
        output::lines(&info.table())?
    }
    Ok(())
}

/// What people and programs are told. Sizes are in elements unless their name says bytes.
#[derive(Serialize)]
struct Info {
    model: String,
    format: &'static str,
    architecture: &'static str,
    /// `text`, or for embedding models how a text becomes one vector.
    output: &'static str,
    layers: usize,
    hidden_size: usize,
    intermediate_size: usize,
    heads: usize,
    kv_heads: usize,
    head_size: usize,
    vocab_size: usize,
    context_length: usize,
    /// Tokens that a token sees in the layers that have a window.
    attention_window: Option<usize>,
    ropes: Vec<RopeInfo>,
    activation: &'static str,
    /// How linear layers take their input; `None` where only the loaded scales can tell.
    linear_input: Option<&'static str>,
    ternary_weights: u64,
    /// Element types of the linear layers in the file, with their number.
    stored_as: String,
    /// Their size at two bits each.
    packed_bytes: u64,
    embedding: TableInfo,
    /// `None` where the embedding serves as the head.
    head: Option<TableInfo>,
    kv_bytes_per_token: KvBytes,
    chat_template: bool,
    end_tokens: Vec<EndToken>,
    notes: Vec<String>,
}

#[derive(Serialize)]
struct RopeInfo {
    theta: f32,
    scaling: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    factor: Option<f32>,
}

#[derive(Serialize)]
struct TableInfo {
    r#type: String,
    bytes: usize,
}

#[derive(Serialize)]
struct KvBytes {
    f32: usize,
    f16: usize,
    int8: usize,
}

#[derive(Serialize)]
struct EndToken {
    id: u32,
    text: String,
}

impl Info {
    fn of(checkpoint: &Checkpoint) -> Result<Self, Error> {
        let Checkpoint { description, tensors } = checkpoint;
        let c = &description.config;
        let tables = weights::tables(&description.path, c, tensors)?;
        let stored_as: Vec<String> = weights::linear_types(&description.path, c, tensors)
            .into_iter()
            .map(|(dtype, count)| format!("{count} x {dtype}"))
            .collect();
        let kv_bytes = |kv_type| c.kv_layout(kv_type, 1).block_bytes();
        let end_token = |&id: &u32| EndToken {
            id,
            text: match description.tokenizer.token_bytes(id) {
                Ok(bytes) => String::from_utf8_lossy(bytes).into_owned(),
                // Files name end tokens that their vocabularies do not have.
                Err(_) => String::new(),
            },
        };
        Ok(Info {
            model: description.path.display().to_string(),
            format: description.format,
            architecture: c.architecture,
            output: match c.pooling {
                None => "text",
                Some(Pooling::Last) => "embedding (last token)",
                Some(Pooling::Mean) => "embedding (mean)",
            },
            layers: c.layers.len(),
            hidden_size: c.hidden_size,
            intermediate_size: c.intermediate_size,
            heads: c.heads,
            kv_heads: c.kv_heads,
            head_size: c.head_size,
            vocab_size: tables.embedding.rows(),
            context_length: c.context_length,
            attention_window: c.layers.iter().find_map(|layer| layer.window),
            ropes: c.ropes.iter().map(RopeInfo::of).collect(),
            activation: match c.activation {
                Activation::Relu2 => "relu2",
                Activation::Silu => "silu",
                Activation::GeluTanh => "gelu_tanh",
            },
            linear_input: match c.precision {
                Precision::Known(ActivationPrecision::Int8) => Some("int8"),
                Precision::Known(ActivationPrecision::F32) => Some("f32"),
                Precision::ByScale => None,
            },
            ternary_weights: weights::ternary_weights(c),
            stored_as: stored_as.join(", "),
            packed_bytes: weights::packed_bytes(c),
            embedding: TableInfo::of(&tables.embedding),
            head: tables.head.as_ref().map(TableInfo::of),
            kv_bytes_per_token: KvBytes {
                f32: kv_bytes(KvType::F32),
                f16: kv_bytes(KvType::F16),
                int8: kv_bytes(KvType::Int8),
            },
            chat_template: description.template.is_some(),
            end_tokens: description.end_ids.iter().map(end_token).collect(),
            notes: description.notes.clone(),
        })
    }

    fn table(&self) -> String {
        let kv = &self.kv_bytes_per_token;
        let ropes: Vec<String> = self.ropes.iter().map(RopeInfo::to_string).collect();
        let end_tokens: Vec<String> = self
            .end_tokens
            .iter()
            .map(|token| match token.text.as_str() {
                "" => token.id.to_string(),
                text => format!("{} {}", token.id, text.escape_debug()),
            })
            .collect();
        let window =
            self.attention_window.map(|tokens| format!(", window of {tokens} in some layers"));
        let rows = [
            ("model", self.model.clone()),
            ("format", self.format.to_owned()),
            ("architecture", self.architecture.to_owned()),
            ("output", self.output.to_owned()),
            ("layers", self.layers.to_string()),
            ("hidden size", self.hidden_size.to_string()),
            ("feed-forward", format!("{}, {}", self.intermediate_size, self.activation)),
            (
                "attention",
                format!(
                    "{} heads of {}, {} key/value heads",
                    self.heads, self.head_size, self.kv_heads
                ),
            ),
            ("rope", ropes.join("; ")),
            ("vocabulary", format!("{} tokens", self.vocab_size)),
            ("context", format!("{} tokens{}", self.context_length, window.unwrap_or_default())),
            (
                "ternary weights",
                format!(
                    "{}, {} at two bits each",
                    grouped(self.ternary_weights),
                    human_bytes(self.packed_bytes)
                ),
            ),
            ("stored as", self.stored_as.clone()),
            (
                "linear input",
                self.linear_input
                    .unwrap_or("int8 or f32, as the scales tell when loaded")
                    .to_owned(),
            ),
            ("embedding", self.embedding.to_string()),
            (
                "output head",
                self.head.as_ref().map_or("the embedding".to_owned(), TableInfo::to_string),
            ),
            (
                "KV per token",
                format!(
                    "{} (f32), {} (f16), {} (int8)",
                    human_bytes(kv.f32 as u64),
                    human_bytes(kv.f16 as u64),
                    human_bytes(kv.int8 as u64)
                ),
            ),
            (
                "chat template",
                if self.chat_template { "yes" } else { "none: a base model" }.to_owned(),
            ),
            ("end tokens", end_tokens.join(", ")),
        ];
        let notes = self.notes.iter().map(|note| ("note", note.clone()));
        let rows: Vec<[String; 2]> =
            rows.into_iter().chain(notes).map(|(name, value)| [name.to_owned(), value]).collect();
        output::table(&rows, [false, false])
    }
}

impl RopeInfo {
    fn of(rope: &Rope) -> Self {
        let (scaling, factor) = match rope.scaling {
            RopeScaling::None => ("none", None),
            RopeScaling::Linear { factor } => ("linear", Some(factor)),
            RopeScaling::Llama3 { factor, .. } => ("llama3", Some(factor)),
        };
        RopeInfo { theta: rope.theta, scaling, factor }
    }
}

impl std::fmt::Display for RopeInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "theta {}", self.theta)?;
        match self.factor {
            Some(factor) => write!(f, ", {} scaling by {factor}", self.scaling),
            None => Ok(()),
        }
    }
}

impl TableInfo {
    fn of(tensor: &Tensor) -> Self {
        TableInfo { r#type: tensor.dtype().to_string(), bytes: tensor.data().len() }
    }
}

impl std::fmt::Display for TableInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}, {}", self.r#type, human_bytes(self.bytes as u64))
    }
}

/// `2084044800` as `2 084 044 800`.
fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.chars().enumerate() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(' ');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn large_numbers_are_grouped_by_three_digits() {
        assert_eq!(grouped(7), "7");
        assert_eq!(grouped(123_456), "123 456");
        assert_eq!(grouped(2_084_044_800), "2 084 044 800");
    }
}
