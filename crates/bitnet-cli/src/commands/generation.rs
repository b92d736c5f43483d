//! What the flags say about sampling and constraints, for every command that generates.

use std::path::Path;

use anyhow::{Result, bail};
use bitnet_inference::{Constraint, InferenceEngine, Model, SamplingParams};

use super::WrongUsage;
use crate::args::{ConstraintArgs, KvTypeChoice, SamplingArgs};

/// What the output must be, read from files where the flags name some.
pub fn constraint(args: &ConstraintArgs) -> Result<Option<Constraint>> {
    let ConstraintArgs { json_schema, regex, grammar } = args;
    Ok(match (json_schema, regex, grammar) {
        (Some(schema), ..) if schema.trim_start().starts_with('{') => {
            Some(Constraint::JsonSchema(schema.clone()))
        }
        (Some(file), ..) => Some(Constraint::JsonSchema(super::read_text(Path::new(file))?)),
        (_, Some(regex), _) => Some(Constraint::Regex(regex.clone())),
        (.., Some(file)) => Some(Constraint::Lark(super::read_text(file)?)),
        (None, None, None) => None,
    })
}

/// How tokens are chosen, checked.
pub fn sampling_params(args: &SamplingArgs) -> Result<SamplingParams> {
    let sampling = SamplingParams {
        logit_bias: args.logit_bias.clone(),
        repetition_penalty: args.repeat_penalty,
        presence_penalty: args.presence_penalty,
        frequency_penalty: args.frequency_penalty,
        repeat_last_n: None,
        top_k: args.top_k,
        temperature: args.temperature,
        top_p: args.top_p,
        min_p: args.min_p,
        typical_p: args.typical,
        seed: args.seed,
        logprobs: None,
    };
    sampling.validate().map_err(|error| {
        let flag = setting_name(error.name).replace('_', "-");
        WrongUsage(format!("--{flag} is {}: give {}", error.value, error.allowed))
    })?;
    Ok(sampling)
}

/// What users call a parameter of sampling.
pub fn setting_name(parameter: &'static str) -> &'static str {
    match parameter {
        "repetition_penalty" => "repeat_penalty",
        "typical_p" => "typical",
        name => name,
    }
}

/// Refuses biases of tokens that the model does not have.
pub fn check_biases(sampling: &SamplingParams, model: &Model) -> Result<()> {
    let vocab_size = model.vocab_size();
    match sampling.logit_bias.iter().find(|(id, _)| *id as usize >= vocab_size) {
        None => Ok(()),
        Some((id, _)) => {
            bail!("--logit-bias: token id {id} does not exist: the model has {vocab_size} tokens")
        }
    }
}

/// An engine that runs so many requests at once, and lets `waiting` more wait.
pub fn engine(
    model: Model,
    kv_type: KvTypeChoice,
    at_once: usize,
    waiting: usize,
) -> Result<InferenceEngine> {
    let mut engine = InferenceEngine::builder()
        .kv_type(super::session_options(kv_type).kv_type)
        .max_batch_size(at_once)
        .max_queue_length(waiting)
        .build()?;
    engine.use_model(model)?;
    Ok(engine)
}
