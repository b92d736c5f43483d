//! The commands of a chat: their names, what they take, and how a line is read as one.

use anyhow::{Result, bail};

/// A command as `/help` and the completion know it.
pub struct Command {
    pub name: &'static str,
    argument: &'static str,
    effect: &'static str,
    pub takes_file: bool,
}

const fn command(name: &'static str, argument: &'static str, effect: &'static str) -> Command {
    Command { name, argument, effect, takes_file: false }
}

const fn file_command(name: &'static str, effect: &'static str) -> Command {
    Command { name, argument: "FILE", effect, takes_file: true }
}

pub const ALL: [Command; 11] = [
    command("/system", "[TEXT|none]", "show, set or remove the system message"),
    command("/clear", "", "forget what was said"),
    command("/regen", "", "answer the last message again, with the next seed"),
    command("/undo", "", "take back the last message and its answer"),
    file_command("/save", "write the conversation to a JSON file"),
    file_command("/load", "read one, in the place of this"),
    file_command("/file", "put a text file before your next message"),
    command("/set", "[NAME VALUE]", "list settings, or change one"),
    command("/stats", "", "show the context and what the last answer took"),
    command("/help", "", "show this"),
    command("/exit", "", "leave; so does Ctrl-D"),
];

/// What was typed.
#[derive(Debug, PartialEq, Eq)]
pub enum Typed<'a> {
    Message(&'a str),
    System(Option<&'a str>),
    Clear,
    Regen,
    Undo,
    Save(&'a str),
    Load(&'a str),
    File(&'a str),
    Set(Option<(&'a str, &'a str)>),
    Stats,
    Help,
    Exit,
}

/// Reads a line. What begins with a slash is a command; a space before it makes it a message.
pub fn parse(line: &str) -> Result<Typed<'_>> {
    if !line.starts_with('/') {
        return Ok(Typed::Message(line.trim()));
    }
    let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
    let argument = argument.trim();
    let Some(known) = ALL.iter().find(|command| command.name == name) else {
        bail!("there is no command {name}: /help lists them");
    };
    if known.argument.is_empty() && !argument.is_empty() {
        bail!("{name} takes nothing after it");
    }
    if known.takes_file && argument.is_empty() {
        bail!("{name} needs the name of a file");
    }
    Ok(match name {
        "/system" => Typed::System(Some(argument).filter(|text| !text.is_empty())),
        "/clear" => Typed::Clear,
        "/regen" => Typed::Regen,
        "/undo" => Typed::Undo,
        "/save" => Typed::Save(argument),
        "/load" => Typed::Load(argument),
        "/file" => Typed::File(argument),
        "/set" if argument.is_empty() => Typed::Set(None),
        "/set" => match argument.split_once(char::is_whitespace) {
            Some((name, value)) => Typed::Set(Some((name, value.trim()))),
            None => bail!("/set needs a name and a value, such as /set temperature 0.8"),
        },
        "/stats" => Typed::Stats,
        "/help" => Typed::Help,
        _ => Typed::Exit,
    })
}

/// What `/help` prints.
pub fn help() -> String {
    let row = |command: &Command| {
        [format!("{} {}", command.name, command.argument), command.effect.to_owned()]
    };
    let rows: Vec<_> = ALL.iter().map(row).collect();
    format!(
        "{}\nA line that ends in \\ goes on in the next one, and so does all between two \"\"\".\n\
         Ctrl-C stops an answer.\n",
        crate::output::table(&rows, [false, false])
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_read_with_what_they_need() {
        assert_eq!(parse("hello /exit").unwrap(), Typed::Message("hello /exit"));
        assert_eq!(parse(" /exit").unwrap(), Typed::Message("/exit"));
        assert_eq!(parse("/save a b.json").unwrap(), Typed::Save("a b.json"));
        assert_eq!(parse("/system").unwrap(), Typed::System(None));
        assert_eq!(parse("/system Be\nbrief.").unwrap(), Typed::System(Some("Be\nbrief.")));
        assert_eq!(parse("/set top_p 0.9").unwrap(), Typed::Set(Some(("top_p", "0.9"))));
        for line in ["/", "/frobnicate", "/save", "/undo 3", "/set top_p"] {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn every_command_that_is_listed_is_understood() {
        for command in ALL {
            let argument = if command.argument.is_empty() { "" } else { " a 1" };
            assert!(parse(&format!("{}{argument}", command.name)).is_ok(), "{}", command.name);
        }
        assert_eq!(parse("/exit").unwrap(), Typed::Exit);
    }
}
