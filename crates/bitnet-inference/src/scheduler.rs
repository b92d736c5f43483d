//! What goes into the next step: continuous batching.
//!
//! Integers only, no model. A sequence has three numbers: how many tokens are known (prompt and
//! output), how many of them have been computed, and its block table. A step takes tokens that are
//! known and not computed; a sequence whose last known token is in the step gets a new one.
//!
//! A step is put together in this order.
//!
//! 1. *Admission.* Waiting sequences get blocks for all tokens they have, as long as every running
//!    sequence keeps one more block to grow into. The highest priority comes first, in it
//!    sequences that ran before, then those of the client that was served least (unless the policy is
//!    another), then the oldest. A sequence that finds no place takes that of paused ones and of
//!    ones with a lower priority, if it fits once all of these are gone.
//! 2. *Decode.* Every running sequence with one token to compute takes part. If there is no block
//!    for it, the lowest running sequence gives up its blocks (paused ones first, then the
//!    lowest priority, then the latest) and waits again with all its tokens, to be computed anew.
//! 3. *Prefill.* What is left of the step's tokens goes to sequences with more to compute, the
//!    highest priority first. Among equals the oldest has half for certain, and the rest goes to
//!    whoever has least left: a short prompt need not wait for a long one.
//! 4. *Speculation.* What is left then goes to proposals: tokens that may follow the known ones of a
//!    sequence that decodes, computed in the same step to be compared with what is sampled. They
//!    take blocks only while every running sequence keeps one more to grow into.
//!
//! Proposed tokens lie behind the known ones until the end of their step, when each has become
//! known or is gone. Those that are gone leave keys and values behind that are written over.
//!
//! Nothing here depends on time, except that deadlines are compared with a time that is handed in.

mod places;

use std::cmp::Reverse;
use std::ops::Range;
use std::time::Instant;

use crate::kv_cache::{BlockTable, KvCache, KvStatistics};
pub use places::QueueFull;
pub(crate) use places::{Place, Places};

/// Who comes first among waiting requests of the same priority.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SchedulerPolicy {
    /// The client for which the fewest tokens have been computed: nobody gets more by asking more
    /// often.
    #[default]
    Fair,
    /// The request that came first.
    Fifo,
}

/// How large steps may become.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Sequences that run at once, at least 1.
    pub(crate) max_sequences: usize,
    /// Tokens of a step, at least `max_sequences`.
    pub(crate) step_tokens: usize,
}

/// Where a request stands among others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Standing {
    /// Higher ones come first.
    pub(crate) priority: i32,
    /// Whom it is from.
    pub(crate) client: u64,
    /// When it is of no use any more.
    pub(crate) deadline: Option<Instant>,
}

/// Consecutive tokens of one sequence in a step.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Work {
    /// The sequence.
    pub(crate) slot: usize,
    /// Position of the first token.
    pub(crate) position: usize,
    /// Number of tokens, without proposed ones.
    pub(crate) count: usize,
}

/// A request on its way, with whatever its owner needs of it.
#[derive(Debug)]
pub(crate) struct Sequence<R> {
    /// The owner's.
    pub(crate) request: R,
    /// Set by the owner: no tokens are wanted for the time being.
    pub(crate) paused: bool,
    /// Set by the owner: most tokens that it would propose in the next step.
    pub(crate) wish: usize,
    /// Known tokens, and behind them the proposed ones.
    tokens: Vec<u32>,
    known: usize,
    computed: usize,
    /// Proposed tokens that the current step has room for.
    granted: usize,
    table: BlockTable,
    standing: Standing,
    /// Place of its client in the list of clients.
    client: usize,
    arrival: u64,
    /// Whether it has been admitted before.
    started: bool,
    /// Tokens that were found computed then.
    reused: usize,
    /// Leading tokens that cost its client nothing any more: those that were computed for it or
    /// found, once.
    charged: usize,
}

