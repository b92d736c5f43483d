//! Tiles of rows in quintuples, on AVX-512 with VBMI (see [`bitnet_quant::packing::tile::runs`]).

use std::arch::x86_64::*;

use bitnet_quant::packing::tile::{Tile, runs};

/// The last four codes of every byte, two bits each.
static LAST_FOUR: [u8; 256] = {
    let mut codes = [0; 256];
    let mut i = 0;
    while i < 256 {
        let mut left = i * 3 % 256;
        let mut plane = 0;
        while plane < 4 {
            codes[i] |= ((left * 3 / 256) << (2 * plane)) as u8;
            left = left * 3 % 256;
            plane += 1;
        }
        i += 1;
    }
    codes
};

/// Words whose columns are those of five tiles.
const WORDS: usize = 4;

/// See [`runs::tiles_of_quintuples`].
///
/// # Safety
/// The CPU has these instructions.
#[target_feature(enable = "avx512f,avx512bw,avx512vbmi")]
pub(super) unsafe fn tiles(words: &[Tile], tiles: &mut [Tile]) {
    // SAFETY: four registers' worth of bytes.
    let table: [__m512i; 4] = std::array::from_fn(|i| unsafe {
        _mm512_loadu_si512(LAST_FOUR.as_ptr().wrapping_add(64 * i).cast())
    });
    let (groups, _) = words.as_chunks::<WORDS>();
    let whole = groups.len().min(tiles.len() / 5);
    let (out, last_tiles) = tiles.split_at_mut(5 * whole);
    for (words, out) in groups.iter().zip(out.as_chunks_mut::<5>().0) {
        // Written out: a closure would not have the instructions of the function around it.
        macro_rules! last_four {
            ($word:expr) => {{
                let low = _mm512_permutex2var_epi8(table[0], $word, table[1]);
                let high = _mm512_permutex2var_epi8(table[2], $word, table[3]);
                _mm512_mask_blend_epi8(_mm512_movepi8_mask($word), low, high)
            }};
        }
        // The first code, in some plane of a tile: 3 * 86 is 258, 3 * 171 is 513.
        macro_rules! first {
            ($word:expr, $plane:expr) => {{
                let one = _mm512_set1_epi8(1 << (2 * $plane));
                let some = _mm512_cmpge_epu8_mask($word, _mm512_set1_epi8(86));
                let two = _mm512_cmpge_epu8_mask($word, _mm512_set1_epi8(171u8 as i8));
                let codes = _mm512_maskz_mov_epi8(some, one);
                _mm512_mask_add_epi8(codes, two, codes, one)
            }};
        }
        // Bits of `b` where the mask has ones, of `a` elsewhere: shifts are of 16 bits.
        macro_rules! join {
            ($a:expr, $b:expr, $mask:expr) => {
                _mm512_ternarylogic_epi32::<0xca>(_mm512_set1_epi8($mask as u8 as i8), $b, $a)
            };
        }
        let word: [__m512i; WORDS] = std::array::from_fn(|i| {
            // SAFETY: a tile has 64 bytes.
            unsafe { _mm512_loadu_si512(words[i].as_ptr().cast()) }
        });
        let last = [last_four!(word[0]), last_four!(word[1]), last_four!(word[2])];
        let tiles = [
            join!(first!(word[0], 0), _mm512_slli_epi16::<2>(last[0]), 0b11_11_11_00),
            join!(
                join!(first!(word[1], 1), _mm512_srli_epi16::<6>(last[0]), 0b00_00_00_11),
                _mm512_slli_epi16::<4>(last[1]),
                0b11_11_00_00
            ),
            join!(
                join!(first!(word[2], 2), _mm512_srli_epi16::<4>(last[1]), 0b00_00_11_11),
                _mm512_slli_epi16::<6>(last[2]),
                0b11_00_00_00
            ),
            join!(first!(word[3], 3), _mm512_srli_epi16::<2>(last[2]), 0b00_11_11_11),
            last_four!(word[3]),
        ];
        for (out, tile) in out.iter_mut().zip(tiles) {
            // SAFETY: as above.
            unsafe { _mm512_storeu_si512(out.as_mut_ptr().cast(), tile) };
        }
    }
    runs::tiles_of_quintuples(&words[WORDS * whole..], last_tiles);
}
