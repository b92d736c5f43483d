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
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::thread;
use std::time::Instant;

use bitnet_core::Error as CoreError;

use crate::error::Error;
use crate::generate::{FinishReason, TokenLogprobs};
use crate::grammar::panic_message;
use crate::kv_cache::{BlockTable, KvCache};
use crate::masks::{Guide, MaskWorker};
use crate::request::{Event, Finish, LogitsProcessor, Overflow, Token, Usage};
use crate::runner::{Part, Runner};
use crate::sampler::{Candidate, Candidates, SampleError, Sampled, Sampler, Selection};
use crate::scheduler::{Place, Scheduler, Sequence, Standing, Work};
use crate::speculation::draft::{Draft, DraftTable};
use crate::speculation::{Source, Speculating};
use crate::step_time::PromptShare;
use crate::stream::EventSender;
use crate::telemetry::{self, Outcome, RequestTelemetry, StepMetrics};

use super::{EngineStatistics, Message};

/// A request on its way to the engine's thread.
pub(super) struct Submission {
    pub(super) active: Active,
    pub(super) tokens: Vec<u32>,
    pub(super) most_tokens: usize,
    pub(super) standing: Standing,
}

/// What the step loop needs of a request.
pub(crate) struct Active {
    pub(super) sampler: Sampler,
    pub(super) processors: Vec<Box<dyn LogitsProcessor>>,
    /// Where its constraint stands, if it has one.
    pub(super) guide: Option<Guide>,
    pub(super) end_ids: BTreeSet<u32>,
    pub(super) prompt_tokens: usize,
    /// Tokens of prompt and output that were dropped because the context was full.
    pub(super) dropped_tokens: usize,
    pub(super) most_output_tokens: usize,
    /// Tokens that stay when the context is full, and its length.
    pub(super) context: (usize, usize),
    pub(crate) speculating: Option<Speculating>,
    // Whoever hears of the end finds it counted.
    pub(super) telemetry: RequestTelemetry,
    /// Dropped before `events`, whose end says that the place is free.
    pub(super) place: Place,
    pub(super) events: EventSender,
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

pub(super) struct StepLoop {
    /// Dropped before the streams' ends: who hears that the thread has ended is refused from then on.
    pub(super) inbox: Receiver<Message>,
    pub(super) runner: Box<dyn Runner>,
    pub(super) draft: Option<Draft>,
    pub(super) metrics: StepMetrics,
    pub(super) prompt_share: Option<PromptShare>,
    pub(super) requests: Requests,
}

/// The requests that run and that wait.
pub(crate) struct Requests {
    pub(crate) scheduler: Scheduler<Active>,
    /// The KV blocks of the draft model.
    pub(crate) draft_cache: Option<KvCache>,
    pub(super) statistics: EngineStatistics,
    pub(super) masks: MaskWorker,
    /// Room for the sequences whose masks have come.
    pub(super) guided: Vec<usize>,
    /// Lent to one sampler after the other.
    pub(super) candidates: Candidates,
}

impl StepLoop {
    pub(super) fn run(mut self) {
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
