//! Defaults that a user gives to flags: by a file with profiles, and by environment variables.
//!
//! They become the defaults of `clap`'s arguments before the command line is read. So every flag of
//! every command can be set, and no command knows of it.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsString;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::{env, fs, io};

use anyhow::{Result, anyhow, bail};
use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgGroup, ArgMatches, Command};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use crate::hints;

/// The path of the file; empty for none.
const FILE: &str = "BITNET_CONFIG";
/// The profile, where `--use` names none.
const USE: &str = "BITNET_USE";
/// What begins the name of a variable that gives a flag a default.
const PREFIX: &str = "BITNET_";

/// Ids of arguments that have no defaults.
const NOT_SET: [&str; 3] = ["help", "version", "use_profile"];

/// What users have set, each setting after those that it comes before.
#[derive(Debug, Default)]
pub struct Settings {
    /// Where the file is, or would be.
    pub path: Option<PathBuf>,
    /// Whether it is there.
    pub exists: bool,
    /// The profile in use.
    pub profile: Option<String>,
    /// The profiles that the file has.
    pub profiles: Vec<String>,
    list: Vec<Setting>,
}

/// One default.
#[derive(Debug, Clone)]
pub struct Setting {
    /// The command it is for; `None` for all that have the flag.
    pub command: Option<String>,
    /// The flag's long name.
    pub flag: String,
    /// As they would be typed.
    pub values: Vec<String>,
    /// Where it was found, for people.
    pub origin: String,
}

impl Settings {
    /// Reads the file and the environment. `arguments` are those of the process.
    ///
    /// # Errors
    /// A sentence with the file and the line for anything that no flag takes.
    pub fn read(cli: &Command, arguments: &[OsString]) -> Result<Self> {
        let typed = typed(cli, arguments);
        let chosen = typed.as_ref().and_then(|m| m.get_one::<String>("use_profile")).cloned();
        let chosen = chosen.or_else(|| env::var(USE).ok().filter(|name| !name.is_empty()));
        let mut settings = Settings { path: path(), ..Settings::default() };
        let is_not_there = |error: &io::Error| {
            matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
        };
        if let Some(path) = settings.path.clone() {
            match fs::read_to_string(&path) {
                Ok(text) => settings.read_file(cli, &path, &text, chosen.as_deref())?,
                // A file that was asked for by name has to be there.
                Err(error) if is_not_there(&error) && !is_named() => {}
                Err(error) => bail!("{}: cannot be read: {error}", path.display()),
            }
        }
        if let Some(name) = chosen {
            if !settings.profiles.contains(&name) {
                bail!("{}", settings.no_such_profile(&name));
            }
            settings.profile = Some(name);
        }
        settings.read_environment(cli)?;
        Ok(settings)
    }

    fn read_file(
        &mut self,
        cli: &Command,
        path: &Path,
        text: &str,
        profile: Option<&str>,
    ) -> Result<()> {
        let line = |at: &Range<usize>| 1 + text[..at.start].matches('\n').count();
        let at = |span: &Range<usize>| format!("{}, line {}", path.display(), line(span));
        let document = DeTable::parse(text).map_err(|error| {
            let message = error.message().lines().next().unwrap_or("is not TOML").to_owned();
            anyhow!("{}: {message}", at(&error.span().unwrap_or(0..0)))
        })?;
        let mut file = File { cli, at: &at, line: &line, profile: None, found: Vec::new() };
        let mut chosen = Vec::new();
        for (key, value) in in_order(document.get_ref()) {
            match (key.get_ref().as_ref(), value.get_ref()) {
                ("profile", DeValue::Table(profiles)) => {
                    for (name, section) in in_order(profiles) {
                        let DeValue::Table(section) = section.get_ref() else {
                            bail!("{}: a profile is a table: [profile.NAME]", at(&name.span()));
                        };
                        // All are read, so that a mistake shows before it matters.
                        let mut of =
                            File { profile: Some(name.get_ref()), found: Vec::new(), ..file };
                        for (key, value) in in_order(section) {
                            of.read(None, key, value)?;
                        }
                        if profile == Some(name.get_ref().as_ref()) {
                            chosen = of.found;
                        }
                        self.profiles.push(name.get_ref().to_string());
                    }
                }
                _ => file.read(None, key, value)?,
            }
        }
        // A setting for one command comes before one for all, within a section.
        for mut section in [file.found, chosen] {
            section.sort_by_key(|setting| setting.command.is_some());
            self.list.extend(section);
        }
        self.exists = true;
        Ok(())
    }

