//! Random numbers for sampling: a function of (seed, position in the output, draw), with no state.
//!
//! Positions can be visited in any order, and more than once: with no state to advance, nothing
//! shifts a number. The function is Philox4x32-10 (Salmon, Moraes,
//! Dror, Shaw: "Parallel random numbers: as easy as 1, 2, 3", SC 2011): the seed is its key, the
//! position and the draw are its counter. It is written out here so that a seed gives the same
//! tokens in every release.

/// Multipliers of the two halves of a round, and what the key grows by between rounds.
const MULTIPLIERS: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const KEY_STEPS: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];
const ROUNDS: usize = 10;

/// The Philox4x32-10 bijection of `counter` under `key`.
fn philox4x32_10(mut counter: [u32; 4], mut key: [u32; 2]) -> [u32; 4] {
    for _ in 0..ROUNDS {
        let even = u64::from(MULTIPLIERS[0]) * u64::from(counter[0]);
        let odd = u64::from(MULTIPLIERS[1]) * u64::from(counter[2]);
        counter = [
            (odd >> 32) as u32 ^ counter[1] ^ key[0],
            odd as u32,
            (even >> 32) as u32 ^ counter[3] ^ key[1],
            even as u32,
        ];
        key = [key[0].wrapping_add(KEY_STEPS[0]), key[1].wrapping_add(KEY_STEPS[1])];
    }
    counter
}

/// 64 random bits: the `draw`-th number of output position `position` under `seed`.
///
/// The counter's words are the position's low and high half, then the draw's; the result is made
/// of words 0 (low) and 1 (high) of the block.
pub fn bits(seed: u64, position: u64, draw: u64) -> u64 {
    let words = |x: u64| [x as u32, (x >> 32) as u32];
    let [p0, p1] = words(position);
    let [d0, d1] = words(draw);
    let block = philox4x32_10([p0, p1, d0, d1], words(seed));
    u64::from(block[0]) | u64::from(block[1]) << 32
}

/// A number in `[0, 1)`: the upper 53 of [`bits`], times 2⁻⁵³.
pub fn uniform(seed: u64, position: u64, draw: u64) -> f64 {
    const UNIT: f64 = 1.0 / (1u64 << 53) as f64;
    (bits(seed, position, draw) >> 11) as f64 * UNIT
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn philox_gives_the_known_answers_of_random123() {
        // `philox4x32 10` in the kat_vectors file of the authors' Random123 library.
        for (counter, key, answer) in [
            ([0; 4], [0; 2], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]),
            ([!0; 4], [!0; 2], [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]),
            (
                [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344],
                [0xa409_3822, 0x299f_31d0],
                [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1],
            ),
        ] {
            assert_eq!(philox4x32_10(counter, key), answer);
        }
    }

    #[test]
    fn seed_position_and_draw_enter_the_block_where_documented() {
        // The known answers above, reached through the public function.
        assert_eq!(bits(0, 0, 0), 0xe169_c58d_6627_e8d5);
        assert_eq!(bits(!0, !0, !0), 0x41c8_3b0e_408f_276d);
        let (seed, position, draw) =
            (0x299f_31d0_a409_3822, 0x85a3_08d3_243f_6a88, 0x0370_7344_1319_8a2e);
        assert_eq!(bits(seed, position, draw), 0x94fd_cceb_d16c_fe09);
    }

    #[test]
    fn uniform_numbers_fill_the_unit_interval_evenly() {
        let (mut sum, mut squares) = (0.0, 0.0);
        const N: u64 = 100_000;
        for position in 0..N {
            let x = uniform(7, position, 0);
            assert!((0.0..1.0).contains(&x));
            sum += x;
            squares += x * x;
        }
        // Five standard deviations of the mean of N uniforms, and of their squares.
        let n = N as f64;
        assert!((sum / n - 0.5).abs() < 5.0 * (1.0 / 12.0 / n).sqrt());
        assert!((squares / n - 1.0 / 3.0).abs() < 5.0 * (4.0 / 45.0 / n).sqrt());
    }
}
