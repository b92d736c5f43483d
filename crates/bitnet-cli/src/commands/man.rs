//! `bitnet man`: the manual pages, made from the same words as `--help`.

use std::fs;

use anyhow::{Result, anyhow};
use clap::CommandFactory;

use crate::args::{Cli, ManArgs};
use crate::output::Messages;

pub fn run(args: ManArgs, messages: &Messages) -> Result<()> {
    let folder = args.folder.display();
    fs::create_dir_all(&args.folder)
        .map_err(|error| anyhow!("{folder}: cannot be made: {error}"))?;
    clap_mangen::generate_to(Cli::command(), &args.folder)
        .map_err(|error| anyhow!("{folder}: cannot be written to: {error}"))?;
    messages.summary(&format!("wrote the manual pages to {folder}"));
    Ok(())
}
