//! Bookkeeping of KV blocks: who uses which, and which hold a prefix that can be used again.
//!
//! Integers only. A backend owns what the blocks hold; here a block is a number, and it is in
//! exactly one of three states: *free*, *used* by one or more sequences, or *idle*: used by none, and
//! kept because it holds the keys and values of known tokens. Idle blocks are taken back, least
//! recently used first, when no block is free.
//!
//! Keys and values depend on the token and on all tokens before it. So what a block holds is named by
//! the name of what the block before it holds, and its own token ids. A name is a number that is
//! given once and never again; the hash of this pair only leads to where the pair itself is compared.
//! A block is found, and shared, only when it is full. Full blocks are never written to: a sequence
//! that has to, because all of its tokens were found and the last one must be computed again to get
//! its logits, writes into a copy.

use std::iter::{self, Sum};

/// No block.
const NONE: u32 = u32::MAX;

/// The name of what comes before the first block: nothing.
const ROOT: u64 = 0;

/// The blocks of one sequence.
#[derive(Debug, Default)]
pub(crate) struct BlockTable {
    blocks: Vec<u32>,
    /// How many of them, from the first, are full and have been shown to the cache.
    known: usize,
    /// Name of what the last of these holds; [`ROOT`] where there is none.
    content: u64,
}

impl BlockTable {
    /// An empty table that can grow to `blocks` blocks without allocating.
    pub(crate) fn with_capacity(blocks: usize) -> Self {
        BlockTable { blocks: Vec::with_capacity(blocks), known: 0, content: ROOT }
    }

    /// How many of its blocks, from the first, hold what the cache knows.
    pub(crate) fn known(&self) -> usize {
        self.known
    }

    /// Block numbers in the order of the tokens.
    pub(crate) fn blocks(&self) -> &[u32] {
        &self.blocks
    }
}

#[derive(Debug, Clone)]
struct Block {
    /// Tables that have this block.
    references: u32,
    /// Name of what the block holds; `None` where the cache cannot find it.
    content: Option<u64>,
    /// Name of what the block before it holds.
    parent: u64,
    /// The next block in the same bucket.
    next_in_bucket: u32,
    /// Neighbours in the list of idle blocks.
    older: u32,
    newer: u32,
}

/// What the bookkeeping has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct KvStatistics {
    /// Blocks in all.
    pub blocks: usize,
    /// Of those, blocks that sequences use.
    pub used_blocks: usize,
    /// Of the others, blocks that hold a prefix that can be used again.
    pub idle_blocks: usize,
    /// Most blocks that were in use at once; of several replicas, the sum of theirs.
    pub most_used_blocks: usize,
    /// Tokens of admitted sequences, each time they were admitted.
    pub admitted_tokens: u64,
    /// Of those, tokens whose keys and values were there already.
    pub reused_tokens: u64,
    /// Idle blocks that were taken back for other tokens.
    pub evicted_blocks: u64,
    /// Blocks that were copied because they are shared and had to be written to.
    pub copied_blocks: u64,
}

impl Sum for KvStatistics {
    fn sum<I: Iterator<Item = Self>>(all: I) -> Self {
        all.fold(KvStatistics::default(), |sum, more| KvStatistics {
            blocks: sum.blocks + more.blocks,
            used_blocks: sum.used_blocks + more.used_blocks,
            idle_blocks: sum.idle_blocks + more.idle_blocks,
            most_used_blocks: sum.most_used_blocks + more.most_used_blocks,
            admitted_tokens: sum.admitted_tokens + more.admitted_tokens,
            reused_tokens: sum.reused_tokens + more.reused_tokens,
            evicted_blocks: sum.evicted_blocks + more.evicted_blocks,
            copied_blocks: sum.copied_blocks + more.copied_blocks,
        })
    }
}

/// How a sequence gets into the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Admission {
    /// Leading tokens whose keys and values are there; at least one token is left to compute.
    pub(crate) computed: usize,
    /// A block to be copied, `(from, to)`, before anything is written. Copies of several admissions
    /// are made in their order.
    pub(crate) copy: Option<(u32, u32)>,
}

