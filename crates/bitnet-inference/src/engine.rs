//! The step loop: many requests on one model.
//!
//! One thread owns the decoder's workspace, the KV store and the scheduler. It takes in what was
//! submitted, puts a step together, lets those propose tokens that speculate, runs the decoder once
//! over all sequences of the step, samples a token for each that has computed all of its own (and
//! for as many more as were proposed right), and sends it. It awaits nothing and takes no
//! lock but those by which the kernels' threads share an operation. Between two admissions it
//! allocates nothing: room for tokens, block tables and events is made when a request comes in. What a
//! constraint allows is found by a thread of its own (`masks.rs`), whose messages allocate.
//!
//! A token is the one that [`generate`](crate::generate()) would give. Each row of a step depends on its own
//! sequence alone, and random numbers on the seed and the position in the output.

use std::collections::BTreeSet;
use std::iter::{self, Sum};
use std::mem;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, Thread};
use std::time::{Duration, Instant};

use bitnet_core::backend::{KvLayout, KvType};
use bitnet_core::{Error as CoreError, Shortcuts};

use crate::conversation::{self, ConversationError, Expected};
use crate::error::Error;
use crate::generate::{FinishReason, TokenLogprobs};
use crate::grammar::{Constraint, ConstraintError, Grammar, Vocabulary, panic_message};
use crate::kv_cache::{BlockTable, KvCache, KvStatistics};
use crate::masks::{Guide, MaskWorker};
use crate::request::{Event, Finish, LogitsProcessor, Overflow, Request, Token, Usage};
use crate::runner::{Part, Room, Runner};
use crate::sampler::{
    Candidate, Candidates, InvalidParameter, SampleError, Sampled, Sampler, SamplingParams,
    Selection,
};
use crate::scheduler::{
    Limits, Place, Places, Scheduler, SchedulerPolicy, Sequence, Standing, Work,
};
use crate::session::{AnyDecoder, DEFAULT_CHUNK, check_tokens};
use crate::speculation::draft::{Draft, DraftTable};
use crate::speculation::{Proposer, Source, Speculating, Speculation};
use crate::step_time::PromptShare;
use crate::stream::{EventSender, TokenStream};
use crate::telemetry::{self, Outcome, RequestMetrics, RequestTelemetry, StepMetrics};

/// How an engine is set up. None of these changes a token, but the KV type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Step loops, each with the model's number of threads, and keys and values of its own. They
    /// share the weights. A request goes to the one that has the fewest.
    pub replicas: usize,
    /// Sequences that run at once on each replica.
    pub max_sequences: usize,
    /// Most tokens per step, or one for each sequence if that is more.
    pub step_tokens: usize,
    /// Requests that may wait, at all replicas together, besides those that run.
    pub queue: usize,
    /// Most bytes of keys and values, those of a draft model included, of which each replica has an
    /// equal part. Storage that was never used takes none.
    pub kv_bytes: u64,
    /// Storage of keys and values.
    pub kv_type: KvType,
    /// Tokens per KV block: prefixes are shared in whole blocks.
    pub block_tokens: usize,
    /// Who comes first among waiting requests of the same priority.
    pub policy: SchedulerPolicy,
    /// How long a step is to take in which prompts are read while others write; the tokens that prompts
    /// get follow from what steps have taken. `None`: they get what is left of `step_tokens`.
    pub target_step_time: Option<Duration>,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            replicas: 1,
            max_sequences: 16,
            step_tokens: DEFAULT_CHUNK,
            queue: 256,
            kv_bytes: 2_000_000_000,
            kv_type: KvType::F32,
            block_tokens: 16,
            policy: SchedulerPolicy::default(),
            target_step_time: None,
        }
    }
}

impl EngineOptions {
    /// Refuses numbers that no engine can have. Room is made for all of them at the start, and each
    /// step looks at every place, so that a slip of a few digits must not take all memory and time.
    pub(crate) fn validate(&self) -> Result<(), InvalidParameter> {
        for (name, value, possible, allowed) in [
            ("the number of replicas", self.replicas, 1..=64, "1 to 64"),
            ("the number of requests that run at once", self.max_sequences, 1..=4096, "1 to 4096"),
            ("the number of tokens per step", self.step_tokens, 1..=65_536, "1 to 65536"),
            ("the number of requests that may wait", self.queue, 0..=10_000, "0 to 10000"),
            ("the number of tokens per KV block", self.block_tokens, 1..=4096, "1 to 4096"),
        ] {
            if !possible.contains(&value) {
                return Err(InvalidParameter { name, value: value.to_string(), allowed });
            }
        }
        Ok(())
    }
}

/// What an engine has done and what it is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct EngineStatistics {
    /// Sequences that take part in steps.
    pub running: usize,
    /// Sequences that wait for a place or for blocks.
    pub waiting: usize,
    /// Steps since the start.
    pub steps: u64,
    /// Tokens computed in these steps, proposed ones included.
    pub computed_tokens: u64,
    /// Of those, tokens of prompts, and of outputs that were computed anew.
    pub prefill_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// Tokens that speculation proposed.
    pub proposed_tokens: u64,
    /// Of those, tokens that came.
    pub accepted_tokens: u64,
    /// How often a sequence gave up its blocks, to be computed anew.
    pub preemptions: u64,
    /// The KV blocks.
    pub kv: KvStatistics,
    /// Those of the draft model; all zero without one.
    pub draft_kv: KvStatistics,
}

impl Sum for EngineStatistics {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(EngineStatistics::default(), |sum, more| EngineStatistics {
            running: sum.running + more.running,
            waiting: sum.waiting + more.waiting,
            steps: sum.steps + more.steps,
            computed_tokens: sum.computed_tokens + more.computed_tokens,
            prefill_tokens: sum.prefill_tokens + more.prefill_tokens,
            output_tokens: sum.output_tokens + more.output_tokens,
            preemptions: sum.preemptions + more.preemptions,
            kv: [sum.kv, more.kv].into_iter().sum(),
            draft_kv: [sum.draft_kv, more.draft_kv].into_iter().sum(),
            proposed_tokens: sum.proposed_tokens + more.proposed_tokens,
            accepted_tokens: sum.accepted_tokens + more.accepted_tokens,
        })
    }
}

