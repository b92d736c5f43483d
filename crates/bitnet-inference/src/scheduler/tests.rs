//! The scheduler with a hash in place of the model.

use std::sync::Arc;
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
    /// Guesses tokens, and three of four right.
    guesses: Random,
    /// Guesses that were right and wrong.
    right: usize,
    wrong: usize,
}

impl Engine {
    fn new(block_tokens: usize, blocks: usize, reuse: bool, limits: Limits) -> Self {
        const PLACES: usize = 12;
        let cache = KvCache::new(block_tokens, blocks, reuse);
        Engine {
            places: Places::new(PLACES, 1),
            scheduler: Scheduler::new(cache, limits, SchedulerPolicy::default(), PLACES),
            keys: vec![0; blocks * block_tokens],
            block_tokens,
            guesses: Random::new(9),
            right: 0,
            wrong: 0,
        }
    }

    fn submit(&mut self, prompt: &[u32], count: usize, standing: Standing) -> usize {
        let place = self.places.enter(|_| false).unwrap();
        let request = Request { expected: alone(prompt, count), _place: place };
        let most_tokens = prompt.len() + count - 1;
        self.scheduler.submit(request, prompt.to_vec(), most_tokens, standing)
    }

    /// Lets every sequence wish for up to so many proposals, and no more than its output has room
    /// for.
    fn wish(&mut self, most: usize) {
        for (_, sequence) in self.scheduler.sequences_mut() {
            let room = sequence.request.expected.len() - sequence.tokens().len() - 1;
            sequence.wish = most.min(room);
        }
    }

    /// Makes the guesses that the step has room for.
    fn guess(&mut self) {
        for index in 0..self.scheduler.batch().len() {
            let slot = self.scheduler.batch()[index].slot;
            while self.scheduler.sequence(slot).proposals_left() > 0 {
                let sequence = self.scheduler.sequence(slot);
                let next = sequence.request.expected[sequence.tokens_and_proposals().len()];
                let token = match self.guesses.below(4) {
                    0 => (next + 1) % 3,
                    _ => next,
                };
                self.scheduler.propose(slot, token);
            }
        }
    }

