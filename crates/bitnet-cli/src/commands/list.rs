//! `bitnet list`: which models are in the cache.

use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use bitnet_core::budget::human_bytes;
use bitnet_model::hub::{CachedModel, Hub};
use serde::Serialize;

use crate::args::ListArgs;
use crate::output::{self, Messages};

#[derive(Serialize)]
struct Json {
    cache: String,
    models: Vec<JsonModel>,
}

#[derive(Serialize)]
struct JsonModel {
    /// What is given as MODEL.
    model: String,
    revisions: Vec<String>,
    commit: String,
    path: String,
    bytes: u64,
    /// `None` if something is missing.
    format: Option<&'static str>,
    /// Seconds since 1970.
    last_used: Option<u64>,
}

pub fn run(args: ListArgs, messages: &Messages) -> Result<()> {
    let hub = Hub::from_env()?;
    let models = hub.list()?;
    let cache = hub.cache.display();
    if args.json {
        let models = models.into_iter().map(JsonModel::of).collect();
        return Ok(output::json(&Json { cache: cache.to_string(), models })?);
    }
    if models.is_empty() {
        messages.note(&format!("no models in {cache}: `bitnet pull org/name` fetches one"));
        return Ok(());
    }
    let now = SystemTime::now();
    let heading = ["model", "revision", "size", "format", "last used"].map(str::to_owned);
    let rows: Vec<_> = [heading].into_iter().chain(models.iter().map(|m| row(m, now))).collect();
    Ok(output::lines(&output::table(&rows, [false, false, true, false, false]))?)
}

fn row(model: &CachedModel, now: SystemTime) -> [String; 5] {
    let commit = &model.commit[..model.commit.len().min(7)];
    let revision = match model.revisions.is_empty() {
        true => commit.to_owned(),
        false => format!("{} ({commit})", model.revisions.join(", ")),
    };
    let used = model.last_used.and_then(|used| now.duration_since(used).ok());
    [
        model.name.clone(),
        revision,
        human_bytes(model.bytes),
        model.format.unwrap_or("incomplete").to_owned(),
        used.map_or(String::new(), |ago| in_words(ago.as_secs())),
    ]
}

fn in_words(seconds: u64) -> String {
    let (number, unit) = match seconds {
        0..60 => return "just now".to_owned(),
        60..3600 => (seconds / 60, "minute"),
        3600..86400 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{number} {unit}{} ago", if number == 1 { "" } else { "s" })
}

impl JsonModel {
    fn of(model: CachedModel) -> Self {
        let since_1970 = |time: SystemTime| Some(time.duration_since(UNIX_EPOCH).ok()?.as_secs());
        JsonModel {
            model: model.name,
            revisions: model.revisions,
            commit: model.commit,
            path: model.path.display().to_string(),
            bytes: model.bytes,
            format: model.format,
            last_used: model.last_used.and_then(since_1970),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_told_in_the_largest_unit() {
        let words = [5, 60, 7300, 86_400, 864_000].map(in_words);
        assert_eq!(words, ["just now", "1 minute ago", "2 hours ago", "1 day ago", "10 days ago"]);
    }
}
