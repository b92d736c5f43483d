//! What was typed: the commands and their flags, as `clap` reads them.
//!
//! What the flags mean is said where they are used, in [`commands`](crate::commands): a file that
//! is to be read is a path here and a prompt there.

mod batch;
mod bench;
mod chat;
mod config;
mod convert;
mod eval;
mod hub;
mod perplexity;

pub use batch::{BatchArgs, InputFormat, OutputFormat};
pub use bench::{BenchArgs, BenchFormat};
pub use chat::ChatArgs;
pub use config::ConfigArgs;
pub use convert::{ConvertArgs, HeadChoice, LayoutChoice, PackingChoice, TargetFormat};
pub use eval::EvalArgs;
pub use hub::{ListArgs, PullArgs, RmArgs};
pub use perplexity::PerplexityArgs;

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, Parser, Subcommand, ValueEnum};

/// Runs ternary (1.58-bit) language models on plain CPUs.
#[derive(Debug, Parser)]
#[command(
    name = "bitnet",
    version,
    disable_help_subcommand = true,
    max_term_width = 80,
    after_help = "\
MODEL is `tiny` (built in, the default), the folder of a Hugging Face
checkpoint, a .gguf or .bitnet file, or the name of a model on the Hugging Face
hub: org/name[@REVISION][:FILE]. Results go to stdout, with --json for
machines; notes and timing go to stderr, and with BITNET_LOG=debug what took
which time. NO_COLOR=1 turns colours off.

Flags that you give each time can be kept: `bitnet config --help`.

Exit status: 0 success, 1 failure, 2 wrong usage, 130 interrupted.

Examples:
  bitnet run \"Once upon a time\"
  bitnet run -m microsoft/bitnet-b1.58-2B-4T --chat \"Why is the sky blue?\"
  bitnet info -m models/bitnet-2b.gguf
  bitnet tokenize --json \"Hello\""
)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Option<Command>,

    /// Print neither notes nor timing on stderr; errors only
    #[arg(short, long, global = true)]
    pub quiet: bool,

    /// Take the defaults of a profile in the configuration file
    #[arg(long = "use", value_name = "PROFILE", global = true)]
    pub use_profile: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Continue a text, or answer a message with --chat
    Run(RunArgs),
    /// Talk to a model
    Chat(ChatArgs),
    /// Run every row of a file through a model
    Batch(BatchArgs),
    /// Show the model's scores for the token that comes next
    Logits(LogitsArgs),
    /// Turn text into token ids
    Tokenize(TokenizeArgs),
    /// Turn token ids into text
    Detokenize(DetokenizeArgs),
    /// Turn a text into one vector, with an embedding model
    Embed(EmbedArgs),
    /// Fetch a model from the Hugging Face hub
    Pull(PullArgs),
    /// List the models that have been fetched
    List(ListArgs),
    /// Remove a model that has been fetched
    Rm(RmArgs),
    /// Write a model as .bitnet, GGUF, ONNX or Hugging Face files
    Convert(ConvertArgs),
    /// Describe a model without loading its weights
    Info(InfoArgs),
    /// List the devices a model can run on
    Devices(DevicesArgs),
    /// Check that this machine computes what it should
    Doctor(DoctorArgs),
    /// Measure how fast a model reads and writes
    Bench(BenchArgs),
    /// Measure how well a model foretells texts
    Perplexity(PerplexityArgs),
    /// Measure how many multiple-choice questions a model answers
    Eval(EvalArgs),
    /// Show which defaults are in force, and where they come from
    Config(ConfigArgs),
    /// Print a script that lets a shell complete commands and flags
    Completions(CompletionsArgs),
    /// Write the manual pages
    Man(ManArgs),
}

/// A model by itself.
#[derive(Debug, Args)]
pub struct ModelName {
    /// `tiny` (built in), a checkpoint folder, a .gguf or .bitnet file, or org/name on the hub
    #[arg(short, long, value_name = "MODEL", default_value = "tiny")]
    #[arg(value_parser = NonEmptyStringValueParser::new())]
    pub model: String,
}

/// A model that is going to run.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelArgs {
    #[command(flatten)]
    pub name: ModelName,

    /// Where to run
    #[arg(long, value_enum, default_value_t = DeviceChoice::Auto)]
    pub device: DeviceChoice,

    /// Number of threads [default: one per physical core]
    #[arg(long, value_name = "N", value_parser = threads)]
    pub threads: Option<usize>,

    /// Keep each thread on a processor of its own (Linux)
    #[arg(long)]
    pub pin: bool,

    #[command(flatten)]
    pub file: FileArgs,
}

