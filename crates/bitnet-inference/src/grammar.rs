//! Constrained output: which tokens may come next, so that the text follows a JSON schema, a regular
//! expression or a grammar.
//!
//! `llguidance` compiles a [`Constraint`] and walks the vocabulary, as a tree of bytes, along the
//! grammar. A `Grammar` is one output on its way: the tokens that may follow it, and whether it may
//! end. It knows no logits; the sampler is given the set.
//!
//! Constraints come from strangers. A text has a greatest length, and the limits of llguidance bound
//! the time and the memory of a compilation and of a mask, but for two things, which `check_schema`
//! refuses. Recursion is as deep as a text is long: hence the size of the stacks.

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread;

use bitnet_model::tokenizer::Tokenizer;
use llguidance::api::{ParserLimits, StopReason, TopLevelGrammar};
use llguidance::toktrie::{ApproximateTokEnv, INVALID_TOKEN, TokEnv, TokRxInfo, TokTrie};
use llguidance::{ParserFactory, TokenParser};
use serde_json::{Value, json};

/// What may stand between two parts of a JSON text.
const WHITE_SPACE: &str = r"[ \n\r\t]{1,24}";

/// Longest text of a constraint, in bytes.
const MOST_BYTES: usize = 64 << 10;

/// Stack of threads that compile and compute masks. Pages that are never touched cost nothing.
pub(crate) const STACK_BYTES: usize = 256 << 20;

/// Longest token that the tree of bytes has room for. Longer ones never come under a constraint.
const LONGEST_TOKEN: usize = 1000;

/// Most entries of `patternProperties` in a schema: each is compared with every other.
const MOST_PATTERNS: usize = 64;

/// Largest common multiple of all `multipleOf` in a schema, in units of their last decimal place: the
/// compiler visits as many states. Far above, its numbers would overflow.
const LARGEST_MULTIPLE: u64 = 10_000;

/// What an output must be.
///
/// While a request has one, only tokens that keep to it can be sampled, and the model's end tokens
/// only where the text is complete. When nothing but the end is possible, the output ends by itself
/// ([`FinishReason::Stop`](crate::FinishReason::Stop)). An output that the token limit or a stop string
/// cuts off may be incomplete.
///
/// ```
/// use bitnet_inference::{Constraint, GenerationParams, InferenceEngine};
///
/// let mut engine = InferenceEngine::new();
/// engine.load_model("tiny")?;
/// let schema = r#"{
///     "type": "object",
///     "properties": {"name": {"enum": ["Tom", "Lily"]}, "age": {"type": "integer", "maximum": 99}},
///     "required": ["name", "age"],
///     "additionalProperties": false,
///     "x-guidance": {"whitespace_flexible": false}
/// }"#;
/// let params = GenerationParams {
///     constraint: Some(Constraint::JsonSchema(schema.to_owned())),
///     ..GenerationParams::default()
/// };
/// let text = engine.generate("Once upon a time there was ", params).wait()?.text;
/// assert!(text.starts_with(r#"{"name":""#), "{text}");
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Constraint {
    /// Any JSON object.
    JsonObject,
    /// JSON that a schema describes. Keywords that cannot be kept are refused, those that JSON Schema
    /// does not know are ignored, as it says. `$ref` leads to places in the same schema. White space
    /// between two parts is up to the model, but no longer than 24 characters, because some would write
    /// nothing else for ever; `"x-guidance": {"whitespace_flexible": false}` in the schema forbids it.
    JsonSchema(String),
    /// A regular expression in the syntax of the `regex` crate, for the whole output; without
    /// look-around, anchors and back references.
    Regex(String),
    /// A grammar in llguidance's form of Lark, from its rule `start`.
    Lark(String),
}

