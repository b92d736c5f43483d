//! Storage of keys and values in blocks.
//!
//! A block holds `[layers, 2 (key, value), kv_heads, block_tokens]` rows of `head_size` elements, so
//! that attention walks the tokens of one head in order and a block is copied in one piece.

use std::ops::Range;

use bitnet_core::Error;
use bitnet_core::backend::{KvLayout, KvType};
use half::f16;

use crate::arch::{HeadPlace, Kernels, KvRows};
use crate::backend::require;

/// Keys and values of all layers.
pub struct KvStore {
    layout: KvLayout,
    pub(crate) rows: KvRows,
}

/// Which half of a block is meant.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Side {
    Key,
    Value,
}

impl KvStore {
    pub(crate) fn new(layout: KvLayout, blocks: usize) -> Result<Self, Error> {
        require("the KV cache", &[layout.block_bytes(), blocks], 1)?;
        let rows = block_rows(&layout) * blocks;
        let elements = rows * layout.head_size;
        let rows = match layout.kv_type {
            KvType::F32 => KvRows::F32(vec![0.0; elements]),
            KvType::F16 => KvRows::F16(vec![[0; 2]; elements]),
            KvType::Int8 => KvRows::Int8(vec![0; elements], vec![0.0; rows]),
        };
        Ok(KvStore { layout, rows })
    }

    pub(crate) fn layout(&self) -> &KvLayout {
        &self.layout
    }

    /// Where the rows of one head are.
    pub(crate) fn place(&self, layer: usize, side: Side, head: usize) -> HeadPlace {
        let KvLayout { layers, kv_heads, block_tokens, .. } = self.layout;
        assert!(layer < layers && head < kv_heads);
        HeadPlace {
            first: ((2 * layer + side as usize) * kv_heads + head) * block_tokens,
            block_rows: block_rows(&self.layout),
            block_tokens,
        }
    }

    /// Stores one row, rounding it to the storage type.
    pub(crate) fn write(&mut self, kernels: &Kernels, row: usize, values: &[f32]) {
        let range = row * values.len()..(row + 1) * values.len();
        match &mut self.rows {
            KvRows::F32(rows) => rows[range].copy_from_slice(values),
            KvRows::F16(rows) => {
                for (half, value) in rows[range].iter_mut().zip(values) {
                    *half = f16::from_f32(*value).to_le_bytes();
                }
            }
            KvRows::Int8(rows, scales) => {
                scales[row] = kernels.quantize_head(values, &mut rows[range]);
            }
        }
    }

    /// Rows and elements of one block.
    fn block(&self, block: u32) -> (Range<usize>, Range<usize>) {
        let (block, rows) = (block as usize, block_rows(&self.layout));
        let elements = rows * self.layout.head_size;
        (block * rows..(block + 1) * rows, block * elements..(block + 1) * elements)
    }

    pub(crate) fn copy(&mut self, from: u32, to: u32) {
        let (from_rows, from) = self.block(from);
        let (to_rows, to) = self.block(to);
        match &mut self.rows {
            KvRows::F32(rows) => rows.copy_within(from, to.start),
            KvRows::F16(rows) => rows.copy_within(from, to.start),
            KvRows::Int8(rows, scales) => {
                rows.copy_within(from, to.start);
                scales.copy_within(from_rows, to_rows.start);
            }
        }
    }

    /// Appends one block's contents, little-endian: its elements, then its scales if it has any.
    pub(crate) fn export(&self, block: u32, out: &mut Vec<u8>) {
        let (row_range, range) = self.block(block);
        match &self.rows {
            KvRows::F32(rows) => out.extend(rows[range].iter().flat_map(|v| v.to_le_bytes())),
            KvRows::F16(rows) => out.extend_from_slice(rows[range].as_flattened()),
            KvRows::Int8(rows, scales) => {
                out.extend(rows[range].iter().map(|&v| v as u8));
                out.extend(scales[row_range].iter().flat_map(|v| v.to_le_bytes()));
            }
        }
    }

    /// Restores a block that [`export`](KvStore::export) wrote.
    pub(crate) fn import(&mut self, block: u32, data: &[u8]) {
        assert_eq!(data.len(), self.layout.block_bytes());
        let (row_range, range) = self.block(block);
        match &mut self.rows {
            KvRows::F32(rows) => copy_f32(data, &mut rows[range]),
            KvRows::F16(rows) => rows[range].as_flattened_mut().copy_from_slice(data),
            KvRows::Int8(rows, scales) => {
                let (elements, scale_bytes) = data.split_at(range.len());
                for (value, &byte) in rows[range].iter_mut().zip(elements) {
                    *value = byte as i8;
                }
                copy_f32(scale_bytes, &mut scales[row_range]);
            }
        }
    }
}

/// Rows of `head_size` elements in one block.
fn block_rows(layout: &KvLayout) -> usize {
    2 * layout.layers * layout.kv_heads * layout.block_tokens
}

fn copy_f32(bytes: &[u8], out: &mut [f32]) {
    for (value, bytes) in out.iter_mut().zip(bytes.as_chunks::<4>().0) {
        *value = f32::from_le_bytes(*bytes);
    }
}
