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

    /// Puts the next step together. It is empty only if every sequence is paused.
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
mod tests {
    use std::time::Duration;

    use bitnet_testing::Random;

    use super::*;

    /// A model whose next token is a hash of all tokens before it. Keys are such hashes too, so
    /// that a token computed from wrong keys is wrong.
    fn hash(before: u64, token: u32) -> u64 {
        Random::new(before ^ u64::from(token).wrapping_mul(0x2545_f491_4f6c_dd1d)).bits()
    }

    fn alone(prompt: &[u32], count: usize) -> Vec<u32> {
        let mut tokens = prompt.to_vec();
        let mut key = prompt.iter().fold(0, |key, &token| hash(key, token));
        for _ in 0..count {
            let token = (key % 3) as u32;
            tokens.push(token);
            key = hash(key, token);
        }
        tokens
    }

    impl Places {
        fn taken(&self) -> usize {
            self.taken.load(Ordering::Relaxed)
        }
    }

    /// What a request is to become.
    struct Request {
        expected: Vec<u32>,
        _place: Place,
    }

    struct Engine {
        places: Arc<Places>,
        scheduler: Scheduler<Request>,
        keys: Vec<u64>,
        block_tokens: usize,
    }

    impl Engine {
        fn new(block_tokens: usize, blocks: usize, reuse: bool, limits: Limits) -> Self {
            const PLACES: usize = 12;
            let cache = KvCache::new(block_tokens, blocks, reuse);
            Engine {
                places: Places::new(PLACES),
                scheduler: Scheduler::new(cache, limits, PLACES),
                keys: vec![0; blocks * block_tokens],
                block_tokens,
            }
        }

        fn submit(&mut self, prompt: &[u32], count: usize, standing: Standing) -> usize {
            let place = self.places.enter().unwrap();
            let request = Request { expected: alone(prompt, count), _place: place };
            let most_tokens = prompt.len() + count - 1;
            self.scheduler.submit(request, prompt.to_vec(), most_tokens, standing)
        }

        /// Runs one step; returns what was in it and which sequences are finished.
        fn step(&mut self) -> (Vec<Work>, Vec<usize>) {
            self.scheduler.schedule();
            self.check();
            let block_tokens = self.block_tokens;
            for &(from, to) in self.scheduler.copies() {
                let from = from as usize * block_tokens;
                self.keys.copy_within(from..from + block_tokens, to as usize * block_tokens);
            }
            for work in self.scheduler.batch() {
                let sequence = self.scheduler.sequence(work.slot);
                let place = |position: usize| {
                    let block = sequence.blocks()[position / block_tokens] as usize;
                    block * block_tokens + position % block_tokens
                };
                for position in work.position..work.position + work.count {
                    let before = if position == 0 { 0 } else { self.keys[place(position - 1)] };
                    self.keys[place(position)] = hash(before, sequence.tokens()[position]);
                }
            }
            self.scheduler.complete();
            let mut finished = Vec::new();
            let batch = self.scheduler.batch().to_vec();
            for work in &batch {
                let sequence = self.scheduler.sequence(work.slot);
                if sequence.is_computed() {
                    let last = sequence.tokens().len() - 1;
                    let block = sequence.blocks()[last / block_tokens] as usize;
                    let key = self.keys[block * block_tokens + last % block_tokens];
                    self.scheduler.push(work.slot, (key % 3) as u32);
                    let sequence = self.scheduler.sequence(work.slot);
                    let known = sequence.tokens();
                    assert_eq!(known, &sequence.request.expected[..known.len()]);
                    if known.len() == sequence.request.expected.len() {
                        finished.push(work.slot);
                    }
                }
            }
            for &slot in &finished {
                self.scheduler.remove(slot);
            }
            (batch, finished)
        }

        /// What holds of every step.
        fn check(&self) {
            let Scheduler { limits, batch, running, waiting, .. } = &self.scheduler;
            assert!(running.len() <= limits.max_sequences);
            assert!(batch.iter().map(|work| work.count).sum::<usize>() <= limits.step_tokens);
            let mut slots: Vec<usize> = running.iter().chain(waiting).copied().collect();
            slots.sort_unstable();
            let live = self.scheduler.sequences.iter().enumerate();
            let live: Vec<usize> =
                live.filter(|(_, s)| s.is_some()).map(|(slot, _)| slot).collect();
            assert_eq!(slots, live, "every sequence is running or waiting");
            assert_eq!(self.places.taken(), live.len());
            assert!(running.is_sorted_by_key(|&slot| self.scheduler.sequence(slot).rank()));
            for &slot in running {
                let sequence = self.scheduler.sequence(slot);
                let takes_part = batch.iter().filter(|work| work.slot == slot).count();
                // Decode never waits.
                let expected = usize::from(!sequence.paused);
                assert!(takes_part <= 1 && (takes_part == expected || sequence.left() > 1));
            }
            for work in batch {
                assert!(running.contains(&work.slot) && work.count > 0);
            }
        }
    }

    fn standing(priority: i32) -> Standing {
        Standing { priority, ..Standing::default() }
    }

