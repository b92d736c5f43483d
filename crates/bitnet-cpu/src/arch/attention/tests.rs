//! The numbers at the ends of what the kernels are made for.

use bitnet_core::mmap::Plain;
use bitnet_testing::Random;

use super::*;
use crate::arch::Kernels;
use crate::arch::tests::all_kernels;

fn zeroed<T: Plain>(len: usize) -> Zeroed<T> {
    Zeroed::new("a test", len).expect("memory")
}

/// Attention of one query over one block of `tokens`, in piece 0 the keys and in piece 1 the values, as
/// [`attend`] leaves it for the first split.
fn partial(kernels: &Kernels, query: &[f32], tokens: usize, data: &KvData) -> Vec<f32> {
    let head_size = query.len();
    let attention = Attention {
        queries: query,
        stride: head_size,
        shared: 1,
        head_size,
        position: tokens - 1,
        tokens: 1,
        window: None,
        scale: 1.0,
        data,
        keys: 0,
        values: 1,
        slabs: Slabs { blocks: 1, pieces: 2 },
        block_tokens: tokens,
        blocks: &[0],
    };
    let (floats, shorts) = room_len(1, head_size);
    let (mut floats, mut shorts) = (vec![f32::NAN; floats], vec![i16::MAX; shorts]);
    let room = Room { floats: &mut floats, shorts: &mut shorts };
    let mut partial = vec![f32::NAN; partial_len(head_size)];
    kernels.attend(&attention, 0, room, &mut partial);
    partial
}

#[test]
fn weights_are_the_exponentials_of_the_recipe() {
    const TOKENS: usize = ATTENTION_SPLIT;
    let mut random = Random::new(31);
    let mut scores: Vec<f32> = vec![-0.0, f32::NEG_INFINITY, f32::MIN, -1e-45, -1e-30, -87.4];
    // Every result next to the least, the ties between two powers of two, and all sizes.
    scores.extend((0..4000).map(|i| f32::from_bits((-87.3f32).to_bits() - 2000 + i)));
    scores.extend((1..254).map(|i| i as f32 / -2.0 * std::f32::consts::LN_2));
    scores.extend((0..40_000).map(|_| f32::from_bits(random.bits() as u32 | 1 << 31)));
    scores.extend((0..40_000).map(|i| i as f32 / -450.0));
    scores.retain(|score| !score.is_nan());
    scores.resize(scores.len().next_multiple_of(TOKENS - 1), -1.0);
    // One token's key is its score, its value is one in a place of its own; that of the first is zero.
    let size = TOKENS * TOKENS;
    let mut data = zeroed(2 * size + 2 * PANEL);
    for token in 0..TOKENS {
        data[size + panel_place(TOKENS, TOKENS, token, token)] = 1.0;
    }
    let mut query = vec![0.0; TOKENS];
    query[0] = 1.0;
    let mut data = KvData::F32(data);
    for scores in scores.chunks(TOKENS - 1) {
        let KvData::F32(numbers) = &mut data else { unreachable!() };
        for (token, score) in (1..).zip(scores) {
            numbers[panel_place(TOKENS, TOKENS, 0, token)] = *score;
        }
        let mut expected: Vec<f32> =
            [0.0].iter().chain(scores).map(|x| numerics::exp(*x)).collect();
        let sum = numerics::sum(&expected);
        expected.extend([0.0, sum]);
        for kernels in all_kernels() {
            let found = partial(kernels, &query, TOKENS, &data);
            for (i, (found, expected)) in found.iter().zip(&expected).enumerate() {
                assert_eq!(found.to_bits(), expected.to_bits(), "{}, {i}", kernels.name);
            }
        }
    }
}

#[test]
fn a_score_that_is_no_number_makes_all_outputs_none() {
    let mut numbers = zeroed(2 * 16 * 16 + 2 * PANEL);
    numbers.fill(1.0);
    numbers[panel_place(16, 16, 0, 5)] = f32::NAN;
    let data = KvData::F32(numbers);
    for kernels in all_kernels() {
        let found = partial(kernels, &[1.0; 16], 16, &data);
        assert!(found[..16].iter().all(|x| x.is_nan()), "{}", kernels.name);
        assert!(found[17].is_nan() && found[16] == 16.0, "{}", kernels.name);
    }
}

#[test]
fn integer_products_hold_at_their_fullest() {
    // Heads of 512 elements fill 32 bits with keys of -128, and 256 tokens 31 with values of -128.
    for (head_size, tokens) in [(128, 256), (512, 256), (640, 256), (6, 255), (512, 37), (128, 1)] {
        let size = head_size * tokens;
        let mut random = Random::new(32);
        for fill in [Some(-128), Some(127), None] {
            let bytes: Vec<i8> =
                (0..2 * size).map(|_| fill.unwrap_or(random.bits() as i8)).collect();
            let (keys, values) = bytes.split_at(size);
            let mut stored = zeroed(2 * size + 2 * PANEL);
            for token in 0..tokens {
                for i in 0..head_size {
                    let place = pair_place(head_size, tokens, i, token);
                    stored[place] = keys[token * head_size + i];
                    let place = pair_place(tokens, head_size, token, i);
                    stored[size + place] = values[token * head_size + i];
                }
            }
            // Equal scores, so that all weights are the largest.
            let mut scales = zeroed(2 * tokens + PANEL);
            scales[..tokens].fill(1e-9);
            scales[tokens..].fill(0.5);
            let data = KvData::Int8(stored, scales);
            for sign in [1.0, -1.0] {
                let query = vec![sign; head_size];
                let mut shorts = vec![0; head_size];
                let levels = numerics::query_levels(head_size);
                let step = numerics::quantize_i16(&query, levels, &mut shorts);
                let product = |x: &[i16], y: &mut dyn Iterator<Item = i8>| {
                    let sum: i64 = x.iter().zip(y).map(|(x, y)| i64::from(*x) * i64::from(y)).sum();
                    i32::try_from(sum).expect("a sum of 32 bits") as f32
                };
                let mut weights: Vec<f32> = keys
                    .chunks(head_size)
                    .map(|key| product(&shorts, &mut key.iter().copied()) * 1e-9 * step)
                    .collect();
                let max = numerics::max(&weights);
                weights.iter_mut().for_each(|weight| *weight = numerics::exp(*weight - max));
                let sum = numerics::sum(&weights);
                weights.iter_mut().for_each(|weight| *weight *= 0.5);
                let mut shorts = vec![0; tokens];
                let step = numerics::quantize_i16(&weights, numerics::WEIGHT_LEVELS, &mut shorts);
                let outputs = (0..head_size).map(|i| {
                    let mut column = values.iter().skip(i).step_by(head_size).copied();
                    product(&shorts, &mut column) * step
                });
                let outputs: Vec<f32> = outputs.collect();
                for kernels in all_kernels() {
                    let found = partial(kernels, &query, tokens, &data);
                    let case = format!("{} {head_size} {tokens} {fill:?} {sign}", kernels.name);
                    assert_eq!(found[..head_size], outputs, "{case}");
                    assert_eq!(found[stats(head_size)..][..2], [max, sum], "{case}");
                }
            }
        }
    }
}
