//! The flags of `bitnet config`.

use clap::Args;

#[derive(Debug, Args)]
#[command(after_help = "\
The file gives flags other defaults, by their long names, for all commands or
for one; --use NAME or BITNET_USE=NAME chooses a profile:

  model = \"models/bitnet-2b.bitnet\"
  threads = 2

  [run]
  max-tokens = 300

  [profile.story]
  model = \"tiny\"
  temperature = 0.8

What is typed comes first, then an environment variable such as
BITNET_THREADS=2, the profile, the rest of the file, and the built-in default.
BITNET_CONFIG=FILE takes another file, BITNET_CONFIG= none.

Examples:
  bitnet config
  bitnet --use story config
  $EDITOR \"$(bitnet config --path)\"")]
pub struct ConfigArgs {
    /// Print only where the file is, or would be
    #[arg(long, conflicts_with = "json")]
    pub path: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,
}
