//! A tokenizer as the files of a Hugging Face checkpoint.

use serde_json::{Map, Value, json};
use tokenizers::AddedToken;

use super::sentencepiece::{Kind, write_model};
use super::{LeadingSpace, Pipeline, Segmentation, Tokenizer, TokenizerConfig, TokenizerError};

/// The files that have the tokenizer.
pub struct HuggingFaceFiles {
    /// `tokenizer.json` or `tokenizer.model`.
    pub vocabulary_name: &'static str,
    /// Its content.
    pub vocabulary: Vec<u8>,
    /// Entries of `tokenizer_config.json`.
    pub config: Map<String, Value>,
    /// Entries of `special_tokens_map.json`.
    pub special_tokens: Map<String, Value>,
}

impl Tokenizer {
    /// The files that [`from_json`](Self::from_json) or
    /// [`from_sentencepiece`](Self::from_sentencepiece) makes the same tokenizer of. Ids that a
    /// GGUF file calls unused have no token in them.
    ///
    /// # Errors
    /// A sentence about the rule that these files cannot hold.
    pub fn to_hugging_face(&self) -> Result<HuggingFaceFiles, TokenizerError> {
        let mut config = Map::new();
        let mut special_tokens = Map::new();
        for (role, id) in [("bos_token", self.ends.bos), ("eos_token", self.ends.eos)] {
            if let Some(name) = id.and_then(|id| self.name_of(id)) {
                special_tokens.insert(role.to_owned(), name.into());
            }
        }
        let (vocabulary_name, vocabulary) = match &self.segmentation {
            Segmentation::Pipeline(pipeline) => {
                config.insert("tokenizer_class".to_owned(), "PreTrainedTokenizerFast".into());
                if let Some(unknown) = &pipeline.model.settings.unk_token {
                    special_tokens.insert("unk_token".to_owned(), unknown.clone().into());
                }
                let json = self.json(pipeline)?;
                ("tokenizer.json", serde_json::to_vec_pretty(&json).expect("texts and numbers"))
            }
            Segmentation::SentencePiece(rules) => {
                let description = rules.description();
                config.insert("tokenizer_class".to_owned(), "LlamaTokenizer".into());
                config.insert("legacy".to_owned(), description.prefix_every_fragment.into());
                for (flag, around, token) in [
                    ("add_bos_token", &self.ends.prefix, self.ends.bos),
                    ("add_eos_token", &self.ends.suffix, self.ends.eos),
                ] {
                    if !(around.is_empty() || around.len() == 1 && around.first().copied() == token)
                    {
                        return Err(TokenizerError::vocabulary(
                            "tokenizer.model cannot hold this tokenizer: it puts other tokens \
                             around texts than begin and end",
                        ));
                    }
                    config.insert(flag.to_owned(), (!around.is_empty()).into());
                }
                let piece = |id: u32| description.pieces.get(id as usize);
                let unknown = description.pieces.iter().find(|piece| piece.kind == Kind::Unknown);
                if let Some(unknown) = unknown {
                    special_tokens.insert("unk_token".to_owned(), unknown.text.clone().into());
                }
                // Pieces for control are added tokens by themselves.
                let is_beside = |id: u32| {
                    piece(id)
                        .is_none_or(|piece| !matches!(piece.kind, Kind::Control | Kind::Unknown))
                };
                let beside = self.added_tokens.iter().filter(|(id, _)| is_beside(*id));
                let beside: Map<String, Value> =
                    beside.map(|(id, token)| (id.to_string(), properties(token))).collect();
                config.insert("added_tokens_decoder".to_owned(), beside.into());
                ("tokenizer.model", write_model(description))
            }
        };
        config.extend(special_tokens.clone());
        let files = HuggingFaceFiles { vocabulary_name, vocabulary, config, special_tokens };
        self.check(&files)?;
        Ok(files)
    }

