//! ggml's `Q2_0`: blocks of 64 weights in 18 bytes, an f16 scale `d` and then 16 bytes of 2-bit
//! codes. Weight `j` of a block is bits `2 (j mod 4)` of byte `j / 4`, four neighbours to a byte
//! with the first in the low bits; its value is `(code - 1) d`. Prism's variant of the same name
//! has 128 weights in 34 bytes under the same rule.

/// Splits a block into its scale bytes and its code bytes.
pub(super) fn split(block: &[u8]) -> ([u8; 2], &[u8]) {
    ([block[0], block[1]], &block[2..])
}

/// The codes of one block, four to a byte.
#[inline]
pub(super) fn decode_codes(bytes: &[u8], codes: &mut [u8]) {
    for (&byte, four) in bytes.iter().zip(codes.chunks_exact_mut(4)) {
        let spread = [byte & 3, byte >> 2 & 3, byte >> 4 & 3, byte >> 6];
        four.copy_from_slice(&spread);
    }
}
