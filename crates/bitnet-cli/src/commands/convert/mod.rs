//! `bitnet convert`: a model in another format.

mod ternarise;

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use bitnet_core::DType;
use bitnet_core::budget::human_bytes;
use bitnet_cpu::Isa;
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::convert::{self, Options, Target};
use bitnet_model::source;
use bitnet_model::weights::LoadOptions;

use self::ternarise::Measured;
use super::WrongUsage;
use crate::args::{ConvertArgs, HeadChoice, LayoutChoice, PackingChoice, TargetFormat};
use crate::output::Messages;

/// Tokens of the prompt that `--verify` reads.
const PROMPT: usize = 16;

/// Most that rounded scales and heads may move a logit, in standard deviations of its row. Inputs
/// that are rounded to int8 make a network jump: rounding to 16 bits moved logits of models with
/// random weights by up to 0.26.
const BOUND: f32 = 0.5;

pub fn run(args: ConvertArgs, messages: &Messages) -> Result<()> {
    let started = Instant::now();
    let target = target(&args)?;
    let load = LoadOptions { ternarise: args.ternarise, ..super::load_options(&args.file) };
    let path = Path::new(&args.output);
    super::pull::fetch(&args.input, messages)?;
    let checkpoint = source::open(&args.input)?;
    let dense = match args.ternarise {
        true => Some(Measured::of(&checkpoint, args.text.as_deref(), messages)?),
        false => None,
    };
    let converted = convert::to(&checkpoint, path, &target, Options { load }, |done, all| {
        messages.progress(&format!("{done} of {all} parts"));
    });
    messages.progress("");
    converted?.iter().for_each(|note| messages.note(note));
    drop(checkpoint);
    let seconds = started.elapsed().as_secs_f64();
    messages.summary(&format!(
        "{}: {} written in {seconds:.1} s",
        path.display(),
        human_bytes(size(path)?)
    ));
    if let Some(dense) = dense {
        dense.report(&args.output, messages)?;
    }
    if args.verify {
        let before = results(&args.input, load)?;
        let after = results(&args.output, LoadOptions::default())?;
        messages.summary(
            &compared(&before, &after).with_context(|| {
                format!("{} is not the model that {} is", args.output, args.input)
            })?,
        );
    }
    Ok(())
}

/// What the flags ask for, if they fit each other.
fn target(args: &ConvertArgs) -> Result<Target> {
    let ends_in = |name: &str| {
        Path::new(&args.output).extension().is_some_and(|it| it.eq_ignore_ascii_case(name))
    };
    let by_name = if ends_in("gguf") { TargetFormat::Gguf } else { TargetFormat::Bitnet };
    let format = args.to.unwrap_or(by_name);
    let wrong = |sentence: &str| Err(WrongUsage(sentence.to_owned()).into());
    if ends_in("onnx") {
        return wrong("ONNX models are folders: give --to onnx and the name of a folder");
    }
    let head = args.head.map(|head| match head {
        HeadChoice::Bf16 => DType::BF16,
        HeadChoice::F16 => DType::F16,
        HeadChoice::Q8_0 => DType::Q8_0,
        HeadChoice::Q6K => DType::Q6K,
        HeadChoice::F32 => DType::F32,
    });
    if args.packing.is_some() && format != TargetFormat::Gguf {
        return wrong("--type is for GGUF files: give --to gguf as well");
    }
    if args.layout.is_some() && format != TargetFormat::Bitnet {
        return wrong("--layout is for .bitnet files");
    }
    let packed = format == TargetFormat::HfPacked;
    match format {
        TargetFormat::Bitnet if head.is_some() => wrong(
            "--head is for GGUF files, Hugging Face and ONNX folders: a .bitnet file keeps it",
        ),
        TargetFormat::Bitnet => {
            let compact = match args.layout {
                Some(layout) => layout == LayoutChoice::Compact,
                None => Isa::takes_compact(Isa::from_env()?)?,
            };
            Ok(Target::Native { compact })
        }
        TargetFormat::Hf | TargetFormat::HfPacked => match head {
            Some(head) if !head.is_float() => {
                wrong("--head in a Hugging Face folder is bf16, f16 or f32")
            }
            _ => Ok(Target::HuggingFace { packed, head }),
        },
        TargetFormat::Onnx => match head {
            Some(head) if !head.is_float() => wrong("--head in an ONNX folder is bf16, f16 or f32"),
            _ => Ok(Target::Onnx { head }),
        },
        TargetFormat::Gguf => {
            let packing = match args.packing.unwrap_or(PackingChoice::Tq2_0) {
                PackingChoice::Tq2_0 => DType::Tq2_0,
                PackingChoice::Tq1_0 => DType::Tq1_0,
                PackingChoice::I2S => DType::I2S,
                PackingChoice::Q2_0 => DType::Q2_0,
            };
            Ok(Target::Gguf { packing, head })
        }
    }
}

