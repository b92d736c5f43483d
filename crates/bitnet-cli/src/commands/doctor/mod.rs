//! `bitnet doctor`: whether this machine computes what it should.
//!
//! Every processor gives the same logits to the last bit, so a digest of them is all it takes to
//! compare two machines.

mod sense;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use bitnet_core::backend::Backend;
use bitnet_core::budget::{available_memory, human_bytes};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::source::{self, TINY};
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::args::DoctorArgs;
use crate::output::{self, Messages};

/// Fingerprints that this program carries, made on the plainest instruction set by
/// `BITNET_ISA=scalar bitnet doctor --threads 1 --write crates/bitnet-cli/fingerprints.json`.
const STORED: &str = include_str!("../../../fingerprints.json");

/// Tokens of the prompt, and tokens generated after it.
const PROMPT: usize = 16;
const GENERATED: usize = 16;

/// Variables that change how this program computes.
const VARIABLES: [&str; 1] = [Isa::VARIABLE];

/// What a model computes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Fingerprint {
    /// What the model was called, for people.
    model: String,
    /// Digest of the names, types, shapes and bytes of the tensors: which model this is.
    weights_sha256: String,
    /// Token ids that were read.
    prompt: Vec<u32>,
    /// The most probable tokens after them, one by one.
    tokens: Vec<u32>,
    /// Digest of the bits of the logits after each token.
    logits_sha256: String,
}

impl Fingerprint {
    /// Whether the same was computed, whatever the model was called.
    fn agrees_with(&self, other: &Self) -> bool {
        Fingerprint { model: other.model.clone(), ..self.clone() } == *other
    }
}

pub fn run(args: DoctorArgs, messages: &Messages) -> Result<()> {
    let against = match &args.against {
        Some(path) => Some(parse(&super::read_text(path)?, &path.display().to_string())?),
        None => None,
    };
    let stored = parse(STORED, "the fingerprints in this program")?;
    let mut report = Report { results_are_right: true, checks: Vec::new(), fingerprint: None };
    check_machine(&mut report)?;
    // What writes the stored fingerprint of the built-in model cannot be held against it.
    if args.write.is_none() {
        check_computation(&stored, &mut report)?;
    }
    if args.model.name.model != TINY || args.write.is_some() || args.against.is_some() {
        check_model(&args, &stored, against.as_deref(), messages, &mut report)?;
    }
    if args.json {
        output::json(&report)?;
    } else {
        output::lines(&report.table())?;
    }
    if !report.results_are_right {
        bail!(
            "results differ from those that are known to be right: the machine's memory or \
             processor, the model's files, or this program is at fault"
        );
    }
    match report.is_healthy() {
        true => Ok(()),
        false => bail!(
            "the model does not work as it should: its files are damaged or say something wrong \
             about it; get them again, or with I2_S weights try --i2s-layout"
        ),
    }
}

/// What was found so far.
#[derive(Serialize)]
struct Report {
    /// Whether every comparison with a fingerprint was equal.
    #[serde(skip)]
    results_are_right: bool,
    checks: Vec<Check>,
    /// Of the model that was asked for.
    fingerprint: Option<Fingerprint>,
}

#[derive(Serialize)]
struct Check {
    name: String,
    finding: String,
    /// Whether all is as it should be; `None` for plain facts.
    ok: Option<bool>,
}

impl Report {
    fn add(&mut self, name: impl Into<String>, finding: impl Into<String>) {
        self.checks.push(Check { name: name.into(), finding: finding.into(), ok: None });
    }

    fn is_healthy(&self) -> bool {
        self.checks.iter().all(|check| check.ok != Some(false))
    }

    fn compare(&mut self, name: impl Into<String>, found: &Fingerprint, expected: &Fingerprint) {
        let agrees = found.agrees_with(expected);
        self.results_are_right &= agrees;
        let finding = if agrees { "ok, equal to the last bit" } else { "FAULT: results differ" };
        let finding = finding.to_owned();
        self.checks.push(Check { name: name.into(), finding, ok: Some(agrees) });
    }

    fn table(&self) -> String {
        let row = |check: &Check| [check.name.clone(), check.finding.clone()];
        output::table(&self.checks.iter().map(row).collect::<Vec<_>>(), [false, false])
    }
}

fn check_machine(report: &mut Report) -> Result<()> {
    let cpu = CpuBackend::new(CpuOptions {
        threads: None,
        isa: Isa::from_env()?,
        ..CpuOptions::default()
    })?;
    let detected: Vec<String> = Isa::detected().iter().map(Isa::to_string).collect();
    let logical = std::thread::available_parallelism().map_or(1, usize::from);
    report.add("system", format!("{} on {}", std::env::consts::OS, std::env::consts::ARCH));
    report.add("logical cores", logical.to_string());
    report.add("memory available", available_memory().map_or("unknown".to_owned(), human_bytes));
    report.add("instruction sets", detected.join(", "));
    report.add("in use", cpu.name());
    for name in VARIABLES {
        let value = std::env::var_os(name);
        report.add(name, value.map_or("not set".into(), |value| value.display().to_string()));
    }
    Ok(())
}

