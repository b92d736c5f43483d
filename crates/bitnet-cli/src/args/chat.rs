//! The flags of `bitnet chat`.

use clap::Args;

use super::{KvArgs, ModelArgs, SamplingArgs};

#[derive(Debug, Args)]
#[command(mut_arg("temperature", |argument| argument.default_value("0.6")))]
#[command(mut_arg("top_p", |argument| argument.default_value("0.9")))]
#[command(after_help = "\
At the prompt, /help lists the commands. Tab completes them, and file names. A
line that ends in \\ goes on in the next one, and so does all between two \"\"\".
Ctrl-C stops an answer; Ctrl-D, or Ctrl-C twice at an empty prompt, leaves.
When the context is full, the oldest turns are left out of what the model reads,
as many as take it down to half. The N-th answer takes the seed S + N - 1.

Where stdin is no terminal, each line of it is a message or a command, and each
answer goes to stdout; the first error ends the program.

Examples:
  bitnet chat -m models/bitnet-2b.gguf
  bitnet chat -m models/bitnet-2b.gguf --system \"Answer in one sentence.\"
  echo \"Why is the sky blue?\" | bitnet chat -m models/bitnet-2b.gguf --quiet")]
pub struct ChatArgs {
    /// System message, which comes before all others
    #[arg(long, value_name = "TEXT")]
    pub system: Option<String>,

    /// Most tokens of an answer [default: as many as the context has room for]
    #[arg(short = 'n', long, value_name = "N")]
    pub max_tokens: Option<usize>,

    /// Talk to a base model too, in lines that begin with `User:` and `Assistant:`
    #[arg(long)]
    pub force: bool,

    #[command(flatten)]
    pub model: ModelArgs,

    #[command(flatten)]
    pub kv: KvArgs,

    #[command(flatten)]
    pub sampling: SamplingArgs,
}
