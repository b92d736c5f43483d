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
//!    sequences that ran before, then those of the client that was served least, then the oldest. A
//!    sequence that finds no place takes that of a paused one or of one with a lower priority.
//! 2. *Decode.* Every running sequence with one token to compute takes part. If there is no block
//!    for it, the lowest running sequence gives up its blocks (paused ones first, then the
//!    lowest priority, then the latest) and waits again with all its tokens, to be computed anew.
//! 3. *Prefill.* What is left of the step's tokens goes to sequences with more to compute, the
//!    highest priority first. Among equals the oldest has half for certain, and the rest goes to
//!    whoever has least left: a short prompt need not wait for a long one.
//!
//! Nothing here depends on time, except that deadlines are compared with a time that is handed in.

use std::cmp::Reverse;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use crate::kv_cache::{BlockTable, KvCache, KvStatistics};

/// No place for another request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{limit} requests are running or waiting, and there is no place for more: try again later")]
pub struct QueueFull {
    /// Requests there is place for.
    pub limit: usize,
}

/// Places for requests, running and waiting ones alike. Whoever submits takes one first, so that a
/// refusal is immediate and nothing grows without bound.
#[derive(Debug)]
pub(crate) struct Places {
    limit: usize,
    taken: AtomicUsize,
}

impl Places {
    pub(crate) fn new(limit: usize) -> Arc<Self> {
        Arc::new(Places { limit, taken: AtomicUsize::new(0) })
    }

    /// Takes a place until it is dropped.
    pub(crate) fn enter(self: &Arc<Self>) -> Result<Place, QueueFull> {
        let more = |taken| (taken < self.limit).then_some(taken + 1);
        match self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(_) => Ok(Place(Arc::clone(self))),
            Err(_) => Err(QueueFull { limit: self.limit }),
        }
    }
}

/// One of the [`Places`].
#[derive(Debug)]
pub(crate) struct Place(Arc<Places>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.taken.fetch_sub(1, Ordering::Relaxed);
    }
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
    /// Number of tokens.
    pub(crate) count: usize,
}

/// A request on its way, with whatever its owner needs of it.
#[derive(Debug)]
pub(crate) struct Sequence<R> {
    /// The owner's.
    pub(crate) request: R,
    /// Set by the owner: no tokens are wanted for the time being.
    pub(crate) paused: bool,
    tokens: Vec<u32>,
    computed: usize,
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
        &self.tokens
    }

    /// The owner's part and the tokens, each for itself.
    pub(crate) fn parts(&mut self) -> (&mut R, &[u32]) {
        (&mut self.request, &self.tokens)
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
        self.computed == self.tokens.len()
    }

    /// Running sequences in ascending order: those that give up their blocks first come last.
    fn rank(&self) -> (Reverse<i32>, u64) {
        (Reverse(self.standing.priority), self.arrival)
    }

    fn left(&self) -> usize {
        self.tokens.len() - self.computed
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
    cache: KvCache,
    sequences: Vec<Option<Sequence<R>>>,
    vacant: Vec<usize>,
    waiting: Vec<usize>,
    /// In the order of their ranks.
    running: Vec<usize>,
    clients: Vec<Client>,
    arrivals: u64,
    preemptions: u64,
    batch: Vec<Work>,
    copies: Vec<(u32, u32)>,
    /// Room for sequences in the order in which they share a step.
    shares: Vec<usize>,
}

