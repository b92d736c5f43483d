//! `bitnet rm`: a model out of the cache.

use std::io::{self, IsTerminal};

use anyhow::{Result, bail};
use bitnet_core::budget::human_bytes;
use bitnet_model::hub::Hub;

use super::WrongUsage;
use crate::args::RmArgs;
use crate::output::Messages;

pub fn run(args: RmArgs, messages: &Messages) -> Result<()> {
    let name = super::hub_name(&args.model)?;
    let removal = Hub::from_env()?.removal(&name)?;
    let size = human_bytes(removal.bytes);
    if !args.yes {
        if !io::stdin().is_terminal() {
            let reason =
                format!("{name} is removed only after a question: add --yes to say yes now");
            return Err(WrongUsage(reason).into());
        }
        messages.report(&format!("Remove {name} for all programs and free {size}? [y/N] "));
        let mut answer = String::new();
        io::stdin().read_line(&mut answer)?;
        if !matches!(answer.trim().to_ascii_lowercase().as_str(), "y" | "yes") {
            bail!("{name} was not removed");
        }
    }
    let shared = removal.shared_bytes;
    removal.execute()?;
    messages.summary(&format!("removed {name}: {size} freed"));
    if shared > 0 {
        messages.note(&format!(
            "{} lie in a store that models share: `hf cache prune` frees what none uses",
            human_bytes(shared)
        ));
    }
    Ok(())
}
