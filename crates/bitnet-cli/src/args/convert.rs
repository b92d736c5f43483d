//! The flags of `bitnet convert`.

use std::path::PathBuf;

use clap::builder::NonEmptyStringValueParser;
use clap::{Args, ValueEnum};

use super::FileArgs;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TargetFormat {
    /// A .bitnet file
    Bitnet,
    /// A Hugging Face folder with float weights
    Hf,
    /// A Hugging Face folder with two bits per weight
    HfPacked,
    /// A GGUF file
    Gguf,
    /// A folder with model.onnx, for ONNX Runtime
    Onnx,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PackingChoice {
    #[value(name = "tq2_0")]
    Tq2_0,
    #[value(name = "tq1_0")]
    Tq1_0,
    #[value(name = "i2_s")]
    I2S,
    #[value(name = "q2_0")]
    Q2_0,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum HeadChoice {
    Bf16,
    F16,
    #[value(name = "q8_0")]
    Q8_0,
    #[value(name = "q6_k")]
    Q6K,
    F32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LayoutChoice {
    /// Two bits per weight, which every processor maps as they are
    Portable,
    /// Fewer bits: faster on processors with AVX-512 VBMI, slower to load on others
    Compact,
}

#[derive(Debug, Args)]
#[command(after_help = "\
A .bitnet file has everything in one: weights as the processor reads them, the
vocabulary and the chat template. It is mapped, not read, when it is opened.
The other formats are for other programs. Not every format holds every model;
what cannot be kept is refused, and what is rounded is said.

Examples:
  bitnet convert models/bitnet-b1.58-2B-4T bitnet-2b.bitnet
  bitnet convert models/bitnet-2b.gguf bitnet-2b.bitnet --verify
  bitnet convert bitnet-2b.bitnet bitnet-2b.gguf --type i2_s --head f16
  bitnet convert bitnet-2b.gguf models/bitnet-2b --to hf-packed
  bitnet convert bitnet-2b.gguf models/bitnet-2b-onnx --to onnx
  bitnet run -m bitnet-2b.bitnet \"Once upon a time\"")]
pub struct ConvertArgs {
    /// The model to convert
    #[arg(value_name = "IN", value_parser = NonEmptyStringValueParser::new())]
    pub input: String,

    /// The file or folder to write
    #[arg(value_name = "OUT", value_parser = NonEmptyStringValueParser::new())]
    pub output: String,

    /// Format to write [default: gguf if OUT ends so, else bitnet]
    #[arg(long, value_enum, value_name = "FORMAT")]
    pub to: Option<TargetFormat>,

    /// Type of the linear layers in a GGUF file [default: tq2_0]
    #[arg(long = "type", value_enum, value_name = "TYPE")]
    pub packing: Option<PackingChoice>,

    /// Type of the embedding and the output head in a GGUF file, Hugging Face or ONNX folder
    /// [default: as they are]
    #[arg(long, value_enum, value_name = "TYPE")]
    pub head: Option<HeadChoice>,

    /// How weights lie in a .bitnet file, which any processor runs [default: as this one is fastest]
    #[arg(long, value_enum, value_name = "LAYOUT")]
    pub layout: Option<LayoutChoice>,

    /// Run a prompt through both models and compare the results
    #[arg(long)]
    pub verify: bool,

    /// Ternarise a dense model, which without training ruins it, and measure how much
    #[arg(long, conflicts_with = "verify")]
    pub ternarise: bool,

    /// Text by which --ternarise measures, at most 512 tokens of it [default: a short story]
    #[arg(long, value_name = "FILE", requires = "ternarise")]
    pub text: Option<PathBuf>,

    #[command(flatten)]
    pub file: FileArgs,
}
