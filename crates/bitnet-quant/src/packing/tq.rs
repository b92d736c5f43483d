//! ggml's `TQ1_0` and `TQ2_0`: blocks of 256 ternary weights with one f16 scale `d` at the end of
//! the block; a weight is `(code - 1) d`.
//!
//! `TQ2_0` spends 2 bits on a code: 64 bytes in two halves of 32, each half holding 128 weights;
//! weight `32 l + m` of a half is bits `2 l` of its byte `m`.
//!
//! `TQ1_0` spends 1.6 bits on most: a byte holds five base-3 digits (trits). The digits
//! `t0 .. t4` form `v = sum of t_n 3^(4-n)`, stored as `ceil(256 v / 243)`, so that `byte / 256` is
//! just above the base-3 fraction `0.t0 t1 t2 t3 t4`, and multiplying by 3 moves the next trit before
//! the point. 32 bytes hold weights 0..160 (byte `m`, trit `n`: weight `m + 32 n`), 16 bytes hold
//! 160..240 (`160 + m + 16 n`), 4 bytes with four trits each hold the last 16 (`240 + m + 4 n`).
//! Every byte decodes to trits, so a broken file of this type cannot be told by its codes.

use super::BlockPacking;

/// `TQ1_0`.
pub(super) const TQ1_0: BlockPacking =
    BlockPacking { scale_at: 52, codes_at: 0, decode: decode_base3, encode: encode_base3 };

/// `TQ2_0`.
pub(super) const TQ2_0: BlockPacking =
    BlockPacking { scale_at: 64, codes_at: 0, decode: decode_two_bit, encode: encode_two_bit };

fn decode_two_bit(bytes: &[u8], codes: &mut [u8]) {
    let halves = codes.as_chunks_mut::<128>().0.iter_mut();
    for (half, bytes) in halves.zip(bytes.as_chunks::<32>().0) {
        for (l, quarter) in half.as_chunks_mut::<32>().0.iter_mut().enumerate() {
            for (code, byte) in quarter.iter_mut().zip(bytes) {
                *code = (byte >> (2 * l)) & 3;
            }
        }
    }
}

fn encode_two_bit(codes: &[u8], bytes: &mut [u8]) {
    for (bytes, half) in bytes.chunks_exact_mut(32).zip(codes.chunks_exact(128)) {
        for (l, quarter) in half.chunks_exact(32).enumerate() {
            for (byte, code) in bytes.iter_mut().zip(quarter) {
                *byte |= code << (2 * l);
            }
        }
    }
}

/// The three runs of a `TQ1_0` block: their bytes, and where their weights end.
const RUNS: [(usize, usize); 3] = [(32, 160), (16, 240), (4, 256)];

fn decode_base3(mut bytes: &[u8], codes: &mut [u8]) {
    let mut start = 0;
    for (len, end) in RUNS {
        let run;
        (run, bytes) = bytes.split_at(len);
        let mut power = 1u8;
        for trits in codes[start..end].chunks_exact_mut(len) {
            for (code, &byte) in trits.iter_mut().zip(run) {
                // The product wraps: the trits before this one stand before the point and go.
                *code = ((u16::from(byte.wrapping_mul(power)) * 3) >> 8) as u8;
            }
            power = power.wrapping_mul(3);
        }
        start = end;
    }
}

fn encode_base3(codes: &[u8], bytes: &mut [u8]) {
    let (mut start, mut at) = (0, 0);
    for (len, end) in RUNS {
        for m in 0..len {
            // A missing fifth trit is 0.
            let digits = codes[start..end].iter().skip(m).step_by(len);
            let value = (0u32..5)
                .zip(digits.copied().chain([0]))
                .fold(0, |value, (_, trit)| 3 * value + u32::from(trit));
            bytes[at + m] = (value * 256).div_ceil(243) as u8;
        }
        (start, at) = (end, at + len);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_243_trit_combinations_come_back_from_their_byte() {
        for value in 0..243u32 {
            let trit = |n: u32| (value / 3u32.pow(4 - n) % 3) as u8;
            let codes: Vec<u8> = (0..256).map(|i| if i < 160 { trit(i / 32) } else { 0 }).collect();
            let mut bytes = [0; 52];
            encode_base3(&codes, &mut bytes);
            let mut decoded = [9; 256];
            decode_base3(&bytes, &mut decoded);
            assert_eq!(decoded[..], codes[..], "{value}");
        }
    }
}
