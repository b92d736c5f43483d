//! One sequence with its own keys and values: the bare decoder behind a trivial block table.

use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::Arc;

use bitnet_core::backend::{Backend, KvType, Span};
use bitnet_core::{Error as CoreError, OperationProfile, Pick, ShortcutCounts, WeightBytes};
use bitnet_model::config::ModelConfig;
use bitnet_model::decoder::{Decoder, Kv, Step, Workspace};

use crate::error::Error;
use crate::grammar::{Constraint, ConstraintError, Grammar, Vocabulary};
use crate::runner::{DecoderRunner, Room, Runner};
use crate::sampler::{Candidate, Selection};
use crate::telemetry;

/// Tokens per KV block of a session.
pub(crate) const BLOCK_TOKENS: usize = 64;

/// Tokens per step while a prompt is read: enough to share each weight's unpacking, small enough
/// that the activations stay in cache.
pub const DEFAULT_CHUNK: usize = 128;

/// Rows of logits that are in memory at once.
pub(crate) const PICKS: usize = 8;

/// How a session is set up. None of these changes a token, but the KV type.
#[derive(Debug, Clone, Copy)]
pub struct SessionOptions {
    /// Storage of keys and values.
    pub kv_type: KvType,
    /// Most tokens per step.
    pub chunk: usize,
}

impl Default for SessionOptions {
    fn default() -> Self {
        SessionOptions { kv_type: KvType::F32, chunk: DEFAULT_CHUNK }
    }
}

/// A decoder on whichever device it was loaded.
pub(crate) trait AnyDecoder: Send + Sync {
    /// The same decoder for one more owner.
    fn share(&self) -> Box<dyn AnyDecoder>;
    fn config(&self) -> &ModelConfig;
    fn vocab_size(&self) -> usize;
    fn backend_name(&self) -> String;
    fn shortcut_counts(&self) -> ShortcutCounts;
    fn profile(&self) -> Vec<OperationProfile>;
    fn weight_bytes(&self) -> WeightBytes;
    fn stages(&self) -> &[Range<usize>];
    fn session(
        &self,
        options: SessionOptions,
        vocabulary: Arc<Vocabulary>,
    ) -> Result<Session, Error>;
    /// Runs many sequences. Replicas after the first, number 0, have threads of their own.
    fn runner(&self, room: Room, replica: usize) -> Result<Box<dyn Runner>, Error>;
}

impl<B: Backend> AnyDecoder for Arc<Decoder<B>> {
    fn share(&self) -> Box<dyn AnyDecoder> {
        Box::new(self.clone())
    }

    fn config(&self) -> &ModelConfig {
        Decoder::config(self)
    }

    fn vocab_size(&self) -> usize {
        Decoder::vocab_size(self)
    }

    fn backend_name(&self) -> String {
        let names: Vec<_> = self.backends().iter().map(B::name).collect();
        names.join(" + ")
    }

    fn shortcut_counts(&self) -> ShortcutCounts {
        self.backends().iter().map(B::shortcut_counts).sum()
    }

    fn weight_bytes(&self) -> WeightBytes {
        Decoder::weight_bytes(self)
    }

    fn stages(&self) -> &[Range<usize>] {
        Decoder::stages(self)
    }

    fn profile(&self) -> Vec<OperationProfile> {
        OperationProfile::merged(self.backends().iter().flat_map(B::profile))
    }

    fn session(
        &self,
        options: SessionOptions,
        vocabulary: Arc<Vocabulary>,
    ) -> Result<Session, Error> {
        let chunk = options.chunk.clamp(1, self.config().context_length);
        let layout = self.kv_layout(options.kv_type, BLOCK_TOKENS);
        let sequence = Sequence {
            kv: self.kv_allocate(layout, 0)?,
            kv_type: options.kv_type,
            capacity_blocks: 0,
            workspace: self.workspace(chunk, PICKS)?,
            decoder: self.clone(),
            chunk,
            blocks: Vec::new(),
            length: 0,
        };
        Ok(Session { sequence: Box::new(sequence), vocabulary })
    }

    fn runner(&self, room: Room, replica: usize) -> Result<Box<dyn Runner>, Error> {
        let decoder = match replica {
            0 => self.clone(),
            _ => Arc::new(self.replica()?),
        };
        Ok(Box::new(DecoderRunner::new(decoder, room)?))
    }
}