/// What a model's file may leave open.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct FileArgs {
    /// Layout of I2_S weights in a .gguf file, which cannot say it itself
    #[arg(long, value_enum, value_name = "LAYOUT", default_value_t = I2sLayoutChoice::X86)]
    pub i2s_layout: I2sLayoutChoice,

    /// How linear layers take their input [default: what the model says]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub activations: Option<ActivationsChoice>,
}

/// How a model that is going to read keeps what it has read.
#[derive(Debug, Args)]
#[command(next_help_heading = "Model")]
pub struct KvArgs {
    /// Storage of keys and values; f32 is exact, the others approximate
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = KvTypeChoice::F32)]
    pub kv_type: KvTypeChoice,
}

/// How long an output may become.
#[derive(Debug, Args)]
pub struct LengthArgs {
    /// Most tokens to generate
    #[arg(short = 'n', long, value_name = "N", default_value_t = 128)]
    pub max_tokens: usize,

    /// Stop before this text; may be given more than once
    #[arg(long, value_name = "TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub stop: Vec<String>,

    /// Go on after an end token
    #[arg(long)]
    pub ignore_eos: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum DeviceChoice {
    Cpu,
    Gpu,
    Mlx,
    Auto,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum KvTypeChoice {
    F32,
    F16,
    Int8,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum I2sLayoutChoice {
    X86,
    Arm,
    X86Rows,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum ActivationsChoice {
    Int8,
    F32,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The prompt is continued as it is, after the begin token if the model's
tokenizer adds one, and printed before its continuation. With --chat it is a
message to the model; then, and with --tokens, only the answer is printed.
Without sampling flags the most probable token is taken each time.

Examples:
  bitnet run \"Once upon a time\"
  bitnet run \"Once upon a time\" -n 200 --temperature 0.8 --top-p 0.95 --seed 7
  bitnet run -m models/bitnet-2b.gguf --chat \"Why is the sky blue?\"
  bitnet run --file story.txt --json
  bitnet run \"Her name was \" --regex \"(Lily|Sue|Anna)\"
  bitnet run \"A cat as JSON: \" --json-schema cat.json")]
pub struct RunArgs {
    /// The text to continue
    #[arg(conflicts_with_all = ["file", "tokens"])]
    pub prompt: Option<String>,

    /// Read the prompt from a UTF-8 file, exactly as it is; `-` is stdin
    #[arg(short, long, value_name = "FILE", conflicts_with = "tokens")]
    pub file: Option<PathBuf>,

    /// Token ids as the prompt, such as 1,2,3; nothing is added to them
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = token_id)]
    pub tokens: Option<Vec<u32>>,

    #[command(flatten)]
    pub length: LengthArgs,

    /// Put the prompt into the model's chat template as the user's message
    #[arg(long, conflicts_with = "tokens")]
    pub chat: bool,

    /// System message before the user's
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub system: Option<String>,

    /// Report the time, the bytes and the bound of each kind of operation
    #[arg(long)]
    pub profile: bool,

    /// Print one JSON object at the end instead of text as it comes
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,

    /// Report log-probabilities of each token and of the N most probable ones
    #[arg(long, help_heading = "Sampling", value_name = "N", requires = "json")]
    pub logprobs: Option<usize>,

    #[command(flatten)]
    pub constraint: ConstraintArgs,
}

/// What the output must be: at most one of these.
#[derive(Debug, Args)]
#[command(next_help_heading = "Constraint")]
#[group(multiple = false)]
pub struct ConstraintArgs {
    /// Write JSON that this schema describes: a file, `-` for stdin, or the schema, which begins with {
    #[arg(long, value_name = "FILE|TEXT", value_parser = NonEmptyStringValueParser::new())]
    pub json_schema: Option<String>,

    /// Write a text that matches this regular expression from its first to its last character
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub regex: Option<String>,

    /// Write a text of the grammar in this file (Lark, from its rule `start`); `-` is stdin
    #[arg(long, value_name = "FILE")]
    pub grammar: Option<PathBuf>,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Sampling")]
pub struct SamplingArgs {
    /// Randomness; 0 takes the most probable token
    #[arg(long, value_name = "T", default_value_t = 0.0, allow_negative_numbers = true)]
    pub temperature: f32,