/// Runs requests on one model. Clones share the same engine; its threads end with the last of them
/// and of their streams. The last clone waits for them if no stream is left; a stream never does.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

struct Handle {
    replicas: Vec<Replica>,
    places: Arc<Places>,
    /// Length of the context and size of the vocabulary.
    limits: (usize, usize),
    /// Tokens whose keys and values fit the budget of one replica.
    kv_tokens: usize,
    /// The keys and values.
    layout: KvLayout,
    /// Whether they are found again.
    prefixes: bool,
    model: Box<dyn AnyDecoder>,
    /// What tells the model from others, once somebody needs it.
    fingerprint: OnceLock<[u8; 32]>,
    /// Length of the draft model's context, if there is one.
    draft_context: Option<usize>,
    /// Whether requests get the speculation that they ask for.
    speculation: bool,
    vocabulary: Arc<Vocabulary>,
    metrics: Arc<RequestMetrics>,
}

/// One of the engine's step loops.
struct Replica {
    /// `None` once the engine is gone.
    link: Option<Arc<Link>>,
    thread: JoinHandle<()>,
}

/// What keeps a step loop running: the engine has one of it, and so has each stream. When the last is
/// dropped, the thread ends by itself.
pub(crate) struct Link {
    /// `None` once the thread is to end.
    mailbox: Option<Sender<Message>>,
    thread: Thread,
}

impl Link {
    /// Lets the step loop look for something to do.
    pub(crate) fn wake(&self) {
        self.thread.unpark();
    }
}

#[cfg(test)]
impl Link {
    /// For a stream without an engine.
    pub(crate) fn to_nobody() -> Arc<Self> {
        Arc::new(Link { mailbox: None, thread: thread::current() })
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.mailbox = None;
        self.wake();
    }
}

enum Message {
    Submit(Box<Submission>),
    Statistics(Sender<EngineStatistics>),
    /// Wants the blocks that hold the beginning of these tokens; with `grow`, blocks for the rest as
    /// well, or none.
    Hold {
        tokens: Arc<[u32]>,
        grow: bool,
        answer: Sender<BlockTable>,
    },
    /// Wants the contents of blocks.
    Export {
        blocks: Vec<u32>,
        answer: Sender<Result<Vec<u8>, CoreError>>,
    },
    /// Gives blocks their contents.
    Import {
        blocks: Vec<u32>,
        data: Arc<[u8]>,
        answer: Sender<Result<(), CoreError>>,
    },
    /// Gives blocks back, of which those of these tokens can be found from now on.
    Release {
        table: BlockTable,
        tokens: Arc<[u32]>,
    },
}

/// Bytes of keys and values that go to or from a replica between two of its steps.
const PIECE: usize = 4 << 20;

/// Blocks of a replica that are kept for whoever saves or restores.
struct Held<'a> {
    engine: &'a Engine,
    replica: usize,
    table: BlockTable,
}

impl Held<'_> {
    fn blocks(&self) -> &[u32] {
        self.table.blocks()
    }

    /// Gives the blocks back, with those of `tokens` as ones that can be found.
    fn release(&mut self, tokens: Arc<[u32]>) -> Result<(), Error> {
        let table = mem::take(&mut self.table);
        self.engine.send(self.replica, Message::Release { table, tokens })
    }
}

impl Drop for Held<'_> {
    fn drop(&mut self) {
        if !self.blocks().is_empty() {
            // With the thread, its blocks are gone.
            let _ = self.release(Arc::default());
        }
    }
}

/// A request on its way to the engine's thread.
struct Submission {
    active: Active,
    tokens: Vec<u32>,
    most_tokens: usize,
    standing: Standing,
}

/// What the step loop needs of a request.
pub(crate) struct Active {
    sampler: Sampler,
    processors: Vec<Box<dyn LogitsProcessor>>,
    /// Where its constraint stands, if it has one.
    guide: Option<Guide>,
    end_ids: BTreeSet<u32>,
    prompt_tokens: usize,
    /// Tokens of prompt and output that were dropped because the context was full.
    dropped_tokens: usize,
    most_output_tokens: usize,
    /// Tokens that stay when the context is full, and its length.
    context: (usize, usize),
    pub(crate) speculating: Option<Speculating>,
    // Whoever hears of the end finds it counted.
    telemetry: RequestTelemetry,
    /// Dropped before `events`, whose end says that the place is free.
    place: Place,
    events: EventSender,
}

impl Active {
    fn output_tokens(&self, tokens: &[u32]) -> usize {
        tokens.len() + self.dropped_tokens - self.prompt_tokens
    }

