//! What people and programs see: results on stdout, notes and errors on stderr.

use std::io::{self, IsTerminal, Write};
use std::sync::atomic::{AtomicBool, Ordering};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressState, ProgressStyle};
use serde::Serialize;
use unicode_width::UnicodeWidthStr;

/// Whether the last thing on stdout is text whose line is still open. Changed only by who holds the
/// lock of stdout, so that an interrupt can tell whether it has to end the line.
static LINE_IS_OPEN: AtomicBool = AtomicBool::new(false);

/// Writes a piece of running text and hands it on at once.
pub fn piece(text: &str) -> io::Result<()> {
    if text.is_empty() {
        return Ok(());
    }
    let mut stdout = io::stdout().lock();
    LINE_IS_OPEN.store(true, Ordering::Relaxed);
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Ends the line of running text.
pub fn end_of_text() -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    LINE_IS_OPEN.store(false, Ordering::Relaxed);
    stdout.write_all(b"\n")?;
    stdout.flush()
}

/// Whether a bar is on the last line of the terminal.
static BAR_IS_SHOWN: AtomicBool = AtomicBool::new(false);

/// Ends the line of running text, or of a bar, if there is one, then calls `then` before anyone else can write.
/// For interrupts: what goes wrong is of no interest.
pub fn end_open_line(then: impl FnOnce()) {
    let mut stdout = io::stdout().lock();
    if LINE_IS_OPEN.swap(false, Ordering::Relaxed) {
        let _ = stdout.write_all(b"\n").and_then(|()| stdout.flush());
    }
    if BAR_IS_SHOWN.swap(false, Ordering::Relaxed) {
        let _ = writeln!(io::stderr());
    }
    then();
}

/// Writes whole lines. `text` ends with a newline.
pub fn lines(text: &str) -> io::Result<()> {
    let mut stdout = io::stdout().lock();
    stdout.write_all(text.as_bytes())?;
    stdout.flush()
}

/// Writes a value as one line of JSON.
pub fn json(value: &impl Serialize) -> io::Result<()> {
    let mut line = serde_json::to_string(value).map_err(io::Error::other)?;
    line.push('\n');
    lines(&line)
}

/// Stderr: for people, and of no consequence if it is closed.
pub struct Messages {
    quiet: bool,
}

impl Messages {
    /// With `quiet` only errors are printed.
    pub fn new(quiet: bool) -> Self {
        Messages { quiet }
    }

    /// Something that was corrected or decided.
    pub fn note(&self, note: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{} {}", painted(DIM, "note:"), printable(note));
        }
    }

    /// How far something is, in place of what was said before; nothing to make room again. Only
    /// where somebody may be watching.
    pub fn progress(&self, text: &str) {
        if !self.quiet && io::stderr().is_terminal() {
            let _ = write!(io::stderr(), "\r\x1b[K{text}");
        }
    }

    /// A bar for bytes of which `there` need not come any more. Only where somebody may be watching.
    pub fn byte_bar(&self, there: u64) -> ByteBar {
        let style = "{msg} {wide_bar} {decimal_bytes} of {decimal_total_bytes} \
                     {decimal_bytes_per_sec} {eta} left";
        let style = ProgressStyle::with_template(style).expect("a template without mistakes");
        // The rate is that of what comes.
        let bar = ProgressBar::with_draw_target(None, self.bar_target()).with_position(there);
        bar.set_style(style.progress_chars("=> "));
        BAR_IS_SHOWN.store(!bar.is_hidden(), Ordering::Relaxed);
        ByteBar(bar)
    }

    /// A bar of how much is done of `total` things that are called `unit`, with their rate and the
    /// remaining time; drawn only where somebody may be watching. What its message says stands last.
    pub fn bar(&self, total: u64, unit: &str) -> ProgressBar {
        let template =
            format!("{{bar:16}} {{pos}}/{{len}} {unit}, {{rate}}/s, {{eta}} left{{msg}}");
        let rate = |state: &ProgressState, text: &mut dyn std::fmt::Write| {
            let _ = text.write_str(&number(state.per_sec()));
        };
        let style = ProgressStyle::with_template(&template).expect("a template without mistakes");
        let style = style.with_key("rate", rate);
        ProgressBar::with_draw_target(Some(total), self.bar_target()).with_style(style)
    }

    fn bar_target(&self) -> ProgressDrawTarget {
        match self.quiet {
            true => ProgressDrawTarget::hidden(),
            false => ProgressDrawTarget::stderr(),
        }
    }

    /// Lines that were asked for beside the result.
    pub fn report(&self, text: &str) {
        let _ = io::stderr().write_all(text.as_bytes());
    }

    /// What was done, and how fast.
    pub fn summary(&self, text: &str) {
        if !self.quiet {
            let _ = writeln!(io::stderr(), "{}", painted(DIM, text));
        }
    }
}