    /// Keep the K most probable tokens; 0 keeps all
    #[arg(long, value_name = "K", default_value_t = 0)]
    pub top_k: usize,

    /// Keep the fewest tokens whose probabilities sum to P
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub top_p: f64,

    /// Keep tokens at least P times as probable as the best one
    #[arg(long, value_name = "P", default_value_t = 0.0, allow_negative_numbers = true)]
    pub min_p: f64,

    /// Keep the tokens of most typical surprise whose probabilities sum to P
    #[arg(long, value_name = "P", default_value_t = 1.0, allow_negative_numbers = true)]
    pub typical: f64,

    /// Divide the logits of tokens seen before by R; 1 leaves them
    #[arg(long, value_name = "R", default_value_t = 1.0, allow_negative_numbers = true)]
    pub repeat_penalty: f32,

    /// Subtract R from the logits of tokens seen before
    #[arg(long, value_name = "R", default_value_t = 0.0, allow_negative_numbers = true)]
    pub presence_penalty: f32,

    /// Subtract R from a token's logit each time it was seen
    #[arg(long, value_name = "R", default_value_t = 0.0, allow_negative_numbers = true)]
    pub frequency_penalty: f32,

    /// Add B to the logit of token ID; -inf bans it; may be given more than once
    #[arg(long, value_name = "ID=B", value_parser = logit_bias)]
    pub logit_bias: Vec<(u32, f32)>,

    /// Seed of the random numbers: the same seed gives the same text
    #[arg(long, value_name = "S", default_value_t = 0)]
    pub seed: u64,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet logits --tokens 1,2,3
  bitnet logits --tokens 1,2,3 --all --json")]
pub struct LogitsArgs {
    /// Token ids to read, such as 1,2,3; nothing is added to them
    #[arg(long, value_name = "IDS", required = true)]
    #[arg(value_delimiter = ',', value_parser = token_id)]
    pub tokens: Vec<u32>,

    /// Scores after every token instead of after the last one
    #[arg(long)]
    pub all: bool,

    /// Print {"logits":[[..]]}: every score, in digits that read back as the same f32
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet tokenize \"Once upon a time\"
  bitnet tokenize --json --special-as-text \"the token <|eot_id|>\"
  bitnet tokenize --json --chat messages.json
  bitnet tokenize --lines < texts.jsonl

messages.json is a list such as [{\"role\": \"user\", \"content\": \"Hello\"}].")]
pub struct TokenizeArgs {
    /// The text
    pub text: Option<String>,

    /// Leave out the tokens that the tokenizer puts around every text
    #[arg(long)]
    pub no_bos: bool,

    /// Read `<|eot_id|>` and its like in the text as plain characters
    #[arg(long)]
    pub special_as_text: bool,

    /// Read a conversation from a JSON file and put it into the model's chat template; `-` is stdin
    #[arg(long, value_name = "MESSAGES.json")]
    #[arg(conflicts_with_all = ["text", "lines", "no_bos", "special_as_text"])]
    pub chat: Option<PathBuf>,

    /// With --chat: do not open the assistant's turn at the end
    #[arg(long, requires = "chat")]
    pub no_generation_prompt: bool,

    /// Read one JSON string per line of stdin and print one JSON result for each
    #[arg(long, conflicts_with = "text")]
    pub lines: bool,

    /// Print {"ids":[..]}, with --chat {"text":"..","ids":[..]}
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelName,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet detokenize --tokens 2036,1187,1096
  bitnet detokenize --tokens 2036,1187,1096 --skip-special --json")]
pub struct DetokenizeArgs {
    /// Token ids, such as 1,2,3
    #[arg(long, value_name = "IDS", required = true)]
    #[arg(value_delimiter = ',', value_parser = token_id)]
    pub tokens: Vec<u32>,

    /// Leave special tokens out of the text
    #[arg(long)]
    pub skip_special: bool,

    /// Print {"text":".."}
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelName,
}

#[derive(Debug, Args)]
#[command(after_help = "\
The vector has length 1, so the similarity of two texts is the sum of products
of their numbers.

Example:
  bitnet embed -m models/embedding \"a small red house\" --json")]
pub struct EmbedArgs {
    /// The text
    pub text: String,

