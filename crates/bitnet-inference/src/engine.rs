//! The step loop: many requests on one model.
//!
//! One thread owns the decoder's workspace, the KV store and the scheduler. It takes in what was
//! submitted, puts a step together, runs the decoder once over all sequences of the step, samples
//! a token for each that has computed all of its own, and sends it. It awaits nothing and takes no
//! lock but those by which the kernels' threads share an operation. Between two admissions it
//! allocates nothing: room for tokens, block tables and events is made when a request comes in. What a
//! constraint allows is found by a thread of its own (`masks.rs`), whose messages allocate.
//!
//! A token is the one that [`generate`](crate::generate()) would give. Each row of a step depends on its own
//! sequence alone, and random numbers on the seed and the position in the output.

use std::collections::BTreeSet;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use bitnet_core::backend::{Backend, KvType, Span};
use bitnet_core::{Error as CoreError, Pick};
use bitnet_model::decoder::{Decoder, Step, Workspace};

use crate::error::Error;
use crate::generate::{FinishReason, TokenLogprobs};
use crate::grammar::{Constraint, ConstraintError, Grammar, Vocabulary, panic_message};
use crate::kv_cache::{KvCache, KvStatistics};
use crate::masks::{Guide, MaskWorker};
use crate::request::{Event, Finish, LogitsProcessor, Request, Token, Usage};
use crate::sampler::{Candidate, Candidates, InvalidParameter, Sampled, Sampler, Selection};
use crate::scheduler::{Limits, Place, Places, Scheduler, Sequence, Standing, Work};
use crate::session::{DEFAULT_CHUNK, PICKS, check_tokens};
use crate::stream::{EventSender, TokenStream};

/// How an engine is set up. None of these changes a token, but the KV type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct EngineOptions {
    /// Sequences that run at once.
    pub max_sequences: usize,
    /// Most tokens per step, or one for each sequence if that is more.
    pub step_tokens: usize,
    /// Requests that may wait besides those that run.
    pub queue: usize,
    /// Most bytes of keys and values. Storage that was never used takes none.
    pub kv_bytes: u64,
    /// Storage of keys and values.
    pub kv_type: KvType,
    /// Tokens per KV block: prefixes are shared in whole blocks.
    pub block_tokens: usize,
}

impl Default for EngineOptions {
    fn default() -> Self {
        EngineOptions {
            max_sequences: 16,
            step_tokens: DEFAULT_CHUNK,
            queue: 256,
            kv_bytes: 2_000_000_000,
            kv_type: KvType::F32,
            block_tokens: 16,
        }
    }
}

