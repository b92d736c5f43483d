//! `bitnet config`: which defaults are in force, and where they come from.

use anyhow::{Result, anyhow};
use clap::CommandFactory;
use serde_json::json;

use crate::args::{Cli, ConfigArgs};
use crate::output;
use crate::settings::Settings;

pub fn run(args: ConfigArgs, settings: &Settings) -> Result<()> {
    let path = settings.path.as_ref().map(|path| path.display().to_string());
    if args.path {
        let path = path.ok_or_else(|| {
            anyhow!("there is no configuration file: BITNET_CONFIG is empty, or there is no HOME")
        })?;
        return Ok(output::lines(&format!("{path}\n"))?);
    }
    let in_force = settings.in_force(&Cli::command());
    if args.json {
        let entry = |setting: &&crate::settings::Setting| {
            json!({
                "command": setting.command,
                "flag": setting.flag,
                "values": setting.values,
                "origin": setting.origin,
            })
        };
        return Ok(output::json(&json!({
            "path": path,
            "exists": settings.exists,
            "profile": settings.profile,
            "profiles": settings.profiles,
            "settings": in_force.iter().map(entry).collect::<Vec<_>>(),
        }))?);
    }
    let file = match path {
        Some(path) if settings.exists => path,
        Some(path) => format!("{path} (not there)"),
        None => "none".to_owned(),
    };
    let profile = settings.profile.clone().unwrap_or_else(|| "none".to_owned());
    let mut facts = vec![["file".to_owned(), file], ["profile".to_owned(), profile]];
    if !settings.profiles.is_empty() {
        facts.push(["profiles".to_owned(), settings.profiles.join(", ")]);
    }
    let mut text = output::table(&facts, [false, false]);
    if in_force.is_empty() {
        text.push_str("\nEvery flag has its built-in default.\n");
    } else {
        let mut rows = vec![["command", "flag", "default", "from"].map(String::from)];
        rows.extend(in_force.iter().map(|setting| {
            [
                setting.command.clone().unwrap_or_else(|| "all".to_owned()),
                format!("--{}", setting.flag),
                setting.values.join(","),
                setting.origin.clone(),
            ]
        }));
        text.push_str(&format!("\n{}", output::table(&rows, [false; 4])));
    }
    Ok(output::lines(&text)?)
}
