//! ggml's `Q2_0`: blocks of 64 weights in 18 bytes, an f16 scale `d` and then 16 bytes of 2-bit
//! codes. Weight `j` of a block is bits `2 (j mod 4)` of byte `j / 4`, four neighbours to a byte
//! with the first in the low bits; its value is `(code - 1) d`. Prism's variant of the same name
//! has 128 weights in 34 bytes under the same rule.
//!
//! The format's fourth code stands for `2 d`. A tensor that uses it is not ternary, and decoding
//! it as such is an error.

use super::{BlockPacking, spread};

/// `Q2_0`, 64 or 128 wide.
pub(super) const PACKING: BlockPacking =
    BlockPacking { scale_at: 0, codes_at: 2, decode: spread, encode };

fn encode(codes: &[u8], bytes: &mut [u8]) {
    for (byte, four) in bytes.iter_mut().zip(codes.as_chunks::<4>().0) {
        let four = u32::from_le_bytes(*four);
        *byte = (four | four >> 6 | four >> 12 | four >> 18) as u8;
    }
}
