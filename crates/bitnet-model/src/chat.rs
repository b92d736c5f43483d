//! Conversations to the text a chat model was trained on, by the model's own Jinja template.
//!
//! Rendering follows Hugging Face's `apply_chat_template`: the same whitespace rules, the same
//! variables (`messages`, `add_generation_prompt`, `bos_token`, `eos_token`, `tools` and `documents`
//! as none), the same extra functions (`raise_exception`, `strftime_now`) and a `tojson` that
//! escapes nothing for HTML.
//!
//! A template comes with a model file, so it is not trusted: it may not be too long, may not run too
//! many instructions and may not write too much. It can still make one huge string by doubling a
//! short one, which only the machine's memory limits.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Value};
use minijinja::{AutoEscape, Environment, ErrorKind, State};
use serde::{Deserialize, Serialize};

use crate::tokenizer::{Special, Tokenizer, TokenizerError};

/// No known template comes near: the longest have some ten thousand bytes.
const MAX_SOURCE_BYTES: usize = 1 << 20;
/// Instructions for a whole rendering, and more for each message.
const FUEL: u64 = 500_000;
const FUEL_PER_MESSAGE: u64 = 5_000;
const MAX_OUTPUT_BYTES: usize = 64 << 20;
/// The name that error messages show.
const NAME: &str = "chat template";

/// One message of a conversation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Message {
    /// Who speaks: `system`, `user`, `assistant`, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

impl Message {
    /// A message of that role.
    pub fn new(role: impl Into<String>, content: impl Into<String>) -> Self {
        Message { role: role.into(), content: content.into() }
    }
}

/// Why a conversation could not be rendered.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum ChatError {
    /// The template cannot be compiled or chosen.
    #[error("the chat template cannot be used: {0}")]
    Template(String),
    /// The template called `raise_exception`: it does not accept this conversation.
    #[error("the chat template refuses this conversation: {0}")]
    Refused(String),
    /// The template failed or reached a limit.
    #[error("the chat template failed: {0}")]
    Rendering(String),
    /// The rendered text cannot be encoded.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    source: String,
    environment: Environment<'static>,
}

impl ChatTemplate {
    /// From Jinja source: a `chat_template.jinja`, or GGUF's `tokenizer.chat_template`.
    ///
    /// # Errors
    /// [`ChatError::Template`] with the line that cannot be compiled.
    pub fn new(source: &str) -> Result<Self, ChatError> {
        if source.len() > MAX_SOURCE_BYTES {
            return Err(ChatError::Template(format!(
                "it has {} bytes and may have {MAX_SOURCE_BYTES}",
                source.len()
            )));
        }
        let mut environment = Environment::new();
        let syntax = SyntaxConfig::builder().trim_blocks(true).lstrip_blocks(true).build();
        environment.set_syntax(syntax.expect("the default delimiters are valid"));
        environment.set_auto_escape_callback(|_| AutoEscape::None);
        environment
            .set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
        environment.add_function("raise_exception", raise_exception);
        environment
            .add_function("strftime_now", |format: &str| strftime(format, SystemTime::now()));
        environment.add_filter("tojson", tojson);
        environment
            .add_template_owned(NAME, without_generation_marks(source))
            .map_err(|error| ChatError::Template(sentence(&error)))?;
        Ok(ChatTemplate { source: source.to_owned(), environment })
    }

    /// From the `chat_template` entry of a `tokenizer_config.json`: Jinja source, or a list of named
    /// templates, of which the one named `default` is taken.
    ///
    /// # Errors
    /// [`ChatError::Template`] as for [`ChatTemplate::new`], or when there is no such template.
    pub fn from_entry(entry: &serde_json::Value) -> Result<Self, ChatError> {
        if let Some(source) = entry.as_str() {
            return Self::new(source);
        }
        let named = entry.as_array().map_or(&[][..], Vec::as_slice);
        let default = named.iter().find(|template| template["name"] == "default");
        match default.and_then(|template| template["template"].as_str()) {
            Some(source) => Self::new(source),
            None => Err(ChatError::Template(
                "`chat_template` is neither text nor a list with a template named `default`".into(),
            )),
        }
    }

    /// The Jinja source that [`new`](Self::new) compiled.
    pub fn source(&self) -> &str {
        &self.source
    }