    /// Runs one step; returns what was in it and which sequences are finished.
    fn step(&mut self) -> (Vec<Work>, Vec<usize>) {
        self.scheduler.schedule();
        self.check();
        self.guess();
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
            for (position, &token) in (work.position..).zip(sequence.tokens_of(work)) {
                let before = if position == 0 { 0 } else { self.keys[place(position - 1)] };
                self.keys[place(position)] = hash(before, token);
            }
        }
        self.scheduler.complete();
        let mut finished = Vec::new();
        let batch = self.scheduler.batch().to_vec();
        for work in &batch {
            let sequence = self.scheduler.sequence(work.slot);
            let proposed = sequence.proposals();
            let mut goes_on = sequence.is_computed();
            let before = self.right;
            while goes_on {
                let sequence = self.scheduler.sequence(work.slot);
                let last = sequence.tokens().len() - 1;
                let block = sequence.blocks()[last / block_tokens] as usize;
                let key = self.keys[block * block_tokens + last % block_tokens];
                goes_on = self.scheduler.push(work.slot, (key % 3) as u32);
                self.right += usize::from(goes_on);
                let sequence = self.scheduler.sequence(work.slot);
                let known = sequence.tokens();
                assert_eq!(known, &sequence.request.expected[..known.len()]);
                assert_eq!(sequence.is_computed(), goes_on);
                if known.len() == sequence.request.expected.len() {
                    finished.push(work.slot);
                }
            }
            self.wrong += proposed - (self.right - before);
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
        let proposals = |work: &Work| self.scheduler.sequence(work.slot).proposals_left();
        let tokens = batch.iter().map(|work| work.count + proposals(work));
        assert!(tokens.sum::<usize>() <= limits.step_tokens);
        let mut slots: Vec<usize> = running.iter().chain(waiting).copied().collect();
        slots.sort_unstable();
        let live = self.scheduler.sequences.iter().enumerate();
        let live: Vec<usize> = live.filter(|(_, s)| s.is_some()).map(|(slot, _)| slot).collect();
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
    let (mut preemptions, mut right, mut wrong) = (0, 0, 0);
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
                0..=2 if engine.places.taken() < engine.places.limit() => {
                    let most = (block_tokens * blocks).min(30);
                    let prompt: Vec<u32> =
                        (0..1 + random.below(most - 1)).map(|_| random.below(3) as u32).collect();
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
                    // Half of the runs speculate.
                    engine.wish(if seed % 4 < 2 { random.below(5) } else { 0 });
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
            engine.wish(0);
            let (batch, finished) = engine.step();
            assert!(!batch.is_empty(), "nobody is stuck");
            live.retain(|slot| !finished.contains(slot));
            steps += 1;
            assert!(steps < 10_000, "nobody waits for ever");
        }
        assert_eq!(engine.scheduler.cache.available(), blocks);
        assert_eq!(engine.scheduler.counts(), (0, 0));
        preemptions += engine.scheduler.preemptions();
        (right, wrong) = (right + engine.right, wrong + engine.wrong);
    }
    assert!(preemptions > 100, "{preemptions}");
    assert!(right > 1000 && wrong > 1000, "{right} guesses were right and {wrong} wrong");
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

/// Wished and granted proposals of the next step.
fn granted(engine: &mut Engine, most: usize) -> Vec<usize> {
    engine.wish(most);
    engine.scheduler.schedule();
    let works = engine.scheduler.batch().iter();
    works.map(|work| engine.scheduler.sequence(work.slot).proposals_left()).collect()
}

#[test]
fn proposals_take_what_is_left_of_the_step() {
    let mut engine = Engine::new(4, 100, true, AMPLE);
    engine.submit(&[1], 50, standing(0));
    engine.step();
    assert_eq!(granted(&mut engine, 3), [3]);
    assert_eq!(granted(&mut engine, 20), [7]);
    engine.submit(&[2], 50, standing(0));
    engine.wish(0);
    engine.step();
    assert_eq!(granted(&mut engine, 5), [5, 1]);
    // A prompt comes before them.
    engine.submit(&[0; 5], 5, standing(0));
    assert_eq!(granted(&mut engine, 5), [1, 0, 0]);
}

#[test]
fn proposals_take_no_block_that_somebody_may_need() {
    let mut engine = Engine::new(2, 6, false, AMPLE);
    engine.submit(&[1, 2], 9, standing(0));
    engine.submit(&[2, 1], 9, standing(0));
    engine.step();
    // Each has two blocks, half of the second is free, and the two that are left are one for each.
    assert_eq!(granted(&mut engine, 5), [1, 1]);
    // With more blocks, they take them.
    let mut engine = Engine::new(2, 8, false, AMPLE);
    engine.submit(&[1, 2], 9, standing(0));
    engine.submit(&[2, 1], 9, standing(0));
    engine.step();
    assert_eq!(granted(&mut engine, 5), [5, 1]);
    assert_eq!(engine.scheduler.cache.available(), 2);
}

#[test]
fn a_client_is_charged_for_accepted_tokens_and_not_for_rejected_ones() {
    let mut engine = Engine::new(4, 100, false, AMPLE);
    let slot = engine.submit(&[1; 4], 20, standing(0));
    assert!((0..20).any(|_| {
        engine.wish(4);
        engine.step().1 == [slot]
    }));
    assert!(engine.right > 0 && engine.wrong > 0);
    assert_eq!(engine.scheduler.clients[0].served, 23, "what is computed without guesses");
}

#[test]
fn what_was_rejected_cannot_be_found_and_what_was_accepted_can() {
    let mut engine = Engine::new(2, 100, true, AMPLE);
    let slot = engine.submit(&[1, 2], 12, standing(0));
    let expected = engine.scheduler.sequence(slot).request.expected.clone();
    engine.step();
    assert_eq!(granted(&mut engine, 4), [4]);
    let wrong = (expected[4] + 1) % 3;
    for guess in [expected[3], wrong, 0, 0] {
        engine.scheduler.propose(slot, guess);
    }
    engine.scheduler.complete();
    assert!(engine.scheduler.push(slot, expected[3]));
    assert!(!engine.scheduler.push(slot, expected[4]));
    engine.scheduler.remove(slot);
    // Two blocks of known tokens; the third held one that was rejected.
    let mut table = BlockTable::default();
    let tokens = [&expected[..4], &[wrong, 0, 0]].concat();
    let admission = engine.scheduler.cache.admit(&mut table, &tokens, 0).unwrap();
    assert_eq!(admission.computed, 4);
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
    let places = Places::new(2, 1);
    let first = places.enter(|_| false).unwrap();
    let _second = places.enter(|_| false).unwrap();
    assert_eq!(places.enter(|_| false).unwrap_err(), QueueFull { limit: 2 });
    drop(first);
    assert!(places.enter(|_| false).is_ok());
    assert_eq!(places.taken(), 1);
}

#[test]
fn a_request_goes_to_the_replica_with_the_fewest_that_has_not_ended() {
    let places = Places::new(5, 3);
    let at = |ended: &[usize]| places.enter(|replica| ended.contains(&replica)).unwrap();
    let first = at(&[]);
    let second = at(&[]);
    assert_eq!((first.replica(), second.replica()), (0, 1));
    drop(first);
    let others = [at(&[0]), at(&[0]), at(&[0, 1, 2])];
    assert_eq!(others.each_ref().map(Place::replica), [2, 1, 0]);
    assert!(places.enter(|_| false).is_ok(), "the limit is one for all");
    let _last = at(&[]);
    assert_eq!(places.enter(|_| false).unwrap_err(), QueueFull { limit: 5 });
}

#[test]
fn whoever_comes_anew_does_not_pass_a_busy_client_because_somebody_stalls() {
    let mut engine = Engine::new(4, 100, false, Limits { max_sequences: 1, step_tokens: 8 });
    let of = |client| Standing { client, ..Standing::default() };
    let stalled = engine.submit(&[1; 4], 9, of(6));
    engine.step();
    engine.scheduler.sequence_mut(stalled).paused = true;
    let busy: Vec<usize> = (0..4).map(|_| engine.submit(&[1; 4], 9, of(7))).collect();
    let mut order = Vec::new();
    while order.is_empty() {
        order.extend(engine.step().1);
    }
    engine.step();
    let new: Vec<usize> = (0..3).map(|_| engine.submit(&[2; 4], 9, of(8))).collect();
    while order.len() < 7 {
        order.extend(engine.step().1);
    }
    assert_eq!(order, [busy[0], busy[1], new[0], busy[2], new[1], busy[3], new[2]]);
}

#[test]
fn a_client_that_stalled_has_not_saved_up_turns() {
    let mut engine = Engine::new(4, 100, false, Limits { max_sequences: 1, step_tokens: 8 });
    let of = |client| Standing { client, ..Standing::default() };
    let stalled: Vec<usize> = (0..3).map(|_| engine.submit(&[1; 4], 2, of(6))).collect();
    for &slot in &stalled {
        engine.scheduler.sequence_mut(slot).paused = true;
    }
    let busy: Vec<usize> = (0..6).map(|_| engine.submit(&[1; 4], 2, of(7))).collect();
    let mut order = Vec::new();
    while order.len() < 3 {
        order.extend(engine.step().1);
    }
    for &slot in &stalled {
        engine.scheduler.sequence_mut(slot).paused = false;
    }
    while order.len() < 9 {
        order.extend(engine.step().1);
    }
    assert_eq!(order[..3], busy[..3]);
    // From here on they take turns.
    assert_eq!(order[3..7], [stalled[0], busy[3], stalled[1], busy[4]]);
}

#[test]
fn what_would_not_fit_even_then_displaces_nobody() {
    let mut engine = Engine::new(2, 10, false, AMPLE);
    let high = engine.submit(&[1; 8], 6, standing(2));
    let low = engine.submit(&[2; 4], 4, standing(0));
    engine.step();
    // Six blocks, and four would be left beside the highest.
    let middle = engine.submit(&[3; 12], 2, standing(1));
    engine.step();
    assert_eq!((engine.scheduler.preemptions(), engine.scheduler.counts()), (0, (2, 1)));
    let mut order = Vec::new();
    while order.len() < 3 {
        order.extend(engine.step().1);
    }
    assert_eq!(order, [low, high, middle]);
    assert_eq!(engine.scheduler.preemptions(), 0);
}

#[test]
fn shared_blocks_are_room_once_all_who_share_them_give_way() {
    let mut engine = Engine::new(2, 8, true, AMPLE);
    let low = [0, 0].map(|priority| {
        let slot = engine.submit(&[1; 9], 4, standing(priority));
        engine.step();
        engine.step();
        slot
    });
    assert_eq!(engine.scheduler.sequence(low[1]).reused(), 8);
    let high = engine.submit(&[2; 14], 2, standing(1));
    assert!((0..5).any(|_| engine.step().1 == [high]));
    assert_eq!(engine.scheduler.preemptions(), 2);
}

#[test]
fn first_come_first_served_where_the_policy_says_so() {
    let limits = Limits { max_sequences: 1, step_tokens: 8 };
    let mut engine = Engine::new(4, 100, false, limits);
    let cache = KvCache::new(4, 100, false);
    engine.scheduler = Scheduler::new(cache, limits, SchedulerPolicy::Fifo, 12);
    let of = |client, priority| Standing { client, priority, deadline: None };
    let busy: Vec<usize> = (0..3).map(|_| engine.submit(&[1; 4], 3, of(7, 0))).collect();
    engine.step();
    let quiet = engine.submit(&[2; 4], 3, of(8, 0));
    let high = engine.submit(&[2; 4], 3, of(7, 1));
    let mut order = Vec::new();
    while order.len() < 5 {
        order.extend(engine.step().1);
    }
    assert_eq!(order, [high, busy[0], busy[1], busy[2], quiet]);
}

#[test]
fn the_share_of_prompts_holds_where_others_write() {
    let mut engine = Engine::new(4, 100, false, AMPLE);
    engine.scheduler.set_prefill_tokens(3);
    let alone = engine.submit(&[2; 12], 2, standing(0));
    let (batch, _) = engine.step();
    assert_eq!(batch, [Work { slot: alone, position: 0, count: 8 }]);
    assert_eq!(engine.scheduler.prompt_tokens_beside_others(), None);
    let mut engine = Engine::new(4, 100, false, AMPLE);
    engine.scheduler.set_prefill_tokens(3);
    let writing = engine.submit(&[1], 50, standing(0));
    engine.step();
    assert_eq!(engine.scheduler.prompt_tokens_beside_others(), None);
    let long = engine.submit(&[2; 12], 2, standing(0));
    let (batch, _) = engine.step();
    let count = |slot| batch.iter().find(|work| work.slot == slot).unwrap().count;
    assert_eq!((count(writing), count(long)), (1, 3));
    assert_eq!(engine.scheduler.prompt_tokens_beside_others(), Some(3));
}

#[test]
fn a_shortened_sequence_goes_on_from_what_was_kept() {
    let mut engine = Engine::new(2, 100, true, AMPLE);
    let slot = engine.submit(&[1, 2, 1, 0, 2, 1], 12, standing(0));
    engine.step();
    engine.step();
    let tokens = engine.scheduler.sequence(slot).tokens().to_vec();
    assert_eq!(tokens.len(), 8);
    engine.scheduler.shorten(slot, 2..5);
    let kept = [&tokens[..2], &tokens[5..]].concat();
    assert_eq!(engine.scheduler.sequence(slot).tokens(), kept);
    engine.scheduler.sequence_mut(slot).request.expected = alone(&kept, 6);
    assert!((0..20).any(|_| engine.step().1 == [slot]));
    assert_eq!(engine.scheduler.preemptions(), 0);
}