    /// What it needs of the logits after each of the last `positions` tokens of `tokens`, if not all.
    pub(crate) fn selection(&mut self, positions: usize, tokens: &[u32]) -> Option<Selection<'_>> {
        let position = self.output_tokens(tokens) as u64;
        let needs_all = !self.processors.is_empty() || self.guide.is_some();
        if needs_all { None } else { self.sampler.selection_of(positions, tokens, position) }
    }

    /// Whether it has all its tokens and waits for its grammar, which knows how it ends.
    fn has_all_tokens(&self, tokens: &[u32]) -> bool {
        self.output_tokens(tokens) == self.most_output_tokens
    }

    /// Whether and how its grammar ends it; nothing is known while this is with the worker.
    fn end(&self, tokens: &[u32]) -> Option<Result<FinishReason, Error>> {
        match self.guide.as_ref()?.grammar()? {
            Err(error) => Some(Err(error.clone().into())),
            Ok(grammar) if grammar.is_complete() => Some(Ok(FinishReason::Stop)),
            Ok(_) => self.has_all_tokens(tokens).then_some(Ok(FinishReason::Length)),
        }
    }

    /// How many tokens to propose after `tokens`: they and the one after them must find room in the
    /// ring.
    fn wish(&mut self, tokens: &[u32]) -> usize {
        let output_tokens = self.output_tokens(tokens);
        let room = self.events.room().saturating_sub(1);
        self.speculating.as_mut().map_or(0, |guesses| guesses.wish(tokens, output_tokens, room))
    }

    /// The keys and values of the draft model, if that is who guesses.
    pub(crate) fn draft_table(&mut self) -> Option<&mut DraftTable> {
        match &mut self.speculating.as_mut()?.source {
            Source::Draft(table) => Some(table),
            Source::Lookup(_) => None,
        }
    }

    /// Gives back the KV blocks of the draft model.
    fn release_draft(&mut self, cache: &mut Option<KvCache>) {
        if let (Some(table), Some(cache)) = (self.draft_table(), cache) {
            table.release(cache);
        }
    }

    /// The token after `tokens` by the logits of another model. Processors are not asked.
    fn guess(&mut self, tokens: &[u32], logits: Logits<'_>) -> Result<u32, SampleError> {
        let position = self.output_tokens(tokens) as u64;
        match logits {
            Logits::Some(candidates) => {
                let sampled = self.sampler.sample_candidates(candidates, tokens, position)?;
                Ok(sampled.token)
            }
            Logits::All(logits) => self.sampler.choose(logits, tokens, position),
        }
    }

    /// The token after `tokens`, from some logits or from all of them.
    fn sample(&mut self, tokens: &[u32], logits: Logits<'_>) -> Result<Sampled, Error> {
        let output_tokens = self.output_tokens(tokens);
        let position = output_tokens as u64;
        let Active { sampler, processors, guide, .. } = self;
        match logits {
            Logits::Some(candidates) => {
                Ok(sampler.sample_candidates(candidates, tokens, position)?)
            }
            Logits::All(logits) => {
                // A processor that breaks breaks its own request: nothing else sees what it leaves.
                catch_unwind(AssertUnwindSafe(|| {
                    for processor in processors {
                        processor.process(tokens, output_tokens, logits);
                    }
                }))
                .map_err(|panic| Error::ProcessorPanicked { message: panic_message(&*panic) })?;
                // After the processors, which so cannot bring back what may not come.
                Ok(match guide.as_ref().and_then(Guide::grammar).transpose() {
                    Ok(Some(grammar)) => {
                        sampler.sample_among(logits, grammar.allowed().ids(), tokens, position)?
                    }
                    Ok(None) => sampler.sample(logits, tokens, position)?,
                    Err(error) => return Err(error.clone().into()),
                })
            }
        }
    }
}

