//! Which weight of which module each constant of a graph is.

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};

use bitnet_core::{DType, Tensor};

use super::proto::{Graph, Node};
use super::{Constants, Form, packed};
use crate::error::excerpt;

/// The weights of a graph by the names of the model's parameters.
pub(super) fn find(
    graph: &Graph<'_>,
    constants: &Constants<'_>,
) -> Result<BTreeMap<String, Form>, String> {
    let mut weights = BTreeMap::new();
    // These may be called after a parameter, and are parts of one.
    let packed = graph.nodes.iter().filter(|node| node.op == "MatMulNBits");
    let operands: BTreeSet<&str> =
        packed.flat_map(|node| node.inputs.iter().skip(1)).copied().collect();
    for (name, tensor) in constants.0.iter().filter(|(name, _)| !operands.contains(*name)) {
        if let Some(parameter) = parameter(name) {
            match weights.entry(parameter) {
                Entry::Vacant(entry) => entry.insert(Form::Plain(tensor.clone())),
                Entry::Occupied(entry) => {
                    return Err(format!(
                        "has two initializers that are `{}`",
                        excerpt(entry.key())
                    ));
                }
            };
        }
    }
    let made: BTreeMap<&str, &Node<'_>> = graph
        .nodes
        .iter()
        .filter(|node| matches!(node.op, "Transpose" | "Identity" | "Cast"))
        .map(|node| (node.output, node))
        .collect();
    for node in &graph.nodes {
        let Some(module) = module(node) else { continue };
        let weight = format!("{module}.weight");
        if weights.contains_key(&weight) {
            continue;
        }
        let first = || constants.get(node.inputs.first()?).cloned();
        match node.op {
            "MatMul" | "Gemm" if is_linear(&module) => {
                let Some((value, turned)) = origin(node, &made) else { continue };
                // The parameter of another module is that of a tied head.
                if let (None, Some(tensor)) = (parameter(value), constants.get(value)) {
                    let form = match tensor {
                        Ok(tensor) if !turned && tensor.shape().len() == 2 => {
                            Form::Transposed(tensor.clone())
                        }
                        tensor => Form::Plain(tensor.clone()),
                    };
                    weights.insert(weight, form);
                }
            }
            // Ternarising master weights begins with the mean of their absolute values.
            "Abs" if is_linear(&module) => {
                if let Some(tensor) = first() {
                    weights.insert(weight, Form::Plain(tensor));
                }
            }
            // A tied table may bear the name of the head alone.
            "Gather" if module.ends_with("embed_tokens") => {
                if let Some(tensor) = first() {
                    weights.insert(weight, Form::Plain(tensor));
                }
            }
            "MatMulNBits" if is_linear(&module) => {
                let scale = format!("{module}.weight_scale");
                let has_scale = weights.contains_key(&scale);
                let form = match packed::Packed::of_node(node, constants, has_scale) {
                    Ok(matrix) => {
                        let matrix = Box::new(matrix);
                        if !has_scale {
                            weights.insert(scale, Form::BlockScales(matrix.clone()));
                        }
                        Form::Packed(matrix)
                    }
                    Err(reason) => Form::Plain(Err(reason)),
                };
                weights.insert(weight, form);
            }
            _ => {}
        }
    }
    let scaled: Vec<String> = weights
        .keys()
        .filter_map(|name| name.strip_suffix("_scale"))
        .filter(|name| weights.contains_key(*name))
        .map(str::to_owned)
        .collect();
    for name in scaled {
        if let Some(form) = weights.get_mut(&name) {
            unpacked(form);
        }
    }
    Ok(weights)
}

/// Marks numbers that have a scale beside them, but are not packed, as ternary: `AutoBitLinear`
/// unpacks its weights when it is loaded.
fn unpacked(form: &mut Form) {
    let is_apart = |tensor: &Tensor| {
        tensor.shape().len() == 2 && (tensor.dtype().is_float() || tensor.dtype() == DType::I8)
    };
    let (weights, transposed) = match form {
        Form::Plain(Ok(tensor)) if is_apart(tensor) => (tensor.clone(), false),
        Form::Transposed(tensor) if is_apart(tensor) => (tensor.clone(), true),
        _ => return,
    };
    *form = Form::Ternary { weights, transposed };
}

/// The name of the parameter that an initializer of this name is, as checkpoints have it: whatever
/// the model was a part of when it was exported is taken off.
fn parameter(name: &str) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    if let Some(layer) = layer(&parts) {
        return Some(format!("model.{}", parts[layer..].join(".")));
    }
    match parts[..] {
        [.., module @ ("embed_tokens" | "norm"), kind] => Some(format!("model.{module}.{kind}")),
        [.., "lm_head", kind] => Some(format!("lm_head.{kind}")),
        _ => None,
    }
}

/// Where `layers` is that a number follows, and something after that.
fn layer(parts: &[&str]) -> Option<usize> {
    let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
    parts.windows(3).position(|window| window[0] == "layers" && is_number(window[1]))
}

/// The module that a node is a part of, by where its exporter found it: a layer's, the embedding or
/// the head.
fn module(node: &Node<'_>) -> Option<String> {
    let path = match node.scopes {
        // The modules from the outermost in, each with its whole path, and the node's own name:
        // `['', 'model', 'model.layers.0', ..., 'linear']`.
        Some(scopes) => scopes.rsplit('\'').skip(1).step_by(2).nth(1)?.to_owned(),
        // `/model/layers.0/self_attn/q_proj/MatMul`
        None => node.name.rsplit_once('/')?.0.trim_start_matches('/').replace('/', "."),
    };
    parameter(&format!("{path}.weight"))?.strip_suffix(".weight").map(str::to_owned)
}

fn is_linear(module: &str) -> bool {
    module.ends_with("_proj") || module == "lm_head"
}

/// The value that the second operand of a product is made of, and whether it was turned around on
/// the way.
fn origin<'a>(node: &Node<'a>, made: &BTreeMap<&str, &Node<'a>>) -> Option<(&'a str, bool)> {
    let mut turned = node.op == "Gemm" && node.integer("transB") == Some(1);
    let mut value = *node.inputs.get(1)?;
    // Exporters put one or two operations between; a chain that has no end is no export.
    for _ in 0..8 {
        let Some(maker) = made.get(value) else { return Some((value, turned)) };
        turned ^= maker.op == "Transpose";
        value = maker.inputs.first()?;
    }
    None
}
