//! `bitnet batch`: every row of a file through a model.

mod export;
mod input;
mod journal;
mod parquet_file;
mod prompt;

use std::fs;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use bitnet_inference::{
    Answer, Error, FinishReason, Generation, GenerationParams, InferenceEngine, Message,
    StreamingConfig,
};
use futures_executor::block_on;
use futures_util::stream::{self, StreamExt};
use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use self::export::{ERROR, FINISH_REASON, OUTPUT, RESULT, TOKENS};
use self::input::{Fields, PROMPT, Row, Rows};
use self::journal::{Journal, Plan};
use self::prompt::Template;
use super::{Interrupted, WrongUsage, generation};
use crate::args::{BatchArgs, InputFormat, OutputFormat};
use crate::files;
use crate::interrupt::Watch;
use crate::output::{self, Messages, number};

/// Rows for each that is computed: enough that a long one, which the others' results wait for, leaves
/// no place empty.
const WINDOW: usize = 4;

/// Tokens of the prompt by which a model is recognised.
const PROBE: usize = 16;

/// What a field of a row gets before its name if a field of the result has that name.
const RENAMED: &str = "input_";

pub fn run(args: BatchArgs, messages: &Messages) -> Result<()> {
    let job = Job::new(args)?;
    let output = &job.args.output;
    if !job.args.restart && output.exists() && !files::with_suffix(output, ".part").exists() {
        bail!(
            "{}: is there already: choose another OUT, or --restart to replace it",
            output.display()
        );
    }
    let (rows, digest) = job.rows()?.count()?;
    let mut journal = Journal::open(output)?;
    match job.fill(&mut journal, rows, digest, messages) {
        Ok(work) => job.finish(journal, work, messages),
        Err(error) => {
            journal.abandon();
            Err(error)
        }
    }
}

/// What is to be done, as far as flags and files tell.
struct Job {
    args: BatchArgs,
    input_format: InputFormat,
    output_format: OutputFormat,
    template: Template,
    params: GenerationParams,
}

impl Job {
    fn new(args: BatchArgs) -> Result<Self> {
        let unknown = |flag: &str, path: &Path, formats: &str| {
            WrongUsage(format!(
                "{}: the name tells no format: give {flag} {formats}",
                path.display()
            ))
        };
        let input_format = args.format.or_else(|| input::format_of(&args.input));
        let output_format = args.to.or_else(|| export::format_of(&args.output));
        let params = GenerationParams {
            sampling: generation::sampling_params(&args.sampling)?,
            max_tokens: args.length.max_tokens,
            stop: args.length.stop.clone(),
            ignore_end: args.length.ignore_eos,
            constraint: generation::constraint(&args.constraint)?,
            ..GenerationParams::default()
        };
        if let Ok((from, to)) = fs::canonicalize(&args.input)
            .and_then(|input| fs::canonicalize(&args.output).map(|output| (input, output)))
            && from == to
        {
            let sentence = format!("{}: is IN and OUT at once: choose another OUT", to.display());
            return Err(WrongUsage(sentence).into());
        }
        Ok(Job {
            input_format: input_format
                .ok_or_else(|| unknown("--format", &args.input, "text, jsonl or csv"))?,
            output_format: output_format
                .ok_or_else(|| unknown("--to", &args.output, "text, jsonl, csv, md or parquet"))?,
            template: Template::new(args.template.as_deref())?,
            params,
            args,
        })
    }

    fn rows(&self) -> Result<Rows> {
        let rows = Rows::open(&self.args.input, self.input_format)?;
        if let Some(columns) = rows.columns() {
            self.template.check(&self.args.input.display().to_string(), &columns)?;
        }
        Ok(rows)
    }