/// The built-in model on every instruction set, by one thread and by all.
fn check_computation(stored: &[Fingerprint], report: &mut Report) -> Result<()> {
    for isa in Isa::detected() {
        for threads in [Some(1), None] {
            let options = ModelOptions { isa: Some(isa), threads, ..ModelOptions::default() };
            let found = fingerprint(TINY, &Model::open(TINY, &options)?)?;
            let expected = known(stored, &found).ok_or_else(|| {
                anyhow!(
                    "the built-in model is not the one whose fingerprint is stored: build again"
                )
            })?;
            let by = if threads.is_some() { "1 thread" } else { "all threads" };
            report.compare(format!("{TINY}, {isa}, {by}"), &found, expected);
        }
    }
    Ok(())
}

fn check_model(
    args: &DoctorArgs,
    stored: &[Fingerprint],
    against: Option<&[Fingerprint]>,
    messages: &Messages,
    report: &mut Report,
) -> Result<()> {
    let name = &args.model.name.model;
    let model = super::load(&args.model, messages)?;
    let found = fingerprint(name, &model)?;
    report.add("model", name);
    report.add("weights", format!("sha256 {}…", &found.weights_sha256[..16]));
    report.add("logits", format!("sha256 {}…", &found.logits_sha256[..16]));
    if model.config().pooling.is_none() {
        sense::check(&model, report)?;
    }
    match (against, &args.against) {
        (Some(list), Some(path)) => {
            let path = path.display();
            let Some(expected) = known(list, &found) else {
                bail!(
                    "{path}: has no fingerprint of {name}: it is of another model, or one of the \
                     two copies is damaged"
                );
            };
            report.add("compared with", path.to_string());
            report.compare("comparison", &found, expected);
        }
        _ => match known(stored, &found) {
            Some(expected) => report.compare("comparison", &found, expected),
            None => report.add(
                "comparison",
                "none: this program has no fingerprint of this model; see --write",
            ),
        },
    }
    if let Some(path) = &args.write {
        write(path, &found)?;
        report.add("written", path.display().to_string());
    }
    report.fingerprint = Some(found);
    Ok(())
}

fn known<'a>(list: &'a [Fingerprint], found: &Fingerprint) -> Option<&'a Fingerprint> {
    list.iter().find(|fingerprint| fingerprint.weights_sha256 == found.weights_sha256)
}

fn parse(text: &str, name: &str) -> Result<Vec<Fingerprint>> {
    serde_json::from_str(text).map_err(|error| {
        anyhow!("{name}: holds no fingerprints as `bitnet doctor --write` writes them: {error}")
    })
}

fn write(path: &Path, fingerprint: &Fingerprint) -> Result<()> {
    let mut text = serde_json::to_string_pretty(&[fingerprint])?;
    text.push('\n');
    fs::write(path, text).map_err(|error| anyhow!("{}: cannot be written: {error}", path.display()))
}

/// Reads a fixed prompt and generates greedily.
fn fingerprint(name: &str, model: &Model) -> Result<Fingerprint> {
    let vocab_size = model.vocab_size() as u64;
    // Ids from all over the vocabulary: Knuth's multiplier spreads them.
    let prompt: Vec<u32> =
        (1..=PROMPT as u64).map(|i| (i * 2_654_435_761 % vocab_size) as u32).collect();
    let mut session = model.session(SessionOptions::default())?;
    let mut logits = Vec::new();
    let mut digest = Sha256::new();
    session.feed_showing_all(&prompt, |row| {
        logits = row.to_vec();
        add_bits(&mut digest, row);
    })?;
    let mut tokens = Vec::new();
    while tokens.len() < GENERATED && session.remaining() > 0 {
        let best =
            (1..logits.len()).fold(0, |best, id| if logits[id] > logits[best] { id } else { best });
        tokens.push(best as u32);
        session.feed(&[best as u32], &mut logits)?;
        add_bits(&mut digest, &logits);
    }
    Ok(Fingerprint {
        model: name.to_owned(),
        weights_sha256: weights_digest(name)?,
        prompt,
        tokens,
        logits_sha256: hex(digest),
    })
}

fn add_bits(digest: &mut Sha256, logits: &[f32]) {
    let bytes: Vec<u8> = logits.iter().flat_map(|logit| logit.to_le_bytes()).collect();
    digest.update(bytes);
}

fn weights_digest(model: &str) -> Result<String> {
    let tensors = source::open(model)?.tensors;
    let mut names: Vec<&str> = tensors.names().collect();
    names.sort_unstable();
    let mut digest = Sha256::new();
    for name in names {
        if let Some(tensor) = tensors.get(name)? {
            digest.update(format!("{name} {} {:?}\n", tensor.dtype(), tensor.shape()));
            digest.update(tensor.data());
        }
    }
    Ok(hex(digest))
}

fn hex(digest: Sha256) -> String {
    digest.finalize().iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