/// Bytes of a file, or of the files in a folder.
fn size(path: &Path) -> Result<u64> {
    let named = || path.display().to_string();
    if path.is_file() {
        return Ok(path.metadata().with_context(named)?.len());
    }
    let mut bytes = 0;
    for entry in fs::read_dir(path).with_context(named)? {
        bytes += entry.and_then(|entry| entry.metadata()).with_context(named)?.len();
    }
    Ok(bytes)
}

/// What a model computes for a fixed prompt: the logits after each token, or of a model that makes
/// embeddings the final states.
fn results(model: &str, load: LoadOptions) -> Result<Vec<Vec<f32>>> {
    let model = Model::open(model, &ModelOptions { load, ..ModelOptions::default() })?;
    let length = PROMPT.min(model.config().context_length);
    let step = (model.vocab_size() / length).max(1);
    let tokens: Vec<u32> = (0..length).map(|i| (i * step % model.vocab_size()) as u32).collect();
    let mut rows = Vec::new();
    let mut keep = |values: &[f32]| rows.push(values.to_vec());
    let mut session = model.session(SessionOptions::default())?;
    match model.config().pooling {
        None => session.feed_showing_all(&tokens, &mut keep)?,
        Some(_) => session.feed_showing_states(&tokens, &mut keep)?,
    }
    Ok(rows)
}

/// How like two models' results are, as a sentence.
///
/// # Errors
/// They are further apart than rounding takes them.
fn compared(before: &[Vec<f32>], after: &[Vec<f32>]) -> Result<String> {
    let is_same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits();
    let mut same = before.len() == after.len();
    let (mut error, mut agreed) = (0.0f32, 0);
    for (a, b) in before.iter().zip(after) {
        if a.len() != b.len() {
            bail!("it has {} scores per token and not {}", b.len(), a.len());
        }
        same &= a.iter().zip(b).all(is_same);
        let largest = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        error = error.max(largest / deviation(a));
        agreed += usize::from(best(a) == best(b));
    }
    if same {
        return Ok("verified: the same results to the last bit".to_owned());
    }
    let measured = format!(
        "results differ by at most {error:.2e} standard deviations, the best token is the same at \
         {agreed} of {} positions",
        before.len()
    );
    // Not a number is no small number.
    if !matches!(error.partial_cmp(&BOUND), Some(std::cmp::Ordering::Less)) {
        bail!("{measured}; rounding explains {BOUND}: do not use it, and report this");
    }
    Ok(format!("verified: {measured} (bound {BOUND}); scales or the head were rounded"))
}

/// Standard deviation of a row.
fn deviation(row: &[f32]) -> f32 {
    let n = row.len() as f64;
    let mean = row.iter().map(|&v| f64::from(v)).sum::<f64>() / n;
    (row.iter().map(|&v| (f64::from(v) - mean).powi(2)).sum::<f64>() / n).sqrt() as f32
}

/// The place of the largest value.
fn best(row: &[f32]) -> Option<usize> {
    (0..row.len()).max_by(|&a, &b| row[a].total_cmp(&row[b]))
}
