//! `bitnet info`: a model described without loading its weights.

use anyhow::Result;
use bitnet_core::backend::{Activation, ActivationPrecision, KvType};
use bitnet_core::budget::human_bytes;
use bitnet_model::config::{ModelConfig, Pooling, Precision, RopeScaling};
use bitnet_model::source::{self, Checkpoint};
use bitnet_model::weights;
use serde_json::{Map, Value, json};

use crate::args::InfoArgs;
use crate::output::{self, Messages};

/// One fact: its name for programs, its name for people, its value for both.
struct Fact {
    key: &'static str,
    name: &'static str,
    value: Value,
    words: String,
}

impl Fact {
    fn number(key: &'static str, name: &'static str, value: usize) -> Self {
        Fact { key, name, value: json!(value), words: value.to_string() }
    }

    fn bytes(key: &'static str, name: &'static str, value: u64) -> Self {
        Fact { key, name, value: json!(value), words: human_bytes(value) }
    }

    fn text(key: &'static str, name: &'static str, words: impl Into<String>) -> Self {
        let words = words.into();
        Fact { key, name, value: json!(words), words }
    }
}

pub fn run(args: InfoArgs, messages: &Messages) -> Result<()> {
    let checkpoint = source::open(&args.model.model)?;
    let facts = facts(&checkpoint)?;
    let notes = &checkpoint.description.notes;
    if args.json {
        let mut object: Map<String, Value> =
            facts.into_iter().map(|fact| (fact.key.to_owned(), fact.value)).collect();
        object.insert("notes".to_owned(), json!(notes));
        output::json(&object)?;
        return Ok(());
    }
    let rows: Vec<[String; 2]> =
        facts.into_iter().map(|fact| [fact.name.to_owned(), fact.words]).collect();
    output::lines(&output::table(&rows, [false, false]))?;
    notes.iter().for_each(|note| messages.note(note));
    Ok(())
}

fn facts(checkpoint: &Checkpoint) -> Result<Vec<Fact>> {
    let Checkpoint { description, tensors } = checkpoint;
    let config = &description.config;
    let tables = weights::tables(&description.path, config, tensors)?;
    let ternary = weights::packed_bytes(config) * 4;
    let embedding = &tables.embedding;
    let (head, head_words) = match &tables.head {
        Some(head) => (head, format!("{}, {}", head.dtype(), human_bytes(size(head)))),
        None => (embedding, "the embedding".to_owned()),
    };
    let template = match (&description.template, config.pooling) {
        (Some(_), _) => "yes",
        (None, Some(_)) => "none: an embedding model",
        (None, None) => "none: a base model, which continues text",
    };
    let mut facts = vec![
        Fact::text("path", "model", description.path.display().to_string()),
        Fact::text("format", "format", description.format),
        Fact::text("architecture", "architecture", config.architecture),
        Fact::text("weights", "ternary weights as stored", weight_types(checkpoint)),
        Fact {
            key: "ternary_weights",
            name: "ternary weights",
            value: json!(ternary),
            words: format!("{}, {} packed", count(ternary), human_bytes(ternary / 4)),
        },
        Fact {
            key: "embedding",
            name: "embedding",
            value: json!({"dtype": embedding.dtype().to_string(), "bytes": size(embedding)}),
            words: format!("{}, {}", embedding.dtype(), human_bytes(size(embedding))),
        },
        Fact {
            key: "head",
            name: "output head",
            value: json!({
                "dtype": head.dtype().to_string(),
                "bytes": size(head),
                "tied": tables.head.is_none(),
            }),
            words: head_words,
        },
        Fact::number("layers", "layers", config.layers.len()),
        Fact::number("hidden_size", "hidden size", config.hidden_size),
        Fact::number("intermediate_size", "feed-forward size", config.intermediate_size),
        Fact::number("heads", "query heads", config.heads),
        Fact::number("kv_heads", "key/value heads", config.kv_heads),
        Fact::number("head_size", "head size", config.head_size),
        Fact::number("vocab_size", "vocabulary", embedding.rows()),
        Fact::number("context_length", "context", config.context_length),
        Fact::text("activation", "activation", activation(config.activation)),
        Fact::text("inputs", "inputs of linear layers", precision(config.precision)),
        Fact::text("rope", "rotary embedding", ropes(config)),
    ];
    for (key, name, kv_type) in [
        ("kv_bytes_per_token_f32", "KV per token, f32", KvType::F32),
        ("kv_bytes_per_token_f16", "KV per token, f16", KvType::F16),
        ("kv_bytes_per_token_int8", "KV per token, int8", KvType::Int8),
    ] {
        facts.push(Fact::bytes(key, name, kv_bytes(config, kv_type)));
    }
    if let Some(pooling) = config.pooling {
        let words = match pooling {
            Pooling::Last => "last token",
            Pooling::Mean => "mean of all tokens",
        };
        facts.push(Fact::text("pooling", "pooling", words));
    }
    facts.push(Fact {
        key: "chat_template",
        name: "chat template",
        value: json!(description.template.is_some()),
        words: template.to_owned(),
    });
    let tokenizer = &description.tokenizer;
    let ends: Vec<String> = description
        .end_ids
        .iter()
        .map(|&id| match tokenizer.token_bytes(id) {
            Ok(bytes) => format!("{id} {}", String::from_utf8_lossy(bytes).escape_debug()),
            Err(_) => id.to_string(),
        })
        .collect();
    facts.push(Fact {
        key: "end_ids",
        name: "end tokens",
        value: json!(description.end_ids),
        words: if ends.is_empty() { "none".to_owned() } else { ends.join(", ") },
    });
    Ok(facts)
}

fn size(table: &bitnet_core::Tensor) -> u64 {
    table.data().len() as u64
}

fn kv_bytes(config: &ModelConfig, kv_type: KvType) -> u64 {
    config.kv_layout(kv_type, 1).block_bytes() as u64
}

/// The element types in which the checkpoint stores its linear layers, with their number.
fn weight_types(checkpoint: &Checkpoint) -> String {
    let config = &checkpoint.description.config;
    let types = weights::linear_types(&checkpoint.description.path, config, &checkpoint.tensors);
    let words: Vec<String> =
        types.into_iter().map(|(dtype, count)| format!("{count} x {dtype}")).collect();
    words.join(", ")
}

fn activation(activation: Activation) -> &'static str {
    match activation {
        Activation::Relu2 => "relu2",
        Activation::Silu => "silu",
        Activation::GeluTanh => "gelu (tanh)",
    }
}

fn precision(precision: Precision) -> &'static str {
    match precision {
        Precision::Known(ActivationPrecision::Int8) => "int8 per token",
        Precision::Known(ActivationPrecision::F32) => "f32",
        Precision::ByScale => "decided by the scales of the weights",
    }
}

fn ropes(config: &ModelConfig) -> String {
    let words: Vec<String> = config
        .ropes
        .iter()
        .map(|rope| match rope.scaling {
            RopeScaling::None => format!("base {}", rope.theta),
            RopeScaling::Linear { factor } => format!("base {}, linear / {factor}", rope.theta),
            RopeScaling::Llama3 { factor, .. } => {
                format!("base {}, llama3 / {factor}", rope.theta)
            }
        })
        .collect();
    words.join("; ")
}

/// A large number for people: `2.08 billion`.
fn count(n: u64) -> String {
    match n {
        1_000_000_000.. => format!("{:.2} billion", n as f64 / 1e9),
        1_000_000.. => format!("{:.2} million", n as f64 / 1e6),
        _ => n.to_string(),
    }
}