    /// Print {"embedding":[..]} instead of numbers with spaces between them
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet info
  bitnet info -m models/bitnet-2b.gguf --json
  bitnet info -m bitnet-2b.bitnet --verify-checksums")]
pub struct InfoArgs {
    /// Read the whole of a .bitnet file and compare it with its checksums first
    #[arg(long)]
    pub verify_checksums: bool,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelName,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet completions bash > ~/.local/share/bash-completion/completions/bitnet
  bitnet completions zsh > \"${fpath[1]}/_bitnet\"
  bitnet completions fish > ~/.config/fish/completions/bitnet.fish")]
pub struct CompletionsArgs {
    /// The shell that is to read the script
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Writes bitnet.1 and a page for each command, such as bitnet-run.1.

Example:
  bitnet man ~/.local/share/man/man1")]
pub struct ManArgs {
    /// The folder to write to, which is made if it is not there
    #[arg(value_name = "FOLDER")]
    pub folder: PathBuf,
}

#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  bitnet devices
  bitnet devices --json")]
pub struct DevicesArgs {
    /// Print {"devices":[..]}
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
#[command(after_help = "\
A fingerprint is what a model computes for a fixed prompt, to the last bit.
It is the same on every CPU, so one that differs means a fault in the machine,
the model file, or this program. Of a model with -m it also shows what it makes
of an easy text: files that contradict themselves make gibberish.

Examples:
  bitnet doctor
  bitnet doctor -m models/bitnet-2b.gguf --write bitnet-2b.json
  bitnet doctor -m models/bitnet-2b.gguf --against bitnet-2b.json")]
pub struct DoctorArgs {
    /// Write the model's fingerprint to a file
    #[arg(long, value_name = "FILE")]
    pub write: Option<PathBuf>,

    /// Compare the model's fingerprint with those in a file
    #[arg(long, value_name = "FILE", conflicts_with = "write")]
    pub against: Option<PathBuf>,

    /// Print one JSON object
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub model: ModelArgs,
}

/// More threads than any machine this runs on has cores.
const MAX_THREADS: usize = 1024;

fn threads(text: &str) -> Result<usize, String> {
    text.parse()
        .ok()
        .filter(|n| (1..=MAX_THREADS).contains(n))
        .ok_or_else(|| format!("give a number from 1 to {MAX_THREADS}"))
}

fn token_id(text: &str) -> Result<u32, String> {
    use std::num::IntErrorKind::PosOverflow;
    text.trim().parse().map_err(|error: std::num::ParseIntError| match error.kind() {
        PosOverflow => "no model has a token id that large".to_owned(),
        _ => "give token ids with commas between them, such as 1,2,3".to_owned(),
    })
}

fn logit_bias(text: &str) -> Result<(u32, f32), String> {
    let parse = || {
        let (id, bias) = text.split_once('=')?;
        Some((id.trim().parse().ok()?, bias.trim().parse::<f32>().ok()?))
    };
    parse()
        .filter(|(_, bias)| *bias < f32::INFINITY)
        .ok_or_else(|| "give a token id and a number, such as 42=-1.5 or 42=-inf".to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_flags_do_not_contradict_each_other() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_shows_examples_in_lines_that_fit_a_terminal() {
        let cli = Cli::command();
        for command in std::iter::once(&cli).chain(cli.get_subcommands()) {
            let name = command.get_name();
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains("Example") && help.contains("\n  bitnet "), "{name}");
            let longest = help.lines().max_by_key(|line| line.chars().count()).unwrap_or("");
            assert!(longest.chars().count() <= 80, "{name}: {longest}");
        }
    }

    #[test]
    fn biases_are_finite_or_bans() {
        assert_eq!(logit_bias("42=-1.5"), Ok((42, -1.5)));
        assert_eq!(logit_bias("7=-inf"), Ok((7, f32::NEG_INFINITY)));
        for text in ["42", "=1", "42=", "-1=1", "42=nan", "42=inf", "x=1"] {
            assert!(logit_bias(text).is_err(), "{text}");
        }
    }

    #[test]
    fn thread_counts_have_ends() {
        assert_eq!(threads("1"), Ok(1));
        for text in ["0", "-1", "1025", "99999999999999999999", "two", ""] {
            assert!(threads(text).is_err(), "{text}");
        }
    }
}