    fn read_environment(&mut self, cli: &Command) -> Result<()> {
        let flags: BTreeSet<&str> =
            commands(cli).flat_map(Command::get_arguments).filter_map(settable).collect();
        for flag in flags {
            let variable = format!("{PREFIX}{}", flag.replace('-', "_").to_uppercase());
            let Some(value) = env::var_os(&variable).filter(|value| !value.is_empty()) else {
                continue;
            };
            let Some(value) = value.to_str().map(str::to_owned) else {
                bail!("{variable}: is not UTF-8 text");
            };
            for argument in with_flag(cli, None, flag) {
                let values = split(argument, &value);
                refuse_wrong(argument, &values)
                    .map_err(|reason| anyhow!("{variable}: {reason}"))?;
            }
            let values = vec![value];
            let flag = flag.to_owned();
            self.list.push(Setting { command: None, flag, values, origin: variable });
        }
        Ok(())
    }

    fn no_such_profile(&self, name: &str) -> String {
        let place = match &self.path {
            Some(path) if self.exists => format!("{} has no profile `{name}`", path.display()),
            Some(path) => {
                let path = path.display();
                return format!("there is no profile `{name}`: {path} is not there");
            }
            None => return format!("there is no profile `{name}` without a configuration file"),
        };
        match self.profiles.as_slice() {
            [] => format!("{place}: write one as [profile.{name}]"),
            profiles => format!("{place}: it has {}", profiles.join(", ")),
        }
    }

    /// The setting that counts for a flag of a command.
    fn of(&self, command: Option<&str>, flag: &str) -> Option<&Setting> {
        let counts = |setting: &&Setting| {
            setting.flag == flag
                && (setting.command.is_none() || setting.command.as_deref() == command)
        };
        self.list.iter().rev().find(counts)
    }

    /// The settings that count for some command, those for all commands first.
    pub fn in_force(&self, cli: &Command) -> Vec<&Setting> {
        let mut counting: Vec<&Setting> = Vec::new();
        for command in commands(cli) {
            let name = (command.get_name() != cli.get_name()).then(|| command.get_name());
            for argument in command.get_arguments() {
                let setting = settable(argument).and_then(|flag| self.of(name, flag));
                counting.extend(setting.filter(|s| !counting.iter().any(|c| std::ptr::eq(*c, *s))));
            }
        }
        counting.sort_by_key(|setting| (&setting.command, &setting.flag));
        counting
    }

    /// The command line with these defaults. A flag that contradicts one that is typed keeps its own.
    pub fn applied_to(&self, cli: Command, arguments: &[OsString]) -> Command {
        let typed = typed(&cli, arguments);
        let mut with_all = self.with_defaults(cli, None, typed.as_ref());
        let names: Vec<String> =
            with_all.get_subcommands().map(|command| command.get_name().to_owned()).collect();
        for name in names {
            let typed = typed.as_ref().and_then(|matches| matches.subcommand_matches(&name));
            with_all = with_all
                .mut_subcommand(&name, |command| self.with_defaults(command, Some(&name), typed));
        }
        with_all
    }

    fn with_defaults(
        &self,
        command: Command,
        name: Option<&str>,
        typed: Option<&ArgMatches>,
    ) -> Command {
        let mut defaults: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for argument in command.get_arguments() {
            let Some(setting) = settable(argument).and_then(|flag| self.of(name, flag)) else {
                continue;
            };
            if !contradicts(&command, argument, typed) {
                let values = setting.values.iter().flat_map(|value| split(argument, value));
                defaults.insert(argument.get_id().to_string(), values.collect());
            }
        }
        command.mut_args(|argument| match defaults.remove(argument.get_id().as_str()) {
            Some(values) => argument.default_values(values),
            None => argument,
        })
    }
}