impl<R> Sequence<R> {
    /// Known tokens: prompt and output.
    pub(crate) fn tokens(&self) -> &[u32] {
        &self.tokens[..self.known]
    }

    /// Known tokens and the ones that are proposed after them.
    pub(crate) fn tokens_and_proposals(&self) -> &[u32] {
        &self.tokens
    }

    /// The owner's part and the known tokens, each for itself.
    pub(crate) fn parts(&mut self) -> (&mut R, &[u32]) {
        (&mut self.request, &self.tokens[..self.known])
    }

    /// The owner's part and the tokens with the proposed ones, each for itself.
    pub(crate) fn parts_and_proposals(&mut self) -> (&mut R, &[u32]) {
        (&mut self.request, &self.tokens)
    }

    /// Tokens that are proposed after the known ones.
    pub(crate) fn proposals(&self) -> usize {
        self.tokens.len() - self.known
    }

    /// Tokens that may still be proposed in the current step.
    pub(crate) fn proposals_left(&self) -> usize {
        self.granted - self.proposals()
    }

    /// Whether all known tokens but one are computed.
    pub(crate) fn decodes(&self) -> bool {
        self.left() == 1
    }

    /// Whether the work brings a sequence to the end of its known tokens.
    pub(crate) fn is_completed_by(&self, work: &Work) -> bool {
        work.position + work.count == self.known
    }

    /// Its tokens in the current step: known ones, and those that are proposed after the last of
    /// them.
    pub(crate) fn tokens_of(&self, work: &Work) -> &[u32] {
        let end = work.position + work.count;
        let end = if end == self.known { self.tokens.len() } else { end };
        &self.tokens[work.position..end]
    }

    /// Tokens whose keys and values were there when it was first admitted.
    pub(crate) fn reused(&self) -> usize {
        self.reused
    }

    /// Its blocks.
    pub(crate) fn blocks(&self) -> &[u32] {
        self.table.blocks()
    }

    /// Whether the step that was just computed gives it a new token.
    pub(crate) fn is_computed(&self) -> bool {
        self.computed == self.known
    }

    /// Running sequences in ascending order: those that give up their blocks first come last.
    fn rank(&self) -> (Reverse<i32>, u64) {
        (Reverse(self.standing.priority), self.arrival)
    }

    /// Charges its client for what has not been charged of `count` tokens.
    fn charge(&mut self, clients: &mut [Client], position: usize, count: usize) {
        let end = position + count;
        let more = end.saturating_sub(self.charged.max(position));
        clients[self.client].served += more as u64;
        self.charged = self.charged.max(end);
    }

    fn left(&self) -> usize {
        self.known - self.computed
    }
}

/// A client and how many tokens have been computed for it.
#[derive(Debug)]
struct Client {
    id: u64,
    /// Its sequences, running or waiting; without any it is forgotten.
    live: usize,
    served: u64,
}

/// Sequences, waiting and running, and the KV blocks they share.
#[derive(Debug)]
pub(crate) struct Scheduler<R> {
    limits: Limits,
    policy: SchedulerPolicy,
    /// Most tokens of a step that go to prompts where others write.
    prefill_tokens: usize,
    cache: KvCache,
    sequences: Vec<Option<Sequence<R>>>,
    vacant: Vec<usize>,
    waiting: Vec<usize>,
    /// In the order of their ranks.
    running: Vec<usize>,
    clients: Vec<Client>,
    /// What somebody who is always served in turn would have been served by now.
    turn: u64,
    arrivals: u64,
    preemptions: u64,
    batch: Vec<Work>,
    copies: Vec<(u32, u32)>,
    /// Room for sequences in the order in which they share a step.
    shares: Vec<usize>,
}

