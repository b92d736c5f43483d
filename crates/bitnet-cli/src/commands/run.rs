//! `bitnet run`: a prompt and its continuation.

use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::path::Path;

use anyhow::Result;
use bitnet_core::machine::physical_cores;
use bitnet_cpu::ceilings::Ceilings;
use bitnet_inference::generate::TokenLogprobs;
use bitnet_inference::{
    FinishReason, GenerateOptions, Generation, Model, ModelOptions, SamplingParams, generate,
};
use bitnet_model::chat::Message;
use bitnet_model::tokenizer::Special;
use serde::Serialize;

use super::profile::Profile;
use super::{WrongUsage, generation};
use crate::args::RunArgs;
use crate::output::{self, Messages, duration, number};

/// What is to be continued.
enum Prompt {
    /// Text as it is.
    Raw(String),
    /// The user's message, after a system message.
    Chat { system: Option<String>, user: String },
    /// Token ids as they are.
    Tokens(Vec<u32>),
}

pub fn run(args: RunArgs, messages: &Messages) -> Result<()> {
    let sampling =
        SamplingParams { logprobs: args.logprobs, ..generation::sampling_params(&args.sampling)? };
    let prompt = prompt(&args)?;
    let constraint = generation::constraint(&args.constraint)?;
    let options = ModelOptions { profile: args.profile, ..super::model_options(&args.model) };
    let model = super::load_generator(&args.model.name.model, &options, messages)?;
    generation::check_biases(&sampling, &model)?;
    let prompt_tokens = encode(&prompt, &model)?;
    let end_ids = match args.length.ignore_eos {
        true => BTreeSet::new(),
        false => model.description().end_ids.clone(),
    };
    let options = GenerateOptions {
        sampling,
        max_tokens: args.length.max_tokens,
        stop: args.length.stop,
        end_ids,
        constraint,
    };

    let mut session = model.session(super::session_options(args.kv.kv_type))?;
    // Printed with the first text after it: a prompt that the model refuses is not half a result.
    let mut pending = match &prompt {
        Prompt::Raw(text) => text.as_str(),
        _ => "",
    };
    let mut written = Ok(());
    let mut write = |text: &str| {
        written = output::piece(std::mem::take(&mut pending)).and_then(|()| output::piece(text));
        match written {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    };
    let tokenizer = model.tokenizer();
    let generation = if args.json {
        generate(&mut session, tokenizer, &prompt_tokens, &options, |_| ControlFlow::Continue(()))?
    } else {
        let generation = generate(&mut session, tokenizer, &prompt_tokens, &options, &mut write)?;
        let _ = write("");
        written?;
        output::end_of_text()?;
        generation
    };
    let profile = match args.profile {
        false => None,
        true => {
            messages.summary("measuring what this machine can do at most");
            let threads = args.model.threads.unwrap_or_else(physical_cores);
            Some(Profile::new(model.profile(), &Ceilings::measure(threads)?))
        }
    };
    let timing = Timing::of(&generation, prompt_tokens.len(), session.length());
    let summary = timing.sentence(prompt_tokens.len(), generation.tokens.len());
    if args.json {
        output::json(&Output {
            prompt_tokens: &prompt_tokens,
            tokens: &generation.tokens,
            text: &generation.text,
            finish_reason: generation.finish_reason.as_str(),
            timing,
            logprobs: args.logprobs.map(|_| logprobs(&generation)),
            profile,
        })?;
    } else if let Some(profile) = profile {
        messages.report(&profile.table());
    }
    if options.constraint.is_some() && generation.finish_reason == FinishReason::Length {
        messages.note("the output is cut off and may not be what the constraint asks: raise -n");
    }
    messages.summary(&summary);
    Ok(())
}

fn prompt(args: &RunArgs) -> Result<Prompt> {
    let stdin = Some(Path::new("-"));
    let schema = args.constraint.json_schema.as_deref().map(Path::new);
    let constraint = args.constraint.grammar.as_deref().or(schema);
    if args.file.as_deref() == stdin && constraint == stdin {
        let sentence = "stdin cannot be both the prompt and the constraint: put one into a file";
        return Err(WrongUsage(sentence.into()).into());
    }
    if let Some(tokens) = &args.tokens {
        return Ok(Prompt::Tokens(tokens.clone()));
    }
    let text = match (&args.prompt, &args.file) {
        (Some(text), _) => text.clone(),
        (None, Some(path)) => super::read_text(path)?,
        (None, None) => {
            return Err(WrongUsage(
                "there is no prompt: give a text, --file FILE (- is stdin) or --tokens IDS".into(),
            )
            .into());
        }
    };
    Ok(match args.chat {
        true => Prompt::Chat { system: args.system.clone(), user: text },
        false => Prompt::Raw(text),
    })
}

fn encode(prompt: &Prompt, model: &Model) -> Result<Vec<u32>> {
    let tokenizer = model.tokenizer();
    match prompt {
        Prompt::Raw(text) => Ok(tokenizer.encode(text, true, Special::Recognised)?),
        Prompt::Tokens(tokens) => Ok(tokens.clone()),
        Prompt::Chat { system, user } => {
            let template = super::template(model.description())?;
            let system = system.iter().map(|text| Message::new("system", text));
            let conversation: Vec<Message> = system.chain([Message::new("user", user)]).collect();
            let (_, ids) = template.encode(tokenizer, &conversation, true)?;
            Ok(ids)
        }
    }
}

/// How long the two parts of a generation took.
#[derive(Serialize)]
struct Timing {
    prompt_ms: f64,
    decode_ms: f64,
    prompt_tokens_per_s: Option<f64>,
    /// Of the tokens that were read back to get the next one; the first token comes with the prompt.
    decode_tokens_per_s: Option<f64>,
}

impl Timing {
    fn of(generation: &Generation, prompt_tokens: usize, tokens_read: usize) -> Self {
        let rate = |tokens: usize, seconds: f64| {
            (tokens > 0 && seconds > 0.0).then(|| tokens as f64 / seconds)
        };
        let prompt_s = generation.prompt_time.as_secs_f64();
        let decode_s = generation.decode_time.as_secs_f64();
        Timing {
            prompt_ms: 1e3 * prompt_s,
            decode_ms: 1e3 * decode_s,
            prompt_tokens_per_s: rate(prompt_tokens, prompt_s),
            decode_tokens_per_s: rate(tokens_read - prompt_tokens, decode_s),
        }
    }

    fn sentence(&self, prompt_tokens: usize, tokens: usize) -> String {
        let part = |count: usize, what: &str, ms: f64, rate: Option<f64>| {
            let plural = if count == 1 { "" } else { "s" };
            if count == 0 {
                return format!("0 {what}s");
            }
            let rate = rate.map(|rate| format!(" ({} tokens/s)", number(rate)));
            format!("{count} {what}{plural} in {}{}", duration(ms), rate.unwrap_or_default())
        };
        format!(
            "{}, {}",
            part(prompt_tokens, "prompt token", self.prompt_ms, self.prompt_tokens_per_s),
            part(tokens, "token", self.decode_ms, self.decode_tokens_per_s),
        )
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Output<'a> {
    prompt_tokens: &'a [u32],
    tokens: &'a [u32],
    text: &'a str,
    finish_reason: &'static str,
    timing: Timing,
    #[serde(skip_serializing_if = "Option::is_none")]
    logprobs: Option<Vec<Logprobs>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    profile: Option<Profile>,
}

#[derive(Serialize)]
struct Logprobs {
    #[serde(flatten)]
    token: Logprob,
    top: Vec<Logprob>,
}

#[derive(Serialize)]
struct Logprob {
    token: u32,
    logprob: f64,
}

fn logprobs(generation: &Generation) -> Vec<Logprobs> {
    let entry = |(&token, entry): (&u32, &TokenLogprobs)| Logprobs {
        token: Logprob { token, logprob: entry.logprob },
        top: entry.top.iter().map(|&(token, logprob)| Logprob { token, logprob }).collect(),
    };
    generation.tokens.iter().zip(&generation.logprobs).map(entry).collect()
}