impl Constraint {
    /// What it is called in an error.
    fn kind(&self) -> &'static str {
        match self {
            Constraint::JsonObject => "JSON object",
            Constraint::JsonSchema(_) => "JSON schema",
            Constraint::Regex(_) => "regular expression",
            Constraint::Lark(_) => "Lark grammar",
        }
    }

    /// The form in which llguidance takes it.
    fn to_llguidance(&self) -> Result<TopLevelGrammar, ConstraintError> {
        let kind = self.kind();
        let invalid = |reason: String| ConstraintError::Invalid { kind, reason };
        if let Constraint::JsonSchema(text) | Constraint::Regex(text) | Constraint::Lark(text) =
            self
            && text.len() > MOST_BYTES
        {
            return Err(ConstraintError::TooLong { kind, bytes: text.len(), limit: MOST_BYTES });
        }
        Ok(match self {
            Constraint::JsonObject => json_grammar(json!({"type": "object"})),
            Constraint::JsonSchema(text) => {
                let schema = serde_json::from_str(text)
                    .map_err(|error| invalid(format!("it is not JSON: {error}")))?;
                check_schema(&schema).map_err(invalid)?;
                json_grammar(schema)
            }
            Constraint::Regex(text) => TopLevelGrammar::from_regex(text),
            Constraint::Lark(text) => {
                for (place, keyword) in text.match_indices("%json") {
                    let rest = &text[place + keyword.len()..];
                    let mut values = serde_json::Deserializer::from_str(rest).into_iter();
                    // What is no JSON is the compiler's to refuse.
                    if let Some(Ok(schema)) = values.next() {
                        check_schema(&schema).map_err(invalid)?;
                    }
                }
                TopLevelGrammar::from_lark(text.clone())
            }
        })
    }
}

/// The grammar of a schema, with white space of bounded length where the schema does not say.
fn json_grammar(mut schema: Value) -> TopLevelGrammar {
    if let Some(schema) = schema.as_object_mut() {
        schema.entry("x-guidance").or_insert(json!({"whitespace_pattern": WHITE_SPACE}));
    }
    TopLevelGrammar::from_json_schema(schema)
}

/// Why a constraint cannot be kept.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// It is wrong, or asks for something that is not supported.
    #[error("the {kind} cannot be used: {reason}")]
    Invalid {
        /// What kind of constraint.
        kind: &'static str,
        /// What is wrong with it.
        reason: String,
    },
    /// Its text is longer than any may be.
    #[error("the {kind} has {bytes} bytes and may have {limit}: make it shorter")]
    TooLong {
        /// What kind of constraint.
        kind: &'static str,
        /// Its length.
        bytes: usize,
        /// The greatest length.
        limit: usize,
    },
    /// No text satisfies it, or none that the model's tokens can spell.
    #[error("nothing satisfies the {kind}: {reason}")]
    Unsatisfiable {
        /// What kind of constraint.
        kind: &'static str,
        /// Why.
        reason: String,
    },
    /// The grammar wants bytes that none of the model's tokens begin with.
    #[error("no token of the model continues the output as the {kind} wants it: change the {kind}")]
    DeadEnd {
        /// What kind of constraint.
        kind: &'static str,
    },
    /// The tokens that may come next cannot be found within the limits.
    #[error("the {kind} is too complex: {reason}; make it simpler")]
    TooComplex {
        /// What kind of constraint.
        kind: &'static str,
        /// Which limit.
        reason: String,
    },
    /// Something that must not happen, in the parser.
    #[error("the {kind} broke the parser of constraints: {reason}; say it in another way")]
    Broken {
        /// What kind of constraint.
        kind: &'static str,
        /// What the parser said.
        reason: String,
    },
    /// The model's vocabulary or this machine cannot have constraints at all.
    #[error("no output of this model can be constrained here: {reason}")]
    Unavailable {
        /// Why.
        reason: String,
    },
}

/// A model's tokens as constraints see them.
pub(crate) struct Vocabulary {
    /// `None` for random weights: their tokens stand for no text.
    tokenizer: Option<Arc<Tokenizer>>,
    /// Logits of the model, of which some may have no token.
    size: usize,
    /// Made for the first constraint.
    factory: OnceLock<Result<ParserFactory, ConstraintError>>,
}

impl Vocabulary {
    pub(crate) fn new(tokenizer: Arc<Tokenizer>, size: usize) -> Arc<Self> {
        Arc::new(Vocabulary { tokenizer: Some(tokenizer), size, factory: OnceLock::new() })
    }

    /// Tokens without text, of which nothing can be asked.
    pub(crate) fn without_text(size: usize) -> Arc<Self> {
        Arc::new(Vocabulary { tokenizer: None, size, factory: OnceLock::new() })
    }