    /// Computes the results that are not there yet.
    fn fill(
        &self,
        journal: &mut Journal,
        rows: u64,
        digest: String,
        messages: &Messages,
    ) -> Result<Work> {
        let args = &self.args;
        let options = super::model_options(&args.model);
        let model = super::load_generator(&args.model.name.model, &options, messages)?;
        generation::check_biases(&self.params.sampling, &model)?;
        if args.chat {
            super::template(model.description())?;
        }
        let at_once = usize::from(args.concurrency);
        let window = WINDOW * at_once;
        let engine = generation::engine(model, args.kv.kv_type, at_once, 2 * window)?;
        if self.params.constraint.is_some() {
            // A constraint that nothing can satisfy is no fault of a row.
            engine.stream("a", self.params.clone(), StreamingConfig::default())?;
        }
        let plan =
            Plan { input: digest, model: self.model_digest(&engine)?, settings: self.settings() };
        journal.resume(&plan, args.restart)?;
        let done = journal.rows();
        if done > 0 {
            messages.note(&format!("{done} of {rows} rows are done already"));
        }

        let started = Instant::now();
        let bar = messages.bar(rows, "rows");
        bar.set_position(done);
        bar.reset_eta();
        let watch = Watch::new();
        let mut failed = 0;
        let mut results = stream::iter(self.rows()?.enumerate().skip(done as usize))
            .map(|(index, row)| self.result(&engine, index as u64, row))
            .buffered(window);
        loop {
            let Some(next) = block_on(watch.until(results.next())) else {
                journal.sync()?;
                bar.finish_and_clear();
                let kept = journal.rows();
                bail!(Interrupted(format!(
                    "stopped after {kept} of {rows} rows: the same command goes on from there"
                )));
            };
            let Some(result) = next else { break };
            let result = result.map_err(|error| resumable(error, journal.rows()))?;
            failed += u64::from(!result[ERROR].is_null());
            journal.append(&result).map_err(|error| resumable(error, journal.rows()))?;
            bar.inc(1);
            if failed > 0 {
                bar.set_message(format!(", {failed} failed"));
            }
        }
        bar.finish_and_clear();
        if journal.rows() != rows {
            bail!("{}: was changed while it was read: run this again", args.input.display());
        }
        Ok(Work { rows: rows - done, seconds: started.elapsed().as_secs_f64() })
    }

    /// The result of a row, which is submitted at once. What goes wrong with it is in its `error`;
    /// what goes wrong with all of them is an error.
    fn result(
        &self,
        engine: &InferenceEngine,
        index: u64,
        row: Result<Row>,
    ) -> impl Future<Output = Result<Fields>> + use<> {
        let submitted = row.map(|Row { fields, problem }| {
            // An empty line of a text keeps its place.
            let empty = self.input_format == InputFormat::Text && fields[PROMPT] == "";
            let prompt = match problem {
                Some(problem) => Err(problem),
                None => self.template.render(&fields),
            };
            let answer = prompt.map(|prompt| (!empty).then(|| self.submit(engine, index, &prompt)));
            (fields, answer)
        });
        async move {
            let (fields, answer) = submitted?;
            let generation = match answer {
                Err(problem) => Err(problem),
                Ok(None) => Ok(None),
                Ok(Some(answer)) => match answer.await {
                    Ok(generation) => Ok(Some(generation)),
                    Err(error @ Error::EngineStopped { .. }) => return Err(error.into()),
                    Err(error) => Err(error.to_string()),
                },
            };
            Ok(with_result(fields, generation))
        }
    }

    fn submit(&self, engine: &InferenceEngine, index: u64, prompt: &str) -> Answer<Generation> {
        let mut params = self.params.clone();
        params.sampling.seed = params.sampling.seed.wrapping_add(index);
        if !self.args.chat {
            return engine.generate(prompt, params);
        }
        let system = self.args.system.iter().map(|text| Message::new("system", text));
        let messages: Vec<Message> = system.chain([Message::new("user", prompt)]).collect();
        engine.chat(&messages, params)
    }