/// What a token is sampled from.
pub(crate) enum Logits<'a> {
    Some(&'a [Candidate]),
    All(&'a mut [f32]),
}

impl Engine {
    /// Starts an engine on threads of its own, with a draft model of the same vocabulary, if any.
    /// Of the shortcuts, it takes `prefix` and `speculation`.
    pub(crate) fn start(
        model: &dyn AnyDecoder,
        draft: Option<&dyn AnyDecoder>,
        options: EngineOptions,
        shortcuts: Shortcuts,
        vocabulary: Arc<Vocabulary>,
    ) -> Result<Self, Error> {
        options.validate()?;
        let EngineOptions { replicas, max_sequences, block_tokens, .. } = options;
        let step_tokens = options.step_tokens.max(max_sequences);
        let context_length = model.config().context_length;
        let draft_context = draft.map(|draft| draft.config().context_length);
        let draft = draft.filter(|_| shortcuts.speculation);
        let layout =
            |model: &dyn AnyDecoder| model.config().kv_layout(options.kv_type, block_tokens);
        // The stores have the same number of blocks, so that each token has a place in both.
        let models = iter::once(model).chain(draft);
        let block_bytes: u64 = models.map(|model| layout(model).block_bytes() as u64).sum();
        // More than all running sequences can ever fill would only be a larger memory of prefixes.
        let useful = max_sequences * context_length.div_ceil(block_tokens);
        let affordable = options.kv_bytes / replicas as u64 / block_bytes;
        let blocks = usize::try_from(affordable).unwrap_or(usize::MAX).min(useful);
        let places = replicas * max_sequences + options.queue;
        let vocab_size = model.vocab_size();

        let mut handle = Handle {
            replicas: Vec::with_capacity(replicas),
            places: Places::new(places, replicas),
            limits: (context_length, vocab_size),
            kv_tokens: blocks * block_tokens,
            layout: layout(model),
            prefixes: shortcuts.prefix,
            model: model.share(),
            fingerprint: OnceLock::new(),
            draft_context,
            speculation: shortcuts.speculation,
            vocabulary,
            metrics: RequestMetrics::register(),
        };
        let cache = || KvCache::new(block_tokens, blocks, shortcuts.prefix);
        for replica in 0..replicas {
            let runner = |model: &dyn AnyDecoder| {
                let layout = layout(model);
                let room = Room { layout, blocks, tokens: step_tokens, sequences: max_sequences };
                model.runner(room, replica)
            };
            let (mailbox, inbox) = channel();
            let step_loop = StepLoop {
                inbox,
                runner: runner(model)?,
                draft: match draft {
                    Some(draft) => Some(Draft::new(runner(draft)?, step_tokens, max_sequences)),
                    None => None,
                },
                metrics: StepMetrics::register(),
                prompt_share: options
                    .target_step_time
                    .map(|target| PromptShare::new(target, step_tokens)),
                requests: Requests {
                    scheduler: Scheduler::new(
                        cache(),
                        Limits { max_sequences, step_tokens },
                        options.policy,
                        places,
                    ),
                    draft_cache: draft.map(|_| cache()),
                    statistics: EngineStatistics::default(),
                    masks: MaskWorker::default(),
                    guided: Vec::with_capacity(places),
                    candidates: Candidates::with_capacity(vocab_size),
                },
            };
            let thread = thread::Builder::new()
                .name("bitnet-engine".to_owned())
                .spawn(move || step_loop.run())
                .map_err(|error| Error::EngineStopped {
                    reason: format!("its thread cannot be started: {error}"),
                })?;
            let link = Link { mailbox: Some(mailbox), thread: thread.thread().clone() };
            handle.replicas.push(Replica { link: Some(Arc::new(link)), thread });
        }
        Ok(Engine { handle: Arc::new(handle) })
    }

    /// Submits a request. Its tokens are the same whatever else is running.
    ///
    /// # Errors
    /// If the prompt is empty, longer than the context or has an unknown id; a parameter has a
    /// value that it cannot have; the KV cache could not hold the request even alone; it asks for
    /// the guesses of a draft model that is not there; there are too many requests; the constraint
    /// cannot be kept; or the engine has stopped.
    pub fn submit(&self, request: Request) -> Result<TokenStream, Error> {
        self.submit_compiled(request, |constraint, end_ids| {
            Grammar::new(&self.handle.vocabulary, constraint, end_ids)
        })
    }

    /// Submits a request whose constraint, if it has one, is compiled in this way.
    fn submit_compiled(
        &self,
        request: Request,
        compile: impl FnOnce(&Constraint, &BTreeSet<u32>) -> Result<Grammar, ConstraintError>,
    ) -> Result<TokenStream, Error> {
        self.accept(request, compile).inspect_err(|error| self.handle.metrics.rejected(error))
    }

    fn accept(
        &self,
        request: Request,
        compile: impl FnOnce(&Constraint, &BTreeSet<u32>) -> Result<Grammar, ConstraintError>,
    ) -> Result<TokenStream, Error> {
        let submitted = Instant::now();
        let Request { mut prompt, sampling, max_tokens, end_ids, constraint, .. } = request;
        let Request { priority, client, deadline, processors, buffer, .. } = request;
        let Request { overflow, max_latency, .. } = request;
        let (context_length, _) = self.handle.limits;
        let prompt_tokens = prompt.len();
        let keep_first = overflow.keep_first();
        if keep_first > context_length / 2 {
            return Err(InvalidParameter {
                name: "the number of tokens that stay when the context is full",
                value: keep_first.to_string(),
                allowed: "at most half of the context",
            }
            .into());
        }
        // The last token of an output is never computed.
        let mut most_output_tokens = max_tokens;
        if overflow == Overflow::Stop {
            let left = (context_length + 1).saturating_sub(prompt.len());
            most_output_tokens = max_tokens.min(left);
        } else {
            while prompt.len() > context_length {
                prompt.drain(Overflow::dropped(keep_first, prompt.len()));
            }
        }
        check_tokens(&prompt, 0, self.handle.limits)?;
        let dropped_tokens = prompt_tokens - prompt.len();
        let mut sampler = Sampler::new(&sampling)?;
        let most_tokens = prompt.len().saturating_add(most_output_tokens.saturating_sub(1));
        let most_tokens = most_tokens.min(context_length);
        // Nobody needs room for more than fits the context.
        let buffer = buffer.min(most_output_tokens).min(context_length + 1);
        if most_tokens > self.handle.kv_tokens {
            return Err(Error::KvBudget { needed: most_tokens, room: self.handle.kv_tokens });
        }
        let speculating = match request.speculation {
            Some(speculation) => self.speculating(speculation, most_tokens)?,
            None => None,
        };
        // What may follow a guess is known only once its grammar has taken it in.
        let speculating = speculating.filter(|_| constraint.is_none());
        let proposals = request.speculation.map_or(0, |speculation| speculation.tokens);
        sampler.reserve(most_tokens, 1 + proposals);
        let ended = |replica: usize| self.handle.replicas[replica].thread.is_finished();
        let place = self.handle.places.enter(ended)?;
        let replica = place.replica();
        let guide = match &constraint {
            Some(constraint) => Some(Guide::new(compile(constraint, &end_ids)?)),
            None => None,
        };
        let (mut events, stream) =
            TokenStream::new(Arc::clone(self.link(replica)), replica, buffer, max_latency);
        let telemetry = RequestTelemetry::new(&self.handle.metrics, submitted, prompt_tokens);
        if most_output_tokens == 0 {
            telemetry.end(Outcome::Finished(FinishReason::Length));
            let usage = Usage { prompt_tokens, dropped_tokens, ..Usage::default() };
            events.send(Ok(Event::Finished(Finish { reason: FinishReason::Length, usage })));
            return Ok(stream);
        }
        let active = Active {
            sampler,
            processors,
            guide,
            end_ids,
            prompt_tokens,
            dropped_tokens,
            most_output_tokens,
            context: (keep_first, context_length),
            speculating,
            telemetry,
            place,
            events,
        };
        let standing = Standing { priority, client, deadline };
        let submission = Submission { active, tokens: prompt, most_tokens, standing };
        self.send(replica, Message::Submit(Box::new(submission)))?;
        Ok(stream)
    }

    /// The guesses for a request of which up to `most_tokens` are computed; none where the shortcut
    /// is off.
    fn speculating(
        &self,
        speculation: Speculation,
        most_tokens: usize,
    ) -> Result<Option<Speculating>, Error> {
        let Handle { layout, draft_context, speculation: on, .. } = *self.handle;
        speculation.validate()?;
        let most_tokens = match speculation.proposer {
            Proposer::PromptLookup => most_tokens,
            // The draft model does not read the last token that it guesses.
            Proposer::DraftModel => most_tokens.min(draft_context.ok_or(Error::NoDraftModel)? + 1),
        };
        Ok(on.then(|| Speculating::new(speculation, most_tokens, layout.block_tokens)))
    }

    /// Writes the conversation of `tokens` to a file, with the keys and values of its whole blocks, so
    /// that [`restore`](Engine::restore) can bring them back. What is not there of them is computed
    /// first, and the last token in any case. Waits; requests go on meanwhile.
    ///
    /// The file appears under its name when all of it is written. The keys and values of a draft model
    /// are not in it.
    ///
    /// # Errors
    /// As [`submit`](Engine::submit) for a request of one token after `tokens`, and
    /// [`Error::Conversation`] if the file cannot be written, the engine does not use prefixes
    /// again, or others need the blocks at the same time.
    ///
    /// ```
    /// use bitnet_inference::{EngineOptions, Model, ModelOptions};
    ///
    /// let model = Model::open("tiny", &ModelOptions::default())?;
    /// let folder = tempfile::tempdir().expect("a folder");
    /// let path = folder.path().join("story.kv");
    /// let tokens: Vec<u32> = (1..100).collect();
    /// model.engine(EngineOptions::default())?.save(&tokens, &path)?;
    /// // Another engine, perhaps on another day.
    /// assert_eq!(model.engine(EngineOptions::default())?.restore(&path)?, tokens);
    /// # Ok::<(), bitnet_inference::Error>(())
    /// ```
    pub fn save(&self, tokens: &[u32], path: impl AsRef<Path>) -> Result<(), Error> {
        let path = path.as_ref();
        let failed = |reason: ConversationError| reason.at(path);
        let Handle { layout, prefixes, .. } = *self.handle;
        if !prefixes {
            return Err(failed(ConversationError::NoPrefixes));
        }
        let request = Request::new(tokens.to_vec(), SamplingParams::default(), 1);
        let mut stream = self.submit(request)?;
        while let Some(event) = stream.next() {
            event?;
        }
        let held = self.hold(stream.replica(), tokens.into(), false)?;
        if held.blocks().len() < tokens.len() / layout.block_tokens {
            return Err(failed(ConversationError::Displaced));
        }
        let expected = self.expected()?;
        let mut file = conversation::Writer::create(path, &expected, tokens).map_err(failed)?;
        for blocks in held.blocks().chunks((PIECE / layout.block_bytes()).max(1)) {
            let blocks = blocks.to_vec();
            let data = self.ask(held.replica, |answer| Message::Export { blocks, answer })??;
            file.write(&data).map_err(failed)?;
        }
        file.finish().map_err(failed)
    }

    /// Reads a file that [`save`](Engine::save) wrote and returns the tokens of its conversation. A
    /// request whose prompt begins with them starts with the keys and values of the file, and gives the
    /// tokens that it gives without, as long as no other request needs the room. Every replica gets
    /// them. Waits; requests go on meanwhile.
    ///
    /// A checksum tells damage, not malice: restore only what you would trust as a model.
    ///
    /// # Errors
    /// [`Error::Conversation`] if the file cannot be read, is damaged, was saved with another model,
    /// another type of keys and values or blocks of another size, or finds no room; and if the engine
    /// has stopped. Then nothing is restored.
    pub fn restore(&self, path: impl AsRef<Path>) -> Result<Vec<u32>, Error> {
        let path = path.as_ref();
        let failed = |reason: ConversationError| reason.at(path);
        let Handle { layout, prefixes, limits, ref replicas, .. } = *self.handle;
        if !prefixes {
            return Err(failed(ConversationError::NoPrefixes));
        }
        let mut file = conversation::Reader::open(path, &self.expected()?).map_err(failed)?;
        if !file.tokens.is_empty() {
            check_tokens(&file.tokens, 0, limits)?;
        }
        let needed = file.tokens.len() / layout.block_tokens;
        let tokens: Arc<[u32]> = file.tokens[..needed * layout.block_tokens].into();
        let mut held = Vec::with_capacity(replicas.len());
        for replica in 0..replicas.len() {
            held.push(self.hold(replica, Arc::clone(&tokens), true)?);
        }
        if held.iter().any(|held| held.blocks().len() < needed) {
            return Err(failed(ConversationError::NoRoom { needed }));
        }
        let piece = (PIECE / layout.block_bytes()).max(1);
        for start in (0..needed).step_by(piece) {
            let end = needed.min(start + piece);
            let mut data = vec![0; (end - start) * layout.block_bytes()];
            file.read(&mut data).map_err(failed)?;
            for held in &held {
                // What was found is there, and shared with others.
                let first = held.table.known().clamp(start, end);
                let blocks = held.blocks()[first..end].to_vec();
                let data = data[(first - start) * layout.block_bytes()..].into();
                self.ask(held.replica, |answer| Message::Import { blocks, data, answer })??;
            }
        }
        let all = file.finish().map_err(failed)?;
        for held in &mut held {
            held.release(Arc::clone(&tokens))?;
        }
        Ok(all)
    }

    /// What a file must be like for this engine.
    fn expected(&self) -> Result<Expected, Error> {
        let Handle { layout, limits: (context_length, _), model, .. } = &*self.handle;
        let Handle { fingerprint, vocabulary, .. } = &*self.handle;
        let fingerprint = match fingerprint.get() {
            Some(fingerprint) => *fingerprint,
            None => {
                let now = conversation::fingerprint(&**model, Arc::clone(vocabulary))?;
                *fingerprint.get_or_init(|| now)
            }
        };
        Ok(Expected { layout: *layout, context_length: *context_length, fingerprint })
    }

    fn hold(&self, replica: usize, tokens: Arc<[u32]>, grow: bool) -> Result<Held<'_>, Error> {
        let table = self.ask(replica, |answer| Message::Hold { tokens, grow, answer })?;
        Ok(Held { engine: self, replica, table })
    }

    /// Sends a replica a question and waits for the answer.
    fn ask<T>(
        &self,
        replica: usize,
        question: impl FnOnce(Sender<T>) -> Message,
    ) -> Result<T, Error> {
        let (answer, answers) = channel();
        self.send(replica, question(answer))?;
        answers.recv().map_err(|_| stopped())
    }

    /// What the engine has done until now, all replicas together.
    ///
    /// # Errors
    /// If the engine has stopped, or one of its replicas.
    pub fn statistics(&self) -> Result<EngineStatistics, Error> {
        let replicas = self.handle.replicas.len();
        let (answer, answers) = channel();
        for replica in 0..replicas {
            self.send(replica, Message::Statistics(answer.clone()))?;
        }
        drop(answer);
        let all: Vec<EngineStatistics> = answers.iter().collect();
        if all.len() < replicas { Err(stopped()) } else { Ok(all.into_iter().sum()) }
    }

    fn send(&self, replica: usize, message: Message) -> Result<(), Error> {
        let link = self.link(replica);
        let mailbox = link.mailbox.as_ref().expect("it is there as long as the link");
        mailbox.send(message).map_err(|_| stopped())?;
        link.wake();
        Ok(())
    }

    fn link(&self, replica: usize) -> &Arc<Link> {
        let link = self.handle.replicas[replica].link.as_ref();
        link.expect("it is there until the last clone is gone")
    }
}

