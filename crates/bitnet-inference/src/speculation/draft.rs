//! A smaller model that guesses what the model will say.
//!
//! It has keys and values of its own. Before it guesses for a sequence it reads what it has not read
//! of the sequence's tokens, at most a step full at a time. Then it samples as the sequence does, by the
//! same rules and with the random numbers of the position: so it guesses right as often as the two
//! models agree, whether the sequence is greedy or not.

use bitnet_core::Error as CoreError;

use crate::engine::Requests;
use crate::kv_cache::{BlockTable, KvCache};
use crate::runner::{Part, Runner};
use crate::scheduler::Work;

use super::{Source, Speculating};

/// The draft model's keys and values of one sequence.
#[derive(Debug, Default)]
pub(crate) struct DraftTable {
    table: BlockTable,
    /// Tokens of the sequence, known or guessed, whose keys and values are there.
    computed: usize,
}

impl DraftTable {
    /// An empty table that can grow to `blocks` blocks without allocating.
    pub(crate) fn with_capacity(blocks: usize) -> Self {
        DraftTable { table: BlockTable::with_capacity(blocks), computed: 0 }
    }

    /// Forgets what was computed of guesses: the last of these known tokens may be another.
    pub(super) fn roll_back(&mut self, known: usize) {
        self.computed = self.computed.min(known - 1);
    }

    /// Makes room for `room` tokens that begin with the known `tokens`; false if there are too few
    /// blocks.
    fn reserve(
        &mut self,
        tokens: &[u32],
        room: usize,
        cache: &mut KvCache,
        runner: &mut dyn Runner,
    ) -> bool {
        if self.table.blocks().is_empty() {
            let Some(admission) = cache.admit(&mut self.table, tokens, 0) else { return false };
            self.computed = admission.computed;
            runner.copy(admission.copy.as_slice());
        }
        cache.grow(&mut self.table, room)
    }

    /// Gives all blocks back.
    pub(crate) fn release(&mut self, cache: &mut KvCache) {
        cache.release(&mut self.table);
        self.computed = 0;
    }
}

/// The draft model of an engine.
pub(crate) struct Draft {
    runner: Box<dyn Runner>,
    /// Most tokens that it computes at once.
    step_tokens: usize,
    /// What it computes next.
    batch: Vec<Work>,
}

impl Draft {
    /// A draft for `sequences` sequences on a runner with room for so many tokens.
    pub(crate) fn new(runner: Box<dyn Runner>, step_tokens: usize, sequences: usize) -> Self {
        Draft { runner, step_tokens, batch: Vec::with_capacity(sequences) }
    }

    /// Proposes tokens for those sequences of the step that have room for some and want them from
    /// here. One that has more to be read first than fits gets none.
    pub(crate) fn propose(&mut self, requests: &mut Requests) -> Result<(), CoreError> {
        self.plan(requests);
        while !self.batch.is_empty() {
            self.runner.forward(&requests.scheduler, &self.batch, &|sequence, work| {
                let tokens = sequence.tokens_and_proposals();
                let end = work.position + work.count;
                let Some(Speculating { source: Source::Draft(draft), .. }) =
                    &sequence.request.speculating
                else {
                    unreachable!("the batch has sequences with a draft")
                };
                Part {
                    tokens: &tokens[work.position..end],
                    blocks: draft.table.blocks(),
                    wanted: usize::from(end == tokens.len()),
                }
            })?;
            self.complete(requests);
            self.runner.sample(requests, &mut |requests, slot, logits| {
                requests.guess(slot, logits);
                false
            })?;
            self.batch.retain_mut(|work| {
                *work = Work { slot: work.slot, position: work.position + work.count, count: 1 };
                let sequence = requests.scheduler.sequence(work.slot);
                let guessed = sequence.tokens_and_proposals().len() == work.position + 1;
                guessed && sequence.proposals_left() > 0
            });
        }
        Ok(())
    }

    /// Notes what is to be read before the first guess.
    fn plan(&mut self, requests: &mut Requests) {
        self.batch.clear();
        let Requests { scheduler, draft_cache: Some(cache), .. } = requests else { return };
        let mut room = self.step_tokens;
        for index in 0..scheduler.batch().len() {
            let slot = scheduler.batch()[index].slot;
            let sequence = scheduler.sequence_mut(slot);
            let proposals = sequence.proposals_left();
            let (active, tokens) = sequence.parts();
            let Some(draft) = active.draft_table() else { continue };
            // The last guess is not read.
            let most = tokens.len() + proposals.saturating_sub(1);
            if room > 0 && proposals > 0 && draft.reserve(tokens, most, cache, &mut *self.runner) {
                let position = draft.computed;
                let count = (tokens.len() - position).min(room);
                room -= count;
                self.batch.push(Work { slot, position, count });
            }
        }
    }

    /// Learns that the batch has been computed.
    fn complete(&self, requests: &mut Requests) {
        let Requests { scheduler, draft_cache: Some(cache), .. } = requests else { return };
        for work in &self.batch {
            let (active, tokens) = scheduler.sequence_mut(work.slot).parts();
            if let Some(draft) = active.draft_table() {
                draft.computed = work.position + work.count;
                // Guesses are not known, and may not be found by others.
                cache.computed(&mut draft.table, &tokens[..draft.computed.min(tokens.len())]);
            }
        }
    }
}
