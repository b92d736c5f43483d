//! The flags of `bitnet eval`.

use std::path::PathBuf;

use clap::Args;

use super::{KvArgs, ModelArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
Each line of the file is a question with its choices:
  {\"question\": \"..\", \"choices\": [\"..\", \"..\"], \"answer\": 1}
The answer is an index from 0 or a letter. A `prompt`, `query` or `ctx` is
continued as it is, a `question` as `Question: ..` with `Answer:` on the next
line. Rows of ARC, HellaSwag and MMLU can be used as they come.

The choice with the largest sum of log-probabilities is the model's; for
acc_norm the sum is divided by the choice's bytes. A line that cannot be used is
named and left out.

Examples:
  bitnet eval questions.jsonl
  bitnet eval -m models/bitnet-2b.bitnet arc.jsonl --output rows.jsonl
  bitnet eval -m models/bitnet-2b.bitnet --chat questions.jsonl --json")]
pub struct EvalArgs {
    /// The questions, a JSON object on each line; `-` is stdin
    #[arg(value_name = "QUESTIONS.jsonl")]
    pub questions: PathBuf,

    /// Put each question into the model's chat template as the user's message
    #[arg(long)]
    pub chat: bool,

    /// Write a line of JSON for each question to a file
    #[arg(long, value_name = "FILE")]
    pub output: Option<PathBuf>,

    /// Print one JSON object, with every question in it
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,
}
