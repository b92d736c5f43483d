//! ggml's `TQ1_0` and `TQ2_0`: blocks of 256 ternary weights with one f16 scale `d` at the end of
//! the block; a weight is `(code - 1) d`.
//!
//! `TQ2_0` spends 2 bits on a code: 64 bytes in two halves of 32, each half holding 128 weights;
//! weight `32 l + m` of a half is bits `2 l` of its byte `m`.
//!
//! `TQ1_0` spends 1.6 bits on most: a byte holds five base-3 digits (trits). The digits
//! `t0 .. t4` form `v = sum of t_n 3^(4-n)`, stored as `ceil(256 v / 243)`, so that `byte / 256` is the
//! fraction `0.t0 t1 t2 t3 t4` in base 3 and multiplying by 3 moves the next digit above the
//! point. 32 bytes hold weights 0..160 (byte `m`, trit `n`: weight `m + 32 n`), 16 bytes hold
//! 160..240 (`160 + m + 16 n`), 4 bytes with four trits each hold the last 16 (`240 + m + 4 n`).

/// Splits a block into its scale bytes and its code bytes.
pub(super) fn split(block: &[u8]) -> ([u8; 2], &[u8]) {
    let (codes, scale) = block.split_at(block.len() - 2);
    ([scale[0], scale[1]], codes)
}

/// The 256 codes of a `TQ2_0` block from its 64 code bytes.
#[inline]
pub(super) fn decode_tq2_0(bytes: &[u8], codes: &mut [u8]) {
    for (bytes, half) in bytes.chunks_exact(32).zip(codes.chunks_exact_mut(128)) {
        for (l, quarter) in half.chunks_exact_mut(32).enumerate() {
            for (code, &byte) in quarter.iter_mut().zip(bytes) {
                *code = byte >> (2 * l) & 3;
            }
        }
    }
}

/// The 256 codes of a `TQ1_0` block from its 52 code bytes.
#[inline]
pub(super) fn decode_tq1_0(bytes: &[u8], codes: &mut [u8]) {
    let (first, rest) = codes.split_at_mut(160);
    let (second, third) = rest.split_at_mut(80);
    decode_trits(&bytes[..32], first);
    decode_trits(&bytes[32..48], second);
    decode_trits(&bytes[48..52], third);
}

/// Trit `n` of every byte goes to the `n`-th run of `bytes.len()` codes.
#[inline]
fn decode_trits(bytes: &[u8], codes: &mut [u8]) {
    let mut power = 1u8;
    for run in codes.chunks_exact_mut(bytes.len()) {
        for (code, &byte) in run.iter_mut().zip(bytes) {
            // The wrapping product drops the trits before the n-th, which stand above the point.
            *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
        }
        power = power.wrapping_mul(3);
    }
}
