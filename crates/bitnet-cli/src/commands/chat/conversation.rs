//! What is said in a chat and how answers are sampled, in memory and as a file people can read.

use std::fs;
use std::io::Write;
use std::path::Path;

use anyhow::{Result, anyhow, bail};
use bitnet_inference::{Message, SamplingParams};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::super::generation::setting_name;
use super::super::read_text;
use crate::files;

/// All that `/save` keeps.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Conversation {
    /// What the model was called, for people.
    pub model: String,
    pub system: Option<String>,
    pub settings: Settings,
    /// Of the user and the assistant.
    pub messages: Vec<Message>,
}

impl Conversation {
    pub fn load(path: &Path) -> Result<Self> {
        let conversation: Self = serde_json::from_str(&read_text(path)?).map_err(|error| {
            anyhow!("{}: is not a conversation that /save wrote: {error}", path.display())
        })?;
        let strange =
            conversation.messages.iter().find(|m| m.role != "user" && m.role != "assistant");
        if let Some(Message { role, .. }) = strange {
            bail!(
                "{}: has a message of `{role}`: messages are of `user` or `assistant`",
                path.display()
            );
        }
        Ok(conversation)
    }

    /// Takes the place of a conversation that is there already, and of nothing else.
    pub fn save(&self, path: &Path) -> Result<()> {
        if fs::symlink_metadata(path).is_ok() && Self::load(path).is_err() {
            bail!(
                "{}: is there and is no conversation: choose another name, or delete it first",
                path.display()
            );
        }
        files::write_whole(path, |mut file| {
            let mut text = serde_json::to_string_pretty(self)?;
            text.push('\n');
            file.write_all(text.as_bytes()).map_err(|error| files::cannot_be_written(path, &error))
        })
    }

    /// Takes back the last answer; whether there was one.
    pub fn take_back_answer(&mut self) -> bool {
        self.messages.pop_if(|message| message.role == "assistant").is_some()
    }

    /// Takes back the last message of the user and what came after it; whether there was one.
    pub fn take_back_turn(&mut self) -> bool {
        let last = self.messages.iter().rposition(|message| message.role == "user");
        self.messages.truncate(last.unwrap_or(self.messages.len()));
        last.is_some()
    }
}

/// What `/set` can change.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Settings {
    pub temperature: f64,
    pub top_k: usize,
    pub top_p: f64,
    pub min_p: f64,
    pub typical: f64,
    pub repeat_penalty: f64,
    pub presence_penalty: f64,
    pub frequency_penalty: f64,
    /// Of the next answer; each takes one more.
    pub seed: u64,
    /// `None`: as many as the context has room for.
    pub max_tokens: Option<usize>,
}

impl Settings {
    /// The names and values, in the order of the fields.
    pub fn list(&self) -> Vec<(String, Value)> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map.into_iter().collect(),
            _ => unreachable!("settings are numbers with names"),
        }
    }

    /// Changes one; nothing, if the name or the value is wrong.
    pub fn set(&mut self, name: &str, value: &str) -> Result<()> {
        let name = name.replace('-', "_");
        let mut all: serde_json::Map<String, Value> = self.list().into_iter().collect();
        let Some(place) = all.get_mut(&name) else {
            bail!("there is no setting `{name}`: /set lists them");
        };
        *place = match value {
            "none" => Value::Null,
            value => serde_json::from_str(value)
                .ok()
                .filter(Value::is_number)
                .ok_or_else(|| anyhow!("{name} cannot be `{value}`: give a number"))?,
        };
        let changed: Settings = serde_json::from_value(Value::Object(all))
            .map_err(|_| anyhow!("{name} cannot be `{value}`: give a number of its kind"))?;
        changed.sampling(&[])?;
        *self = changed;
        Ok(())
    }

    /// How the next answer is sampled.
    pub fn sampling(&self, logit_bias: &[(u32, f32)]) -> Result<SamplingParams> {
        let sampling = SamplingParams {
            logit_bias: logit_bias.to_vec(),
            repetition_penalty: self.repeat_penalty as f32,
            presence_penalty: self.presence_penalty as f32,
            frequency_penalty: self.frequency_penalty as f32,
            repeat_last_n: None,
            top_k: self.top_k,
            temperature: self.temperature as f32,
            top_p: self.top_p,
            min_p: self.min_p,
            typical_p: self.typical,
            seed: self.seed,
            logprobs: None,
        };
        sampling.validate().map_err(|error| {
            anyhow!("{} is {}: give {}", setting_name(error.name), error.value, error.allowed)
        })?;
        Ok(sampling)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings() -> Settings {
        Settings {
            temperature: 0.6,
            top_k: 0,
            top_p: 0.9,
            min_p: 0.0,
            typical: 1.0,
            repeat_penalty: 1.0,
            presence_penalty: 0.0,
            frequency_penalty: 0.0,
            seed: 0,
            max_tokens: None,
        }
    }

    #[test]
    fn a_setting_changes_by_its_name_and_a_wrong_one_changes_nothing() {
        let mut settings = settings();
        settings.set("top-k", "40").unwrap();
        settings.set("max_tokens", "7").unwrap();
        assert_eq!((settings.top_k, settings.max_tokens), (40, Some(7)));
        settings.set("max_tokens", "none").unwrap();
        assert_eq!(settings.max_tokens, None);
        for (name, value) in [
            ("colour", "1"),
            ("temperature", "hot"),
            ("temperature", "-1"),
            ("temperature", "none"),
            ("top_k", "1.5"),
            ("top_p", "2"),
        ] {
            assert!(settings.set(name, value).is_err(), "{name} {value}");
        }
        assert_eq!((settings.temperature, settings.top_p), (0.6, 0.9));
    }

    #[test]
    fn turns_are_taken_back_whole() {
        let messages = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")];
        let mut conversation = Conversation {
            model: "tiny".into(),
            system: None,
            settings: settings(),
            messages: messages.map(|(role, text)| Message::new(role, text)).to_vec(),
        };
        assert!(conversation.take_back_answer());
        assert!(!conversation.take_back_answer());
        assert!(conversation.take_back_turn());
        assert_eq!(conversation.messages.len(), 2);
        assert!(conversation.take_back_turn());
        assert!(!conversation.take_back_turn());
        assert!(conversation.messages.is_empty());
    }
}
