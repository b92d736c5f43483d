//! The `bitnet` program.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod files;
mod hints;
mod interrupt;
mod log;
mod output;
mod settings;

use std::ffi::OsString;
use std::path::Path;
use std::process::ExitCode;
use std::sync::mpsc;
use std::time::Duration;
use std::{env, io, thread};

use bitnet_model::source::TINY;
use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser};

use args::Cli;
use output::Messages;
use settings::Settings;

const FAILURE: u8 = 1;
const WRONG_USAGE: u8 = 2;
/// 128 and the number of SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

const GUIDANCE: &str = "\
bitnet runs ternary (1.58-bit) language models. A small one is built in, so that
this works at once:

  bitnet run \"Once upon a time\"

Then see whether this machine computes as it should, and how fast it is:

  bitnet doctor
  bitnet bench

With a model of your own, see what it is, and talk to it:

  bitnet info -m FOLDER
  bitnet chat -m FOLDER

`bitnet --help` lists every command, `bitnet COMMAND --help` shows its flags and
examples, `bitnet config --help` says how to keep your own defaults.
";

fn main() -> ExitCode {
    let arguments: Vec<OsString> = env::args_os().collect();
    let (mut command, settings) = match Settings::read(&Cli::command(), &arguments) {
        Ok(settings) => (settings.applied_to(Cli::command(), &arguments), settings),
        Err(error) => match Cli::try_parse_from(&arguments) {
            // Help is there whatever the file says.
            Err(wanted) if !wanted.use_stderr() => return refused(&wanted),
            _ => return failed(&error, &[]),
        },
    };
    let parsed = command.try_get_matches_from_mut(&arguments).and_then(|matches| {
        let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command))?;
        Ok((matches, cli))
    });
    let (matches, cli) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return refused(&error),
    };
    if let Err(error) = ctrlc::set_handler(interrupted) {
        output::error(&format!("cannot listen for Ctrl-C: {error}"), &[]);
        return ExitCode::from(FAILURE);
    }
    let messages = Messages::new(cli.quiet);
    let result = log::start().and_then(|()| match cli.command {
        Some(command) => commands::run(command, &settings, &messages),
        None => output::lines(GUIDANCE).map_err(Into::into),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads the output has seen enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            let hint = model_hint(&matches);
            failed(&error, hint.as_slice())
        }
    }
}

/// Reports a failure and says how the program ends.
fn failed(error: &anyhow::Error, hints: &[String]) -> ExitCode {
    let hints: Vec<&str> = hints.iter().map(String::as_str).collect();
    output::error(&error.to_string(), &hints);
    let code = if error.is::<commands::WrongUsage>() {
        WRONG_USAGE
    } else if error.is::<commands::Interrupted>() {
        INTERRUPTED
    } else {
        FAILURE
    };
    ExitCode::from(code)
}

/// Where the model that was asked for is not there: what is called nearly the same.
fn model_hint(matches: &ArgMatches) -> Option<String> {
    let (_, typed) = matches.subcommand()?;
    let model = typed.try_get_one::<String>("model").ok()??;
    let path = hints::closest_path(Path::new(model))?;
    (model != TINY).then(|| format!("hint: is it {}?", path.display()))
}

fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|e| e.kind() == io::ErrorKind::BrokenPipe)
}

/// Help and version as `clap` prints them; what it refuses as one sentence and its hints, without
/// the usage line that repeats every flag.
fn refused(error: &clap::Error) -> ExitCode {
    if !error.use_stderr() {
        let _ = error.print();
        return ExitCode::SUCCESS;
    }
    let text = error.render().to_string();
    let paragraphs: Vec<&str> = text
        .split("\n\n")
        .map(str::trim_end)
        .filter(|paragraph| !paragraph.is_empty() && !paragraph.starts_with("Usage:"))
        .collect();
    let (sentence, hints) = paragraphs.split_first().expect("an error says something");
    // What is missing, or possible, stands on lines of its own.
    let sentence = sentence.split_whitespace().collect::<Vec<_>>().join(" ");
    output::error(sentence.strip_prefix("error: ").unwrap_or(&sentence), hints);
    ExitCode::from(WRONG_USAGE)
}

/// Ctrl-C, unless somebody takes care of it, leaves the text so far and ends its line. It must work whatever the program is at: loading,
/// reading a prompt, or waiting for a pipe that nobody reads, in which case the line stays open.
fn interrupted() {
    if interrupt::request() {
        return;
    }
    let (ended, wait) = mpsc::channel();
    thread::spawn(move || {
        output::end_open_line(|| {
            let _ = ended.send(());
            // Keeps the lock, so that nothing is written after the end.
            loop {
                thread::park();
            }
        });
    });
    let _ = wait.recv_timeout(Duration::from_millis(250));
    std::process::exit(INTERRUPTED.into());
}