/// How many bytes have come, how fast, and how long it will take. It goes away when it is dropped.
pub struct ByteBar(ProgressBar);

impl ByteBar {
    /// How far it is, and with what.
    pub fn show(&self, name: &str, bytes: u64, all: u64) {
        if self.0.message() != name {
            self.0.set_message(name.to_owned());
        }
        if self.0.length() != Some(all) {
            self.0.set_length(all);
        }
        self.0.set_position(bytes);
    }

    /// Does something that writes lines, above the bar.
    pub fn above(&self, write: impl FnOnce()) {
        self.0.suspend(write);
    }
}

impl Drop for ByteBar {
    fn drop(&mut self) {
        self.0.finish_and_clear();
        BAR_IS_SHOWN.store(false, Ordering::Relaxed);
    }
}

/// Reports a failure in one sentence, and hints on lines of their own.
pub fn error(sentence: &str, hints: &[&str]) {
    let mut stderr = io::stderr().lock();
    let _ = writeln!(stderr, "{} {}", painted(BOLD_RED, "error:"), printable(sentence));
    for hint in hints {
        let _ = writeln!(stderr, "{hint}");
    }
}

const BOLD_RED: &str = "\x1b[1;31m";
const DIM: &str = "\x1b[2m";

/// Text in a colour, where stderr is a terminal and nobody asked for none (<https://no-color.org>).
fn painted(colour: &str, text: &str) -> String {
    let unwanted = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    match io::stderr().is_terminal() && !unwanted {
        true => format!("{colour}{text}\x1b[0m"),
        false => text.to_owned(),
    }
}

/// Names from files may hold anything: no character of them is to move the cursor.
fn printable(message: &str) -> String {
    let mut safe = String::with_capacity(message.len());
    for character in message.chars() {
        match character.is_control() {
            true => safe.extend(character.escape_default()),
            false => safe.push(character),
        }
    }
    safe
}

/// Running text for a terminal: lines end between words, and no character moves the cursor.
pub struct Wrapping {
    columns: usize,
    column: usize,
    /// The beginning of a word that may have to go into the next line.
    word: String,
}

impl Wrapping {
    /// For the terminal as wide as it is now.
    pub fn new() -> Self {
        let width = terminal_size::terminal_size().map(|(width, _)| usize::from(width.0));
        Self::of(width.unwrap_or(80))
    }

    fn of(columns: usize) -> Self {
        Wrapping { columns: columns.max(1), column: 0, word: String::new() }
    }

    /// What of the text can be shown now.
    pub fn push(&mut self, text: &str) -> String {
        let mut shown = String::new();
        for character in text.chars() {
            match character {
                '\n' => {
                    shown += &self.finish();
                    shown.push('\n');
                    self.column = 0;
                }
                ' ' | '\t' => {
                    shown += &self.finish();
                    // A space after a full line would begin the next one.
                    if self.column < self.columns {
                        shown.push(' ');
                        self.column += 1;
                    }
                }
                character if character.is_control() => {}
                character => self.word.push(character),
            }
        }
        shown
    }

    /// The word that was still open.
    pub fn finish(&mut self) -> String {
        let word = std::mem::take(&mut self.word);
        let width = word.width();
        let breaks = self.column > 0 && self.column + width > self.columns && width > 0;
        if breaks {
            self.column = 0;
        }
        // Longer words than lines are broken by the terminal. A line that is full stays the current one.
        self.column = match self.column + width {
            0 => 0,
            end => (end - 1) % self.columns + 1,
        };
        if breaks { format!("\n{word}") } else { word }
    }
}

