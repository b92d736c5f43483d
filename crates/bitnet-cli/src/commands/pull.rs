//! `bitnet pull`: a model from the Hugging Face hub into the cache.

use std::ops::ControlFlow;
use std::time::Instant;

use anyhow::Result;
use bitnet_core::budget::human_bytes;
use bitnet_model::hub::{self, FetchProgress, FetchState, Hub, HubError, Pulled};
use serde::Serialize;

use super::WrongUsage;
use crate::args::PullArgs;
use crate::output::{self, Messages};

#[derive(Serialize)]
struct Json {
    model: String,
    path: String,
    bytes: u64,
    fetched_bytes: u64,
}

pub fn run(args: PullArgs, messages: &Messages) -> Result<()> {
    let mut name = super::hub_name(&args.model)?;
    if let Some(file) = &args.file {
        let refused = || WrongUsage(format!("`{file}` is not the name of a file in a repository"));
        name = name.with_file(file).ok_or_else(refused)?;
    }
    let hub = Hub::from_env()?;
    let pull = |progress: hub::OnProgress<'_>| hub.pull(&name, progress).map(Some);
    let pulled = watched(messages, &name.to_string(), pull)?.expect("it was pulled");
    let path = pulled.path.display().to_string();
    if args.json {
        let Pulled { bytes, fetched_bytes, .. } = pulled;
        return Ok(output::json(&Json { model: name.to_string(), path, bytes, fetched_bytes })?);
    }
    Ok(output::lines(&format!("{path}\n"))?)
}

/// Fetches a model that is going to be run, if it is one of the hub and not in the cache.
pub fn fetch(model: &str, messages: &Messages) -> Result<()> {
    watched(messages, model, |progress| hub::fetch(model, progress)).map(drop)
}

/// Downloads something while a bar shows how far it is, and says what was done.
fn watched(
    messages: &Messages,
    name: &str,
    download: impl FnOnce(hub::OnProgress<'_>) -> Result<Option<Pulled>, HubError>,
) -> Result<Option<Pulled>> {
    let started = Instant::now();
    let mut bar = None;
    let mut is_waiting = false;
    let pulled = download(&mut |now: FetchProgress<'_>| {
        let bar = bar.get_or_insert_with(|| {
            messages.summary(&format!("fetching {name}"));
            messages.byte_bar(now.bytes)
        });
        bar.show(now.file, now.bytes, now.total_bytes);
        match now.state {
            FetchState::Downloading => is_waiting = false,
            FetchState::Waiting if is_waiting => {}
            FetchState::Waiting => {
                is_waiting = true;
                bar.above(|| messages.note("another program is fetching it: waiting"));
            }
            FetchState::Retrying { reason } => {
                bar.above(|| messages.note(&format!("{reason}: trying again")));
            }
        }
        ControlFlow::Continue(())
    });
    drop(bar);
    let pulled = pulled?;
    if let Some(pulled) = &pulled {
        let (all, fetched) = (human_bytes(pulled.bytes), human_bytes(pulled.fetched_bytes));
        let seconds = started.elapsed().as_secs_f64();
        messages.summary(&match pulled.fetched_bytes {
            0 => format!("{name}: {all}, nothing to fetch"),
            _ => format!("{name}: {all}, of which {fetched} fetched in {seconds:.1} s"),
        });
        pulled.notes.iter().for_each(|note| messages.note(note));
    }
    Ok(pulled)
}
