//! What is asked of the engine and what it answers, in token ids.

use std::collections::BTreeSet;
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::generate::{FinishReason, TokenLogprobs};
use crate::grammar::Constraint;
use crate::sampler::SamplingParams;
use crate::speculation::Speculation;

/// A change to the logits of one request, made by code of your own before anything else looks at
/// them.
///
/// The engine may compute a position more than once, or after another one: what `process` does must
/// depend on its arguments alone, or the tokens depend on what else is running. A panic in `process`
/// ends its request with an error. Dropping it must not panic.
///
/// ```
/// use bitnet_inference::{GenerationParams, InferenceEngine};
///
/// // Closures are processors: this one allows no token twice in a row.
/// let mut engine = InferenceEngine::builder()
///     .logits_processor(|| {
///         |tokens: &[u32], _output_tokens: usize, logits: &mut [f32]| {
///             logits[tokens[tokens.len() - 1] as usize] = f32::NEG_INFINITY;
///         }
///     })
///     .build()?;
/// engine.load_model("tiny")?;
/// let tokens = engine.generate("Once upon a time", GenerationParams::default()).wait()?.tokens;
/// assert!(tokens.windows(2).all(|pair| pair[0] != pair[1]));
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
pub trait LogitsProcessor: Send {
    /// Changes `logits: [vocabulary]` of the token that follows `tokens`, of which the last
    /// `output_tokens` are output; where [`Overflow`] has dropped some, all that are left.
    fn process(&mut self, tokens: &[u32], output_tokens: usize, logits: &mut [f32]);
}

impl<F: FnMut(&[u32], usize, &mut [f32]) + Send> LogitsProcessor for F {
    fn process(&mut self, tokens: &[u32], output_tokens: usize, logits: &mut [f32]) {
        self(tokens, output_tokens, logits);
    }
}

/// What becomes of a conversation that has filled the model's context.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Overflow {
    /// It ends, as at the token limit, and a prompt that is longer is refused.
    #[default]
    Stop,
    /// The older half of it is dropped, but for its beginning, and it goes on: the tokens that follow
    /// are those of a request whose prompt is what was kept. What is kept is read anew at its new
    /// place. A prompt that is too long is shortened in the same way until it fits.
    ///
    /// Models were not trained on such a cut; a beginning that stays, such as the begin token and a
    /// system message, lets them bear it.
    DropOldest {
        /// Tokens that stay at the beginning, at most half of the context.
        keep_first: usize,
    },
}

impl Overflow {
    /// Tokens that stay at the beginning.
    pub(crate) fn keep_first(self) -> usize {
        match self {
            Overflow::Stop => 0,
            Overflow::DropOldest { keep_first } => keep_first,
        }
    }

    /// What is dropped of so many tokens, more than one of which come after those that stay.
    pub(crate) fn dropped(keep_first: usize, length: usize) -> Range<usize> {
        keep_first..keep_first + (length - keep_first).div_ceil(2)
    }
}