    fn factory(&self) -> Result<&ParserFactory, ConstraintError> {
        let make = || {
            let unavailable = |reason: String| ConstraintError::Unavailable { reason };
            // The tree asserts that a vocabulary fits its numbers.
            catch_unwind(AssertUnwindSafe(|| self.make_factory()))
                .unwrap_or_else(|panic| Err(panic_message(&*panic)))
                .map_err(unavailable)
        };
        self.factory.get_or_init(make).as_ref().map_err(Clone::clone)
    }

    fn make_factory(&self) -> Result<ParserFactory, String> {
        let tokenizer = self.tokenizer.as_ref().ok_or("its tokens stand for no text")?;
        let size = u32::try_from(self.size).map_err(|error| error.to_string())?;
        let words: Vec<Vec<u8>> = (0..size).map(|id| word(tokenizer, id)).collect();
        // Without an end token of its own: `Grammar` has those of the request.
        let trie = TokTrie::from(&TokRxInfo::new(size, INVALID_TOKEN), &words);
        let environment: TokEnv = Arc::new(ApproximateTokEnv::new(trie));
        let mut factory =
            ParserFactory::new_simple(&environment).map_err(|error| error.to_string())?;
        *factory.quiet().limits_mut() = ParserLimits {
            // A state takes 1 to 2 kB.
            max_lexer_states: 50_000,
            verbose_errors: false,
            ..ParserLimits::default()
        };
        Ok(factory)
    }
}

/// The bytes by which grammars know a token; none for a token that can never come.
fn word(tokenizer: &Tokenizer, id: u32) -> Vec<u8> {
    let marker = TokTrie::SPECIAL_TOKEN_MARKER;
    let bytes = tokenizer.token_bytes(id).unwrap_or_default();
    match bytes {
        _ if bytes.len() > LONGEST_TOKEN => Vec::new(),
        // A special token is none of the characters of its name.
        _ if tokenizer.is_special(id) => [&[marker], bytes].concat(),
        // The marker is a byte that no UTF-8 text has.
        [first, ..] if *first == marker => Vec::new(),
        _ => bytes.to_vec(),
    }
}

/// A set of token ids.
#[derive(Debug, Clone, Default)]
pub(crate) struct TokenSet {
    /// A bit for each, in words of 32, the low bits first.
    words: Vec<u32>,
}

impl TokenSet {
    fn set(&mut self, id: u32, present: bool) {
        if let Some(word) = self.words.get_mut(id as usize / 32) {
            let bit = 1 << (id % 32);
            *word = if present { *word | bit } else { *word & !bit };
        }
    }

    fn is_empty(&self) -> bool {
        self.words.iter().all(|&word| word == 0)
    }

    /// The ids, ascending.
    pub(crate) fn ids(&self) -> impl Iterator<Item = u32> {
        (0..).zip(&self.words).flat_map(|(index, &word)| {
            let mut rest = word;
            std::iter::from_fn(move || {
                let bit = (rest != 0).then(|| rest.trailing_zeros())?;
                rest &= rest - 1;
                Some(32 * index + bit)
            })
        })
    }
}

/// One output on its way through a constraint.
pub(crate) struct Grammar {
    parser: Box<TokenParser>,
    kind: &'static str,
    end_ids: BTreeSet<u32>,
    allowed: TokenSet,
    complete: bool,
}

impl Grammar {
    /// Compiles a constraint for outputs that any of these ids ends, in a thread with a stack that is
    /// large enough, and finds the tokens that may come first.
    ///
    /// # Errors
    /// If the constraint is invalid, too large, or nothing satisfies it.
    pub(crate) fn new(
        vocabulary: &Vocabulary,
        constraint: &Constraint,
        end_ids: &BTreeSet<u32>,
    ) -> Result<Self, ConstraintError> {
        thread::scope(|scope| {
            let thread = thread::Builder::new().stack_size(STACK_BYTES);
            let compile = || Self::compile(vocabulary, constraint, end_ids);
            let unavailable = |reason| ConstraintError::Unavailable { reason };
            match thread.spawn_scoped(scope, compile) {
                Ok(compiling) => compiling
                    .join()
                    .unwrap_or_else(|panic| Err(unavailable(panic_message(&*panic)))),
                Err(error) => Err(unavailable(format!("its thread cannot be started: {error}"))),
            }
        })
    }