/// All blocks of a store.
#[derive(Debug)]
pub(crate) struct KvCache {
    block_tokens: usize,
    /// Whether prefixes are found again.
    reuse: bool,
    blocks: Vec<Block>,
    /// Token ids of every block that can be found, `[blocks, block_tokens]`.
    tokens: Vec<u32>,
    /// First block of each chain of blocks whose hashes end alike; the length is a power of two.
    buckets: Vec<u32>,
    /// Free blocks; the last one is taken first.
    free: Vec<u32>,
    /// Ends of the list of idle blocks.
    oldest: u32,
    newest: u32,
    /// The next name.
    next_content: u64,
    statistics: KvStatistics,
}

impl KvCache {
    /// Bookkeeping of `blocks` free blocks of `block_tokens` tokens each.
    pub(crate) fn new(block_tokens: usize, blocks: usize, reuse: bool) -> Self {
        assert!(block_tokens > 0 && blocks < NONE as usize);
        let block = Block {
            references: 0,
            content: None,
            parent: ROOT,
            next_in_bucket: NONE,
            older: NONE,
            newer: NONE,
        };
        let stored_tokens = if reuse { blocks * block_tokens } else { 0 };
        KvCache {
            block_tokens,
            reuse,
            blocks: vec![block; blocks],
            tokens: vec![0; stored_tokens],
            buckets: vec![NONE; blocks.next_power_of_two()],
            // Low numbers first: storage that was never used costs no memory.
            free: (0..blocks as u32).rev().collect(),
            oldest: NONE,
            newest: NONE,
            next_content: ROOT + 1,
            statistics: KvStatistics { blocks, ..KvStatistics::default() },
        }
    }

    /// Tokens per block.
    pub(crate) fn block_tokens(&self) -> usize {
        self.block_tokens
    }

    /// Blocks that no sequence uses.
    pub(crate) fn available(&self) -> usize {
        self.free.len() + self.statistics.idle_blocks
    }

    /// What was counted until now.
    pub(crate) fn statistics(&self) -> KvStatistics {
        self.statistics
    }

    /// Gives an empty table room for all of `tokens`, with as many of them as can be found already
    /// computed. `None`, and nothing changes, unless `spare` blocks are left over after that.
    pub(crate) fn admit(
        &mut self,
        table: &mut BlockTable,
        tokens: &[u32],
        spare: usize,
    ) -> Option<Admission> {
        let Some(all_found) = self.lookup(table, tokens, self.available(), spare) else {
            table.blocks.clear();
            return None;
        };
        let (found, copies) = (table.blocks.len(), usize::from(all_found));
        for &block in &table.blocks {
            self.share(block);
        }
        table.known = found;
        table.content = table
            .blocks
            .last()
            .map_or(ROOT, |&last| self.blocks[last as usize].content.expect("it was found"));
        let mut copy = None;
        if all_found {
            let shared = table.blocks[found - 1];
            let own = self.take();
            table.blocks[found - 1] = own;
            table.known = found - 1;
            table.content = self.blocks[shared as usize].parent;
            self.leave(shared);
            self.statistics.copied_blocks += 1;
            copy = Some((shared, own));
        }
        let room = self.grow(table, tokens.len());
        assert!(room, "the blocks were counted");
        let computed = found * self.block_tokens - copies;
        self.statistics.admitted_tokens += tokens.len() as u64;
        self.statistics.reused_tokens += computed as u64;
        Some(Admission { computed, copy })
    }

