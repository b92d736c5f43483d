//! Flags of the commands about models of the Hugging Face hub and the cache they lie in.

use clap::Args;
use clap::builder::NonEmptyStringValueParser;

#[derive(Debug, Args)]
#[command(after_help = "\
Fetches the files that are read and no others into the cache that other
programs use too, and prints where the model lies. What is there already, or
was left by a download that broke off, is not fetched again. Commands that run
a model fetch it by themselves when it is not in the cache; this one also looks
for a newer one. docs/models.md has the variables: HF_TOKEN, HF_HOME and others.

Examples:
  bitnet pull microsoft/bitnet-b1.58-2B-4T
  bitnet pull microsoft/bitnet-b1.58-2B-4T-gguf@main
  bitnet pull org/name --file model-TQ2_0.gguf
  bitnet run -m microsoft/bitnet-b1.58-2B-4T --chat \"Why is the sky blue?\"")]
pub struct PullArgs {
    /// The model: org/name, org/name@REVISION or org/name:FILE
    #[arg(value_name = "MODEL", value_parser = NonEmptyStringValueParser::new())]
    pub model: String,

    /// The file with the weights, where a repository has several
    #[arg(long, value_name = "FILE", value_parser = NonEmptyStringValueParser::new())]
    pub file: Option<String>,

    /// Print {"model":"..","path":"..","bytes":..,"fetched_bytes":..}
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Shows the models in the cache whose architecture is known, whichever program
fetched them, and downloads that broke off.

Examples:
  bitnet list
  bitnet list --json")]
pub struct ListArgs {
    /// Print {"cache":"..","models":[..]}
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Other programs use the same cache: what is removed is gone for them too. Of a
model with @REVISION only the files go that no other revision uses.

Examples:
  bitnet rm microsoft/bitnet-b1.58-2B-4T
  bitnet rm org/name@v1.0 --yes")]
pub struct RmArgs {
    /// The model: org/name or org/name@REVISION
    #[arg(value_name = "MODEL", value_parser = NonEmptyStringValueParser::new())]
    pub model: String,

    /// Remove it without asking
    #[arg(short, long)]
    pub yes: bool,
}
