//! The commands, one file each: from what was typed to what is printed.

mod batch;
mod bench;
mod chat;
mod completions;
mod config;
mod convert;
mod detokenize;
mod devices;
mod doctor;
mod embed;
mod eval;
mod generation;
mod info;
mod list;
mod logits;
mod man;
mod perplexity;
mod profile;
mod pull;
mod rm;
mod run;
mod tokenize;

use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use bitnet_core::Device;
use bitnet_core::backend::{ActivationPrecision, KvType};
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::chat::ChatTemplate;
use bitnet_model::hub::HubName;
use bitnet_model::source::Description;
use bitnet_model::weights::LoadOptions;
use bitnet_quant::packing::i2_s::I2sLayout;

use crate::args::{
    ActivationsChoice, Command, DeviceChoice, FileArgs, I2sLayoutChoice, KvTypeChoice, ModelArgs,
};
use crate::output::Messages;
use crate::settings::Settings;

/// The flags are wrong in a way that only their meaning shows.
#[derive(Debug)]
pub struct WrongUsage(String);

impl std::fmt::Display for WrongUsage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for WrongUsage {}

/// Somebody asked for the end before it came.
#[derive(Debug)]
pub struct Interrupted(String);

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Interrupted {}

/// Runs one command. `settings` have become defaults of its flags already.
pub fn run(command: Command, settings: &Settings, messages: &Messages) -> Result<()> {
    match command {
        Command::Run(args) => run::run(args, messages),
        Command::Chat(args) => chat::run(args, messages),
        Command::Batch(args) => batch::run(args, messages),
        Command::Logits(args) => logits::run(args, messages),
        Command::Tokenize(args) => tokenize::run(args, messages),
        Command::Detokenize(args) => detokenize::run(args, messages),
        Command::Embed(args) => embed::run(args, messages),
        Command::Pull(args) => pull::run(args, messages),
        Command::List(args) => list::run(args, messages),
        Command::Rm(args) => rm::run(args, messages),
        Command::Convert(args) => convert::run(args, messages),
        Command::Info(args) => info::run(args),
        Command::Devices(args) => devices::run(args),
        Command::Doctor(args) => doctor::run(args, messages),
        Command::Bench(args) => bench::run(args, messages),
        Command::Perplexity(args) => perplexity::run(args, messages),
        Command::Eval(args) => eval::run(args, messages),
        Command::Config(args) => config::run(args, settings),
        Command::Completions(args) => completions::run(args),
        Command::Man(args) => man::run(args, messages),
    }
}

/// What the flags say about loading a model.
fn model_options(args: &ModelArgs) -> ModelOptions {
    let device = match args.device {
        DeviceChoice::Auto => None,
        DeviceChoice::Cpu => Some(Device::Cpu),
        DeviceChoice::Gpu => Some(Device::Gpu),
        DeviceChoice::Mlx => Some(Device::Mlx),
    };
    ModelOptions {
        device,
        threads: args.threads,
        pinned: args.pin,
        load: load_options(&args.file),
        ..ModelOptions::default()
    }
}

/// What the flags say about a file that does not say it itself.
fn load_options(args: &FileArgs) -> LoadOptions {
    let i2s_layout = match args.i2s_layout {
        I2sLayoutChoice::X86 => I2sLayout::X86,
        I2sLayoutChoice::Arm => I2sLayout::Arm,
        I2sLayoutChoice::X86Rows => I2sLayout::X86Rows,
    };
    let precision = args.activations.map(|activations| match activations {
        ActivationsChoice::Int8 => ActivationPrecision::Int8,
        ActivationsChoice::F32 => ActivationPrecision::F32,
    });
    LoadOptions { i2s_layout, precision, ..LoadOptions::default() }
}

/// The name of a model on the hub.
fn hub_name(text: &str) -> Result<HubName, WrongUsage> {
    let refused = || {
        WrongUsage(format!(
            "`{text}` is not the name of a model on the hub: give org/name, org/name@REVISION or \
             org/name:FILE"
        ))
    };
    HubName::parse(text).ok_or_else(refused)
}

/// Loads a model to run it.
fn load(args: &ModelArgs, messages: &Messages) -> Result<Model> {
    open(&args.name.model, &model_options(args), messages)
}

fn open(name: &str, options: &ModelOptions, messages: &Messages) -> Result<Model> {
    pull::fetch(name, messages)?;
    let model = Model::open(name, options)?;
    show_notes(model.description(), messages);
    Ok(model)
}

/// Loads a model that is to write text.
fn load_generator(name: &str, options: &ModelOptions, messages: &Messages) -> Result<Model> {
    let model = open(name, options, messages)?;
    if model.config().pooling.is_some() {
        bail!(
            "{name} makes embeddings and does not write text: use `bitnet embed`, or choose \
             another model"
        );
    }
    Ok(model)
}

fn show_notes(description: &Description, messages: &Messages) {
    description.notes.iter().for_each(|note| messages.note(note));
}

/// The chat template, which base models do not have.
fn template(description: &Description) -> Result<&ChatTemplate> {
    description.template.as_ref().ok_or_else(|| {
        anyhow!(
            "{} is a base model without a chat template: leave out --chat to continue a text, or \
             choose a chat model",
            description.path.display()
        )
    })
}

fn session_options(kv_type: KvTypeChoice) -> SessionOptions {
    let kv_type = match kv_type {
        KvTypeChoice::F32 => KvType::F32,
        KvTypeChoice::F16 => KvType::F16,
        KvTypeChoice::Int8 => KvType::Int8,
    };
    SessionOptions { kv_type, ..SessionOptions::default() }
}

/// Far more than any context holds; a device file or a wrong path must not fill the memory.
const MAX_TEXT_BYTES: u64 = 64 << 20;

/// The text of a file, or of stdin for `-`.
fn read_text(path: &Path) -> Result<String> {
    let (name, source): (String, Box<dyn Read>) = match path.as_os_str() == "-" {
        true => ("stdin".to_owned(), Box::new(io::stdin().lock())),
        false => {
            let name = path.display().to_string();
            match File::open(path) {
                Ok(file) => (name, Box::new(file)),
                Err(error) => bail!("{name}: cannot be read: {error}"),
            }
        }
    };
    let mut bytes = Vec::new();
    if let Err(error) = source.take(MAX_TEXT_BYTES + 1).read_to_end(&mut bytes) {
        bail!("{name}: cannot be read: {error}");
    }
    if bytes.len() as u64 > MAX_TEXT_BYTES {
        bail!("{name}: is longer than {} MiB: give a shorter text", MAX_TEXT_BYTES >> 20);
    }
    match String::from_utf8(bytes) {
        Ok(text) => Ok(text),
        Err(error) => bail!(
            "{name}: is not UTF-8 text: the byte at offset {} belongs to no character; save it as \
             UTF-8",
            error.utf8_error().valid_up_to()
        ),
    }
}