    /// Whether [`admit`](KvCache::admit) would find room once the other tables are given back, with an
    /// empty table that is left empty.
    pub(crate) fn would_admit<'a>(
        &mut self,
        table: &mut BlockTable,
        tokens: &[u32],
        spare: usize,
        others: impl Iterator<Item = &'a BlockTable> + Clone,
    ) -> bool {
        let mut available = self.available();
        let all = others.clone().flat_map(|other| &other.blocks);
        for &block in all.clone() {
            let references = &mut self.blocks[block as usize].references;
            *references -= 1;
            available += usize::from(*references == 0);
        }
        let fits = self.lookup(table, tokens, available, spare).is_some();
        table.blocks.clear();
        for &block in all {
            self.blocks[block as usize].references += 1;
        }
        fits
    }

    /// Puts the blocks that hold the beginning of `tokens` into an empty table, and says whether all
    /// of them were found. `None` if there is no room for the rest, so that `spare` of the `available`
    /// blocks are left over.
    fn lookup(
        &self,
        table: &mut BlockTable,
        tokens: &[u32],
        available: usize,
        spare: usize,
    ) -> Option<bool> {
        let mut content = ROOT;
        let mut idle = 0;
        for ids in tokens.chunks_exact(self.block_tokens) {
            let Some(block) = self.find(content, ids) else { break };
            let Block { content: Some(found), references, .. } = self.blocks[block as usize] else {
                unreachable!("a block that was found has a name")
            };
            content = found;
            idle += usize::from(references == 0);
            table.blocks.push(block);
        }
        // The last token is computed in any case, for its logits.
        let mut all_found = table.blocks.len() * self.block_tokens == tokens.len();
        if all_found && available - idle < 1 + spare {
            // There is no block for a copy: the last one is computed anew, as if it had not been
            // found, and can be evicted for that.
            let last = &self.blocks[table.blocks.pop().expect("it was found") as usize];
            idle -= usize::from(last.references == 0);
            all_found = false;
        }
        let more = tokens.len().div_ceil(self.block_tokens) - table.blocks.len();
        (available - idle >= more + usize::from(all_found) + spare).then_some(all_found)
    }

    /// Gives an empty table the blocks that hold the beginning of `tokens`, as many as are found. They
    /// stay what they are while it has them.
    pub(crate) fn hold(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        assert!(table.blocks.is_empty());
        for ids in tokens.chunks_exact(self.block_tokens) {
            let Some(block) = self.find(table.content, ids) else { break };
            self.share(block);
            table.blocks.push(block);
            table.known += 1;
            table.content = self.blocks[block as usize].content.expect("it was found");
        }
    }

    /// Gives a table room for `tokens` tokens; false, and nothing changes, if there are too few
    /// blocks.
    pub(crate) fn grow(&mut self, table: &mut BlockTable, tokens: usize) -> bool {
        let more = tokens.div_ceil(self.block_tokens).saturating_sub(table.blocks.len());
        if self.available() < more {
            return false;
        }
        for _ in 0..more {
            table.blocks.push(self.take());
        }
        true
    }

    /// Learns that the keys and values of all of `tokens`, the first of a table's sequence, are in
    /// its blocks. From then on its full blocks can be found.
    pub(crate) fn computed(&mut self, table: &mut BlockTable, tokens: &[u32]) {
        if !self.reuse {
            return;
        }
        for ids in tokens.chunks_exact(self.block_tokens).skip(table.known) {
            let parent = table.content;
            table.content = match self.find(parent, ids) {
                // Another sequence was faster: this block stays unknown, but what comes after it
                // follows the known one.
                Some(twin) => self.blocks[twin as usize].content.expect("it was found"),
                None => self.name(table.blocks[table.known], parent, ids),
            };
            table.known += 1;
        }
    }

    /// Gives a sequence's blocks back and empties its table.
    pub(crate) fn release(&mut self, table: &mut BlockTable) {
        // The last first, so that the beginning of a sequence, which more others may share, stays
        // longest.
        while let Some(block) = table.blocks.pop() {
            self.leave(block);
        }
        table.known = 0;
        table.content = ROOT;
    }

    /// One table more has the block.
    fn share(&mut self, block: u32) {
        if self.blocks[block as usize].references == 0 {
            self.unlink_idle(block);
            self.count_use();
        }
        self.blocks[block as usize].references += 1;
    }

    /// One table less has the block.
    fn leave(&mut self, block: u32) {
        let Block { references, content, .. } = &mut self.blocks[block as usize];
        *references -= 1;
        if *references == 0 {
            let findable = content.is_some();
            self.statistics.used_blocks -= 1;
            if findable {
                self.link_idle(block);
            } else {
                self.free.push(block);
            }
        }
    }

    /// A block for one table to write to.
    fn take(&mut self) -> u32 {
        let block = self.free.pop().unwrap_or_else(|| {
            let block = self.oldest;
            self.unlink_idle(block);
            self.forget(block);
            self.statistics.evicted_blocks += 1;
            block
        });
        self.blocks[block as usize].references = 1;
        self.count_use();
        block
    }

    fn count_use(&mut self) {
        let KvStatistics { used_blocks, most_used_blocks, .. } = &mut self.statistics;
        *used_blocks += 1;
        *most_used_blocks = (*most_used_blocks).max(*used_blocks);
    }

    fn bucket(&self, parent: u64, ids: &[u32]) -> usize {
        // One round of SplitMix64 for the parent's name and for each id.
        let mix = |hash: u64, word: u64| {
            let mut z = (hash ^ word).wrapping_add(0x9e37_79b9_7f4a_7c15);
            z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            z ^ (z >> 31)
        };
        let hash = ids.iter().fold(mix(0, parent), |hash, &id| mix(hash, u64::from(id)));
        hash as usize & (self.buckets.len() - 1)
    }

    fn ids(&self, block: u32) -> &[u32] {
        &self.tokens[block as usize * self.block_tokens..][..self.block_tokens]
    }

    /// The block that holds `ids` after `parent`.
    fn find(&self, parent: u64, ids: &[u32]) -> Option<u32> {
        if !self.reuse {
            return None;
        }
        self.chain(self.bucket(parent, ids))
            .find(|&block| self.blocks[block as usize].parent == parent && self.ids(block) == ids)
    }

    /// The blocks of a bucket.
    fn chain(&self, bucket: usize) -> impl Iterator<Item = u32> {
        let some = |block: u32| (block != NONE).then_some(block);
        let next = move |&block: &u32| some(self.blocks[block as usize].next_in_bucket);
        iter::successors(some(self.buckets[bucket]), next)
    }

    /// Makes a block findable as the one that holds `ids` after `parent`, and names this.
    fn name(&mut self, block: u32, parent: u64, ids: &[u32]) -> u64 {
        let bucket = self.bucket(parent, ids);
        self.tokens[block as usize * self.block_tokens..][..ids.len()].copy_from_slice(ids);
        let content = self.next_content;
        self.next_content += 1;
        let entry = &mut self.blocks[block as usize];
        entry.content = Some(content);
        entry.parent = parent;
        entry.next_in_bucket = self.buckets[bucket];
        self.buckets[bucket] = block;
        content
    }

    /// Makes a block unfindable.
    fn forget(&mut self, block: u32) {
        let Block { parent, next_in_bucket: next, .. } = self.blocks[block as usize];
        let bucket = self.bucket(parent, self.ids(block));
        if self.buckets[bucket] == block {
            self.buckets[bucket] = next;
        } else {
            let mut before = self.buckets[bucket];
            while self.blocks[before as usize].next_in_bucket != block {
                before = self.blocks[before as usize].next_in_bucket;
            }
            self.blocks[before as usize].next_in_bucket = next;
        }
        self.blocks[block as usize].content = None;
    }

    /// Appends a block to the idle ones as the newest.
    fn link_idle(&mut self, block: u32) {
        let older = std::mem::replace(&mut self.newest, block);
        let entry = &mut self.blocks[block as usize];
        (entry.older, entry.newer) = (older, NONE);
        match older {
            NONE => self.oldest = block,
            older => self.blocks[older as usize].newer = block,
        }
        self.statistics.idle_blocks += 1;
    }

    /// Takes a block out of the idle ones.
    fn unlink_idle(&mut self, block: u32) {
        let Block { older, newer, .. } = self.blocks[block as usize];
        match older {
            NONE => self.oldest = newer,
            older => self.blocks[older as usize].newer = newer,
        }
        match newer {
            NONE => self.newest = older,
            newer => self.blocks[newer as usize].older = older,
        }
        self.statistics.idle_blocks -= 1;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use bitnet_testing::Random;

    use super::*;

    /// A sequence, and how many of its tokens have been computed.
    struct Sequence {
        tokens: Vec<u32>,
        computed: usize,
        table: BlockTable,
    }

    /// A cache with a store in which a token's key is the whole sequence up to it.
    struct Model {
        cache: KvCache,
        store: Vec<Vec<Vec<u32>>>,
    }

    impl Model {
        fn new(block_tokens: usize, blocks: usize, reuse: bool) -> Self {
            Model {
                cache: KvCache::new(block_tokens, blocks, reuse),
                store: vec![vec![Vec::new(); block_tokens]; blocks],
            }
        }

        fn admit(&mut self, tokens: &[u32], spare: usize) -> Option<Sequence> {
            let mut table = BlockTable::with_capacity(0);
            let before = self.cache.available();
            let Some(admission) = self.cache.admit(&mut table, tokens, spare) else {
                assert!(table.blocks.is_empty());
                assert_eq!(self.cache.available(), before);
                return None;
            };
            assert!(self.cache.available() >= spare);
            assert!(admission.computed < tokens.len());
            if let Some((from, to)) = admission.copy {
                self.store[to as usize] = self.store[from as usize].clone();
            }
            Some(Sequence { tokens: tokens.to_vec(), computed: admission.computed, table })
        }

        fn compute(&mut self, sequence: &mut Sequence, end: usize) {
            let block_tokens = self.cache.block_tokens;
            for position in sequence.computed..end {
                let block = sequence.table.blocks[position / block_tokens];
                assert_eq!(self.cache.blocks[block as usize].references, 1, "it is written to");
                assert_eq!(self.cache.blocks[block as usize].content, None, "it is written to");
                self.store[block as usize][position % block_tokens] =
                    sequence.tokens[..=position].to_vec();
            }
            sequence.computed = end;
            self.cache.computed(&mut sequence.table, &sequence.tokens[..end]);
        }

        fn check(&self, sequences: &[Sequence]) {
            let cache = &self.cache;
            let mut references = vec![0; cache.blocks.len()];
            for sequence in sequences {
                for &block in &sequence.table.blocks {
                    references[block as usize] += 1;
                }
                for position in 0..sequence.computed {
                    let block = sequence.table.blocks[position / cache.block_tokens];
                    let key = &self.store[block as usize][position % cache.block_tokens];
                    assert_eq!(key, &sequence.tokens[..=position], "position {position}");
                }
            }
            let mut idle = Vec::new();
            let mut block = cache.oldest;
            while block != NONE {
                idle.push(block);
                block = cache.blocks[block as usize].newer;
            }
            assert_eq!(idle.last().copied().unwrap_or(NONE), cache.newest);
            let idle: HashSet<u32> = idle.into_iter().collect();
            let free: HashSet<u32> = cache.free.iter().copied().collect();
            assert_eq!(free.len(), cache.free.len());
            let mut used = 0;
            for (number, block) in (0..).zip(&cache.blocks) {
                assert_eq!(block.references, references[number as usize]);
                let states = [free.contains(&number), idle.contains(&number), block.references > 0];
                assert_eq!(states.iter().filter(|&&state| state).count(), 1, "{states:?}");
                used += usize::from(states[2]);
                // What is free cannot be found, and what is idle can.
                assert!(states[2] || block.content.is_some() == states[1]);
                if block.content.is_some() {
                    assert_eq!(cache.find(block.parent, cache.ids(number)), Some(number));
                }
            }
            let statistics = cache.statistics();
            assert_eq!(statistics.used_blocks, used);
            assert_eq!(statistics.idle_blocks, idle.len());
            assert_eq!(cache.available() + used, cache.blocks.len());
            let chained = (0..cache.buckets.len()).map(|bucket| cache.chain(bucket).count());
            let findable = cache.blocks.iter().filter(|block| block.content.is_some()).count();
            assert_eq!(chained.sum::<usize>(), findable);
        }
    }

    #[test]
    fn a_hundred_thousand_random_operations_keep_every_invariant() {
        for (seed, reuse) in [(1, true), (2, true), (3, true), (4, false)] {
            let random = &mut Random::new(seed);
            let (block_tokens, blocks) = (1 + random.below(4), 4 + random.below(28));
            let mut model = Model::new(block_tokens, blocks, reuse);
            let mut sequences: Vec<Sequence> = Vec::new();
            // Few different tokens, so that prefixes meet.
            let token = |random: &mut Random| random.below(2) as u32;
            for _ in 0..25_000 {
                let chosen = random.below(sequences.len().max(1));
                match random.below(8) {
                    0..=2 => {
                        let length = 1 + random.below(6 * block_tokens);
                        let tokens: Vec<u32> = (0..length).map(|_| token(random)).collect();
                        sequences.extend(model.admit(&tokens, random.below(3)));
                    }
                    3 if !sequences.is_empty() => {
                        let mut sequence = sequences.swap_remove(chosen);
                        model.cache.release(&mut sequence.table);
                        assert!(sequence.table.blocks.is_empty());
                    }
                    4..=5 if !sequences.is_empty() => {
                        let sequence = &mut sequences[chosen];
                        let left = sequence.tokens.len() - sequence.computed;
                        let end = sequence.computed + random.below(left + 1);
                        model.compute(sequence, end);
                    }
                    6..=7 if !sequences.is_empty() => {
                        let sequence = &mut sequences[chosen];
                        let table = &mut sequence.table;
                        let (before, available) = (table.blocks.len(), model.cache.available());
                        if model.cache.grow(table, sequence.tokens.len() + 1) {
                            sequence.tokens.push(token(random));
                        } else {
                            assert_eq!((table.blocks.len(), available), (before, 0));
                        }
                    }
                    _ => {}
                }
                model.check(&sequences);
            }
            let statistics = model.cache.statistics();
            assert_eq!(statistics.reused_tokens > 0, reuse);
            assert_eq!(statistics.evicted_blocks > 0, reuse);
            assert_eq!(statistics.copied_blocks > 0, reuse);
            for mut sequence in sequences.drain(..) {
                model.cache.release(&mut sequence.table);
            }
            model.check(&sequences);
            assert_eq!(model.cache.available(), blocks);
        }
    }

    /// Admits tokens, computes them all and releases them; returns how many were there already.
    fn pass(model: &mut Model, tokens: &[u32]) -> usize {
        let mut sequence = model.admit(tokens, 0).unwrap();
        let found = sequence.computed;
        model.compute(&mut sequence, tokens.len());
        model.cache.release(&mut sequence.table);
        found
    }

    #[test]
    fn whole_blocks_of_a_prefix_are_used_again() {
        let mut model = Model::new(4, 8, true);
        assert_eq!(pass(&mut model, &[1, 2, 3, 4, 5, 6, 7, 8, 9]), 0);
        assert_eq!(pass(&mut model, &[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]), 8);
        assert_eq!(pass(&mut model, &[1, 2, 3, 4, 5, 6, 0, 8]), 4);
        // The same ids after others are something else.
        assert_eq!(pass(&mut model, &[5, 6, 7, 8, 5, 6, 7, 8, 9]), 0);
        // Of a prompt that is there to its end, the last token is computed again, in a copy.
        assert_eq!(pass(&mut model, &[1, 2, 3, 4, 5, 6, 7, 8]), 7);
        assert_eq!(model.cache.statistics().copied_blocks, 1);
        assert_eq!(model.cache.statistics().used_blocks, 0);
    }

    #[test]
    fn the_least_recently_used_prefix_is_evicted_from_its_end() {
        let mut model = Model::new(2, 6, true);
        let (a, b) = ([1, 1, 1, 1, 1, 1], [2, 2, 2, 2, 2, 2]);
        pass(&mut model, &a);
        pass(&mut model, &b);
        assert_eq!(pass(&mut model, &[1, 1, 0]), 2);
        // Two blocks are needed: the free one, and the last of b, since a was used after b.
        assert_eq!(pass(&mut model, &[3, 3, 3, 3]), 0);
        assert_eq!(pass(&mut model, &[2, 2, 2, 2, 2]), 4);
    }

    #[test]
    fn a_sequence_that_is_found_and_leaves_no_block_for_a_copy_is_admitted_all_the_same() {
        let mut model = Model::new(2, 4, true);
        let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
        assert_eq!(pass(&mut model, &tokens), 0);
        assert_eq!(pass(&mut model, &tokens), 6);
        // It is found once more.
        assert_eq!(pass(&mut model, &tokens), 6);
        model.check(&[]);
        assert_eq!(model.cache.statistics().copied_blocks, 0);
    }

    #[test]
    fn what_does_not_fit_changes_nothing() {
        let mut model = Model::new(2, 4, true);
        pass(&mut model, &[1, 2, 3, 4]);
        let mut other = model.admit(&[5, 6], 0).unwrap();
        // Both blocks are found, and of the one left one is to be spared.
        assert!(model.admit(&[1, 2, 3, 4, 5], 1).is_none());
        assert!(!model.cache.grow(&mut other.table, 9));
        model.check(std::slice::from_ref(&other));
        let sequence = model.admit(&[1, 2, 3, 4, 5], 0).unwrap();
        assert_eq!(sequence.computed, 4);
        model.check(&[other, sequence]);
    }
}
