//! Where messages come from: a line editor at a terminal, or lines of stdin.

use std::cell::Cell;
use std::fs;
use std::io::{self, BufRead, IsTerminal};
use std::path::{MAIN_SEPARATOR, Path, PathBuf};
use std::rc::Rc;

use anyhow::{Result, bail};
use rustyline::completion::{Completer, Pair};
use rustyline::error::ReadlineError;
use rustyline::highlight::Highlighter;
use rustyline::hint::Hinter;
use rustyline::history::FileHistory;
use rustyline::validate::{ValidationContext, ValidationResult, Validator};
use rustyline::{ColorMode, CompletionType, Config, Context, Editor, Helper};

use super::commands;
use crate::files;
use crate::output::Messages;

const PROMPT: &str = "> ";

/// Messages of the history that are kept.
const HISTORY: usize = 1000;

/// Text between two of these may have many lines.
const BLOCK: &str = "\"\"\"";

pub enum Input {
    Terminal(Box<Terminal>),
    Lines,
}

pub struct Terminal {
    editor: Editor<Assistance, FileHistory>,
    history: Option<PathBuf>,
    /// Whether the line is empty that is being edited.
    empty: Rc<Cell<bool>>,
}

impl Input {
    /// A line editor if there is a terminal at both ends.
    pub fn new(settings: Vec<String>, messages: &Messages) -> Result<Self> {
        if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
            return Ok(Input::Lines);
        }
        let config = Config::builder()
            .max_history_size(HISTORY)?
            .history_ignore_dups(true)?
            .completion_type(CompletionType::List)
            .color_mode(ColorMode::Disabled)
            .build();
        let mut editor = Editor::with_config(config)?;
        let empty = Rc::new(Cell::new(true));
        editor.set_helper(Some(Assistance { settings, empty: empty.clone() }));
        let history = history_file(messages);
        if let Some(history) = &history {
            // There is none the first time.
            let _ = editor.load_history(history);
        }
        Ok(Input::Terminal(Box::new(Terminal { editor, history, empty })))
    }

    pub fn is_terminal(&self) -> bool {
        matches!(self, Input::Terminal(_))
    }

    /// The next message or command; `None` at the end.
    pub fn next(&mut self, messages: &Messages) -> Result<Option<String>> {
        match self {
            Input::Terminal(terminal) => terminal.next(messages),
            Input::Lines => next_line(),
        }
    }
}

fn history_file(messages: &Messages) -> Option<PathBuf> {
    let folder = files::state_folder()?;
    match fs::create_dir_all(&folder) {
        Ok(()) => Some(folder.join("chat_history")),
        Err(error) => {
            messages.note(&format!("no history: {}: {error}", folder.display()));
            None
        }
    }
}

impl Terminal {
    fn next(&mut self, messages: &Messages) -> Result<Option<String>> {
        let mut leaving = false;
        loop {
            self.empty.set(true);
            match self.editor.readline(PROMPT) {
                Ok(entered) => {
                    let text = unfolded(&entered);
                    if text.is_empty() {
                        continue;
                    }
                    self.editor.add_history_entry(&entered)?;
                    if let Some(history) = &self.history
                        && let Err(error) = self.editor.append_history(history)
                    {
                        messages.note(&format!("no history: {}: {error}", history.display()));
                        self.history = None;
                    }
                    return Ok(Some(text));
                }
                Err(ReadlineError::Eof) => return Ok(None),
                Err(ReadlineError::Interrupted) => {
                    if leaving && self.empty.get() {
                        return Ok(None);
                    }
                    leaving = self.empty.get();
                    if leaving {
                        messages.note("Ctrl-C again, Ctrl-D or /exit leaves");
                    }
                }
                Err(error) => bail!("the terminal cannot be read: {error}"),
            }
        }
    }
}

fn next_line() -> Result<Option<String>> {
    loop {
        let mut line = String::new();
        match io::stdin().lock().read_line(&mut line) {
            Ok(0) => return Ok(None),
            Ok(_) if line.trim().is_empty() => {}
            Ok(_) => {
                line.truncate(line.trim_end().len());
                return Ok(Some(line));
            }
            Err(error) if error.kind() == io::ErrorKind::InvalidData => {
                bail!("stdin: is not UTF-8 text: save it as UTF-8")
            }
            Err(error) => bail!("stdin: cannot be read: {error}"),
        }
    }
}

/// Whether what was typed goes on in the next line.
fn is_open(text: &str) -> bool {
    text.matches(BLOCK).count() % 2 == 1 || text.ends_with('\\')
}

/// What was typed, without the signs that let it have several lines. A space at the beginning stays:
/// it tells a message from a command.
fn unfolded(text: &str) -> String {
    let text = text.replace("\\\n", "\n");
    match text.trim().strip_prefix(BLOCK).and_then(|text| text.strip_suffix(BLOCK)) {
        Some(inner) if !inner.contains(BLOCK) => inner.trim_matches('\n').to_owned(),
        _ => text.trim_end().to_owned(),
    }
}

