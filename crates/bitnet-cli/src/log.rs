//! What the library tells of its work, on stderr, for whoever asks by `BITNET_LOG`.

use std::{env, io};

use anyhow::{Result, anyhow};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::FmtSpan;

/// Environment variable with the filter: `info`, `debug`, `trace`, or targets with levels.
const VARIABLE: &str = "BITNET_LOG";

/// Prints a line for each span that ends and passes the filter. Without a filter nothing listens.
pub fn start() -> Result<()> {
    let Some(filter) = env::var_os(VARIABLE).filter(|filter| !filter.is_empty()) else {
        return Ok(());
    };
    let parsed = filter.to_str().and_then(|text| EnvFilter::try_new(text).ok());
    let parsed = parsed.ok_or_else(|| {
        anyhow!(
            "{VARIABLE}: `{}` is no filter: give info, debug, trace or a list such as \
             bitnet_inference=debug",
            filter.display()
        )
    })?;
    tracing_subscriber::fmt()
        .with_env_filter(parsed)
        .with_span_events(FmtSpan::CLOSE)
        .with_writer(io::stderr)
        // A closed stderr is of no consequence.
        .log_internal_errors(false)
        .init();
    Ok(())
}