/// A prompt and what is to come of it. Without text there are no stop strings: whoever makes text of the
/// tokens looks for them.
pub struct Request {
    /// Token ids of the prompt, at least one.
    pub prompt: Vec<u32>,
    /// How each token is chosen.
    pub sampling: SamplingParams,
    /// Most tokens to generate.
    pub max_tokens: usize,
    /// Token ids that end the generation and are not part of it.
    pub end_ids: BTreeSet<u32>,
    /// What the output must be. [`Engine::submit`](crate::Engine::submit) compiles it, which takes
    /// about a millisecond and, for a large schema, up to seconds.
    ///
    /// ```
    /// use bitnet_inference::{
    ///     Constraint, EngineOptions, Event, Model, ModelOptions, Request, SamplingParams,
    /// };
    ///
    /// let model = Model::open("tiny", &ModelOptions::default())?;
    /// let engine = model.engine(EngineOptions::default())?;
    /// let mut request = Request::new(vec![1, 2, 3], SamplingParams::default(), 50);
    /// request.end_ids = model.description().end_ids.clone();
    /// request.constraint = Some(Constraint::Regex("(Tom|Lily) and (Max|Sue)".to_owned()));
    /// let mut stream = engine.submit(request)?;
    /// let mut tokens = Vec::new();
    /// while let Some(event) = stream.next() {
    ///     if let Event::Token(token) = event? {
    ///         tokens.push(token.id);
    ///     }
    /// }
    /// let text = model.tokenizer().decode(&tokens, true).unwrap();
    /// assert!(["Tom and Max", "Tom and Sue", "Lily and Max", "Lily and Sue"].contains(&&*text));
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub constraint: Option<Constraint>,
    /// Higher ones come first; 0 is ordinary.
    pub priority: i32,
    /// Whom the request is from: clients of the same priority get the same share of the engine.
    pub client: u64,
    /// When the answer is of no use any more.
    pub deadline: Option<Instant>,
    /// Applied to the logits in this order. Log-probabilities are those after them.
    pub processors: Vec<Box<dyn LogitsProcessor>>,
    /// Tokens that may wait to be read before the request pauses, at least 1. More than can come are
    /// as many as can come.
    pub buffer: usize,
    /// How the next tokens are guessed, which makes the request faster or slower and changes no
    /// token; `None`: not at all, as with a constraint.
    pub speculation: Option<Speculation>,
    /// What becomes of it when the model's context is full.
    pub overflow: Overflow,
    /// How long a reader that sleeps may be left asleep after a token, so that several come at once.
    pub max_latency: Duration,
}

impl Request {
    /// Tokens that may wait to be read, unless a request says otherwise.
    pub const DEFAULT_BUFFER: usize = 64;

    /// An ordinary request, which no token ends.
    pub fn new(prompt: Vec<u32>, sampling: SamplingParams, max_tokens: usize) -> Self {
        Request {
            prompt,
            sampling,
            max_tokens,
            end_ids: BTreeSet::new(),
            constraint: None,
            priority: 0,
            client: 0,
            deadline: None,
            processors: Vec::new(),
            buffer: Request::DEFAULT_BUFFER,
            speculation: None,
            overflow: Overflow::default(),
            max_latency: Duration::ZERO,
        }
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Request")
            .field("prompt", &self.prompt)
            .field("sampling", &self.sampling)
            .field("max_tokens", &self.max_tokens)
            .field("end_ids", &self.end_ids)
            .field("constraint", &self.constraint)
            .field("priority", &self.priority)
            .field("client", &self.client)
            .field("deadline", &self.deadline)
            .field("processors", &self.processors.len())
            .field("buffer", &self.buffer)
            .field("speculation", &self.speculation)
            .field("overflow", &self.overflow)
            .field("max_latency", &self.max_latency)
            .finish()
    }
}

/// A generated token.
#[derive(Debug, Clone, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// Its log-probability and those of the most probable ones, if asked for.
    pub logprobs: Option<TokenLogprobs>,
    /// When it was sampled.
    pub time: Instant,
}

/// What a finished request took.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Tokens of the prompt.
    pub prompt_tokens: usize,
    /// Of those, tokens whose keys and values were there already.
    pub reused_tokens: usize,
    /// Generated tokens, without an end token.
    pub output_tokens: usize,
    /// Tokens that speculation proposed.
    pub proposed_tokens: usize,
    /// Of those, tokens that came: the output took so many steps less.
    pub accepted_tokens: usize,
    /// Tokens of prompt and output that were dropped because the context was full: see [`Overflow`].
    pub dropped_tokens: usize,
}

/// The end of a request that went well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Finish {
    /// Why it ended.
    pub reason: FinishReason,
    /// What it took.
    pub usage: Usage,
}

/// Something that happened to a request.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// A token was generated.
    Token(Token),
    /// The request is finished; nothing comes after this.
    Finished(Finish),
}
