//! In which order a band's tiles meet the tokens. The functions are `inline(always)` so that they
//! take on the instructions of the function that they are called from.

use std::mem::MaybeUninit;

use super::{Tile, prefetch, tile};

/// Tiles whose unpacked codes a block holds: 16 kB, which stay in the first-level cache.
const TILES_PER_BLOCK: usize = 64;

/// How many of `tokens` to take in each pass if one can take `most`: about the same number in all,
/// because a pass of few tokens costs more for each.
pub(super) fn evenly(tokens: usize, most: usize) -> usize {
    tokens.div_ceil(tokens.div_ceil(most).max(1)).max(1)
}

/// Calls `pass` for each `per_pass` tokens, with `tiles`, the tokens' activations (the first
/// token's; the others follow at `stride`), `stride` and their part of `acc`. `next` is what will
/// be read after `tiles`: where there are several passes, they hide its way from memory.
#[inline(always)]
pub(super) fn in_passes<S>(
    tiles: &[S],
    (mut next, lines): (*const Tile, usize),
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
    per_pass: usize,
    pass: impl Fn(&[S], *const i8, usize, &mut [[i32; tile::ROWS]]),
) {
    let passes = acc.len().div_ceil(per_pass);
    let ahead = if passes > 1 { lines.div_ceil(passes) } else { 0 };
    let mut start = q;
    for group in acc.chunks_mut(per_pass) {
        for _ in 0..ahead {
            prefetch(next);
            next = next.wrapping_add(1);
        }
        pass(tiles, start, stride, group);
        start = start.wrapping_add(per_pass * stride);
    }
}

/// [`in_passes`] for many tokens: a block of columns is unpacked once, to tiles of a form that suits
/// the instruction set, and then meets all tokens, so that the multiplication is all that is left
/// to do.
#[inline(always)]
pub(super) fn in_blocks<U>(
    tiles: &[Tile],
    q: *const i8,
    stride: usize,
    acc: &mut [[i32; tile::ROWS]],
    per_pass: usize,
    unpack: impl Fn(&Tile) -> U,
    pass: impl Fn(&[U], *const i8, usize, &mut [[i32; tile::ROWS]]),
) {
    let mut unpacked = [const { MaybeUninit::<U>::uninit() }; TILES_PER_BLOCK];
    for (block, tiles) in tiles.chunks(TILES_PER_BLOCK).enumerate() {
        for (unpacked, tile) in unpacked.iter_mut().zip(tiles) {
            unpacked.write(unpack(tile));
        }
        // SAFETY: as many as there are tiles were written.
        let unpacked = unsafe { unpacked[..tiles.len()].assume_init_ref() };
        let start = q.wrapping_add(block * TILES_PER_BLOCK * tile::COLS);
        // Blocks and bands follow each other in memory. A block is as long as a page, at whose end
        // the prefetcher of the CPU stops.
        let next = tiles.as_ptr_range().end;
        in_passes(unpacked, (next, tiles.len()), start, stride, acc, per_pass, &pass);
    }
}