/// What the editor asks while somebody types.
struct Assistance {
    /// Names that `/set` takes.
    settings: Vec<String>,
    empty: Rc<Cell<bool>>,
}

impl Helper for Assistance {}
impl Highlighter for Assistance {}

impl Hinter for Assistance {
    type Hint = String;

    /// Never hints, but is asked after each change.
    fn hint(&self, line: &str, _: usize, _: &Context<'_>) -> Option<String> {
        self.empty.set(line.is_empty());
        None
    }
}

impl Validator for Assistance {
    fn validate(&self, context: &mut ValidationContext<'_>) -> rustyline::Result<ValidationResult> {
        Ok(match is_open(context.input()) {
            true => ValidationResult::Incomplete,
            false => ValidationResult::Valid(None),
        })
    }
}

impl Completer for Assistance {
    type Candidate = Pair;

    fn complete(
        &self,
        line: &str,
        position: usize,
        _: &Context<'_>,
    ) -> rustyline::Result<(usize, Vec<Pair>)> {
        let typed = &line[..position];
        if !typed.starts_with('/') {
            return Ok((position, Vec::new()));
        }
        let Some((command, argument)) = typed.split_once(' ') else {
            let names = commands::ALL.iter().map(|command| command.name);
            return Ok((0, starting_with(typed, names)));
        };
        let start = position - argument.len();
        Ok(match commands::ALL.iter().find(|known| known.name == command) {
            Some(known) if known.takes_file => {
                let name = Path::new(argument).file_name().filter(|_| !ends_in_folder(argument));
                let name_length = name.map_or(0, |name| name.len());
                (position - name_length, file_names(argument, name_length))
            }
            Some(known) if known.name == "/set" => {
                (start, starting_with(argument, self.settings.iter().map(String::as_str)))
            }
            _ => (position, Vec::new()),
        })
    }
}

fn ends_in_folder(path: &str) -> bool {
    path.ends_with(['/', MAIN_SEPARATOR]) || path.is_empty()
}

fn starting_with<'a>(typed: &str, names: impl Iterator<Item = &'a str>) -> Vec<Pair> {
    let fitting = names.filter(|name| name.starts_with(typed));
    fitting.map(|name| Pair { display: name.into(), replacement: name.into() }).collect()
}

/// The files and folders that a path, whose last `name_length` bytes are a name, can become.
fn file_names(path: &str, name_length: usize) -> Vec<Pair> {
    let (folder, typed) = path.split_at(path.len() - name_length);
    let folder = if folder.is_empty() { "." } else { folder };
    let Ok(entries) = fs::read_dir(folder) else { return Vec::new() };
    let mut names: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let mut name = entry.file_name().into_string().ok()?;
            if !name.starts_with(typed) || (name.starts_with('.') && typed.is_empty()) {
                return None;
            }
            if entry.path().is_dir() {
                name.push(MAIN_SEPARATOR);
            }
            Some(name)
        })
        .collect();
    names.sort();
    starting_with(typed, names.iter().map(String::as_str))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_go_on_after_a_backslash_and_inside_a_block() {
        for open in ["a\\", "\"\"\"", "\"\"\"a\nb", "x \"\"\" y"] {
            assert!(is_open(open), "{open}");
        }
        for closed in ["a", "", "\"\"\"a\nb\"\"\"", "a\\\nb"] {
            assert!(!is_open(closed), "{closed}");
        }
        assert_eq!(unfolded("a\\\nb  "), "a\nb");
        assert_eq!(unfolded("\"\"\"\na\nb\n\"\"\""), "a\nb");
        assert_eq!(unfolded("\"\"\"a\"\"\" and \"\"\"b\"\"\""), "\"\"\"a\"\"\" and \"\"\"b\"\"\"");
        assert_eq!(unfolded(" /not a command"), " /not a command");
    }

    #[test]
    fn names_of_files_are_completed_where_they_are() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("one two.json"), "").unwrap();
        fs::create_dir(folder.path().join("other")).unwrap();
        fs::write(folder.path().join(".hidden"), "").unwrap();
        let complete = |name: &str| {
            let path = format!("{}/{name}", folder.path().display());
            let pairs = file_names(&path, name.len());
            pairs.into_iter().map(|pair| pair.replacement).collect::<Vec<_>>()
        };
        assert_eq!(complete("o"), ["one two.json".to_owned(), format!("other{MAIN_SEPARATOR}")]);
        assert_eq!(complete("one t"), ["one two.json"]);
        assert_eq!(complete("").len(), 2);
        assert!(complete("x").is_empty());
    }
}