/// Refuses tokens that the model does not have, or has no room for after `before` others. The limits
/// are the length of the context and the size of the vocabulary.
pub(crate) fn check_tokens(
    tokens: &[u32],
    before: usize,
    (context_length, vocab_size): (usize, usize),
) -> Result<(), Error> {
    if let Some(&token) = tokens.iter().find(|&&token| token as usize >= vocab_size) {
        return Err(Error::TokenOutOfRange { token, vocab_size });
    }
    let length = before + tokens.len();
    if length > context_length {
        return Err(Error::ContextExceeded { length, context_length });
    }
    if tokens.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    Ok(())
}

/// One sequence being read and written.
pub struct Session {
    sequence: Box<dyn AnySequence>,
    vocabulary: Arc<Vocabulary>,
}

trait AnySequence: Send {
    fn length(&self) -> usize;
    fn decoder_limits(&self) -> (usize, usize);
    fn truncate(&mut self, length: usize);
    fn feed(&mut self, tokens: &[u32], output: &mut Output<'_>) -> Result<(), CoreError>;
}

/// What is wanted of the tokens that are fed.
enum Output<'a> {
    /// Logits of the last token.
    Last(&'a mut Vec<f32>),
    /// Logits of the last token that can matter, or all where the model cannot tell them apart;
    /// whether it could goes into the flag.
    Selected(Selection<'a>, &'a mut Vec<Candidate>, &'a mut Vec<f32>, &'a mut bool),
    /// Logits of every token, shown one row at a time.
    Every(&'a mut dyn FnMut(&[f32])),
    /// Normed final hidden states, shown one step at a time.
    States(&'a mut dyn FnMut(&[f32])),
}

struct Sequence<B: Backend> {
    decoder: Arc<Decoder<B>>,
    kv: Kv<B>,
    kv_type: KvType,
    capacity_blocks: usize,
    workspace: Workspace<B>,
    chunk: usize,
    /// The trivial block table: block `i` is block `i`.
    blocks: Vec<u32>,
    length: usize,
}

impl<B: Backend> Sequence<B> {
    /// Makes room for `tokens` more tokens: storage doubles, and what is there moves over.
    fn reserve(&mut self, tokens: usize) -> Result<(), CoreError> {
        let needed = (self.length + tokens).div_ceil(BLOCK_TOKENS);
        if needed > self.capacity_blocks {
            let context_blocks = self.decoder.config().context_length.div_ceil(BLOCK_TOKENS);
            let layout = self.decoder.kv_layout(self.kv_type, BLOCK_TOKENS);
            let fits = |blocks: usize| {
                bitnet_core::budget::require(
                    &format!("a context of {} tokens", blocks * BLOCK_TOKENS),
                    (layout.block_bytes() * blocks) as u64,
                )
            };
            let mut capacity = needed.max(2 * self.capacity_blocks).min(context_blocks);
            if fits(capacity).is_err() {
                // Where there is no room for twice as much, what is needed now has to do.
                fits(needed)?;
                capacity = needed;
            }
            let mut larger = self.decoder.kv_allocate(layout, capacity)?;
            self.decoder.kv_transfer(&self.kv, &mut larger, &self.blocks)?;
            self.kv = larger;
            self.capacity_blocks = capacity;
            self.blocks.reserve(capacity - self.blocks.len());
        }
        self.blocks.extend(self.blocks.len() as u32..needed as u32);
        Ok(())
    }
}

impl<B: Backend> AnySequence for Sequence<B> {
    fn length(&self) -> usize {
        self.length
    }

    fn decoder_limits(&self) -> (usize, usize) {
        (self.decoder.config().context_length, self.decoder.vocab_size())
    }

    fn truncate(&mut self, length: usize) {
        self.length = self.length.min(length);
        // What the other blocks hold is written anew before it is read.
        self.blocks.truncate(self.length.div_ceil(BLOCK_TOKENS));
    }

    fn feed(&mut self, tokens: &[u32], output: &mut Output<'_>) -> Result<(), CoreError> {
        self.reserve(tokens.len())?;
        let mut values = Vec::new();
        let vocab_size = self.decoder.vocab_size();
        let mut rest = tokens;
        while !rest.is_empty() {
            let (chunk, after) = rest.split_at(self.chunk.min(rest.len()));
            let spans =
                [Span { rows: 0..chunk.len(), position: self.length, blocks: &self.blocks }];
            let Sequence { decoder, kv, workspace, .. } = self;
            let span = telemetry::step_span(1);
            span.record("rows", chunk.len());
            decoder.forward(&Step { tokens: chunk, spans: &spans }, kv, workspace)?;
            match output {
                Output::States(show) => {
                    decoder.final_states(workspace, &mut values)?;
                    show(&values);
                }
                Output::Last(logits) if after.is_empty() => {
                    decoder.logits(workspace, &[chunk.len() - 1], logits)?;
                }
                Output::Selected(selection, candidates, logits, selected) if after.is_empty() => {
                    let row = chunk.len() - 1;
                    let Selection { keep, exact_ids } = *selection;
                    let pick = Pick { row, keep, exact_ids };
                    let out = std::slice::from_mut(&mut **candidates);
                    **selected = decoder.candidates(workspace, &[pick], out)?;
                    if !**selected {
                        decoder.logits(workspace, &[row], logits)?;
                    }
                }
                Output::Last(_) | Output::Selected(..) => {}
                Output::Every(show) => {
                    let rows: Vec<usize> = (0..chunk.len()).collect();
                    for picks in rows.chunks(PICKS) {
                        decoder.logits(workspace, picks, &mut values)?;
                        values.chunks_exact(vocab_size).for_each(&mut *show);
                    }
                }
            }
            self.length += chunk.len();
            rest = after;
        }
        Ok(())
    }
}

impl Session {
    /// Tokens read so far.
    pub fn length(&self) -> usize {
        self.sequence.length()
    }

    /// Tokens that the model's context still has room for.
    pub fn remaining(&self) -> usize {
        let (context_length, _) = self.sequence.decoder_limits();
        context_length - self.length()
    }

    /// Forgets all but the first `length` tokens, so that others can follow them. Does nothing to a
    /// sequence that has no more.
    pub fn truncate(&mut self, length: usize) {
        self.sequence.truncate(length);
    }

    /// A constraint for outputs of the model, which any of these ids ends.
    pub(crate) fn grammar(
        &self,
        constraint: &Constraint,
        end_ids: &BTreeSet<u32>,
    ) -> Result<Grammar, ConstraintError> {
        Grammar::new(&self.vocabulary, constraint, end_ids)
    }

    /// Refuses tokens that cannot be read next.
    pub(crate) fn check(&self, tokens: &[u32]) -> Result<(), Error> {
        check_tokens(tokens, self.length(), self.sequence.decoder_limits())
    }

    /// Reads tokens and puts the logits `[vocabulary]` of the last of them into `logits`.
    pub fn feed(&mut self, tokens: &[u32], logits: &mut Vec<f32>) -> Result<(), Error> {
        self.check(tokens)?;
        Ok(self.sequence.feed(tokens, &mut Output::Last(logits))?)
    }

    /// Reads tokens and gets what a sampler needs of the last of them: returns whether it is in
    /// `candidates`, in ascending order of ids; if not, all logits `[vocabulary]` are in `logits`.
    pub fn feed_selected(
        &mut self,
        tokens: &[u32],
        selection: Option<Selection<'_>>,
        candidates: &mut Vec<Candidate>,
        logits: &mut Vec<f32>,
    ) -> Result<bool, Error> {
        let Some(selection) = selection else {
            self.feed(tokens, logits)?;
            return Ok(false);
        };
        self.check(tokens)?;
        let mut selected = false;
        let mut output = Output::Selected(selection, candidates, logits, &mut selected);
        self.sequence.feed(tokens, &mut output)?;
        Ok(selected)
    }

    /// Reads tokens and shows the logits `[vocabulary]` of each of them in turn.
    pub fn feed_showing_all(
        &mut self,
        tokens: &[u32],
        mut show: impl FnMut(&[f32]),
    ) -> Result<(), Error> {
        self.check(tokens)?;
        Ok(self.sequence.feed(tokens, &mut Output::Every(&mut show))?)
    }

    /// Reads tokens and shows the normed final hidden states `[tokens, hidden]`, some tokens at a
    /// time.
    pub fn feed_showing_states(
        &mut self,
        tokens: &[u32],
        mut show: impl FnMut(&[f32]),
    ) -> Result<(), Error> {
        self.check(tokens)?;
        Ok(self.sequence.feed(tokens, &mut Output::States(&mut show))?)
    }
}
