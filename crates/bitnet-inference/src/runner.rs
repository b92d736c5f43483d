//! A decoder with its keys and values, run over many sequences at once: one step after another.
//!
//! What runs is a list of parts, each some consecutive tokens of one sequence. There is no padding:
//! a step has one row per token. Between two steps nothing is allocated.

use std::sync::Arc;

use bitnet_core::backend::{Backend, KvLayout, Span};
use bitnet_core::{Error as CoreError, Pick};
use bitnet_model::decoder::{Decoder, Kv, Step, Workspace};

use crate::engine::{Active, Logits, Requests};
use crate::error::Error;
use crate::sampler::{Candidate, Selection};
use crate::scheduler::{Scheduler, Sequence, Work};
use crate::session::PICKS;

/// Most rows that go through the screened head together: each needs room for as many candidates as
/// the vocabulary has tokens.
const MOST_SCREENED: usize = 64;

/// How much a runner is to have room for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Room {
    /// The KV blocks.
    pub(crate) layout: KvLayout,
    /// How many of them there are.
    pub(crate) blocks: usize,
    /// Tokens of a step.
    pub(crate) tokens: usize,
    /// Sequences of a step.
    pub(crate) sequences: usize,
}

/// Tokens of one sequence in a step.
pub(crate) struct Part<'a> {
    pub(crate) tokens: &'a [u32],
    /// The block table of the sequence.
    pub(crate) blocks: &'a [u32],
    /// How many of the last tokens are to be followed by one that is sampled.
    pub(crate) wanted: usize,
}

/// A decoder on whichever device, with keys and values of its own.
pub(crate) trait Runner: Send {
    /// Copies blocks, `(from, to)`, in this order.
    fn copy(&mut self, blocks: &[(u32, u32)]);

    /// Appends the contents of a block, in the same order whatever the stages are.
    fn export(&self, block: u32, out: &mut Vec<u8>) -> Result<(), CoreError>;

    /// Restores the contents of a block that [`export`](Runner::export) wrote.
    fn import(&mut self, block: u32, data: &[u8]) -> Result<(), CoreError>;

    /// Computes a step: of each work what `part` makes of it. Returns the number of tokens. An error
    /// means that a device was lost.
    fn forward(
        &mut self,
        scheduler: &Scheduler<Active>,
        batch: &[Work],
        part: &dyn for<'a> Fn(&'a Sequence<Active>, &Work) -> Part<'a>,
    ) -> Result<usize, CoreError>;

    /// Shows the logits after the wanted tokens of the step, those of each sequence in their order.
    /// `sample` says whether those after the next token of the sequence in this slot are of use.
    fn sample(
        &mut self,
        requests: &mut Requests,
        sample: &mut dyn FnMut(&mut Requests, usize, Logits<'_>) -> bool,
    ) -> Result<(), CoreError>;
}

/// A row of the step after which a token is sampled.
#[derive(Debug, Clone, Copy)]
struct Wanted {
    slot: usize,
    row: usize,
    /// Wanted rows of the sequence before this one.
    depth: usize,
    /// Tokens of the sequence up to this row.
    length: usize,
    /// Whether some logits are enough.
    selected: bool,
}

pub(crate) struct DecoderRunner<B: Backend> {
    decoder: Arc<Decoder<B>>,
    kv: Kv<B>,
    workspace: Workspace<B>,
    // Room for one step.
    tokens: Vec<u32>,
    spans: Vec<Span<'static>>,
    wanted: Vec<Wanted>,
    // Room for those of the wanted rows whose logits are computed together.
    group: Vec<Wanted>,
    picks: Vec<Pick<'static>>,
    rows: Vec<usize>,
    selected: Vec<Vec<Candidate>>,
    logits: Vec<f32>,
}

/// The memory of a vector for other elements, which differ in lifetimes alone.
fn emptied<T, U>(mut vec: Vec<T>) -> Vec<U> {
    vec.clear();
    // Collecting what comes out of a vector into one of the same layout keeps its memory.
    vec.into_iter().map(|_| unreachable!("it is empty")).collect()
}

impl<B: Backend> DecoderRunner<B> {
    pub(crate) fn new(decoder: Arc<Decoder<B>>, room: Room) -> Result<Self, Error> {
        let Room { layout, blocks, tokens, sequences } = room;
        let group = sequences.clamp(PICKS, MOST_SCREENED);
        let vocab_size = decoder.vocab_size();
        Ok(DecoderRunner {
            kv: decoder.kv_allocate(layout, blocks)?,
            workspace: decoder.workspace(tokens, PICKS)?,
            tokens: Vec::with_capacity(tokens),
            spans: Vec::with_capacity(sequences),
            wanted: Vec::with_capacity(tokens),
            group: Vec::with_capacity(group),
            picks: Vec::with_capacity(group),
            rows: Vec::with_capacity(PICKS),
            selected: (0..group).map(|_| Vec::with_capacity(vocab_size)).collect(),
            logits: Vec::with_capacity(PICKS * vocab_size),
            decoder,
        })
    }