    /// The text of a conversation. With `add_generation_prompt` it ends where the assistant's next
    /// message begins. The tokenizer says what its begin and end tokens are called.
    ///
    /// # Errors
    /// [`ChatError::Refused`] or [`ChatError::Rendering`].
    pub fn render(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<String, ChatError> {
        let name = |id: Option<u32>| match id.map(|id| tokenizer.token_bytes(id)) {
            Some(Ok(bytes)) => Value::from(String::from_utf8_lossy(bytes)),
            _ => Value::UNDEFINED,
        };
        let list: Vec<Value> = messages
            .iter()
            .map(|Message { role, content }| minijinja::context! { role, content })
            .collect();
        let context = minijinja::context! {
            messages => list,
            add_generation_prompt,
            bos_token => name(tokenizer.bos()),
            eos_token => name(tokenizer.eos()),
            tools => (),
            documents => (),
        };

        let mut environment = self.environment.clone();
        environment.set_fuel(Some(FUEL + FUEL_PER_MESSAGE * messages.len() as u64));
        let template = environment.get_template(NAME).expect("added when it was compiled");
        let mut output = Output(Vec::new());
        template.render_captured_to(context, &mut output).map_err(|error| {
            match source_of::<Raised>(&error) {
                Some(Raised(message)) => ChatError::Refused(message.clone()),
                None => ChatError::Rendering(sentence(&error)),
            }
        })?;
        Ok(String::from_utf8(output.0).expect("templates write text"))
    }

    /// The text of a conversation and its ids, which begin with exactly one begin token if the
    /// tokenizer adds one to texts: some templates write it, some leave it to the tokenizer.
    ///
    /// # Errors
    /// As [`ChatTemplate::render`], and when the text cannot be encoded.
    pub fn encode(
        &self,
        tokenizer: &Tokenizer,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<(String, Vec<u32>), ChatError> {
        let text = self.render(tokenizer, messages, add_generation_prompt)?;
        let mut ids = tokenizer.encode(&text, false, Special::Recognised)?;
        if let Some(bos) = tokenizer.bos().filter(|_| tokenizer.adds_bos())
            && ids.first() != Some(&bos)
        {
            ids.insert(0, bos);
        }
        Ok((text, ids))
    }
}

/// Hugging Face's own statement `{% generation %}…{% endgeneration %}` marks, for training, what the
/// assistant said. It renders what it holds, so here it is an `if` that is always true.
fn without_generation_marks(source: &str) -> String {
    let mut result = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(at) = rest.find("{%") {
        let inside = rest[at + 2..].trim_start_matches(['-', '+']).trim_start();
        let name_at = rest.len() - inside.len();
        let name_length =
            inside.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(inside.len());
        let (name, after) = inside.split_at(name_length);
        result.push_str(&rest[..name_at]);
        result.push_str(match name {
            "generation" => "if true",
            "endgeneration" => "endif",
            other => other,
        });
        rest = after;
    }
    result.push_str(rest);
    result
}

/// What a template has written, up to the limit.
struct Output(Vec<u8>);

impl io::Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.0.len() + bytes.len() > MAX_OUTPUT_BYTES {
            return Err(io::Error::other(format!("it wrote more than {MAX_OUTPUT_BYTES} bytes")));
        }
        self.0.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The message of a template's `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

fn raise_exception(message: String) -> Result<Value, minijinja::Error> {
    let kind = ErrorKind::InvalidOperation;
    Err(minijinja::Error::new(kind, "raise_exception").with_source(Raised(message)))
}

/// The first error of type `T` in the chain of causes.
fn source_of<T: std::error::Error + 'static>(error: &minijinja::Error) -> Option<&T> {
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref() {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

/// An error of the template engine as one line: its own message, then the innermost cause.
fn sentence(error: &minijinja::Error) -> String {
    let mut innermost = None;
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        innermost = Some(error.to_string());
        cause = error.source();
    }
    let message = match innermost {
        Some(cause) => format!("{error}: {cause}"),
        None => error.to_string(),
    };
    message.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Python's `json.dumps(value, ensure_ascii=False)`: the engine's own filter, without the escapes
/// by which it protects HTML.
fn tojson(
    _: &State<'_, '_>,
    value: &Value,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<Value, minijinja::Error> {
    // Hugging Face's filter also takes these two; they are Python's defaults here.
    for option in ["ensure_ascii", "sort_keys"] {
        if options.has(option) && options.get::<bool>(option)? {
            return Err(minijinja::Error::new(
                ErrorKind::InvalidOperation,
                format!("tojson with {option}=true is not supported"),
            ));
        }
    }
    let indent = match indent {
        Some(indent) => Some(indent),
        None => options.get::<Option<Value>>("indent")?.filter(|indent| !indent.is_none()),
    };
    let escaped =
        minijinja::filters::tojson(value, indent, Kwargs::from_iter([] as [(&str, Value); 0]))?;
    let escaped: Arc<str> = escaped.to_str().expect("the filter makes text");

    let mut text = String::with_capacity(escaped.len());
    let mut rest = &*escaped;
    while let Some(at) = rest.find('\\') {
        text.push_str(&rest[..at]);
        let html = [("\\u003c", '<'), ("\\u003e", '>'), ("\\u0026", '&'), ("\\u0027", '\'')];
        let escape = html.iter().find(|(escape, _)| rest[at..].starts_with(escape));
        rest = match escape {
            Some((escape, character)) => {
                text.push(*character);
                &rest[at + escape.len()..]
            }
            None => {
                // Two bytes at once, so that an escaped backslash begins no escape.
                let end = at + 2;
                text.push_str(&rest[at..end]);
                &rest[end..]
            }
        };
    }
    text.push_str(rest);
    Ok(Value::from(text))
}

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const WEEKDAYS: [&str; 7] =
    ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];

/// C's `strftime` in UTC, as far as chat templates use it.
fn strftime(format: &str, now: SystemTime) -> Result<String, minijinja::Error> {
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs();
    let (days, second) = (since_epoch / 86_400, since_epoch % 86_400);
    let (year, month, day) = civil_date(days);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let month_name = MONTHS[month as usize - 1];
    // 1 January 1970 was a Thursday.
    let weekday = WEEKDAYS[(days % 7) as usize];

    let mut text = String::new();
    let mut characters = format.chars();
    while let Some(character) = characters.next() {
        if character != '%' {
            text.push(character);
            continue;
        }
        let code = characters.next();
        text += &match code {
            Some('Y') => year.to_string(),
            Some('y') => format!("{:02}", year % 100),
            Some('m') => format!("{month:02}"),
            Some('d') => format!("{day:02}"),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('H') => format!("{hour:02}"),
            Some('I') => format!("{:02}", (hour + 11) % 12 + 1),
            Some('p') => if hour < 12 { "AM" } else { "PM" }.to_owned(),
            Some('M') => format!("{minute:02}"),
            Some('S') => format!("{second:02}"),
            Some('F') => format!("{year}-{month:02}-{day:02}"),
            Some('T') => format!("{hour:02}:{minute:02}:{second:02}"),
            Some('%') => "%".to_owned(),
            _ => {
                return Err(minijinja::Error::new(
                    ErrorKind::InvalidOperation,
                    format!(
                        "strftime_now does not know `%{}`",
                        code.map_or("".into(), String::from)
                    ),
                ));
            }
        };
    }
    Ok(text)
}

/// Year, month and day of a day counted from 1 January 1970, in the Gregorian calendar. Years are
/// counted from March, so that the leap day is a year's last (Howard Hinnant,
/// "chrono-Compatible Low-Level Date Algorithms").
fn civil_date(days: u64) -> (u64, u64, u64) {
    // From 1 March of the year 0; 400 years have 146 097 days.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates_are_written_as_strftime_writes_them() {
        let at = |seconds, format| strftime(format, UNIX_EPOCH + Duration::from_secs(seconds));
        assert_eq!(at(0, "%A %d %B %Y %T").unwrap(), "Thursday 01 January 1970 00:00:00");
        // 29 February 2024, 13:05:09 UTC, by `date -u -d @1709211909`.
        assert_eq!(
            at(1_709_211_909, "%a %d %b %y, %I:%M:%S %p").unwrap(),
            "Thu 29 Feb 24, 01:05:09 PM"
        );
        assert_eq!(at(1_709_211_909, "%F %H%%").unwrap(), "2024-02-29 13%");
        assert_eq!(at(951_782_400, "%F").unwrap(), "2000-02-29");
        assert_eq!(at(4_107_542_400, "%F").unwrap(), "2100-03-01");
        assert!(at(0, "%Q").unwrap_err().to_string().contains("%Q"));
        assert!(at(0, "%").is_err());
    }
}