impl EngineOptions {
    /// Refuses numbers that no engine can have. Room is made for all of them at the start, and each
    /// step looks at every place, so that a slip of a few digits must not take all memory and time.
    pub(crate) fn validate(&self) -> Result<(), InvalidParameter> {
        for (name, value, possible, allowed) in [
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
    /// Tokens computed in these steps.
    pub computed_tokens: u64,
    /// Tokens generated.
    pub output_tokens: u64,
    /// How often a sequence gave up its blocks, to be computed anew.
    pub preemptions: u64,
    /// The KV blocks.
    pub kv: KvStatistics,
}

/// Runs requests on one model. Clones share the same engine; its thread ends with the last of them
/// and of their streams.
#[derive(Clone)]
pub struct Engine {
    handle: Arc<Handle>,
}

struct Handle {
    /// `None` once the thread is to end.
    mailbox: Option<Sender<Message>>,
    thread: Option<JoinHandle<()>>,
    places: Arc<Places>,
    /// Length of the context and size of the vocabulary.
    limits: (usize, usize),
    /// Tokens whose keys and values fit the budget.
    kv_tokens: usize,
    vocabulary: Arc<Vocabulary>,
}

enum Message {
    Submit(Box<Submission>),
    Statistics(Sender<EngineStatistics>),
}

/// A request on its way to the engine's thread.
struct Submission {
    active: Active,
    tokens: Vec<u32>,
    most_tokens: usize,
    standing: Standing,
}

/// What the step loop needs of a request.
struct Active {
    sampler: Sampler,
    processors: Vec<Box<dyn LogitsProcessor>>,
    /// Where its constraint stands, if it has one.
    guide: Option<Guide>,
    end_ids: BTreeSet<u32>,
    prompt_tokens: usize,
    most_output_tokens: usize,
    /// Dropped before `events`, whose end says that the place is free.
    place: Place,
    events: EventSender,
}

impl Active {
    fn output_tokens(&self, tokens: &[u32]) -> usize {
        tokens.len() - self.prompt_tokens
    }

    /// What it needs of the logits after `tokens`, if not all.
    fn selection(&mut self, tokens: &[u32]) -> Option<Selection<'_>> {
        let position = self.output_tokens(tokens) as u64;
        let needs_all = !self.processors.is_empty() || self.guide.is_some();
        if needs_all { None } else { self.sampler.selection(tokens, position) }
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

enum Logits<'a> {
    Some(&'a [Candidate]),
    All(&'a mut [f32]),
}

impl Engine {
    /// Starts an engine on a thread of its own. With `prefix_reuse`, a prefix that was computed for
    /// one request serves others.
    pub(crate) fn start<B: Backend>(
        decoder: Arc<Decoder<B>>,
        options: EngineOptions,
        prefix_reuse: bool,
        vocabulary: Arc<Vocabulary>,
    ) -> Result<Self, Error> {
        options.validate()?;
        let EngineOptions { max_sequences, block_tokens, .. } = options;
        let step_tokens = options.step_tokens.max(max_sequences);
        let context_length = decoder.config().context_length;
        let layout = decoder.kv_layout(options.kv_type, block_tokens);
        // More than all running sequences can ever fill would only be a larger memory of prefixes.
        let useful = max_sequences * context_length.div_ceil(block_tokens);
        let affordable = options.kv_bytes / layout.block_bytes() as u64;
        let blocks = usize::try_from(affordable).unwrap_or(usize::MAX).min(useful);
        let places = max_sequences + options.queue;
        let vocab_size = decoder.vocab_size();

        let (mailbox, inbox) = channel();
        let step_loop = StepLoop {
            kv: decoder.backend().kv_allocate(layout, blocks)?,
            workspace: decoder.workspace(step_tokens, PICKS)?,
            scheduler: Scheduler::new(
                KvCache::new(block_tokens, blocks, prefix_reuse),
                Limits { max_sequences, step_tokens },
                places,
            ),
            inbox,
            statistics: EngineStatistics::default(),
            masks: MaskWorker::default(),
            guided: Vec::with_capacity(places),
            tokens: Vec::with_capacity(step_tokens),
            spans: Vec::with_capacity(max_sequences),
            wanted: Vec::with_capacity(max_sequences),
            picks: Vec::with_capacity(max_sequences),
            rows: Vec::with_capacity(PICKS),
            selected: (0..max_sequences).map(|_| Vec::with_capacity(vocab_size)).collect(),
            logits: Vec::with_capacity(PICKS * vocab_size),
            candidates: Candidates::with_capacity(vocab_size),
            decoder,
        };
        let thread = thread::Builder::new()
            .name("bitnet-engine".to_owned())
            .spawn(move || step_loop.run())
            .map_err(|error| Error::EngineStopped {
                reason: format!("its thread cannot be started: {error}"),
            })?;
        Ok(Engine {
            handle: Arc::new(Handle {
                mailbox: Some(mailbox),
                thread: Some(thread),
                places: Places::new(places),
                limits: (context_length, vocab_size),
                kv_tokens: blocks * block_tokens,
                vocabulary,
            }),
        })
    }

    /// Submits a request. Its tokens are the same whatever else is running.
    ///
    /// # Errors
    /// If the prompt is empty, longer than the context or has an unknown id; a parameter has a
    /// value that it cannot have; the KV cache could not hold the request even alone; there are
    /// too many requests; the constraint cannot be kept; or the engine has stopped.
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
        let Request { prompt, sampling, max_tokens, end_ids, constraint, .. } = request;
        let Request { priority, client, deadline, processors, buffer, .. } = request;
        let (context_length, vocab_size) = self.handle.limits;
        check_tokens(&prompt, 0, self.handle.limits)?;
        let mut sampler = Sampler::new(&sampling)?;
        // The last token of an output is never computed.
        let most_output_tokens = max_tokens.min(context_length - prompt.len() + 1);
        let most_tokens = prompt.len() + most_output_tokens.saturating_sub(1);
        if most_tokens > self.handle.kv_tokens {
            return Err(Error::KvBudget { needed: most_tokens, room: self.handle.kv_tokens });
        }
        sampler.reserve(most_tokens);
        let place = self.handle.places.enter()?;
        let guide = match &constraint {
            Some(constraint) => Some(Guide::new(compile(constraint, &end_ids)?, vocab_size)),
            None => None,
        };
        let (mut events, stream) = TokenStream::new(self.clone(), buffer.min(most_output_tokens));
        let prompt_tokens = prompt.len();
        if most_output_tokens == 0 {
            let usage = Usage { prompt_tokens, reused_tokens: 0, output_tokens: 0 };
            events.send(Ok(Event::Finished(Finish { reason: FinishReason::Length, usage })));
            return Ok(stream);
        }
        let active = Active {
            sampler,
            processors,
            guide,
            end_ids,
            prompt_tokens,
            most_output_tokens,
            place,
            events,
        };
        let standing = Standing { priority, client, deadline };
        self.send(Message::Submit(Box::new(Submission {
            active,
            tokens: prompt,
            most_tokens,
            standing,
        })))?;
        Ok(stream)
    }

    /// What the engine has done until now.
    ///
    /// # Errors
    /// If the engine has stopped.
    pub fn statistics(&self) -> Result<EngineStatistics, Error> {
        let (answer, answers) = channel();
        self.send(Message::Statistics(answer))?;
        answers.recv().map_err(|_| stopped())
    }

    fn send(&self, message: Message) -> Result<(), Error> {
        let mailbox =
            self.handle.mailbox.as_ref().expect("it is there until the last clone is gone");
        mailbox.send(message).map_err(|_| stopped())?;
        self.wake();
        Ok(())
    }

    /// Lets the engine look for something to do.
    pub(crate) fn wake(&self) {
        if let Some(thread) = &self.handle.thread {
            thread.thread().unpark();
        }
    }
}

fn stopped() -> Error {
    Error::EngineStopped { reason: "its thread has ended".to_owned() }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.mailbox = None;
        if let Some(thread) = self.thread.take() {
            thread.thread().unpark();
            // A logits processor can hold the last clone.
            if thread.thread().id() != thread::current().id() {
                // If it panicked, it has said so.
                let _ = thread.join();
            }
        }
    }
}

/// A row of the step whose sequence gets a token.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    slot: usize,
    row: usize,
    /// Whether some logits are enough.
    selected: bool,
}

struct StepLoop<B: Backend> {
    /// Dropped before the streams' ends: who hears that the thread has ended is refused from then on.
    inbox: Receiver<Message>,
    decoder: Arc<Decoder<B>>,
    kv: B::Kv,
    workspace: Workspace<B>,
    scheduler: Scheduler<Active>,
    statistics: EngineStatistics,
    masks: MaskWorker,
    // Room for one step.
    guided: Vec<usize>,
    tokens: Vec<u32>,
    spans: Vec<Span<'static>>,
    wanted: Vec<Wanted>,
    picks: Vec<Pick<'static>>,
    rows: Vec<usize>,
    selected: Vec<Vec<Candidate>>,
    logits: Vec<f32>,
    /// Lent to one sampler after the other.
    candidates: Candidates,
}

/// The memory of a vector for other elements, which differ in lifetimes alone.
fn emptied<T, U>(mut vec: Vec<T>) -> Vec<U> {
    vec.clear();
    // Collecting what comes out of a vector into one of the same layout keeps its memory.
    vec.into_iter().map(|_| unreachable!("it is empty")).collect()
}

impl<B: Backend> StepLoop<B> {
    fn run(mut self) {
        while self.receive() {
            self.sweep();
            self.scheduler.schedule();
            if self.scheduler.batch().is_empty() {
                // Whoever submits, reads from a full ring or goes away wakes this thread.
                match self.scheduler.next_deadline() {
                    Some(end) => {
                        thread::park_timeout(end.saturating_duration_since(Instant::now()))
                    }
                    None => thread::park(),
                }
            } else if let Err(error) = self.step() {
                return self.fail_all(&error);
            }
        }
    }