/// Where the file is, unless nothing says where users keep such files.
fn path() -> Option<PathBuf> {
    match env::var_os(FILE) {
        Some(file) => (!file.is_empty()).then(|| file.into()),
        None => {
            let folder = |variable| {
                env::var_os(variable).map(PathBuf::from).filter(|folder| folder.is_absolute())
            };
            let folder = match cfg!(windows) {
                true => folder("APPDATA"),
                false => folder("XDG_CONFIG_HOME")
                    .or_else(|| folder("HOME").map(|home| home.join(".config"))),
            };
            Some(folder?.join("bitnet").join("config.toml"))
        }
    }
}

fn is_named() -> bool {
    env::var_os(FILE).is_some()
}

/// What is typed, as far as it can be read: mistakes are reported when it is read for good.
fn typed(cli: &Command, arguments: &[OsString]) -> Option<ArgMatches> {
    cli.clone().ignore_errors(true).try_get_matches_from(arguments).ok()
}

/// The program and its commands.
fn commands(cli: &Command) -> impl Iterator<Item = &Command> {
    std::iter::once(cli).chain(cli.get_subcommands())
}

/// The long name of a flag that can have a default.
fn settable(argument: &Arg) -> Option<&str> {
    let has_default = !argument.is_required_set() && !NOT_SET.contains(&argument.get_id().as_str());
    argument.get_long().filter(|_| has_default)
}

/// The arguments with this long name, of one command or of all.
fn with_flag<'a>(
    cli: &'a Command,
    command: Option<&'a str>,
    flag: &'a str,
) -> impl Iterator<Item = &'a Arg> {
    commands(cli)
        .filter(move |c| command.is_none_or(|name| c.get_name() == name))
        .flat_map(Command::get_arguments)
        .filter(move |argument| argument.get_long() == Some(flag))
}

fn is_switch(argument: &Arg) -> bool {
    matches!(argument.get_action(), ArgAction::SetTrue)
}

/// The values in a text, where commas separate them.
fn split(argument: &Arg, value: &str) -> Vec<String> {
    match argument.get_value_delimiter() {
        Some(delimiter) => value.split(delimiter).map(str::to_owned).collect(),
        None => vec![value.to_owned()],
    }
}

/// Whether an argument may not stand beside one that is typed.
fn contradicts(command: &Command, argument: &Arg, typed: Option<&ArgMatches>) -> bool {
    let Some(typed) = typed else { return false };
    let is_typed = |other: &Arg| {
        other.get_id() != argument.get_id()
            && typed.value_source(other.get_id().as_str()) == Some(ValueSource::CommandLine)
    };
    let excludes = |one: &Arg, other: &Arg| {
        command.get_arg_conflicts_with(one).iter().any(|arg| arg.get_id() == other.get_id())
    };
    let at_most_one = command.get_groups().filter(|group| {
        let multiple = ArgGroup::is_multiple(&mut (*group).clone());
        !multiple && group.get_args().any(|id| id == argument.get_id())
    });
    let others: Vec<_> = at_most_one.flat_map(ArgGroup::get_args).collect();
    command.get_arguments().filter(|other| is_typed(other)).any(|other| {
        others.contains(&other.get_id()) || excludes(argument, other) || excludes(other, argument)
    })
}

/// Why an argument does not take these values, as `clap` says it.
fn refuse_wrong(argument: &Arg, values: &[String]) -> Result<(), String> {
    if is_switch(argument) {
        return match values {
            [value] if value == "true" || value == "false" => Ok(()),
            _ => Err("is on or off: give true or false".to_owned()),
        };
    }
    let takes_many = argument.get_value_delimiter().is_some()
        || matches!(argument.get_action(), ArgAction::Append);
    if values.len() > 1 && !takes_many {
        return Err("takes one value and not a list".to_owned());
    }
    let long = argument.get_long().unwrap_or_default();
    let alone = Arg::new(long.to_owned())
        .long(long.to_owned())
        .value_names(argument.get_value_names().unwrap_or_default().to_vec())
        .value_parser(argument.get_value_parser().clone())
        .action(argument.get_action().clone())
        .allow_hyphen_values(true);
    let command = Command::new("settings").no_binary_name(true).arg(alone);
    let typed = values.iter().map(|value| format!("--{long}={value}"));
    command.try_get_matches_from(typed).map(drop).map_err(|error| {
        let text = error.render().to_string();
        let paragraphs = text.split("\n\n").filter(|text| !text.starts_with("Usage:"));
        let sentence = paragraphs.take(1).flat_map(str::split_whitespace).collect::<Vec<_>>();
        sentence.join(" ").trim_start_matches("error: ").to_owned()
    })
}