impl<R> Scheduler<R> {
    /// An empty scheduler over the blocks of a cache, with room for `places` sequences.
    pub(crate) fn new(
        cache: KvCache,
        limits: Limits,
        policy: SchedulerPolicy,
        places: usize,
    ) -> Self {
        assert!(limits.max_sequences > 0 && limits.step_tokens >= limits.max_sequences);
        Scheduler {
            limits,
            policy,
            prefill_tokens: limits.step_tokens,
            cache,
            sequences: (0..places).map(|_| None).collect(),
            vacant: (0..places).rev().collect(),
            waiting: Vec::with_capacity(places),
            running: Vec::with_capacity(limits.max_sequences),
            clients: Vec::with_capacity(places),
            turn: 0,
            arrivals: 0,
            preemptions: 0,
            batch: Vec::with_capacity(limits.max_sequences),
            copies: Vec::with_capacity(limits.max_sequences),
            shares: Vec::with_capacity(limits.max_sequences),
        }
    }

    /// Puts a sequence of known `tokens` among the waiting ones, with room for `most_tokens`
    /// computed ones. The caller has made sure that there is a place, and enough blocks in all.
    pub(crate) fn submit(
        &mut self,
        request: R,
        mut tokens: Vec<u32>,
        most_tokens: usize,
        standing: Standing,
    ) -> usize {
        assert!(!tokens.is_empty() && tokens.len() <= most_tokens);
        let slot = self.vacant.pop().expect("there is a place for whoever submits");
        // The last token is known, and not computed.
        tokens.reserve_exact(most_tokens + 1 - tokens.len());
        let table = BlockTable::with_capacity(most_tokens.div_ceil(self.cache.block_tokens()));
        let client = self.client(standing.client);
        self.clients[client].live += 1;
        self.sequences[slot] = Some(Sequence {
            request,
            paused: false,
            wish: 0,
            known: tokens.len(),
            tokens,
            computed: 0,
            granted: 0,
            table,
            standing,
            client,
            arrival: self.arrivals,
            started: false,
            reused: 0,
            charged: 0,
        });
        self.arrivals += 1;
        self.waiting.push(slot);
        slot
    }

    /// The place of a client in the list. One that comes anew has its turn with the others: absence
    /// earns nothing.
    fn client(&mut self, id: u64) -> usize {
        if let Some(place) = self.clients.iter().position(|c| c.live > 0 && c.id == id) {
            return place;
        }
        if self.clients.iter().all(|client| client.live == 0) {
            self.turn = 0;
        }
        self.pass_on();
        let client = Client { id, live: 0, served: self.turn };
        match self.clients.iter().position(|c| c.live == 0) {
            Some(place) => {
                self.clients[place] = client;
                place
            }
            None => {
                self.clients.push(client);
                self.clients.len() - 1
            }
        }
    }

    /// Lets the turn pass on to the client who was served least of those who can be served, and raises
    /// those who fell behind it because they could not.
    fn pass_on(&mut self) {
        let runnable = self.sequences.iter().flatten().filter(|sequence| !sequence.paused);
        let least = runnable.map(|sequence| self.clients[sequence.client].served).min();
        self.turn = self.turn.max(least.unwrap_or(0));
        for client in &mut self.clients {
            client.served = client.served.max(self.turn);
        }
    }

    /// Takes a sequence out, wherever it stands, and gives its blocks back.
    pub(crate) fn remove(&mut self, slot: usize) -> Sequence<R> {
        let mut sequence = self.sequences[slot].take().expect("the sequence is there");
        self.cache.release(&mut sequence.table);
        self.waiting.retain(|&other| other != slot);
        self.running.retain(|&other| other != slot);
        self.clients[sequence.client].live -= 1;
        self.vacant.push(slot);
        sequence
    }

    /// All sequences with their slots, in the order of these.
    pub(crate) fn sequences_mut(&mut self) -> impl Iterator<Item = (usize, &mut Sequence<R>)> {
        (0..)
            .zip(&mut self.sequences)
            .filter_map(|(slot, sequence)| Some((slot, sequence.as_mut()?)))
    }