    fn compile(
        vocabulary: &Vocabulary,
        constraint: &Constraint,
        end_ids: &BTreeSet<u32>,
    ) -> Result<Self, ConstraintError> {
        let kind = constraint.kind();
        let top_level = constraint.to_llguidance()?;
        let mut parser = vocabulary.factory()?.create_parser(top_level).map_err(|error| {
            let reason = sentence(&error.to_string(), constraint);
            match reason.strip_prefix("Unsatisfiable schema: ") {
                Some(reason) => ConstraintError::Unsatisfiable { kind, reason: reason.to_owned() },
                None => ConstraintError::Invalid { kind, reason },
            }
        })?;
        parser.start_without_prompt();
        let (end_ids, allowed) = (end_ids.clone(), TokenSet::default());
        let parser = Box::new(parser);
        let mut grammar = Grammar { parser, kind, end_ids, allowed, complete: false };
        grammar.guarded(Self::look_ahead).map_err(|error| match error {
            ConstraintError::DeadEnd { kind } => {
                let reason = "no token of the model can begin it".to_owned();
                ConstraintError::Unsatisfiable { kind, reason }
            }
            other => other,
        })?;
        Ok(grammar)
    }

    /// The tokens that may come next, end tokens among them where the output may end.
    pub(crate) fn allowed(&self) -> &TokenSet {
        &self.allowed
    }

    /// Whether nothing can come but the end.
    pub(crate) fn is_complete(&self) -> bool {
        self.complete
    }

    /// Goes on by one of the allowed tokens that is no end token.
    ///
    /// # Errors
    /// If no token can come after it, or none can be found within the limits.
    pub(crate) fn advance(&mut self, token: u32) -> Result<(), ConstraintError> {
        self.guarded(|grammar| {
            grammar.parser.consume_token(token).map_err(|error| grammar.too_complex(&error))?;
            grammar.look_ahead()
        })
    }

    /// A parser that panics is an error like others.
    fn guarded(
        &mut self,
        step: impl FnOnce(&mut Self) -> Result<(), ConstraintError>,
    ) -> Result<(), ConstraintError> {
        catch_unwind(AssertUnwindSafe(|| step(self))).unwrap_or_else(|panic| {
            Err(ConstraintError::Broken { kind: self.kind, reason: panic_message(&*panic) })
        })
    }

    fn look_ahead(&mut self) -> Result<(), ConstraintError> {
        self.complete = self.parser.check_stop().map_err(|error| self.too_complex(&error))?;
        if self.complete {
            self.allowed = TokenSet::default();
            return Ok(());
        }
        if self.parser.temperature().is_some() {
            let reason = "it sets a temperature: set that of the request".to_owned();
            return Err(ConstraintError::Invalid { kind: self.kind, reason });
        }
        let may_end = self.parser.is_accepting();
        self.allowed = match self.parser.compute_mask() {
            Ok(mask) => TokenSet { words: mask.into() },
            Err(_) if self.parser.stop_reason() == StopReason::NoExtensionBias => {
                TokenSet::default()
            }
            Err(error) => return Err(self.too_complex(&error)),
        };
        // Wherever a grammar has the text of an end token, that token would end the output.
        self.end_ids.iter().for_each(|&id| self.allowed.set(id, false));
        if self.allowed.is_empty() {
            self.complete = may_end;
            return if may_end {
                Ok(())
            } else {
                Err(ConstraintError::DeadEnd { kind: self.kind })
            };
        }
        self.end_ids.iter().for_each(|&id| self.allowed.set(id, may_end));
        Ok(())
    }

    fn too_complex(&self, error: &dyn ToString) -> ConstraintError {
        let reason = first_line(&error.to_string()).to_owned();
        ConstraintError::TooComplex { kind: self.kind, reason }
    }
}

/// What a panic said.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().copied();
    let text = text.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
    text.unwrap_or("without a message").to_owned()
}

