//! `bitnet doctor`: does this machine compute what it should?

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use bitnet_core::budget::{available_memory, human_bytes};
use bitnet_cpu::Isa;
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::source::TINY;
use serde::{Deserialize, Serialize};
use serde_json::json;
use sha2::{Digest, Sha256};

use crate::args::DoctorArgs;
use crate::output::{self, Messages};

/// Fingerprints of models that this program knows, by name. Made by
/// `BITNET_ISA=scalar bitnet doctor --write FILE`.
const KNOWN: &str = include_str!("../../fingerprints.json");

/// What a model computes for fixed token ids, to the last bit.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Fingerprint {
    /// The ids that are read.
    prompt: Vec<u32>,
    /// The most probable tokens that follow, one after another.
    greedy: Vec<u32>,
    /// SHA-256 of the bits of all logits on the way, as little-endian f32.
    logits_sha256: String,
}

/// Fingerprints by the name of the model.
type Fingerprints = BTreeMap<String, Fingerprint>;

/// One line of the report.
struct Check {
    what: String,
    /// `None`: there is nothing to compare with.
    passed: Option<bool>,
    words: String,
}

pub fn run(args: DoctorArgs, messages: &Messages) -> Result<()> {
    let known: Fingerprints = serde_json::from_str(KNOWN)?;
    let mut checks = Vec::new();
    for isa in Isa::detected() {
        let options = ModelOptions { isa: Some(isa), ..ModelOptions::default() };
        let fingerprint = fingerprint(&Model::open(TINY, &options)?)?;
        checks.push(compare(format!("built-in model, {isa}"), &fingerprint, known.get(TINY)));
    }
    let model = super::load_generator(&args.model, messages)?;
    let name = model.description().path.display().to_string();
    let found = fingerprint(&model)?;
    if let Some(path) = &args.write {
        let stored = Fingerprints::from([(name.clone(), found.clone())]);
        let text = serde_json::to_string_pretty(&stored)? + "\n";
        fs::write(path, text)
            .map_err(|error| anyhow!("{}: cannot be written: {error}", path.display()))?;
        checks.push(Check {
            what: name.clone(),
            passed: None,
            words: format!("fingerprint written to {}", path.display()),
        });
    } else if let Some(path) = &args.against {
        let stored = read(path)?;
        // A file with one fingerprint is meant for the model at hand, whatever its path here.
        let expected = match stored.len() {
            1 => stored.values().next(),
            _ => stored.get(&name),
        };
        if expected.is_none() {
            bail!("{}: has no fingerprint of `{name}`", path.display());
        }
        checks.push(compare(name.clone(), &found, expected));
    } else if name != TINY {
        checks.push(compare(name.clone(), &found, known.get(&name)));
    }
    report(&args, &model, &found, &checks)?;
    match checks.iter().find(|check| check.passed == Some(false)) {
        Some(check) => bail!("{}: {}", check.what, check.words),
        None => Ok(()),
    }
}

fn read(path: &Path) -> Result<Fingerprints> {
    let text = super::read_text(path)?;
    serde_json::from_str(&text)
        .map_err(|error| anyhow!("{}: is not a file of fingerprints: {error}", path.display()))
}

/// Reads eight fixed ids and goes on greedily for sixteen tokens.
fn fingerprint(model: &Model) -> Result<Fingerprint> {
    let vocab_size = model.vocab_size() as u32;
    let prompt: Vec<u32> = (1..=8).map(|id| id % vocab_size).collect();
    let mut session = model.session(SessionOptions::default())?;
    let mut digest = Sha256::new();
    let mut last = Vec::new();
    session.feed_showing_all(&prompt, |logits| {
        logits.iter().for_each(|logit| digest.update(logit.to_le_bytes()));
        last.clear();
        last.extend_from_slice(logits);
    })?;
    let mut greedy = Vec::new();
    for _ in 0..16.min(session.remaining()) {
        let mut best = 0;
        for (id, logit) in last.iter().enumerate() {
            if *logit > last[best] {
                best = id;
            }
        }
        greedy.push(best as u32);
        session.feed(&[best as u32], &mut last)?;
        last.iter().for_each(|logit| digest.update(logit.to_le_bytes()));
    }
    let logits_sha256 = digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok(Fingerprint { prompt, greedy, logits_sha256 })
}

fn compare(what: String, found: &Fingerprint, expected: Option<&Fingerprint>) -> Check {
    let (passed, words) = match expected {
        None => (None, "no fingerprint is stored to compare with"),
        Some(expected) if expected == found => (Some(true), "the bits are as stored"),
        Some(expected) if expected.greedy == found.greedy => {
            (Some(false), "the logits differ from those stored, the tokens do not")
        }
        Some(_) => (Some(false), "the tokens differ from those stored"),
    };
    Check { what, passed, words: words.to_owned() }
}

fn report(args: &DoctorArgs, model: &Model, found: &Fingerprint, checks: &[Check]) -> Result<()> {
    let cores = std::thread::available_parallelism().map_or(1, |n| n.get());
    let levels: Vec<String> = Isa::detected().iter().map(Isa::to_string).collect();
    let memory = available_memory();
    let forced = std::env::var(Isa::VARIABLE).ok();
    if args.json {
        let checks: Vec<_> = checks
            .iter()
            .map(|check| json!({"what": check.what, "passed": check.passed, "words": check.words}))
            .collect();
        output::json(&json!({
            "machine": {
                "cores": cores,
                "available_memory": memory,
                "instruction_sets": levels,
                "backend": model.backend_name(),
                "bitnet_isa": forced,
            },
            "fingerprint": found,
            "checks": checks,
        }))?;
        return Ok(());
    }
    let mut rows = vec![
        ["cores".to_owned(), cores.to_string()],
        ["memory available".to_owned(), memory.map_or("unknown".to_owned(), human_bytes)],
        ["instruction sets".to_owned(), levels.join(", ")],
        ["in use".to_owned(), model.backend_name()],
        [Isa::VARIABLE.to_owned(), forced.unwrap_or_else(|| "not set".to_owned())],
    ];
    rows.extend(checks.iter().map(|check| {
        let verdict = match check.passed {
            Some(true) => "good: ",
            Some(false) => "BAD: ",
            None => "",
        };
        [check.what.clone(), format!("{verdict}{}", check.words)]
    }));
    rows.push(["fingerprint".to_owned(), found.logits_sha256[..16].to_owned()]);
    output::lines(&output::table(&rows, [false, false]))?;
    Ok(())
}