fn stopped() -> Error {
    Error::EngineStopped { reason: "its thread has ended".to_owned() }
}

impl Drop for Handle {
    fn drop(&mut self) {
        let links = self.replicas.iter_mut().map(|replica| replica.link.take());
        let last: Vec<bool> = links.map(|link| link.and_then(Arc::into_inner).is_some()).collect();
        for (Replica { thread, .. }, last) in self.replicas.drain(..).zip(last) {
            // Where streams are left, the thread ends after them and nobody waits for it. A logits
            // processor can hold the last clone.
            if last && thread.thread().id() != thread::current().id() {
                // If it panicked, it has said so.
                let _ = thread.join();
            }
        }
    }
}

struct StepLoop {
    /// Dropped before the streams' ends: who hears that the thread has ended is refused from then on.
    inbox: Receiver<Message>,
    runner: Box<dyn Runner>,
    draft: Option<Draft>,
    metrics: StepMetrics,
    prompt_share: Option<PromptShare>,
    requests: Requests,
}

/// The requests that run and that wait.
pub(crate) struct Requests {
    pub(crate) scheduler: Scheduler<Active>,
    /// The KV blocks of the draft model.
    pub(crate) draft_cache: Option<KvCache>,
    statistics: EngineStatistics,
    masks: MaskWorker,
    /// Room for the sequences whose masks have come.
    guided: Vec<usize>,
    /// Lent to one sampler after the other.
    candidates: Candidates,
}