    /// Gets the logits of the rows of the group that need only some, if the model can tell which.
    fn select(&mut self, scheduler: &mut Scheduler<Active>) -> Result<(), CoreError> {
        let Self { decoder, workspace, group, selected, .. } = self;
        if !decoder.has_screen() {
            return Ok(());
        }
        let mut picks: Vec<Pick<'_>> = emptied(std::mem::take(&mut self.picks));
        let mut sequences = scheduler.sequences_mut();
        for rows in group.chunk_by_mut(|a, b| a.slot == b.slot) {
            let (_, sequence) =
                sequences.find(|(slot, _)| *slot == rows[0].slot).expect("both are in order");
            let (active, tokens) = sequence.parts_and_proposals();
            let history = &tokens[..rows[rows.len() - 1].length];
            if let Some(Selection { keep, exact_ids }) = active.selection(rows.len(), history) {
                for wanted in rows {
                    picks.push(Pick { row: wanted.row, keep, exact_ids });
                    wanted.selected = true;
                }
            }
        }
        if !picks.is_empty() {
            decoder.candidates(workspace, &picks, &mut selected[..picks.len()])?;
        }
        self.picks = emptied(picks);
        // The order of the picks, which is that of the results.
        group.sort_unstable_by_key(|wanted| (!wanted.selected, wanted.slot, wanted.length));
        Ok(())
    }
}

impl<B: Backend> Runner for DecoderRunner<B> {
    fn copy(&mut self, blocks: &[(u32, u32)]) {
        self.decoder.kv_copy(&mut self.kv, blocks);
    }

    fn export(&self, block: u32, out: &mut Vec<u8>) -> Result<(), CoreError> {
        self.decoder.kv_export(&self.kv, block, out)
    }

    fn import(&mut self, block: u32, data: &[u8]) -> Result<(), CoreError> {
        self.decoder.kv_import(&mut self.kv, block, data)
    }

    fn forward(
        &mut self,
        scheduler: &Scheduler<Active>,
        batch: &[Work],
        part: &dyn for<'a> Fn(&'a Sequence<Active>, &Work) -> Part<'a>,
    ) -> Result<usize, CoreError> {
        let Self { decoder, kv, workspace, tokens, wanted, .. } = self;
        tokens.clear();
        wanted.clear();
        let mut spans: Vec<Span<'_>> = emptied(std::mem::take(&mut self.spans));
        for work in batch {
            let Work { slot, position, .. } = *work;
            let part = part(scheduler.sequence(slot), work);
            let start = tokens.len();
            tokens.extend_from_slice(part.tokens);
            let rows = start..tokens.len();
            let first = rows.end - part.wanted;
            wanted.extend((first..rows.end).map(|row| Wanted {
                slot,
                row,
                depth: row - first,
                length: position + row + 1 - start,
                selected: false,
            }));
            spans.push(Span { rows, position, blocks: part.blocks });
        }
        decoder.forward(&Step { tokens, spans: &spans }, kv, workspace)?;
        self.spans = emptied(spans);
        // Of each sequence the next row first: it decides whether those after it are of use.
        wanted.sort_unstable_by_key(|wanted| (wanted.depth, wanted.slot));
        Ok(tokens.len())
    }

    fn sample(
        &mut self,
        requests: &mut Requests,
        sample: &mut dyn FnMut(&mut Requests, usize, Logits<'_>) -> bool,
    ) -> Result<(), CoreError> {
        while !self.wanted.is_empty() {
            let count = self.wanted.len().min(self.selected.len());
            self.group.clear();
            self.group.extend(self.wanted.drain(..count));
            self.group.sort_unstable_by_key(|wanted| (wanted.slot, wanted.length));
            self.select(&mut requests.scheduler)?;
            let Self { decoder, workspace, wanted, group, rows, selected, logits, .. } = self;
            // The rows of a sequence lie side by side.
            let mut settled = None;
            let mut give = |slot: usize, logits: Logits<'_>| {
                if settled != Some(slot) && !sample(requests, slot, logits) {
                    settled = Some(slot);
                    wanted.retain(|wanted| wanted.slot != slot);
                }
            };
            let screened = group.iter().take_while(|wanted| wanted.selected).count();
            for (wanted, candidates) in group[..screened].iter().zip(selected) {
                give(wanted.slot, Logits::Some(candidates));
            }
            for group in group[screened..].chunks(PICKS) {
                rows.clear();
                rows.extend(group.iter().map(|wanted| wanted.row));
                decoder.logits(workspace, rows, logits)?;
                let logits = logits.chunks_exact_mut(decoder.vocab_size());
                for (wanted, logits) in group.iter().zip(logits) {
                    give(wanted.slot, Logits::All(logits));
                }
            }
        }
        Ok(())
    }
}
