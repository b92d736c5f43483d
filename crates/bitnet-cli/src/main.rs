//! The `bitnet` program.
#![forbid(unsafe_code)]

mod args;
mod commands;
mod files;
mod interrupt;
mod log;
mod output;

use std::io;
use std::process::ExitCode;
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use clap::Parser;

use args::Cli;
use output::Messages;

const FAILURE: u8 = 1;
const WRONG_USAGE: u8 = 2;
/// 128 and the number of SIGINT, as shells have it.
const INTERRUPTED: u8 = 130;

const GUIDANCE: &str = "\
bitnet runs ternary (1.58-bit) language models. A small one is built in:

  bitnet run \"Once upon a time\"

`bitnet --help` shows what else there is.
";

fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return refused(&error),
    };
    if let Err(error) = ctrlc::set_handler(interrupted) {
        output::error(&format!("cannot listen for Ctrl-C: {error}"), &[]);
        return ExitCode::from(FAILURE);
    }
    let messages = Messages::new(cli.quiet);
    let result = log::start().and_then(|()| match cli.command {
        Some(command) => commands::run(command, &messages),
        None => output::lines(GUIDANCE).map_err(Into::into),
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        // Who reads the output has seen enough.
        Err(error) if is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            output::error(&error.to_string(), &[]);
            let code = if error.is::<commands::WrongUsage>() {
                WRONG_USAGE
            } else if error.is::<commands::Interrupted>() {
                INTERRUPTED
            } else {
                FAILURE
            };
            ExitCode::from(code)
        }
    }
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