impl StepLoop {
    fn run(mut self) {
        while self.receive() {
            self.requests.sweep();
            self.requests.scheduler.schedule();
            self.metrics.publish(self.requests.statistics());
            if self.requests.scheduler.batch().is_empty() {
                self.requests.tell_all();
                // Whoever submits, reads from a full ring or goes away wakes this thread.
                match self.requests.scheduler.next_deadline() {
                    Some(end) => {
                        thread::park_timeout(end.saturating_duration_since(Instant::now()))
                    }
                    None => thread::park(),
                }
            } else if let Err(error) = self.timed_step() {
                self.requests.fail_all(&error);
                break;
            }
        }
        // Nobody reads any more: what is left is cancelled.
        self.requests.sweep();
        self.metrics.publish(self.requests.statistics());
    }

    /// Takes in what has come; false once nobody can submit any more.
    fn receive(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Message::Submit(submission)) => {
                    let Submission { active, tokens, most_tokens, standing } = *submission;
                    self.requests.scheduler.submit(active, tokens, most_tokens, standing);
                }
                Ok(Message::Statistics(answer)) => {
                    // Who does not wait for the answer does not need it.
                    let _ = answer.send(self.requests.statistics());
                }
                Ok(Message::Hold { tokens, grow, answer }) => {
                    let cache = self.requests.scheduler.cache_mut();
                    let mut table = BlockTable::default();
                    cache.hold(&mut table, &tokens);
                    if grow && !cache.grow(&mut table, tokens.len()) {
                        cache.release(&mut table);
                    }
                    if let Err(unread) = answer.send(table) {
                        cache.release(&mut { unread.0 });
                    }
                }
                Ok(Message::Export { blocks, answer }) => {
                    let mut data = Vec::new();
                    let mut all = blocks.into_iter();
                    let _ = answer.send(
                        all.try_for_each(|b| self.runner.export(b, &mut data)).map(|()| data),
                    );
                }
                Ok(Message::Import { blocks, data, answer }) => {
                    let size = data.len() / blocks.len().max(1);
                    let mut all = blocks.into_iter().zip(data.chunks_exact(size.max(1)));
                    let _ = answer.send(all.try_for_each(|(b, data)| self.runner.import(b, data)));
                }
                Ok(Message::Release { mut table, tokens }) => {
                    self.requests.scheduler.cache_mut().computed(&mut table, &tokens);
                    self.requests.scheduler.cache_mut().release(&mut table);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Computes the step that was put together, and learns what prompts cost in it.
    fn timed_step(&mut self) -> Result<(), CoreError> {
        let prompt_tokens = self.requests.scheduler.prompt_tokens_beside_others();
        let start = Instant::now();
        self.step()?;
        if let (Some(share), Some(prompt_tokens)) = (&mut self.prompt_share, prompt_tokens) {
            share.learn(prompt_tokens, start.elapsed());
            self.requests.scheduler.set_prefill_tokens(share.tokens());
        }
        Ok(())
    }

    /// Computes the step that was put together.
    fn step(&mut self) -> Result<(), CoreError> {
        let Self { runner, draft, metrics, requests, .. } = self;
        let start = Instant::now();
        let sequences = requests.scheduler.batch().len();
        let span = telemetry::step_span(sequences);
        if let Some(draft) = draft {
            draft.propose(requests)?;
        }
        requests.look_up();
        runner.copy(requests.scheduler.copies());
        let (scheduler, batch) = (&requests.scheduler, requests.scheduler.batch());
        let tokens = runner.forward(scheduler, batch, &|sequence, work| {
            let completed = sequence.is_completed_by(work);
            Part {
                tokens: sequence.tokens_of(work),
                blocks: sequence.blocks(),
                wanted: if completed { 1 + sequence.proposals() } else { 0 },
            }
        })?;
        span.record("rows", tokens);
        requests.complete(tokens);
        runner.sample(requests, &mut Requests::sample)?;
        metrics.step(start.elapsed(), tokens, sequences);
        Ok(())
    }
}

impl Requests {
    /// What has been done and what is being done.
    fn statistics(&self) -> EngineStatistics {
        let Self { scheduler, draft_cache, statistics, .. } = self;
        let (running, waiting) = scheduler.counts();
        EngineStatistics {
            running,
            waiting,
            preemptions: scheduler.preemptions(),
            kv: scheduler.kv_statistics(),
            draft_kv: draft_cache.as_ref().map(KvCache::statistics).unwrap_or_default(),
            ..*statistics
        }
    }