    fn json(&self, pipeline: &Pipeline) -> Result<Value, TokenizerError> {
        let Pipeline { normalizer, pre_tokenizer, model } = pipeline;
        let words = model.words();
        let merges: Option<Vec<[&str; 2]>> = model
            .ranked_merges()
            .iter()
            .map(|[left, right]| Some([*words.get(left)?, *words.get(right)?]))
            .collect();
        let merges = merges.ok_or_else(|| {
            TokenizerError::vocabulary("a merge of this tokenizer has a token without a spelling")
        })?;
        let vocab: Map<String, Value> =
            words.iter().map(|(&id, &word)| (word.to_owned(), id.into())).collect();
        let added = self.added_tokens.iter().map(|(id, token)| {
            let mut entry = properties(token);
            entry["id"] = (*id).into();
            entry
        });
        let pre_tokenizer = serde_json::to_value(pre_tokenizer).expect("texts and flags");
        let is_byte_level = pre_tokenizer.to_string().contains("\"ByteLevel\"");
        let settings = &model.settings;
        let spelled = json!({
            "type": "ByteLevel", "add_prefix_space": true, "trim_offsets": true, "use_regex": true,
        });
        let decoder = if is_byte_level {
            spelled.clone()
        } else {
            let mut stages = vec![
                json!({"type": "Replace", "pattern": {"String": "▁"}, "content": " "}),
                json!({"type": "Fuse"}),
            ];
            if settings.byte_fallback {
                stages.insert(1, json!({"type": "ByteFallback"}));
            }
            if self.ends.leading_space != LeadingSpace::Kept {
                stages.push(json!({"type": "Strip", "content": " ", "start": 1, "stop": 0}));
            }
            json!({"type": "Sequence", "decoders": stages})
        };
        Ok(json!({
            "version": "1.0",
            "truncation": null,
            "padding": null,
            "added_tokens": added.collect::<Vec<_>>(),
            "normalizer": normalizer,
            "pre_tokenizer": pre_tokenizer,
            "post_processor": self.around().or(is_byte_level.then_some(spelled)),
            "decoder": decoder,
            "model": {
                "type": "BPE",
                "dropout": null,
                "unk_token": settings.unk_token,
                "continuing_subword_prefix": null,
                "end_of_word_suffix": null,
                "fuse_unk": settings.fuse_unk,
                "byte_fallback": settings.byte_fallback,
                "ignore_merges": settings.ignore_merges,
                "vocab": vocab,
                "merges": merges,
            },
        }))
    }

    /// The stage that puts tokens around texts, if any are put there.
    fn around(&self) -> Option<Value> {
        let (prefix, suffix) = (&self.ends.prefix, &self.ends.suffix);
        if prefix.is_empty() && suffix.is_empty() {
            return None;
        }
        let name = |id: u32| self.name_of(id).unwrap_or_default();
        let sequence = |text: &str, segment: u32| -> Vec<Value> {
            let token = |&id: &u32| json!({"SpecialToken": {"id": name(id), "type_id": segment}});
            let text = json!({"Sequence": {"id": text, "type_id": segment}});
            let before = prefix.iter().map(token);
            before.chain([text]).chain(suffix.iter().map(token)).collect()
        };
        let special: Map<String, Value> = prefix
            .iter()
            .chain(suffix)
            .map(|&id| (name(id), json!({"id": name(id), "ids": [id], "tokens": [name(id)]})))
            .collect();
        let pair = [sequence("A", 0), sequence("B", 1)].concat();
        Some(json!({
            "type": "TemplateProcessing",
            "single": sequence("A", 0),
            "pair": pair,
            "special_tokens": special,
        }))
    }

    /// Reads the files again and compares what they give with this tokenizer.
    fn check(&self, files: &HuggingFaceFiles) -> Result<(), TokenizerError> {
        let config = serde_json::to_vec(&files.config).expect("texts and numbers");
        let config = TokenizerConfig::from_json(Some(&config), None)?;
        let read = match files.vocabulary_name {
            "tokenizer.json" => Tokenizer::from_json(&files.vocabulary, &config),
            _ => Tokenizer::from_sentencepiece(&files.vocabulary, &config),
        }?;
        let differs = |what: &str| {
            Err(TokenizerError::vocabulary(format!(
                "{} cannot hold this tokenizer: {what} would be lost",
                files.vocabulary_name
            )))
        };
        if read.ends != self.ends {
            return differs("what stands around texts");
        }
        let unlike = (0..read.vocab_size() as u32).find(|&id| {
            read.token_bytes(id).is_ok_and(|bytes| self.token_bytes(id) != Ok(bytes))
                || read.is_special(id) != self.is_special(id)
        });
        match unlike {
            Some(id) => differs(&format!("the text of token {id}")),
            None => Ok(()),
        }
    }
}

/// A token as `tokenizer.json` and `tokenizer_config.json` write it, without its id.
fn properties(token: &AddedToken) -> Value {
    json!({
        "content": token.content,
        "single_word": token.single_word,
        "lstrip": token.lstrip,
        "rstrip": token.rstrip,
        "normalized": token.normalized,
        "special": token.special,
    })
}