/// The entries of a table as they stand in the file.
fn in_order<'t, 'i>(
    table: &'t DeTable<'i>,
) -> Vec<(&'t Spanned<std::borrow::Cow<'i, str>>, &'t Spanned<DeValue<'i>>)> {
    let mut entries: Vec<_> = table.iter().collect();
    entries.sort_by_key(|(key, _)| key.span().start);
    entries
}

/// What reads the sections of a file.
struct File<'a> {
    cli: &'a Command,
    /// The file and the line of a place, for people.
    at: &'a dyn Fn(&Range<usize>) -> String,
    line: &'a dyn Fn(&Range<usize>) -> usize,
    profile: Option<&'a str>,
    found: Vec<Setting>,
}

impl File<'_> {
    /// Reads a key and its value, which is a table where the key is a command.
    fn read(
        &mut self,
        command: Option<&str>,
        key: &Spanned<std::borrow::Cow<'_, str>>,
        value: &Spanned<DeValue<'_>>,
    ) -> Result<()> {
        let name = key.get_ref().as_ref();
        let at = (self.at)(&key.span());
        if let DeValue::Table(table) = value.get_ref() {
            if command.is_some() || self.cli.find_subcommand(name).is_none() {
                let known = self.cli.get_subcommands().map(Command::get_name);
                bail!("{at}: there is no command `{name}`{}", did_you_mean(name, known));
            }
            for (key, value) in in_order(table) {
                self.read(Some(name), key, value)?;
            }
            return Ok(());
        }
        let cli = self.cli;
        let (arguments, required): (Vec<&Arg>, Vec<&Arg>) =
            with_flag(cli, command, name).partition(|argument| settable(argument).is_some());
        if arguments.is_empty() {
            if !required.is_empty() {
                bail!("{at}: --{name} has no default: type it each time");
            }
            let whose = command.map_or("no command has a".to_owned(), |c| format!("`{c}` has no"));
            let known = commands(cli)
                .filter(|c| command.is_none_or(|name| c.get_name() == name))
                .flat_map(Command::get_arguments)
                .filter_map(settable);
            bail!("{at}: {whose} flag --{name}{}", did_you_mean(name, known));
        }
        let values = values(value.get_ref())
            .ok_or_else(|| anyhow!("{at}: {name} is a text, a number, true, false or a list"))?;
        let is_bool = matches!(value.get_ref(), DeValue::Boolean(_));
        for argument in arguments {
            let reason = match is_switch(argument) != is_bool {
                true if is_bool => Err("takes a value and not true or false".to_owned()),
                true => Err("is on or off: give true or false".to_owned()),
                false => refuse_wrong(argument, &values),
            };
            reason.map_err(|reason| anyhow!("{at}: {name}: {reason}"))?;
        }
        let line = (self.line)(&key.span());
        let origin = match self.profile {
            Some(profile) => format!("profile {profile}, line {line}"),
            None => format!("line {line}"),
        };
        let command = command.map(str::to_owned);
        self.found.push(Setting { command, flag: name.to_owned(), values, origin });
        Ok(())
    }
}

/// What would be typed for a value.
fn values(value: &DeValue<'_>) -> Option<Vec<String>> {
    let one = |value: &DeValue<'_>| match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Float(number) => Some(number.as_str().to_owned()),
        DeValue::Boolean(on) => Some(on.to_string()),
        _ => None,
    };
    match value {
        DeValue::Array(list) => list.iter().map(|item| one(item.get_ref())).collect(),
        value => one(value).map(|value| vec![value]),
    }
}

fn did_you_mean<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> String {
    hints::closest(name, known).map_or(String::new(), |other| format!(": did you mean `{other}`?"))
}
