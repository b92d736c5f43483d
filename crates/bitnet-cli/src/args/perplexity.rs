//! The flags of `bitnet perplexity`.

use std::path::PathBuf;

use clap::Args;

use super::{KvArgs, ModelArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
A text is read in windows of --context tokens that begin every --stride
tokens. Each token is scored in the first window that it is in, so all but the
first few have at least context - stride tokens before them. A shorter stride
gives a lower perplexity and takes longer; figures can be compared if both
numbers and the vocabulary are the same, bits per byte with any vocabulary.

Examples:
  bitnet perplexity book.txt
  bitnet perplexity -m bitnet-2b.bitnet --context 2048 --stride 512 a.txt b.txt
  bitnet perplexity --json - < book.txt")]
pub struct PerplexityArgs {
    /// UTF-8 texts, each scored by itself; `-` is stdin
    #[arg(value_name = "FILE", required = true)]
    pub files: Vec<PathBuf>,

    /// Tokens of a window [default: the model's context, at most 2048]
    #[arg(long, value_name = "N")]
    pub context: Option<usize>,

    /// Tokens from one window to the next [default: half of --context]
    #[arg(long, value_name = "N")]
    pub stride: Option<usize>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,
}