    /// The sequence in a slot.
    pub(crate) fn sequence(&self, slot: usize) -> &Sequence<R> {
        self.sequences[slot].as_ref().expect("the sequence is there")
    }

    /// The sequence in a slot.
    pub(crate) fn sequence_mut(&mut self, slot: usize) -> &mut Sequence<R> {
        self.sequences[slot].as_mut().expect("the sequence is there")
    }

    /// The first sequence of which something holds.
    pub(crate) fn find(&self, holds: impl Fn(&Sequence<R>) -> bool) -> Option<usize> {
        self.sequences.iter().position(|sequence| sequence.as_ref().is_some_and(&holds))
    }

    /// A sequence whose deadline is over.
    pub(crate) fn expired(&self, now: Instant) -> Option<usize> {
        self.find(|sequence| sequence.standing.deadline.is_some_and(|end| end <= now))
    }

    /// The earliest deadline.
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.sequences.iter().flatten().filter_map(|sequence| sequence.standing.deadline).min()
    }

    /// Sequences that run and that wait.
    pub(crate) fn counts(&self) -> (usize, usize) {
        (self.running.len(), self.waiting.len())
    }

    /// How often a sequence gave up its blocks.
    pub(crate) fn preemptions(&self) -> u64 {
        self.preemptions
    }

    /// What the block bookkeeping has counted.
    pub(crate) fn kv_statistics(&self) -> KvStatistics {
        self.cache.statistics()
    }

    /// The block bookkeeping, for blocks that no sequence has.
    pub(crate) fn cache_mut(&mut self) -> &mut KvCache {
        &mut self.cache
    }

    /// Gives prompts at most so many tokens of a step in which others write; at least 1.
    pub(crate) fn set_prefill_tokens(&mut self, tokens: usize) {
        assert!(tokens > 0);
        self.prefill_tokens = tokens;
    }

    /// Tokens of prompts in the current step, if there are some and others write.
    pub(crate) fn prompt_tokens_beside_others(&self) -> Option<usize> {
        let prompts = self.batch.iter().filter(|work| work.count > 1);
        let (works, tokens) =
            prompts.fold((0, 0), |(works, tokens), work| (works + 1, tokens + work.count));
        (works > 0 && works < self.batch.len()).then_some(tokens)
    }

    /// Takes tokens out of the middle of a computed sequence, which waits to be computed anew.
    pub(crate) fn shorten(&mut self, slot: usize, dropped: Range<usize>) {
        let place = self.running.iter().position(|&other| other == slot);
        self.set_aside(place.expect("it was in the step"));
        let sequence = self.sequence_mut(slot);
        assert_eq!(sequence.proposals(), 0);
        sequence.known -= dropped.len();
        sequence.tokens.drain(dropped);
        // What is computed again is work for the client.
        sequence.charged = 0;
    }

    /// The tokens of the current step.
    pub(crate) fn batch(&self) -> &[Work] {
        &self.batch
    }

    /// Blocks to be copied, `(from, to)`, in this order, before the current step writes.
    pub(crate) fn copies(&self) -> &[(u32, u32)] {
        &self.copies
    }

    /// Puts the next step together. It is empty only if every sequence is paused, computed and without
    /// a new token yet, or waits for blocks that no sequence has.
    pub(crate) fn schedule(&mut self) {
        self.batch.clear();
        self.copies.clear();
        self.pass_on();
        self.admit();
        self.decode();
        self.prefill();
        self.speculate();
    }

    /// Proposes a token to follow the known and the proposed ones of a sequence in the current step,
    /// which has room for it.
    pub(crate) fn propose(&mut self, slot: usize, token: u32) {
        let sequence = self.sequence_mut(slot);
        assert!(sequence.proposals_left() > 0, "the step has room for it");
        sequence.tokens.push(token);
    }

    /// Learns that the current step has been computed. What is proposed counts once it is known.
    pub(crate) fn complete(&mut self) {
        for work in &self.batch {
            let sequence = self.sequences[work.slot].as_mut().expect("the sequence is there");
            sequence.computed = work.position + work.count;
            let known = &sequence.tokens[..sequence.computed];
            self.cache.computed(&mut sequence.table, known);
        }
    }

    /// Gives a computed sequence its next token. If it is the one that was proposed, the step has
    /// computed it already: returns whether it has, and so the token after it can come too. If not,
    /// the proposals are gone.
    pub(crate) fn push(&mut self, slot: usize, token: u32) -> bool {
        let Self { sequences, clients, cache, .. } = self;
        let sequence = sequences[slot].as_mut().expect("the sequence is there");
        assert!(sequence.is_computed());
        let accepted = sequence.tokens.get(sequence.known) == Some(&token);
        if accepted {
            sequence.charge(clients, sequence.known, 1);
            sequence.computed += 1;
            cache.computed(&mut sequence.table, &sequence.tokens[..sequence.computed]);
        } else {
            sequence.tokens.truncate(sequence.known);
            sequence.tokens.push(token);
        }
        sequence.known += 1;
        accepted
    }

    fn admit(&mut self) {
        while let Some(slot) = self.next_waiting() {
            let Self { sequences, cache, running, .. } = self;
            let sequence = sequences[slot].as_mut().expect("the sequence is there");
            let admission = if running.len() < self.limits.max_sequences {
                cache.admit(&mut sequence.table, &sequence.tokens[..sequence.known], running.len())
            } else {
                None
            };
            let Some(admission) = admission else {
                if !self.can_displace(slot) {
                    break;
                }
                self.preempt(self.lowest().expect("somebody gives way"));
                continue;
            };
            if !sequence.started {
                sequence.reused = admission.computed;
            }
            sequence.started = true;
            sequence.computed = admission.computed;
            self.copies.extend(admission.copy);
            let rank = sequence.rank();
            let place = self.running.partition_point(|&other| self.sequence(other).rank() < rank);
            self.running.insert(place, slot);
            self.waiting.retain(|&other| other != slot);
        }
    }

    /// The waiting sequence that is next.
    fn next_waiting(&self) -> Option<usize> {
        let waiting = self.waiting.iter().copied().filter(|&slot| !self.sequence(slot).paused);
        waiting.min_by_key(|&slot| {
            let Sequence { standing, started, client, arrival, .. } = self.sequence(slot);
            let served = match self.policy {
                SchedulerPolicy::Fair => self.clients[*client].served,
                SchedulerPolicy::Fifo => 0,
            };
            (Reverse(standing.priority), !started, served, *arrival)
        })
    }

    /// Place among the running of the sequence that gives up its blocks first.
    fn lowest(&self) -> Option<usize> {
        let paused = self.running.iter().rposition(|&slot| self.sequence(slot).paused);
        paused.or(self.running.len().checked_sub(1))
    }

    /// Whether running sequences make room for a waiting one, and enough of it.
    fn can_displace(&mut self, slot: usize) -> bool {
        // Its table is filled and emptied again on the way.
        let mut waiting = self.sequences[slot].take().expect("the sequence is there");
        let Self { sequences, cache, running, .. } = self;
        let priority = waiting.standing.priority;
        let count = running.len();
        let running = running.iter().map(|&slot| sequences[slot].as_ref().expect("it is running"));
        let ways = running.filter(|s| s.paused || s.standing.priority < priority);
        let left = count - ways.clone().count();
        let tables = ways.map(|sequence| &sequence.table);
        let Sequence { table, tokens, known, .. } = &mut waiting;
        let fits = left < count && cache.would_admit(table, &tokens[..*known], left, tables);
        self.sequences[slot] = Some(waiting);
        fits
    }

    /// Takes the blocks of the running sequence at that place for others, and lets it wait.
    fn preempt(&mut self, place: usize) {
        self.set_aside(place);
        self.preemptions += 1;
    }

    /// Takes the blocks of the running sequence at that place and lets it wait.
    fn set_aside(&mut self, place: usize) {
        let slot = self.running.remove(place);
        let sequence = self.sequences[slot].as_mut().expect("the sequence is there");
        self.cache.release(&mut sequence.table);
        sequence.computed = 0;
        self.waiting.push(slot);
    }

    fn decode(&mut self) {
        let mut place = 0;
        while place < self.running.len() {
            let slot = self.running[place];
            place += 1;
            let Self { sequences, cache, .. } = self;
            let sequence = sequences[slot].as_mut().expect("the sequence is there");
            if sequence.paused || sequence.left() != 1 {
                continue;
            }
            if cache.grow(&mut sequence.table, sequence.known) {
                self.take(slot, 1);
                continue;
            }
            // Those before this place stay, unless they are paused, and so are not in the batch.
            let lowest = self.lowest().expect("this one is running");
            self.preempt(lowest);
            // The same sequence again, if it was another that gave way.
            place -= if lowest < place - 1 { 2 } else { 1 };
        }
    }

    fn prefill(&mut self) {
        let mut room = self.limits.step_tokens - self.batch.len();
        if !self.batch.is_empty() {
            room = room.min(self.prefill_tokens);
        }
        let mut start = 0;
        while room > 0 && start < self.running.len() {
            let priority = |slot: usize| self.sequence(slot).standing.priority;
            let level = priority(self.running[start]);
            let equals = self.running[start..].iter().take_while(|&&slot| priority(slot) == level);
            let end = start + equals.count();

            let mut shares = std::mem::take(&mut self.shares);
            shares.clear();
            shares.extend(self.running[start..end].iter().copied().filter(|&slot| {
                let sequence = self.sequence(slot);
                !sequence.paused && sequence.left() > 1
            }));
            let oldest = shares.first().copied();
            let certain = oldest.map_or(0, |slot| self.sequence(slot).left().min(room.div_ceil(2)));
            room -= certain;
            shares.sort_unstable_by_key(|&slot| {
                let sequence = self.sequence(slot);
                (sequence.left(), sequence.arrival)
            });
            for &slot in &shares {
                let given = if Some(slot) == oldest { certain } else { 0 };
                let more = (self.sequence(slot).left() - given).min(room);
                room -= more;
                if given + more > 0 {
                    self.take(slot, given + more);
                }
            }
            self.shares = shares;
            start = end;
        }
    }

    /// Gives what is left of the step to proposals for the sequences that decode.
    fn speculate(&mut self) {
        let Self { sequences, cache, batch, running, .. } = self;
        let taken: usize = batch.iter().map(|work| work.count).sum();
        let mut room = self.limits.step_tokens - taken;
        for work in batch {
            let sequence = sequences[work.slot].as_mut().expect("the sequence is there");
            sequence.granted = 0;
            if sequence.is_completed_by(work) {
                let spare = cache.available().saturating_sub(running.len());
                let blocks = sequence.table.blocks().len() + spare;
                let storable = blocks * cache.block_tokens() - sequence.known;
                sequence.granted = sequence.wish.min(room).min(storable);
                room -= sequence.granted;
                let grown = cache.grow(&mut sequence.table, sequence.known + sequence.granted);
                assert!(grown, "the blocks were counted");
            }
        }
    }

    /// Puts the next `count` tokens of a sequence into the step.
    fn take(&mut self, slot: usize, count: usize) {
        let Self { sequences, clients, batch, .. } = self;
        let sequence = sequences[slot].as_mut().expect("the sequence is there");
        let position = sequence.computed;
        batch.push(Work { slot, position, count });
        sequence.charge(clients, position, count);
    }
}

#[cfg(test)]
mod tests;