    /// Removes sequences that nobody wants any more, and pauses those that nobody reads.
    fn sweep(&mut self) {
        let cancelled = |sequence: &Sequence<Active>| sequence.request.events.is_cancelled();
        while let Some(slot) = self.scheduler.find(cancelled) {
            let sequence = self.remove(slot);
            sequence.request.telemetry.end(Outcome::Finished(FinishReason::Cancelled));
        }
        if self.scheduler.next_deadline().is_some() {
            let now = Instant::now();
            while let Some(slot) = self.scheduler.expired(now) {
                self.finish(slot, Err(Error::DeadlineExceeded));
            }
        }
        let mut guided = std::mem::take(&mut self.guided);
        for (slot, sequence) in self.scheduler.sequences_mut() {
            if sequence.request.guide.as_mut().is_some_and(Guide::poll) {
                guided.push(slot);
            }
        }
        for slot in guided.drain(..) {
            self.mask_came(slot);
        }
        self.guided = guided;
        // After the tokens that were sampled just now.
        let Self { scheduler, draft_cache, .. } = self;
        let mut now = None;
        for (_, sequence) in scheduler.sequences_mut() {
            let (decodes, waits) = (sequence.decodes(), sequence.blocks().is_empty());
            let (active, tokens) = sequence.parts();
            if waits {
                active.release_draft(draft_cache);
            }
            if active.events.is_untold() {
                active.events.tell(*now.get_or_insert_with(Instant::now));
            }
            let paused = active.events.is_full() || active.has_all_tokens(tokens);
            let wish = if decodes { active.wish(tokens) } else { 0 };
            (sequence.paused, sequence.wish) = (paused, wish);
        }
    }

    /// Ends a sequence whose mask has come, if it must, or samples from the logits that waited for it.
    fn mask_came(&mut self, slot: usize) {
        let sequence = self.scheduler.sequence_mut(slot);
        let is_computed = sequence.is_computed();
        let (active, tokens) = sequence.parts();
        let end = active.end(tokens);
        let late = active.guide.as_mut().expect("a mask has come").take_late();
        if let Some(end) = end {
            self.finish(slot, end);
        } else if let Some(mut logits) = late
            // One that gave up its blocks meanwhile computes them anew.
            && is_computed
        {
            self.sample(slot, Logits::All(&mut logits));
        }
    }

    /// Wakes every reader that was left asleep.
    fn tell_all(&mut self) {
        for (_, sequence) in self.scheduler.sequences_mut() {
            if sequence.request.events.is_untold() {
                sequence.request.events.tell_now();
            }
        }
    }

    /// Proposes what followed the last time, for those sequences of the step that have room for some
    /// tokens and want them from there.
    fn look_up(&mut self) {
        for index in 0..self.scheduler.batch().len() {
            let slot = self.scheduler.batch()[index].slot;
            let sequence = self.scheduler.sequence(slot);
            let Some(Speculating { source: Source::Lookup(place), .. }) =
                sequence.request.speculating
            else {
                continue;
            };
            for place in place..place + sequence.proposals_left() {
                // What followed may run on into what is proposed: a loop goes on as a loop.
                let token = self.scheduler.sequence(slot).tokens_and_proposals()[place];
                self.scheduler.propose(slot, token);
            }
        }
    }

    /// Proposes a token that a draft model finds probable.
    pub(crate) fn guess(&mut self, slot: usize, logits: Logits<'_>) {
        let (active, tokens) = self.scheduler.sequence_mut(slot).parts_and_proposals();
        active.sampler.swap_candidates(&mut self.candidates);
        let guess = active.guess(tokens, logits);
        active.sampler.swap_candidates(&mut self.candidates);
        // From what cannot be sampled from, nothing is guessed.
        if let Ok(token) = guess {
            self.scheduler.propose(slot, token);
        }
    }

    /// Learns that the step of so many tokens has been computed.
    fn complete(&mut self, tokens: usize) {
        self.statistics.steps += 1;
        self.statistics.computed_tokens += tokens as u64;
        self.scheduler.complete();
        for index in 0..self.scheduler.batch().len() {
            let Work { slot, position, count } = self.scheduler.batch()[index];
            let sequence = self.scheduler.sequence_mut(slot);
            if count > 1 || position < sequence.request.prompt_tokens {
                self.statistics.prefill_tokens += count as u64;
            }
            let proposed = sequence.proposals();
            if let Some(guesses) = &mut sequence.request.speculating {
                guesses.count_proposed(proposed);
                self.statistics.proposed_tokens += proposed as u64;
            }
        }
    }

