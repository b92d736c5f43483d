//! `bitnet chat`: a conversation at a terminal, or by lines of stdin.

mod answer;
mod commands;
mod conversation;
mod editor;

use std::io;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, bail};
use bitnet_inference::{
    ChatWindow, FinishReason, GenerationParams, InferenceEngine, Message, Model, StreamingConfig,
    Usage,
};
use bitnet_model::chat::ChatTemplate;
use bitnet_model::source::TINY;
use bitnet_model::tokenizer::Special;
use serde_json::Value;

use self::answer::Answer;
use self::commands::Typed;
use self::conversation::{Conversation, Settings};
use self::editor::Input;
use super::{generation, read_text};
use crate::args::ChatArgs;
use crate::output::{self, Messages, Wrapping};

/// The form of a conversation with a base model, which was taught none.
const PLAIN_TEMPLATE: &str = "{% for message in messages %}{{ message.role | capitalize }}: \
    {{ message.content | trim }}\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}";

/// Where a base model begins to speak for the user.
const PLAIN_STOP: &str = "\nUser:";

/// Answers that were stopped may still be on their way out when the next one begins.
const WAITING: usize = 4;

pub fn run(args: ChatArgs, messages: &Messages) -> Result<()> {
    let flags = generation::sampling_params(&args.sampling)?;
    let name = &args.model.name.model;
    let options = super::model_options(&args.model);
    let mut model = super::load_generator(name, &options, messages)?;
    generation::check_biases(&flags, &model)?;
    let stop = prepare_template(&mut model, args.force, messages)?;

    let settings = Settings {
        temperature: shortest(args.sampling.temperature),
        top_k: args.sampling.top_k,
        top_p: args.sampling.top_p,
        min_p: args.sampling.min_p,
        typical: args.sampling.typical,
        repeat_penalty: shortest(args.sampling.repeat_penalty),
        presence_penalty: shortest(args.sampling.presence_penalty),
        frequency_penalty: shortest(args.sampling.frequency_penalty),
        seed: args.sampling.seed,
        max_tokens: args.max_tokens,
    };
    let names = settings.list().into_iter().map(|(name, _)| name).collect();
    let mut input = Input::new(names, messages)?;
    let at_terminal = input.is_terminal();
    let mut chat = Chat {
        engine: generation::engine(model, args.kv.kv_type, 1, WAITING)?,
        conversation: Conversation {
            model: name.clone(),
            system: args.system,
            settings,
            messages: Vec::new(),
        },
        logit_bias: args.sampling.logit_bias,
        stop,
        dropped: 0,
        attached: String::new(),
        last: None,
        answers: 0,
        at_terminal,
        messages,
    };
    if at_terminal {
        let context = chat.engine.context_length()?;
        messages.summary(&format!(
            "{name}, context of {context} tokens. /help lists commands, Ctrl-D leaves."
        ));
    }
    while let Some(line) = input.next(messages)? {
        match chat.act(&line) {
            Ok(true) => {}
            Ok(false) => break,
            // Who talks can go on after an error; a script cannot know that there was one.
            Err(error) if at_terminal && !error.is::<io::Error>() => {
                output::error(&error.to_string(), &[]);
            }
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// The f64 of the same shortest digits: 0.6, and not 0.6000000238.
fn shortest(value: f32) -> f64 {
    value.to_string().parse().expect("digits of a number are a number")
}

/// Makes sure that there is a template, and says where else than at its end tokens an answer ends.
fn prepare_template(model: &mut Model, force: bool, messages: &Messages) -> Result<Vec<String>> {
    let path = model.description().path.display().to_string();
    if model.description().template.is_some() {
        if path == TINY {
            messages.note("tiny tells stories and was never taught to converse: see -m");
        }
        return Ok(Vec::new());
    }
    if !force {
        bail!(
            "{path} is a base model: it has no chat template, because it was taught to continue \
             texts and not to answer; use `bitnet run`, choose a chat model, or try with --force"
        );
    }
    messages.note("a base model, asked in lines that begin with `User:` and `Assistant:`");
    let template = ChatTemplate::new(PLAIN_TEMPLATE).expect("the template is valid");
    model.set_chat_template(template);
    Ok(vec![PLAIN_STOP.to_owned()])
}

struct Chat<'a> {
    engine: InferenceEngine,
    conversation: Conversation,
    logit_bias: Vec<(u32, f32)>,
    stop: Vec<String>,
    /// The oldest messages, for which there is no room in the context any more.
    dropped: usize,
    /// Files that come before the next message.
    attached: String,
    last: Option<Answer>,
    answers: usize,
    at_terminal: bool,
    messages: &'a Messages,
}

impl Chat<'_> {
    /// Does what a line says; whether to go on.
    fn act(&mut self, line: &str) -> Result<bool> {
        match commands::parse(line)? {
            Typed::Message(text) => {
                let attached = std::mem::take(&mut self.attached);
                self.conversation.messages.push(Message::new("user", attached + text));
                self.answer()?;
            }
            Typed::System(None) => {
                let system = self.conversation.system.as_deref();
                self.messages.report(&format!("{}\n", system.unwrap_or("no system message")));
            }
            Typed::System(Some(text)) => {
                self.conversation.system = (text != "none").then(|| text.to_owned());
                self.dropped = 0;
            }
            Typed::Clear => {
                self.conversation.messages.clear();
                self.attached.clear();
                self.restart();
            }
            Typed::Regen => self.answer_again()?,
            Typed::Undo => {
                if !self.conversation.take_back_turn() {
                    bail!("there is no message to take back");
                }
                self.restart();
            }
            Typed::Save(path) => {
                self.conversation.save(Path::new(path))?;
                self.messages.summary(&format!("{path}: written"));
            }
            Typed::Load(path) => self.load(Path::new(path))?,
            Typed::File(path) => self.attach(path)?,
            Typed::Set(None) => {
                let row = |(name, value): (String, Value)| match value {
                    Value::Null => [name, "none".to_owned()],
                    value => [name, value.to_string()],
                };
                let rows: Vec<_> = self.conversation.settings.list().into_iter().map(row).collect();
                self.messages.report(&output::table(&rows, [false, true]));
            }
            Typed::Set(Some((name, value))) => self.conversation.settings.set(name, value)?,
            Typed::Stats => self.messages.report(&self.statistics()?),
            Typed::Help => self.messages.report(&commands::help()),
            Typed::Exit => return Ok(false),
        }
        Ok(true)
    }

    /// Nothing has been read of the conversation as it is now.
    fn restart(&mut self) {
        self.dropped = 0;
        self.last = None;
    }

    fn answer_again(&mut self) -> Result<()> {
        let before = self.conversation.messages.clone();
        self.conversation.take_back_answer();
        if self.conversation.messages.is_empty() {
            bail!("there is no message to answer again");
        }
        if self.conversation.settings.temperature == 0.0 {
            self.messages.note("with temperature 0 every answer is the same");
        }
        let result = self.answer();
        // An answer that could not be replaced stays.
        if self.conversation.messages.len() < before.len() {
            self.conversation.messages = before;
        }
        result
    }

    fn load(&mut self, path: &Path) -> Result<()> {
        let loaded = Conversation::load(path)?;
        loaded.settings.sampling(&self.logit_bias)?;
        if loaded.model != self.conversation.model {
            self.messages
                .note(&format!("it was with {}, and goes on with this model", loaded.model));
        }
        let model = std::mem::take(&mut self.conversation.model);
        self.conversation = Conversation { model, ..loaded };
        self.restart();
        let count = self.conversation.messages.len();
        self.messages.summary(&format!("{}: {count} messages", path.display()));
        if let Some(last) = self.conversation.messages.last() {
            self.messages.summary(&format!("the last, of the {}:", last.role));
            let mut wrapping = Wrapping::new();
            let text = wrapping.push(last.content.trim()) + &wrapping.finish();
            output::lines(&format!("{text}\n"))?;
        }
        Ok(())
    }

    fn attach(&mut self, path: &str) -> Result<()> {
        let text = read_text(Path::new(path))?;
        let tokens = self.engine.model()?.tokenizer().encode(&text, false, Special::Recognised)?;
        let count = tokens.len();
        self.messages.summary(&format!("{path}: {count} tokens, before your next message"));
        self.attached += text.trim_end();
        self.attached += "\n\n";
        Ok(())
    }

    fn statistics(&self) -> Result<String> {
        let Conversation { model, messages, .. } = &self.conversation;
        let context = self.last.as_ref().map_or(0, Answer::context);
        let mut rows = vec![
            ["model".to_owned(), model.clone()],
            [
                "context".to_owned(),
                format!("{context} of {} tokens", self.engine.context_length()?),
            ],
            [
                "messages".to_owned(),
                match self.dropped {
                    0 => messages.len().to_string(),
                    dropped => format!("{}, the oldest {dropped} left out", messages.len()),
                },
            ],
            ["answers so far".to_owned(), self.answers.to_string()],
        ];
        if let Some(answer) = &self.last {
            let Usage { prompt_tokens, reused_tokens, .. } = answer.usage;
            rows.push(["last answer".to_owned(), answer.summary()]);
            rows.push([
                "last prompt".to_owned(),
                format!("{prompt_tokens} tokens, {reused_tokens} of them known from before"),
            ]);
        }
        Ok(output::table(&rows, [false, false]))
    }

    /// What the model is to read, without turns for which there is no room.
    fn prompt(&mut self) -> Result<(Vec<Message>, ChatWindow)> {
        let limit = self.conversation.settings.max_tokens.unwrap_or(usize::MAX);
        // A quarter of the context is enough to begin an answer.
        let answer = limit.min(self.engine.context_length()? / 4).max(1);
        let system = self.conversation.system.iter().map(|text| Message::new("system", text));
        let kept = self.conversation.messages[self.dropped..].iter().cloned();
        let mut prompt: Vec<Message> = system.chain(kept).collect();
        let window = self.engine.chat_window(&prompt, answer)?;
        if window.dropped > 0 {
            self.dropped += window.dropped;
            let head = usize::from(self.conversation.system.is_some());
            prompt.drain(head..head + window.dropped);
            let dropped = self.dropped;
            self.messages
                .note(&format!("the context is full: the oldest {dropped} messages are left out"));
        }
        Ok((prompt, window))
    }

    /// Answers the last message. If there is no answer to keep, that message is taken back too.
    fn answer(&mut self) -> Result<()> {
        let answered = self.try_answer();
        match &answered {
            Ok(answer) if !answer.text.is_empty() => {
                self.conversation.messages.push(Message::new("assistant", &answer.text));
            }
            _ => {
                self.conversation.take_back_turn();
            }
        }
        self.last = Some(answered?);
        Ok(())
    }

    fn try_answer(&mut self) -> Result<Answer> {
        let (prompt, ChatWindow { prompt_tokens, context_length, .. }) = self.prompt()?;
        let limit = self.conversation.settings.max_tokens.unwrap_or(usize::MAX);
        let room = context_length - prompt_tokens;
        let params = GenerationParams {
            sampling: self.conversation.settings.sampling(&self.logit_bias)?,
            max_tokens: limit.min(room),
            stop: self.stop.clone(),
            ..GenerationParams::default()
        };
        let asked = Instant::now();
        let stream = self.engine.stream_chat(&prompt, params, StreamingConfig::default())?;
        let answer = Answer::show(stream, asked, prompt_tokens, self.at_terminal, self.messages)?;
        let seed = &mut self.conversation.settings.seed;
        *seed = seed.wrapping_add(1);
        self.answers += 1;
        let meter = format!("[{}/{context_length}] {}", answer.context(), answer.summary());
        self.messages.summary(&meter);
        match (answer.reason, answer.text.is_empty()) {
            (None, true) => self.messages.note("stopped; there is no answer to keep"),
            (None, false) => self.messages.note("stopped; what was said so far is kept"),
            (Some(_), true) => self.messages.note("the answer is empty, and not kept"),
            (Some(FinishReason::Length), _) if limit >= room => {
                self.messages.note("the context is full, and the answer is cut off");
            }
            (Some(FinishReason::Length), _) => {
                self.messages.note("the answer is cut off: see max_tokens in /set");
            }
            (Some(_), _) => {}
        }
        Ok(answer)
    }
}