    /// Digest of what the model computes for a fixed prompt, which is the same on every machine.
    fn model_digest(&self, engine: &InferenceEngine) -> Result<String> {
        let vocab_size = engine.model()?.vocab_size();
        let length = PROBE.min(engine.context_length()?);
        let step = (vocab_size / length).max(1);
        let tokens: Vec<u32> = (0..length).map(|at| (at * step % vocab_size) as u32).collect();
        let mut digest = Sha256::new();
        for logit in engine.infer(&tokens).wait()? {
            digest.update(logit.to_bits().to_le_bytes());
        }
        Ok(digest.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
    }

    /// The flags on which results depend.
    fn settings(&self) -> Value {
        let BatchArgs { template, chat, system, kv, .. } = &self.args;
        json!({
            "format": format!("{:?}", self.input_format),
            "template": template,
            "chat": chat,
            "system": system,
            "kv_type": format!("{:?}", kv.kv_type),
            "generation": format!("{:?}", self.params),
        })
    }

    /// Writes the output of a journal that has all results.
    fn finish(&self, mut journal: Journal, work: Work, messages: &Messages) -> Result<()> {
        let path = &self.args.output;
        let kept = journal.rows();
        let mut counts = Counts::default();
        journal.each(|result| {
            counts.add(&result);
            Ok(())
        })?;
        export::write(&mut journal, self.output_format, path)
            .map_err(|error| resumable(error, kept))?;
        journal.remove()?;

        let Counts { rows, failed, cut_off, tokens, first_error } = &counts;
        if self.args.json {
            let Work { seconds, .. } = work;
            output::json(&Summary { rows: *rows, failed: *failed, tokens: *tokens, seconds })?;
        }
        if let Some((row, error)) = first_error {
            messages
                .note(&format!("{failed} of {rows} rows failed; the first, row {row}: {error}"));
        }
        if self.params.constraint.is_some() && *cut_off > 0 {
            messages.note(&format!(
                "{cut_off} outputs are cut off and may not be what the constraint asks: raise -n"
            ));
        }
        let seconds = number(work.seconds);
        let time = match work.rows == *rows {
            true => format!("{seconds} s"),
            false => format!("{seconds} s for the last {}", work.rows),
        };
        messages.summary(&format!("{}: {rows} rows, {tokens} tokens, {time}", path.display()));
        match self.args.strict && *failed > 0 {
            true => bail!("{failed} of {rows} rows failed: see `{ERROR}` in {}", path.display()),
            false => Ok(()),
        }
    }
}

/// What this run did; there may have been others before it.
struct Work {
    rows: u64,
    seconds: f64,
}

/// The fields of a row, and after them what came of it.
fn with_result(row: Fields, generation: Result<Option<Generation>, String>) -> Fields {
    let names: Vec<String> = row.keys().cloned().collect();
    let mut result = Fields::new();
    for (mut name, value) in row {
        if RESULT.contains(&name.as_str()) {
            while RESULT.contains(&name.as_str()) || names.contains(&name) {
                name.insert_str(0, RENAMED);
            }
        }
        result.insert(name, value);
    }
    let (output, finish_reason, tokens, error) = match generation {
        Ok(Some(Generation { text, finish_reason, tokens, .. })) => {
            (json!(text), json!(finish_reason.as_str()), tokens.len(), Value::Null)
        }
        Ok(None) => (json!(""), Value::Null, 0, Value::Null),
        Err(error) => (Value::Null, Value::Null, 0, error.into()),
    };
    result.insert(OUTPUT.to_owned(), output);
    result.insert(FINISH_REASON.to_owned(), finish_reason);
    result.insert(TOKENS.to_owned(), tokens.into());
    result.insert(ERROR.to_owned(), error);
    result
}

/// Results that are there are not lost by an error that ends the run.
fn resumable(error: anyhow::Error, rows: u64) -> anyhow::Error {
    match rows {
        0 => error,
        rows => anyhow!("{error}; {rows} rows are kept, and the same command goes on from there"),
    }
}

/// What became of all rows.
#[derive(Default)]
struct Counts {
    rows: u64,
    failed: u64,
    cut_off: u64,
    tokens: u64,
    /// The row, counted from 1, and its error.
    first_error: Option<(u64, String)>,
}

impl Counts {
    fn add(&mut self, result: &Fields) {
        self.rows += 1;
        self.tokens += result[TOKENS].as_u64().unwrap_or(0);
        self.cut_off += u64::from(result[FINISH_REASON] == FinishReason::Length.as_str());
        if let Value::String(error) = &result[ERROR] {
            self.failed += 1;
            self.first_error.get_or_insert_with(|| (self.rows, error.clone()));
        }
    }
}

/// What `--json` prints.
#[derive(Serialize)]
struct Summary {
    rows: u64,
    failed: u64,
    tokens: u64,
    /// Of this run.
    seconds: f64,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_field_of_a_row_is_lost_to_its_result() {
        let row = json!({"a": 1, "output": 2, "input_output": 3, "error": 4});
        let row = row.as_object().unwrap().clone();
        let result = with_result(row, Err("why".into()));
        let expected = json!({
            "a": 1, "input_input_output": 2, "input_output": 3, "input_error": 4,
            "output": null, "finish_reason": null, "tokens": 0, "error": "why",
        });
        assert_eq!(serde_json::to_string(&result).unwrap(), expected.to_string());
    }
}