    /// Takes in what has come; false once nobody can submit any more.
    fn receive(&mut self) -> bool {
        loop {
            match self.inbox.try_recv() {
                Ok(Message::Submit(submission)) => {
                    let Submission { active, tokens, most_tokens, standing } = *submission;
                    self.scheduler.submit(active, tokens, most_tokens, standing);
                }
                Ok(Message::Statistics(answer)) => {
                    let (running, waiting) = self.scheduler.counts();
                    let kv = self.scheduler.kv_statistics();
                    let preemptions = self.scheduler.preemptions();
                    let now =
                        EngineStatistics { running, waiting, preemptions, kv, ..self.statistics };
                    // Who does not wait for the answer does not need it.
                    let _ = answer.send(now);
                }
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Removes sequences that nobody wants any more, and pauses those that nobody reads.
    fn sweep(&mut self) {
        let cancelled = |sequence: &Sequence<Active>| sequence.request.events.is_cancelled();
        while let Some(slot) = self.scheduler.find(cancelled) {
            self.scheduler.remove(slot);
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
        for (_, sequence) in self.scheduler.sequences_mut() {
            let (active, tokens) = sequence.parts();
            sequence.paused = active.events.is_full() || active.has_all_tokens(tokens);
        }
    }

    /// Ends a sequence whose mask has come, if it must, or samples from the logits that waited for it.
    fn mask_came(&mut self, slot: usize) {
        let sequence = self.scheduler.sequence_mut(slot);
        // One that gave up its blocks meanwhile computes them anew.
        let is_computed = sequence.is_computed();
        let (active, tokens) = sequence.parts();
        let end = active.end(tokens);
        let guide = active.guide.as_mut().expect("a mask has come");
        let waited = guide.take_late(&mut self.logits) && is_computed;
        if let Some(end) = end {
            self.finish(slot, end);
        } else if waited {
            let mut logits = std::mem::take(&mut self.logits);
            self.sample(slot, Logits::All(&mut logits));
            self.logits = logits;
        }
    }

    /// Computes the step that was put together.
    fn step(&mut self) -> Result<(), CoreError> {
        self.forward();
        self.want();
        let screened = self.select()?;
        for index in 0..self.wanted.len() {
            let Wanted { slot, selected, .. } = self.wanted[index];
            if screened && selected {
                // Selected rows come first, in this order.
                let candidates = std::mem::take(&mut self.selected[index]);
                self.sample(slot, Logits::Some(&candidates));
                self.selected[index] = candidates;
            }
        }
        self.wanted.retain(|wanted| !(screened && wanted.selected));
        let wanted = std::mem::take(&mut self.wanted);
        for wanted in wanted.chunks(PICKS) {
            self.rows.clear();
            self.rows.extend(wanted.iter().map(|wanted| wanted.row));
            self.decoder.logits(&mut self.workspace, &self.rows, &mut self.logits)?;
            let mut logits = std::mem::take(&mut self.logits);
            let rows = logits.chunks_exact_mut(self.decoder.vocab_size());
            for (wanted, logits) in wanted.iter().zip(rows) {
                self.sample(wanted.slot, Logits::All(logits));
            }
            self.logits = logits;
        }
        self.wanted = wanted;
        Ok(())
    }

    /// Runs the decoder over all sequences of the step.
    fn forward(&mut self) {
        let Self { decoder, kv, workspace, scheduler, tokens, statistics, .. } = self;
        decoder.backend().kv_copy(kv, scheduler.copies());
        tokens.clear();
        let mut spans: Vec<Span<'_>> = emptied(std::mem::take(&mut self.spans));
        for &Work { slot, position, count } in scheduler.batch() {
            let sequence = scheduler.sequence(slot);
            let start = tokens.len();
            tokens.extend_from_slice(&sequence.tokens()[position..position + count]);
            spans.push(Span { rows: start..tokens.len(), position, blocks: sequence.blocks() });
        }
        decoder.forward(&Step { tokens, spans: &spans }, kv, workspace);
        self.spans = emptied(spans);
        statistics.steps += 1;
        statistics.computed_tokens += tokens.len() as u64;
        scheduler.complete();
    }

    /// Notes which rows get a token, in the order of their slots.
    fn want(&mut self) {
        let Self { scheduler, wanted, .. } = self;
        wanted.clear();
        let mut end = 0;
        for work in scheduler.batch() {
            end += work.count;
            if scheduler.sequence(work.slot).is_computed() {
                wanted.push(Wanted { slot: work.slot, row: end - 1, selected: false });
            }
        }
        wanted.sort_unstable_by_key(|wanted| wanted.slot);
    }

    /// Gets the logits of the rows that need only some; false if the model cannot tell which.
    fn select(&mut self) -> Result<bool, CoreError> {
        let Self { decoder, workspace, scheduler, wanted, selected, .. } = self;
        let mut picks: Vec<Pick<'_>> = emptied(std::mem::take(&mut self.picks));
        let mut sequences = scheduler.sequences_mut();
        for wanted in wanted.iter_mut() {
            let (_, sequence) =
                sequences.find(|(slot, _)| *slot == wanted.slot).expect("both are in order");
            let (active, tokens) = sequence.parts();
            if let Some(Selection { keep, exact_ids }) = active.selection(tokens) {
                picks.push(Pick { row: wanted.row, keep, exact_ids });
                wanted.selected = true;
            }
        }
        let outs = &mut selected[..picks.len()];
        let screened = picks.is_empty() || decoder.candidates(workspace, &picks, outs)?;
        self.picks = emptied(picks);
        // The order of the picks, which is that of the results.
        wanted.sort_unstable_by_key(|wanted| (!wanted.selected, wanted.slot));
        Ok(screened)
    }

    /// Gives a sequence its next token, or its end; lets the logits wait if its mask is not there.
    fn sample(&mut self, slot: usize, logits: Logits<'_>) {
        let sequence = self.scheduler.sequence_mut(slot);
        let reused_tokens = sequence.reused();
        let (active, tokens) = sequence.parts();
        if let (Some(guide), Logits::All(logits)) = (&mut active.guide, &logits) {
            guide.poll();
            if guide.grammar().is_none() {
                return guide.keep(logits);
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
        active.events.set_reused_tokens(reused_tokens);
        active.events.send(Ok(Event::Token(Token { id, logprobs, time: Instant::now() })));
        let last = active.output_tokens(tokens) + 1 == active.most_output_tokens;
        let guided =
            active.guide.as_mut().map(|guide| guide.advance(id, &mut self.masks)).is_some();
        self.scheduler.push(slot, id);
        self.statistics.output_tokens += 1;
        // Whether a constrained output is complete is what its grammar says.
        if last && !guided {
            self.finish(slot, Ok(FinishReason::Length));
        }
    }

    /// Ends a request.
    fn finish(&mut self, slot: usize, end: Result<FinishReason, Error>) {
        let sequence = self.scheduler.remove(slot);
        let (reused_tokens, known) = (sequence.reused(), sequence.tokens().len());
        let Active { mut events, prompt_tokens, place, .. } = sequence.request;
        let output_tokens = known - prompt_tokens;
        let usage = Usage { prompt_tokens, reused_tokens, output_tokens };
        // Whoever hears of the end may submit again at once.
        drop(place);
        events.send(end.map(|reason| Event::Finished(Finish { reason, usage })));
    }

    /// Ends every request: the device is lost.
    fn fail_all(&mut self, error: &CoreError) {
        while let Some(slot) = self.scheduler.find(|_| true) {
            self.finish(slot, Err(Error::EngineStopped { reason: error.to_string() }));
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
