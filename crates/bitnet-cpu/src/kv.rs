//! Storage of keys and values in blocks.
//!
//! Blocks that one split of attention reads, where they follow one another, form a *slab*. Memory is `[layers, slabs,
//! kv_heads, 2 (key, value), blocks of a slab]`: what attention reads in a layer is read from one end to the other, and a
//! context that grows takes new pages at one place of each layer. Within a block the tokens of a head are in panels, keys
//! transposed (see [`panel_place`]).

use std::ops::Range;

use bitnet_core::Error;
use bitnet_core::backend::{KvLayout, KvType};
use bitnet_core::mmap::Zeroed;
use bitnet_core::numerics::ATTENTION_SPLIT;

use crate::arch::{KvData, PANEL, Slabs, pair_place, panel_place, prefetch_second};
use crate::backend::require;

/// Keys and values of all layers.
pub struct KvStore {
    layout: KvLayout,
    blocks: usize,
    pub(crate) slabs: Slabs,
    pub(crate) data: KvData,
}

/// Which half of a block is meant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Key,
    Value,
}

/// The elements of one layer, and their scales if they have any: `[slabs, kv_heads, 2, blocks of a slab]` pieces.
pub(crate) enum LayerMut<'a> {
    F32(&'a mut [f32]),
    F16(&'a mut [[u8; 2]]),
    Int8(&'a mut [i8], &'a mut [f32]),
}

impl KvStore {
    pub(crate) fn new(layout: KvLayout, blocks: usize) -> Result<Self, Error> {
        const WHAT: &str = "the KV cache";
        let of_split = (ATTENTION_SPLIT / layout.block_tokens).clamp(1, blocks.max(1));
        let slabs = Slabs { blocks: of_split, pieces: 2 * layout.kv_heads * of_split };
        let count = blocks.div_ceil(of_split);
        require(WHAT, &[layout.block_bytes(), of_split, count], 1)?;
        let pieces = layout.layers * count * slabs.pieces;
        let tokens = pieces * layout.block_tokens;
        let elements = tokens * layout.head_size + 2 * PANEL;
        let data = match layout.kv_type {
            KvType::F32 => KvData::F32(Zeroed::new(WHAT, elements)?),
            KvType::F16 => KvData::F16(Zeroed::new(WHAT, elements)?),
            KvType::Int8 => {
                KvData::Int8(Zeroed::new(WHAT, elements)?, Zeroed::new(WHAT, tokens + PANEL)?)
            }
        };
        Ok(KvStore { layout, blocks, slabs, data })
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// The piece of block 0 of one head, from which [`Slabs::piece`] finds the others.
    pub(crate) fn first_piece(&self, layer: usize, side: Side, head: usize) -> usize {
        let KvLayout { layers, kv_heads, .. } = self.layout;
        assert!(layer < layers && head < kv_heads);
        layer * self.layer_pieces() + (2 * head + side as usize) * self.slabs.blocks
    }

    /// Whether it has room for nothing.
    pub(crate) fn is_empty(&self) -> bool {
        self.blocks == 0
    }

    /// Pieces of one layer.
    fn layer_pieces(&self) -> usize {
        self.blocks.div_ceil(self.slabs.blocks) * self.slabs.pieces
    }

    /// One layer, to write to.
    pub(crate) fn layer_mut(&mut self, layer: usize) -> LayerMut<'_> {
        let KvLayout { layers, head_size, block_tokens, .. } = self.layout;
        assert!(layer < layers);
        let len = self.layer_pieces() * block_tokens;
        let range = layer * len..(layer + 1) * len;
        let elements = range.start * head_size..range.end * head_size;
        match &mut self.data {
            KvData::F32(data) => LayerMut::F32(&mut data[elements]),
            KvData::F16(data) => LayerMut::F16(&mut data[elements]),
            KvData::Int8(data, scales) => LayerMut::Int8(&mut data[elements], &mut scales[range]),
        }
    }

    /// Elements and tokens of each piece of a block: of each layer the keys of all heads, then the values.
    fn pieces(&self, block: u32) -> Vec<(Range<usize>, Range<usize>)> {
        let KvLayout { layers, kv_heads, head_size, block_tokens, .. } = self.layout;
        assert!((block as usize) < self.blocks, "block {block} of {}", self.blocks);
        let mut pieces = Vec::with_capacity(2 * layers * kv_heads);
        for layer in 0..layers {
            for side in [Side::Key, Side::Value] {
                for head in 0..kv_heads {
                    let piece = self.slabs.piece(self.first_piece(layer, side, head), block);
                    let tokens = piece * block_tokens..(piece + 1) * block_tokens;
                    pieces.push((tokens.start * head_size..tokens.end * head_size, tokens));
                }
            }
        }
        pieces
    }

    pub(crate) fn copy(&mut self, from: u32, to: u32) {
        for ((from, from_tokens), (to, to_tokens)) in
            self.pieces(from).into_iter().zip(self.pieces(to))
        {
            match &mut self.data {
                KvData::F32(data) => data.copy_within(from, to.start),
                KvData::F16(data) => data.copy_within(from, to.start),
                KvData::Int8(data, scales) => {
                    data.copy_within(from, to.start);
                    scales.copy_within(from_tokens, to_tokens.start);
                }
            }
        }
    }

    /// Appends one block's contents, little-endian: the elements of each piece, then its scales if
    /// it has any.
    pub(crate) fn export(&self, block: u32, out: &mut Vec<u8>) {
        for (elements, tokens) in self.pieces(block) {
            match &self.data {
                KvData::F32(data) => {
                    out.extend(data[elements].iter().flat_map(|v| v.to_le_bytes()))
                }
                KvData::F16(data) => out.extend_from_slice(data[elements].as_flattened()),
                KvData::Int8(data, scales) => {
                    out.extend(data[elements].iter().map(|&v| v as u8));
                    out.extend(scales[tokens].iter().flat_map(|v| v.to_le_bytes()));
                }
            }
        }
    }

    /// Restores a block that [`export`](KvStore::export) wrote.
    pub(crate) fn import(&mut self, block: u32, bytes: &[u8]) {
        assert_eq!(bytes.len(), self.layout.block_bytes());
        let mut rest = bytes;
        let mut take = |len: usize| {
            let (taken, after) = rest.split_at(len);
            rest = after;
            taken
        };
        for (elements, tokens) in self.pieces(block) {
            match &mut self.data {
                KvData::F32(data) => copy_f32(take(4 * elements.len()), &mut data[elements]),
                KvData::F16(data) => {
                    let out = data[elements].as_flattened_mut();
                    out.copy_from_slice(take(out.len()));
                }
                KvData::Int8(data, scales) => {
                    let bytes = take(elements.len());
                    for (value, &byte) in data[elements].iter_mut().zip(bytes) {
                        *value = byte as i8;
                    }
                    copy_f32(take(4 * tokens.len()), &mut scales[tokens]);
                }
            }
        }
    }
}

/// Asks memory for the places of one token of one head in its block's piece, most of which lie in cache
/// lines of their own; pairs of rows lie in the same lines.
pub(crate) fn ask<T>(piece: &[T], layout: &KvLayout, side: Side, token: usize) {
    let KvLayout { head_size, block_tokens, .. } = *layout;
    let place = |element| match side {
        Side::Key => panel_place(head_size, block_tokens, element, token),
        Side::Value => panel_place(block_tokens, head_size, token, element),
    };
    let apart = if side == Side::Key { 1 } else { PANEL };
    let elements = (0..head_size).step_by(apart);
    elements.for_each(|element| prefetch_second(&piece[place(element)]));
}

/// As [`scatter`], into panels of pairs ([`pair_place`]).
pub(crate) fn scatter_pairs(
    piece: &mut [i8],
    layout: &KvLayout,
    side: Side,
    token: usize,
    values: &[i8],
) {
    let KvLayout { head_size, block_tokens, .. } = *layout;
    match side {
        // A column of one panel, two elements at a time.
        Side::Key => {
            let (pairs, last) = values.as_chunks::<2>();
            let place = pair_place(head_size, block_tokens, 0, token);
            let width = PANEL.min(block_tokens - token / PANEL * PANEL);
            for (slots, pair) in piece[place..].chunks_mut(2 * width).zip(pairs) {
                slots[..2].copy_from_slice(pair);
            }
            if let [last] = last {
                piece[pair_place(head_size, block_tokens, head_size - 1, token)] = *last;
            }
        }
        // A row of every panel.
        Side::Value => {
            let alone = token + 1 == block_tokens && token.is_multiple_of(2);
            for (i, values) in values.chunks(PANEL).enumerate() {
                let place = pair_place(block_tokens, head_size, token, i * PANEL);
                let slots = piece[place..].iter_mut().step_by(if alone { 1 } else { 2 });
                for (slot, value) in slots.zip(values) {
                    *slot = *value;
                }
            }
        }
    }
}

/// Writes one token of one head into its block's piece.
pub(crate) fn scatter<T>(
    piece: &mut [T],
    layout: &KvLayout,
    side: Side,
    token: usize,
    values: impl IntoIterator<Item = T>,
) {
    let KvLayout { head_size, block_tokens, .. } = *layout;
    let mut values = values.into_iter();
    match side {
        // A column of one panel.
        Side::Key => {
            let place = panel_place(head_size, block_tokens, 0, token);
            let width = PANEL.min(block_tokens - token / PANEL * PANEL);
            for (slot, value) in piece[place..].iter_mut().step_by(width).zip(values) {
                *slot = value;
            }
        }
        // A row of every panel.
        Side::Value => {
            for col in (0..head_size).step_by(PANEL) {
                let place = panel_place(block_tokens, head_size, token, col);
                let row = &mut piece[place..][..PANEL.min(head_size - col)];
                for (slot, value) in row.iter_mut().zip(&mut values) {
                    *slot = value;
                }
            }
        }
    }
}

fn copy_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}
