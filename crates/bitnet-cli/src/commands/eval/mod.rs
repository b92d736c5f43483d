//! `bitnet eval`: how many multiple-choice questions a model answers.

mod question;

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, anyhow, bail};
use bitnet_inference::perplexity::{choice_logprobs, encode_choices};
use bitnet_inference::{Model, Session};
use bitnet_model::chat::Message;
use bitnet_model::tokenizer::Special;
use serde::Serialize;

use crate::args::EvalArgs;
use crate::output::{self, Messages, number};
use question::Question;

/// Lines left out whose reasons are told one by one.
const TOLD: usize = 10;

#[derive(Serialize)]
struct Report {
    model: String,
    file: String,
    chat: bool,
    questions: usize,
    acc: f64,
    acc_stderr: f64,
    acc_norm: f64,
    acc_norm_stderr: f64,
    seconds: f64,
    skipped: Vec<Skipped>,
    rows: Vec<Row>,
}

/// A line that could not be used.
#[derive(Serialize)]
struct Skipped {
    line: usize,
    reason: String,
}

/// What the model makes of a question. Choices are counted from 0.
#[derive(Serialize)]
struct Row {
    line: usize,
    answer: usize,
    /// The choice with the largest log-probability.
    choice: usize,
    /// The choice with the largest log-probability per byte.
    choice_norm: usize,
    logprobs: Vec<f64>,
    bytes: Vec<usize>,
}

pub fn run(args: EvalArgs, messages: &Messages) -> Result<()> {
    let file = args.questions.display().to_string();
    let text = super::read_text(&args.questions)?;
    let lines: Vec<(usize, &str)> =
        (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty()).collect();
    let mut rows_file = args.output.as_deref().map(RowsFile::create).transpose()?;
    let model = super::load_generator(
        &args.model.name.model,
        &super::model_options(&args.model),
        messages,
    )?;
    if args.chat {
        super::template(model.description())?;
    }
    let mut session = model.session(super::session_options(args.kv.kv_type))?;

    let started = Instant::now();
    let bar = messages.bar(lines.len() as u64, "questions");
    let (mut rows, mut skipped) = (Vec::new(), Vec::new());
    let mut right = 0;
    for (line, text) in lines {
        let asked = Question::read(text)
            .and_then(|question| Ok((tokens(&question, &model, args.chat)?, question)));
        match asked {
            Ok(((prompt, choices), question)) => {
                let row = row(line, &question, &prompt, &choices, &mut session)?;
                rows_file.iter_mut().try_for_each(|file| file.write(&row))?;
                right += usize::from(row.choice == row.answer);
                rows.push(row);
            }
            Err(reason) => {
                if skipped.len() < TOLD {
                    let note = format!("{file}, line {line}: {reason}; left out");
                    bar.suspend(|| messages.note(&note));
                }
                skipped.push(Skipped { line, reason });
            }
        }
        bar.inc(1);
        if !bar.is_hidden() && !rows.is_empty() {
            bar.set_message(format!(", acc {:.4}", right as f64 / rows.len() as f64));
        }
    }
    bar.finish_and_clear();
    rows_file.map_or(Ok(()), RowsFile::finish)?;
    if rows.is_empty() {
        bail!("{file}: has no question that can be used");
    }
    if skipped.len() > TOLD {
        messages.note(&format!("{} lines were left out in all", skipped.len()));
    }
    let (acc, acc_stderr) = accuracy(&rows, |row| row.choice);
    let (acc_norm, acc_norm_stderr) = accuracy(&rows, |row| row.choice_norm);
    let report = Report {
        model: args.model.name.model,
        file,
        chat: args.chat,
        questions: rows.len(),
        acc,
        acc_stderr,
        acc_norm,
        acc_norm_stderr,
        seconds: started.elapsed().as_secs_f64(),
        skipped,
        rows,
    };
    if args.json {
        output::json(&report)?;
    } else {
        output::lines(&report.table())?;
    }
    messages.summary(&format!(
        "{} questions in {:.1} s, {} questions/s",
        report.questions,
        report.seconds,
        number(report.questions as f64 / report.seconds)
    ));
    Ok(())
}