    /// Gives a sequence its next token, or its end; lets the logits wait if its mask is not there.
    /// Returns whether the token was proposed and goes on: then the step has the logits after it too.
    fn sample(&mut self, slot: usize, logits: Logits<'_>) -> bool {
        let sequence = self.scheduler.sequence_mut(slot);
        let usage = usage(sequence);
        let (active, tokens) = sequence.parts();
        if let (Some(guide), Logits::All(logits)) = (&mut active.guide, &logits) {
            guide.poll();
            if guide.grammar().is_none() {
                guide.keep(logits);
                return false;
            }
        }
        if let Some(end) = active.end(tokens) {
            return self.finish(slot, end);
        }
        active.sampler.swap_candidates(&mut self.candidates);
        let sampled = active.sample(tokens, logits);
        active.sampler.swap_candidates(&mut self.candidates);
        let Sampled { token: id, logprob, top_logprobs: top } = match sampled {
            Ok(sampled) => sampled,
            Err(error) => return self.finish(slot, Err(error)),
        };
        if active.end_ids.contains(&id) {
            return self.finish(slot, Ok(FinishReason::Stop));
        }
        let logprobs = logprob.map(|logprob| TokenLogprobs { logprob, top });
        active.events.set_usage(usage);
        let time = Instant::now();
        active.telemetry.token(time);
        active.events.send(Ok(Event::Token(Token { id, logprobs, time })));
        let last = usage.output_tokens + 1 == active.most_output_tokens;
        let guided =
            active.guide.as_mut().map(|guide| guide.advance(id, &mut self.masks)).is_some();
        let accepted = self.scheduler.push(slot, id);
        self.statistics.output_tokens += 1;
        if accepted {
            self.statistics.accepted_tokens += 1;
            let active = &mut self.scheduler.sequence_mut(slot).request;
            active.speculating.as_mut().expect("it was proposed").count_accepted();
        }
        // Whether a constrained output is complete is what its grammar says.
        if last && !guided {
            return self.finish(slot, Ok(FinishReason::Length));
        }
        let sequence = self.scheduler.sequence_mut(slot);
        let (length, (keep_first, context_length)) =
            (sequence.tokens().len(), sequence.request.context);
        if !last && length > context_length {
            let dropped = Overflow::dropped(keep_first, length);
            sequence.request.dropped_tokens += dropped.len();
            self.scheduler.shorten(slot, dropped);
        }
        accepted
    }

    /// Takes out a sequence and gives back all of its blocks.
    fn remove(&mut self, slot: usize) -> Sequence<Active> {
        let mut sequence = self.scheduler.remove(slot);
        sequence.request.release_draft(&mut self.draft_cache);
        sequence
    }

    /// Ends a request. Returns that it does not go on.
    fn finish(&mut self, slot: usize, end: Result<FinishReason, Error>) -> bool {
        let sequence = self.remove(slot);
        let usage = usage(&sequence);
        let Active { mut events, place, telemetry, .. } = sequence.request;
        telemetry.end(Outcome::from(&end));
        // Whoever hears of the end may submit again at once.
        drop(place);
        events.send(end.map(|reason| Event::Finished(Finish { reason, usage })));
        false
    }

    /// Ends every request: the device is lost.
    fn fail_all(&mut self, error: &CoreError) {
        while let Some(slot) = self.scheduler.find(|_| true) {
            self.finish(slot, Err(Error::EngineStopped { reason: error.to_string() }));
        }
    }
}

/// What a sequence has taken until now.
fn usage(sequence: &Sequence<Active>) -> Usage {
    let Active { prompt_tokens, dropped_tokens, speculating, .. } = &sequence.request;
    let (proposed_tokens, accepted_tokens) =
        speculating.as_ref().map_or((0, 0), Speculating::counts);
    Usage {
        prompt_tokens: *prompt_tokens,
        reused_tokens: sequence.reused(),
        output_tokens: sequence.request.output_tokens(sequence.tokens()),
        proposed_tokens,
        accepted_tokens,
        dropped_tokens: *dropped_tokens,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::grammar::tests::broken;
    use crate::model::{Model, ModelOptions};
    use crate::sampler::SamplingParams;

    #[test]
    fn a_grammar_that_panics_fails_its_own_request() {
        let model = Model::open("tiny", &ModelOptions::default()).unwrap();
        let engine = model.engine(EngineOptions::default()).unwrap();
        let request = |constraint: Option<&str>| {
            let mut request = Request::new(vec![1, 2, 3], SamplingParams::default(), 60);
            request.constraint = constraint.map(|text| Constraint::Regex(text.to_owned()));
            request
        };
        let read = |mut stream: TokenStream| {
            let mut tokens = 0;
            loop {
                match stream.next().expect("an end comes before nothing") {
                    Ok(Event::Token(_)) => tokens += 1,
                    Ok(Event::Finished(_)) => return (tokens, None),
                    Err(error) => return (tokens, Some(error)),
                }
            }
        };
        let free = engine.submit(request(None)).unwrap();
        let good = engine.submit(request(Some("[a-z ]{80}"))).unwrap();
        let compile = |constraint: &Constraint, end_ids: &BTreeSet<u32>| {
            Grammar::new(&engine.handle.vocabulary, constraint, end_ids).map(broken)
        };
        let bad = engine.submit_compiled(request(Some("[a-z ]{80}")), compile).unwrap();
        let (tokens, error) = read(bad);
        assert_eq!(tokens, 1, "the first mask was there before");
        assert!(
            matches!(error, Some(Error::Constraint(ConstraintError::Broken { .. }))),
            "{error:?}"
        );
        assert!(matches!(read(good), (10..=60, None)));
        assert!(matches!(read(free), (60, None)));
        // The worker is there still.
        let after = engine.submit(request(Some("abc"))).unwrap();
        assert!(matches!(read(after), (1..=3, None)));
        let statistics = engine.statistics().unwrap();
        assert_eq!((statistics.running, statistics.kv.used_blocks), (0, 0));
    }
}