    #[test]
    fn random_requests_in_little_memory_get_the_tokens_they_get_alone() {
        let mut preemptions = 0;
        for seed in 0..40 {
            let random = &mut Random::new(seed);
            let (block_tokens, blocks) = (1 + random.below(4), 12 + random.below(20));
            let max_sequences = 1 + random.below(5);
            let step_tokens = max_sequences + random.below(12);
            let limits = Limits { max_sequences, step_tokens };
            let mut engine = Engine::new(block_tokens, blocks, seed % 2 == 0, limits);
            let mut live: Vec<usize> = Vec::new();
            let mut pauses = 0;
            for _ in 0..2_000 {
                match random.below(10) {
                    0..=2 if engine.places.taken() < engine.places.limit => {
                        let most = (block_tokens * blocks).min(30);
                        let prompt: Vec<u32> = (0..1 + random.below(most - 1))
                            .map(|_| random.below(3) as u32)
                            .collect();
                        let count = 1 + random.below(most - prompt.len());
                        let standing = Standing {
                            priority: random.below(3) as i32,
                            client: random.below(3) as u64,
                            deadline: None,
                        };
                        live.push(engine.submit(&prompt, count, standing));
                    }
                    3 if !live.is_empty() && random.below(4) == 0 => {
                        let slot = live.swap_remove(random.below(live.len()));
                        engine.scheduler.remove(slot);
                    }
                    4 if !live.is_empty() => {
                        let slot = live[random.below(live.len())];
                        let paused = &mut engine.scheduler.sequence_mut(slot).paused;
                        *paused = !*paused;
                        pauses += usize::from(*paused);
                    }
                    _ => {
                        let (_, finished) = engine.step();
                        live.retain(|slot| !finished.contains(slot));
                    }
                }
            }
            assert!(pauses > 0);
            for (_, sequence) in engine.scheduler.sequences_mut() {
                sequence.paused = false;
            }
            let mut steps = 0;
            while !live.is_empty() {
                let (batch, finished) = engine.step();
                assert!(!batch.is_empty(), "nobody is stuck");
                live.retain(|slot| !finished.contains(slot));
                steps += 1;
                assert!(steps < 10_000, "nobody waits for ever");
            }
            assert_eq!(engine.scheduler.cache.available(), blocks);
            assert_eq!(engine.scheduler.counts(), (0, 0));
            preemptions += engine.scheduler.preemptions();
        }
        assert!(preemptions > 100, "{preemptions}");
    }

    const AMPLE: Limits = Limits { max_sequences: 4, step_tokens: 8 };

    #[test]
    fn decode_goes_on_beside_a_long_prompt() {
        let mut engine = Engine::new(4, 100, true, AMPLE);
        let decoding = engine.submit(&[1], 50, standing(0));
        engine.step();
        let long = engine.submit(&[2; 60], 2, standing(0));
        for _ in 0..8 {
            let (batch, _) = engine.step();
            let count = |slot| batch.iter().find(|work| work.slot == slot).unwrap().count;
            assert_eq!((count(decoding), count(long)), (1, 7));
        }
    }

    #[test]
    fn a_short_prompt_overtakes_a_long_one_which_keeps_half_of_each_step() {
        let mut engine = Engine::new(4, 100, true, AMPLE);
        let long = engine.submit(&[2; 70], 2, standing(0));
        let second = engine.submit(&[0; 60], 2, standing(0));
        engine.step();
        let short = engine.submit(&[1; 4], 2, standing(0));
        let (batch, _) = engine.step();
        let count = |slot| batch.iter().find(|work| work.slot == slot).map(|work| work.count);
        assert_eq!((count(long), count(second), count(short)), (Some(4), None, Some(4)));
        // A higher priority has everything.
        let urgent = engine.submit(&[1; 20], 2, standing(1));
        let (batch, _) = engine.step();
        let count = |slot| batch.iter().find(|work| work.slot == slot).map(|work| work.count);
        assert_eq!((count(long), count(short), count(urgent)), (None, Some(1), Some(7)));
    }

    #[test]
    fn the_latest_of_the_lowest_priority_gives_up_its_blocks_and_comes_back() {
        let mut engine = Engine::new(2, 10, false, AMPLE);
        let slots = [1, 0, 0, 1].map(|priority| engine.submit(&[1, 2], 9, standing(priority)));
        let mut preempted = Vec::new();
        let mut waiting = Vec::new();
        for _ in 0..200 {
            let (batch, _) = engine.step();
            for &slot in &engine.scheduler.waiting {
                if !waiting.contains(&slot) && engine.scheduler.sequence(slot).started {
                    preempted.push(slot);
                }
            }
            waiting.clone_from(&engine.scheduler.waiting);
            if batch.is_empty() {
                break;
            }
        }
        assert_eq!(engine.scheduler.counts(), (0, 0));
        assert_eq!(preempted[..2], [slots[2], slots[1]]);
        assert!(!preempted.contains(&slots[0]), "the first of the highest priority");
        // Ten tokens each: to compute one again costs nothing.
        assert_eq!(engine.scheduler.clients[0].served, 40);
    }