/// The tokens of a question and of its choices, if the model has room for them.
fn tokens(
    question: &Question,
    model: &Model,
    chat: bool,
) -> Result<(Vec<u32>, Vec<Vec<u32>>), String> {
    let tokenizer = model.tokenizer();
    let tokens = match chat {
        false => encode_choices(tokenizer, &question.prompt(), &question.choices)
            .map_err(|error| error.to_string()),
        true => {
            let message = Message::new("user", question.text.clone());
            let template = super::template(model.description()).map_err(|e| e.to_string())?;
            let (_, prompt) =
                template.encode(tokenizer, &[message], true).map_err(|error| error.to_string())?;
            let encode = |choice: &String| tokenizer.encode(choice, false, Special::AsText);
            let choices = question.choices.iter().map(encode).collect::<Result<_, _>>();
            Ok((prompt, choices.map_err(|error| error.to_string())?))
        }
    };
    let (prompt, choices) = tokens?;
    let longest = choices.iter().map(Vec::len).max().unwrap_or(0);
    let (length, context) = (prompt.len() + longest, model.config().context_length);
    if length > context {
        return Err(format!("its {length} tokens do not fit the model's context of {context}"));
    }
    Ok((prompt, choices))
}

fn row(
    line: usize,
    question: &Question,
    prompt: &[u32],
    choices: &[Vec<u32>],
    session: &mut Session,
) -> Result<Row> {
    let logprobs = choice_logprobs(session, prompt, choices)?;
    let bytes: Vec<usize> = question.choices.iter().map(String::len).collect();
    let per_byte: Vec<f64> =
        logprobs.iter().zip(&bytes).map(|(logprob, &bytes)| logprob / bytes as f64).collect();
    let (choice, choice_norm) = (best(&logprobs), best(&per_byte));
    Ok(Row { line, answer: question.answer, choice, choice_norm, logprobs, bytes })
}

/// The index of the largest value, the first of equal ones.
fn best(values: &[f64]) -> usize {
    (1..values.len()).fold(0, |best, i| if values[i] > values[best] { i } else { best })
}

/// The share of questions whose answer was chosen, and its standard error: the deviation of the
/// sample over the root of its size, as lm-evaluation-harness has it.
fn accuracy(rows: &[Row], choice: impl Fn(&Row) -> usize) -> (f64, f64) {
    let n = rows.len() as f64;
    let share = rows.iter().filter(|row| choice(row) == row.answer).count() as f64 / n;
    let error = if n > 1.0 { (share * (1.0 - share) / (n - 1.0)).sqrt() } else { 0.0 };
    (share, error)
}

impl Report {
    fn table(&self) -> String {
        let row = |name: &str, share: f64, error: f64| {
            [name.to_owned(), format!("{share:.4}"), format!("{error:.4}")]
        };
        let rows = [
            ["", "share", "standard error"].map(String::from),
            row("acc", self.acc, self.acc_stderr),
            row("acc_norm", self.acc_norm, self.acc_norm_stderr),
        ];
        let skipped = match self.skipped.len() {
            0 => String::new(),
            count => format!(", {count} lines left out"),
        };
        let table = output::table(&rows, [false, true, true]);
        format!("{} questions{skipped}\n\n{table}", self.questions)
    }
}

/// The file with a line for each question, written as they are answered.
struct RowsFile<'a> {
    path: &'a Path,
    file: BufWriter<File>,
}

impl<'a> RowsFile<'a> {
    fn create(path: &'a Path) -> Result<Self> {
        let file = File::create(path).map_err(|error| Self::failed(path, error))?;
        Ok(RowsFile { path, file: BufWriter::new(file) })
    }

    fn write(&mut self, row: &Row) -> Result<()> {
        let mut line = serde_json::to_vec(row)?;
        line.push(b'\n');
        self.file.write_all(&line).map_err(|error| Self::failed(self.path, error))
    }

    fn finish(mut self) -> Result<()> {
        self.file.flush().map_err(|error| Self::failed(self.path, error))
    }

    fn failed(path: &Path, error: std::io::Error) -> anyhow::Error {
        anyhow!("{}: cannot be written: {error}", path.display())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_standard_error_is_that_of_a_sample() {
        let row = |choice| Row {
            line: 1,
            answer: 0,
            choice,
            choice_norm: 0,
            logprobs: Vec::new(),
            bytes: Vec::new(),
        };
        let rows = [0, 0, 0, 1].map(row);
        // Values 1, 1, 1, 0: the sum of squares about their mean is 0.75, over 3 is 0.25.
        assert_eq!(accuracy(&rows, |row| row.choice), (0.75, 0.25));
        assert_eq!(accuracy(&rows, |row| row.choice_norm), (1.0, 0.0));
        assert_eq!(accuracy(&rows[..1], |row| row.choice), (1.0, 0.0));
    }

    #[test]
    fn the_first_of_equal_choices_is_taken() {
        assert_eq!(best(&[-2.0, -1.0, -1.0]), 1);
        assert_eq!(best(&[-1.0]), 0);
    }
}
