//! `bitnet bench`: how fast a model reads and writes on this machine.

mod compare;
mod grade;
mod operations;
mod plot;
mod report;

use std::fs;

use anyhow::{Result, anyhow, bail};
use bitnet_core::machine::physical_cores;
use bitnet_cpu::ceilings::{Ceilings, ReadRate};
use bitnet_inference::bench::{Bench, Kind, Test, Weights};
use bitnet_model::shapes::Shape;

use super::{WrongUsage, session_options};
use crate::args::{BenchArgs, BenchFormat};
use crate::output::{self, Messages};
use compare::Earlier;
use report::{CeilingFacts, MachineFacts, ModelFacts, Report, Row};

pub fn run(args: BenchArgs, messages: &Messages) -> Result<()> {
    if args.ops {
        return operations::run(&args, messages);
    }
    if args.grade {
        return grade::run(&args, messages);
    }
    let options = session_options(args.kv_type);
    let weights = match &args.shape {
        None => {
            super::pull::fetch(&args.model.model, messages)?;
            Weights::of_model(&args.model.model)?
        }
        Some(name) => {
            let shape = Shape::named(name).expect("the flag takes names of shapes");
            if args.gate_sparsity.is_some() && !shape.has_relu2() {
                return Err(WrongUsage(format!(
                    "{name} has no relu2 gates, so none of them is exactly zero: leave out \
                     --gate-sparsity"
                ))
                .into());
            }
            messages.summary(&format!("making random weights of {name}"));
            Weights::of_shape(shape, args.gate_sparsity)?
        }
    };
    weights.notes.iter().for_each(|note| messages.note(note));
    let mut generate = args.generate.clone();
    if weights.config.pooling.is_some() {
        messages.note("this model makes embeddings: it generates nothing");
        generate.clear();
    }
    let tests = tests(&args, &generate);
    if tests.is_empty() {
        let sentence = "there is nothing to measure: give -p or -n a number above 0";
        return Err(WrongUsage(sentence.to_owned()).into());
    }
    for test in &tests {
        let (length, context) = (test.depth + test.tokens, weights.config.context_length);
        if length > context {
            bail!(
                "{} needs {length} tokens, but the context of {} has {context}: choose a shorter \
                 one",
                test.name(),
                weights.path.display()
            );
        }
    }

    let threads = match args.threads.is_empty() {
        true => vec![physical_cores()],
        false => args.threads.clone(),
    };
    let earlier = match &args.compare {
        None => None,
        Some(path) => {
            let name = path.display().to_string();
            let earlier = Earlier::parse(&super::read_text(path)?, name)?;
            earlier.must_have_one_of(&tests, &threads)?;
            Some(earlier)
        }
    };
    let mut report = Report {
        machine: MachineFacts::collect(),
        model: ModelFacts {
            name: weights.path.display().to_string(),
            random_weights: args.shape.is_some(),
            ternary_weights: bitnet_model::weights::ternary_weights(&weights.config),
            head_weights: 0,
            head_bytes: 0,
            kv_type: options.kv_type.name(),
            gate_sparsity_asked: args.gate_sparsity,
            gate_sparsity: None,
        },
        compared_with: None,
        ceilings: Vec::new(),
        rows: Vec::new(),
    };
    for &threads in &threads {
        let (ceilings, reads) = match args.ceilings {
            false => (None, None),
            true => {
                messages.summary(&format!("measuring the ceilings of {}", count(threads)));
                (Some(Ceilings::measure(threads)?), Some(ReadRate::new(threads)?))
            }
        };
        messages.summary(&format!("loading for {}", count(threads)));
        let bench = Bench::load(&weights, threads, options.kv_type)?;
        report.machine.instruction_set = bench.backend_name();
        let costs = bench.costs();
        report.model.head_weights = costs.head_rows * costs.hidden;
        report.model.head_bytes = costs.head_rows * costs.head_row_bytes;
        if report.rows.is_empty() {
            report.model.gate_sparsity = bench.gate_sparsity()?;
        }
        let depth = tests.iter().map(|test| test.depth).max().unwrap_or(0);
        if depth > 0 {
            messages.summary(&format!("filling {depth} tokens of context"));
        }
        let mut sequences = bench.sequences(&tests)?;
        let rounds = usize::from(args.reps);
        let progress = |round| {
            messages.summary(&format!("{}, round {} of {rounds}", count(threads), round + 1));
        };
        let measurements = bench.run(&tests, &mut sequences, rounds, reads.as_ref(), progress)?;
        let rows = measurements
            .iter()
            .map(|measurement| Row::new(measurement, &measurements, threads, ceilings.as_ref()));
        report.rows.extend(rows);
        report.ceilings.extend(ceilings.iter().map(CeilingFacts::new));
    }
    let mut regressions = Vec::new();
    if let Some(earlier) = &earlier {
        earlier.differences(&report).iter().for_each(|note| messages.note(note));
        regressions = earlier.compare(&mut report);
    }
    match args.format {
        BenchFormat::Json => output::json(&report)?,
        BenchFormat::Table => output::lines(&report.table())?,
        BenchFormat::Csv => output::lines(&report.csv()?)?,
        BenchFormat::Md => output::lines(&report.markdown())?,
    }
    if let Some(path) = &args.plot {
        fs::write(path, plot::svg(&report))
            .map_err(|error| anyhow!("{}: cannot be written: {error}", path.display()))?;
        messages.summary(&format!("drew {}", path.display()));
    }
    if args.fail_on_regression && !regressions.is_empty() {
        bail!(
            "{}: more than {} % slower than before",
            regressions.join(", "),
            compare::TOLERATED_PERCENT
        );
    }
    Ok(())
}

/// What the flags ask for.
fn tests(args: &BenchArgs, generate: &[usize]) -> Vec<Test> {
    let mut tests = Vec::new();
    for &batch in &args.batch {
        for &depth in &args.depth {
            let of = |kind, tokens| Test { kind, tokens, depth, batch: usize::from(batch) };
            let prefills = args.prompt.iter().map(|&tokens| of(Kind::Prefill, tokens));
            let decodes = generate.iter().map(|&tokens| of(Kind::Decode, tokens));
            tests.extend(prefills.chain(decodes).filter(|test| test.tokens > 0));
        }
    }
    tests
}

fn count(threads: usize) -> String {
    format!("{threads} thread{}", if threads == 1 { "" } else { "s" })
}