impl<R> Scheduler<R> {
    /// An empty scheduler over the blocks of a cache, with room for `places` sequences.
    pub(crate) fn new(cache: KvCache, limits: Limits, places: usize) -> Self {
        assert!(limits.max_sequences > 0 && limits.step_tokens >= limits.max_sequences);
        Scheduler {
            limits,
            cache,
            sequences: (0..places).map(|_| None).collect(),
            vacant: (0..places).rev().collect(),
            waiting: Vec::with_capacity(places),
            running: Vec::with_capacity(limits.max_sequences),
            clients: Vec::with_capacity(places),
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
            tokens,
            computed: 0,
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

    /// The place of a client in the list. One that comes anew starts at the count of the one who
    /// was served least: absence earns nothing.
    fn client(&mut self, id: u64) -> usize {
        if let Some(place) = self.clients.iter().position(|c| c.live > 0 && c.id == id) {
            return place;
        }
        let live = self.clients.iter().filter(|client| client.live > 0);
        let served = live.map(|client| client.served).min().unwrap_or(0);
        let client = Client { id, live: 0, served };
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

    /// The tokens of the current step.
    pub(crate) fn batch(&self) -> &[Work] {
        &self.batch
    }

    /// Blocks to be copied, `(from, to)`, in this order, before the current step writes.
    pub(crate) fn copies(&self) -> &[(u32, u32)] {
        &self.copies
    }

    /// Puts the next step together. It is empty only if every sequence is paused, or computed and
    /// without a new token yet.
    pub(crate) fn schedule(&mut self) {
        self.batch.clear();
        self.copies.clear();
        self.admit();
        self.decode();
        self.prefill();
    }

    /// Learns that the current step has been computed.
    pub(crate) fn complete(&mut self) {
        for work in &self.batch {
            let sequence = self.sequences[work.slot].as_mut().expect("the sequence is there");
            sequence.computed = work.position + work.count;
            let known = &sequence.tokens[..sequence.computed];
            self.cache.computed(&mut sequence.table, known);
        }
    }

    /// Appends the token that a computed sequence got.
    pub(crate) fn push(&mut self, slot: usize, token: u32) {
        let sequence = self.sequence_mut(slot);
        assert!(sequence.is_computed());
        sequence.tokens.push(token);
    }

    fn admit(&mut self) {
        while let Some(slot) = self.next_waiting() {
            let Self { sequences, cache, running, .. } = self;
            let sequence = sequences[slot].as_mut().expect("the sequence is there");
            let admission = if running.len() < self.limits.max_sequences {
                cache.admit(&mut sequence.table, &sequence.tokens, running.len())
            } else {
                None
            };
            let Some(admission) = admission else {
                let priority = sequence.standing.priority;
                match self.lowest() {
                    Some(lowest) if self.gives_way(lowest, priority) => self.preempt(lowest),
                    _ => break,
                }
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
            (Reverse(standing.priority), !started, self.clients[*client].served, *arrival)
        })
    }

    /// Place among the running of the sequence that gives up its blocks first.
    fn lowest(&self) -> Option<usize> {
        let paused = self.running.iter().rposition(|&slot| self.sequence(slot).paused);
        paused.or(self.running.len().checked_sub(1))
    }

    /// Whether the sequence at that place makes room for one of this priority.
    fn gives_way(&self, place: usize, priority: i32) -> bool {
        let sequence = self.sequence(self.running[place]);
        sequence.paused || sequence.standing.priority < priority
    }

    /// Takes the blocks of the running sequence at that place and lets it wait.
    fn preempt(&mut self, place: usize) {
        let slot = self.running.remove(place);
        let sequence = self.sequences[slot].as_mut().expect("the sequence is there");
        self.cache.release(&mut sequence.table);
        sequence.computed = 0;
        self.waiting.push(slot);
        self.preemptions += 1;
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
            let known = sequence.tokens.len();
            if cache.grow(&mut sequence.table, known) {
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

    /// Puts the next `count` tokens of a sequence into the step.
    fn take(&mut self, slot: usize, count: usize) {
        let Self { sequences, clients, batch, .. } = self;
        let sequence = sequences[slot].as_mut().expect("the sequence is there");
        let position = sequence.computed;
        batch.push(Work { slot, position, count });
        let end = position + count;
        let more = end.saturating_sub(sequence.charged.max(position));
        clients[sequence.client].served += more as u64;
        sequence.charged = sequence.charged.max(end);
    }
}

#[cfg(test)]
mod tests;