fn first_line(text: &str) -> &str {
    text.trim().lines().next().unwrap_or_default()
}

/// What the compiler said, without the source that it shows: of a regular expression the part behind
/// `error: `, which is the reason, and of a Lark grammar with the place.
fn sentence(message: &str, constraint: &Constraint) -> String {
    const LONGEST: usize = 300;
    let reason = message.lines().find_map(|line| line.strip_prefix("error: "));
    // Places look like `at 3(14): ` or `3(14): `.
    let line = first_line(message);
    let place =
        line.strip_prefix("at ").unwrap_or(line).split_once("): ").and_then(|(at, rest)| {
            let (row, column) = at.split_once('(')?;
            let numbers = row.parse::<usize>().is_ok() && column.parse::<usize>().is_ok();
            numbers.then(|| (format!("line {row}, column {column}: "), rest))
        });
    let mut sentence = match (place, constraint) {
        (Some((place, rest)), Constraint::Lark(_)) => place + reason.unwrap_or(rest),
        (Some((_, rest)), _) => reason.unwrap_or(rest).to_owned(),
        (None, _) => reason.unwrap_or(line).to_owned(),
    };
    if let Some((end, _)) = sentence.char_indices().nth(LONGEST) {
        sentence.truncate(end);
        sentence.push('…');
    }
    sentence
}

/// Refuses what the compiler of schemas spends unbounded time and memory on.
fn check_schema(schema: &Value) -> Result<(), String> {
    let mut patterns = 0;
    let mut multiples = Vec::new();
    let mut rest = vec![schema];
    while let Some(value) = rest.pop() {
        match value {
            Value::Array(values) => rest.extend(values),
            Value::Object(entries) => {
                if let Some(Value::Object(entries)) = entries.get("patternProperties") {
                    patterns += entries.len();
                }
                if let Some(Value::Number(number)) = entries.get("multipleOf") {
                    multiples.push(number.to_string());
                }
                rest.extend(entries.values());
            }
            _ => {}
        }
    }
    if patterns > MOST_PATTERNS {
        return Err(format!(
            "its patternProperties have {patterns} entries and may have {MOST_PATTERNS}"
        ));
    }
    match common_multiple(&multiples) {
        Some(multiple) if multiple <= LARGEST_MULTIPLE => Ok(()),
        _ => Err(format!(
            "its multipleOf {} have a common multiple above {LARGEST_MULTIPLE} of their last decimal \
             place",
            multiples.join(", ")
        )),
    }
}

/// The least common multiple of decimal numbers in units of their last decimal place, at least one
/// whole; `None` if it is not to be had.
fn common_multiple(numbers: &[String]) -> Option<u64> {
    let decimals = numbers.iter().map(|number| decimal(number));
    let decimals = decimals.collect::<Option<Vec<(u64, u32)>>>()?;
    let places = decimals.iter().map(|(_, places)| *places).max().unwrap_or(0);
    let one = 10u64.checked_pow(places)?;
    decimals
        .into_iter()
        .try_fold(1, |multiple: u64, (digits, own)| {
            let number = digits.checked_mul(10u64.pow(places - own))?;
            let (mut a, mut b) = (multiple, number);
            while b != 0 {
                (a, b) = (b, a % b);
            }
            multiple.checked_mul(number / a)
        })?
        .max(one)
        .into()
}

/// A positive number as digits and how many of them are decimal places.
fn decimal(text: &str) -> Option<(u64, u32)> {
    let (mantissa, exponent) = text.split_once(['e', 'E']).unwrap_or((text, "0"));
    let (whole, fraction) = mantissa.split_once('.').unwrap_or((mantissa, ""));
    let mut digits = format!("{whole}{fraction}").parse::<u64>().ok()?;
    let mut places = i32::try_from(fraction.len()).ok()? - exponent.parse::<i32>().ok()?;
    while places > 0 && digits % 10 == 0 && digits > 0 {
        (digits, places) = (digits / 10, places - 1);
    }
    if places < 0 {
        digits = digits.checked_mul(10u64.checked_pow(places.unsigned_abs())?)?;
    }
    (digits > 0).then_some((digits, places.max(0).unsigned_abs()))
}

#[cfg(test)]
pub(crate) mod tests;