    #[test]
    fn a_preempted_sequence_comes_before_new_ones_of_its_priority() {
        let mut engine = Engine::new(2, 40, true, Limits { max_sequences: 1, step_tokens: 8 });
        let from = |client, priority| Standing { priority, client, deadline: None };
        let preempted = engine.submit(&[1; 8], 2, from(1, 0));
        // Nothing has been computed for this client, and so not for the one that comes anew.
        let last = engine.submit(&[0], 1, from(4, -1));
        engine.step();
        let high = engine.submit(&[2; 4], 2, from(2, 1));
        engine.step();
        let new = engine.submit(&[3; 4], 2, from(3, 0));
        let mut order = Vec::new();
        while order.len() < 4 {
            order.extend(engine.step().1);
        }
        assert_eq!(order, [high, preempted, new, last]);
    }

    #[test]
    fn a_higher_priority_takes_the_place_of_a_lower_one() {
        let mut engine = Engine::new(2, 40, true, Limits { max_sequences: 2, step_tokens: 8 });
        let low = [0, 0].map(|priority| engine.submit(&[1, 2], 9, standing(priority)));
        engine.step();
        let high = engine.submit(&[3, 4], 2, standing(5));
        let (batch, _) = engine.step();
        let slots: Vec<usize> = batch.iter().map(|work| work.slot).collect();
        assert_eq!(slots, [low[0], high]);
        assert_eq!(engine.scheduler.waiting, [low[1]]);
    }

    #[test]
    fn a_paused_sequence_gives_way_and_holds_up_nobody() {
        // Together they need more blocks than there are: when the other grows, or when it comes.
        for prompt in [[2; 2].as_slice(), &[3; 12]] {
            let mut engine = Engine::new(2, 8, true, Limits { max_sequences: 2, step_tokens: 8 });
            let stalled = engine.submit(&[1; 8], 8, standing(9));
            engine.step();
            engine.scheduler.sequence_mut(stalled).paused = true;
            let other = engine.submit(prompt, 16 - prompt.len(), standing(0));
            assert!((0..20).any(|_| engine.step().1 == [other]));
            assert_eq!(engine.scheduler.preemptions(), 1, "the other kept its place");
            assert!(engine.step().0.is_empty());
            engine.scheduler.sequence_mut(stalled).paused = false;
            assert!((0..20).any(|_| engine.step().1 == [stalled]));
        }
    }

    #[test]
    fn clients_take_turns_however_many_requests_one_of_them_has() {
        let mut engine = Engine::new(4, 100, false, Limits { max_sequences: 1, step_tokens: 8 });
        let of = |client| Standing { client, ..Standing::default() };
        let busy: Vec<usize> = (0..5).map(|_| engine.submit(&[1; 4], 3, of(7))).collect();
        engine.step();
        let quiet: Vec<usize> = (0..2).map(|_| engine.submit(&[2; 4], 3, of(8))).collect();
        let mut order = Vec::new();
        while order.len() < 7 {
            order.extend(engine.step().1);
        }
        assert_eq!(order[..4], [busy[0], quiet[0], busy[1], quiet[1]]);
    }

    #[test]
    fn a_client_is_charged_for_what_is_computed_and_not_for_what_is_found() {
        let mut engine = Engine::new(4, 100, true, AMPLE);
        for (client, computed) in [(1, 21), (2, 2)] {
            let of = Standing { client, ..Standing::default() };
            let slot = engine.submit(&[1; 20], 2, of);
            assert!((0..20).any(|_| engine.step().1 == [slot]));
            assert_eq!(engine.scheduler.clients[0].served, computed);
        }
    }

    #[test]
    fn deadlines_are_compared_with_the_time_that_is_handed_in() {
        let mut engine = Engine::new(4, 100, true, AMPLE);
        let start = Instant::now();
        let at = |seconds| Some(start + Duration::from_secs(seconds));
        let with = |deadline| Standing { deadline, ..Standing::default() };
        engine.submit(&[1], 3, with(None));
        let late = engine.submit(&[1], 3, with(at(9)));
        let early = engine.submit(&[1], 3, with(at(5)));
        assert_eq!(engine.scheduler.next_deadline(), at(5));
        assert_eq!(engine.scheduler.expired(start), None);
        assert_eq!(engine.scheduler.expired(at(5).unwrap()), Some(early));
        engine.scheduler.remove(early);
        assert_eq!(engine.scheduler.expired(at(8).unwrap()), None);
        assert_eq!(engine.scheduler.expired(at(10).unwrap()), Some(late));
    }

    #[test]
    fn a_full_house_refuses_until_somebody_leaves() {
        let places = Places::new(2);
        let first = places.enter().unwrap();
        let _second = places.enter().unwrap();
        assert_eq!(places.enter().unwrap_err(), QueueFull { limit: 2 });
        drop(first);
        assert!(places.enter().is_ok());
        assert_eq!(places.taken(), 1);
    }
}
