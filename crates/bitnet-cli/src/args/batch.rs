//! The flags of `bitnet batch`.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};

use super::{ConstraintArgs, KvArgs, LengthArgs, ModelArgs, SamplingArgs};

#[derive(Debug, Args)]
#[command(after_help = "\
IN is a text (.txt, a prompt per line), JSON lines (.jsonl, an object per line)
or a table (.csv, with a header). --template makes a prompt of a row's fields,
in the syntax of Jinja; without it the prompt is the field `prompt`, which is
also what a line of text is called. OUT is written as .txt, .jsonl, .csv, .md
or .parquet, in the order of IN, when all rows are done: the fields of IN, then
output, finish_reason, tokens and error. A field of IN that has one of these
names gets `input_` before it. A .txt has the outputs alone, one per line, with
line breaks in them written as \\n.

Until then the results are in OUT.part. After a kill or Ctrl-C, the same command
goes on where that ends. Row N, counted from 0, takes the seed S + N, so that no
row depends on others. A row that fails has the reason in its `error`, and the
others go on.

Examples:
  bitnet batch prompts.txt -o answers.jsonl -n 64
  bitnet batch news.csv -o news.parquet -m models/bitnet-2b.gguf --chat \\
      --template \"Summarise {{ title }}: {{ text }}\"
  bitnet batch cats.jsonl -o cats.csv --json-schema cat.json --concurrency 16")]
pub struct BatchArgs {
    /// The file with the prompts
    #[arg(value_name = "IN")]
    pub input: PathBuf,

    /// The file to write
    #[arg(short, long, value_name = "OUT")]
    pub output: PathBuf,

    /// Format of IN [default: as its name ends]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub format: Option<InputFormat>,

    /// Format of OUT [default: as its name ends]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub to: Option<OutputFormat>,

    /// The prompt of a row, such as "Summarise {{ title }}: {{ text }}"
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub template: Option<String>,

    #[command(flatten)]
    pub length: LengthArgs,

    /// Put each prompt into the model's chat template as the user's message
    #[arg(long)]
    pub chat: bool,

    /// System message before the user's
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Rows that are computed at once
    #[arg(long, value_name = "N", default_value_t = 8)]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=256))]
    pub concurrency: u16,

    /// Begin anew: forget what OUT.part has, and replace OUT
    #[arg(long)]
    pub restart: bool,

    /// Exit with status 1 if a row failed
    #[arg(long)]
    pub strict: bool,

    /// Print one JSON object with the counts at the end
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    #[command(flatten)]
    pub constraint: ConstraintArgs,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum InputFormat {
    Text,
    Jsonl,
    Csv,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum OutputFormat {
    Text,
    Jsonl,
    Csv,
    Md,
    Parquet,
}
