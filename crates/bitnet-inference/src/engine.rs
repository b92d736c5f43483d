//! [`Engine`]: many requests on one model, for whoever asks. The loop that runs them is in
//! `step_loop.rs`.

mod options;
mod statistics;
mod step_loop;

use std::collections::BTreeSet;
use std::iter;
use std::mem;
use std::path::Path;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, OnceLock};
use std::thread::{self, JoinHandle, Thread};
use std::time::Instant;

use bitnet_core::backend::KvLayout;
use bitnet_core::{Error as CoreError, Shortcuts};

use crate::conversation::{self, ConversationError, Expected};
use crate::error::Error;
use crate::generate::FinishReason;
use crate::grammar::{Constraint, ConstraintError, Grammar, Vocabulary};
use crate::kv_cache::{BlockTable, KvCache};
use crate::masks::{Guide, MaskWorker};
use crate::request::{Event, Finish, Overflow, Request, Usage};
use crate::runner::Room;
use crate::sampler::{Candidates, InvalidParameter, Sampler, SamplingParams};
use crate::scheduler::{Limits, Places, Scheduler, Standing};
use crate::session::{AnyDecoder, check_tokens};
use crate::speculation::draft::Draft;
use crate::speculation::{Proposer, Speculating, Speculation};
use crate::step_time::PromptShare;
use crate::stream::TokenStream;
use crate::telemetry::{Outcome, RequestMetrics, RequestTelemetry, StepMetrics};
pub use options::EngineOptions;
pub use statistics::EngineStatistics;
pub(crate) use step_loop::{Active, Logits, Requests};
use step_loop::{StepLoop, Submission};

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

    /// Tokens that the prompt and the output of one request may have: as many as the model's context, or
    /// fewer if the memory for keys and values holds fewer.
    pub fn most_tokens(&self) -> usize {
        let (context_length, _) = self.handle.limits;
        context_length.min(self.handle.kv_tokens)
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