/// The bytes of a token between quotes, for tables.
pub fn quoted(bytes: &[u8]) -> String {
    match std::str::from_utf8(bytes) {
        Ok(text) => format!("{text:?}"),
        Err(_) => format!("\"{}\"", bytes.escape_ascii()),
    }
}

/// Rows of text as lines of columns that line up. `right` says which columns hold numbers.
pub fn table<const N: usize>(rows: &[[String; N]], right: [bool; N]) -> String {
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max();
    let widths: [usize; N] = std::array::from_fn(|column| width(column).unwrap_or(0));
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for ((cell, width), right) in row.iter().zip(widths).zip(right) {
            let padding = " ".repeat(width - cell.chars().count());
            let (before, after) =
                if right { (padding, String::new()) } else { (String::new(), padding) };
            line.push_str(&format!("{before}{cell}{after}  "));
        }
        text.push_str(line.trim_end());
        text.push('\n');
    }
    text
}

/// Three digits that tell, or one decimal.
pub fn number(value: f64) -> String {
    match value {
        v if v >= 99.95 => format!("{v:.0}"),
        v if v >= 9.995 => format!("{v:.1}"),
        v => format!("{v:.2}"),
    }
}

/// A time in milliseconds or seconds.
pub fn duration(ms: f64) -> String {
    if ms < 999.5 { format!("{} ms", number(ms)) } else { format!("{} s", number(ms / 1e3)) }
}

/// A share with two digits that tell.
pub fn percent(share: f64) -> String {
    let percent = 100.0 * share;
    match percent {
        0.0 => "0 %".to_owned(),
        p if p < 0.1 => format!("{p:.3} %"),
        p if p < 9.95 => format!("{p:.1} %"),
        p => format!("{p:.0} %"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let rows =
            [["id", "token"], ["7", "\"é\""], ["1234", "\"a\""]].map(|row| row.map(String::from));
        assert_eq!(table(&rows, [true, false]), "  id  token\n   7  \"é\"\n1234  \"a\"\n");
    }

    #[test]
    fn lines_end_between_words_however_the_text_is_cut() {
        let text = "one two three\n\nfour 漢字漢字 \x1b[2Jfive";
        let expected = "one two \nthree\n\nfour \n漢字漢字 \n[2Jfive";
        for length in 1..text.len() {
            let mut wrapping = Wrapping::of(9);
            let mut shown = String::new();
            let characters: Vec<char> = text.chars().collect();
            for piece in characters.chunks(length) {
                shown += &wrapping.push(&piece.iter().collect::<String>());
            }
            shown += &wrapping.finish();
            assert_eq!(shown, expected);
        }
        for (columns, expected) in [(3, "abc\nd e"), (4, "abc \nd e"), (5, "abc d\ne")] {
            let mut wrapping = Wrapping::of(columns);
            assert_eq!(wrapping.push("abc d e") + &wrapping.finish(), expected);
        }
    }

    #[test]
    fn messages_cannot_control_the_terminal() {
        assert_eq!(printable("tensor `\x1b[2J\u{9b}\n`"), "tensor `\\u{1b}[2J\\u{9b}\\n`");
    }

    #[test]
    fn tokens_that_are_no_text_show_their_bytes() {
        assert_eq!(quoted("é\n".as_bytes()), "\"é\\n\"");
        assert_eq!(quoted(b"\xe2\x80"), "\"\\xe2\\x80\"");
    }

    #[test]
    fn numbers_have_three_digits() {
        let numbers = [123.4, 99.96, 12.34, 1.234].map(number);
        assert_eq!(numbers, ["123", "100", "12.3", "1.23"]);
        assert_eq!([2.346, 999.9].map(duration), ["2.35 ms", "1.00 s"]);
        let shares = [0.0, 0.00021, 0.034, 0.5].map(percent);
        assert_eq!(shares, ["0 %", "0.021 %", "3.4 %", "50 %"]);
    }
}
