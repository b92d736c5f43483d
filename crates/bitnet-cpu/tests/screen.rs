//! The screened output head against the full one, on random and adversarial hidden states. CI runs a
//! short part; `BITNET_SCREEN_STATES=100000` runs the whole.

use bitnet_core::backend::{Backend, Norm};
use bitnet_core::{Candidate, DType, Keep, Pick, Tensor};
use bitnet_cpu::{CpuBackend, CpuOptions, Isa};
use bitnet_quant::packing::blocks::decode_row;
use bitnet_quant::screen;
use bitnet_testing::Random;

const STATES: usize = 2_000;
const ROWS: usize = 1003;
const COLS: usize = 96;

fn normal(random: &mut Random) -> f32 {
    (0..12).map(|_| random.signed()).sum::<f32>() / 2.0
}

/// Rows of many sizes; some repeated, some almost.
fn table(random: &mut Random, dtype: DType) -> Tensor {
    let mut rows: Vec<Vec<f32>> = (0..ROWS)
        .map(|row| {
            let size = if row % 97 == 5 { 1e-3 } else { 1.0 };
            (0..COLS).map(|_| normal(random) * size).collect()
        })
        .collect();
    for row in (20..ROWS).step_by(50) {
        rows[row] = rows[row - 17].clone();
        let near = row - 3;
        rows[near] = rows[row].clone();
        rows[near][row % COLS] *= 1.01;
    }
    rows[40] = vec![0.0; COLS];
    rows[41] = vec![1e-40; COLS];
    let values = rows.concat();
    let data: Vec<u8> = match dtype {
        DType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        _ => values.iter().flat_map(|v| ((v.to_bits() >> 16) as u16).to_le_bytes()).collect(),
    };
    Tensor::new(dtype, vec![ROWS, COLS], data.into()).unwrap()
}

/// A hidden state of one of ten kinds.
fn state(random: &mut Random, table: &Tensor, kind: usize) -> Vec<f32> {
    let row = |random: &mut Random| {
        let mut values = vec![0.0; COLS];
        decode_row(table.dtype(), table.row(random.below(ROWS)), &mut values);
        values
    };
    match kind {
        0 => vec![0.0; COLS],
        1 => {
            let mut one = vec![0.0; COLS];
            one[random.below(COLS)] = 10.0 * random.signed();
            one
        }
        2 => (0..COLS).map(|_| normal(random) * (20.0 * random.signed()).exp2()).collect(),
        3 => row(random),
        4 => {
            // Between two rows, so that they nearly tie.
            let (a, b) = (row(random), row(random));
            a.iter().zip(&b).map(|(a, b)| a + b).collect()
        }
        5 => (0..COLS).map(|_| normal(random) * 1e-41).collect(),
        6 => (0..COLS).map(|_| normal(random) * 1e30).collect(),
        7 => random.activations(COLS),
        _ => (0..COLS).map(|_| normal(random)).collect(),
    }
}

/// The ids that must be there.
fn needed(logits: &[f32], keep: Keep, exact_ids: &[u32]) -> Vec<u32> {
    let named = |id: u32| exact_ids.contains(&id);
    let mut others: Vec<f32> =
        (0..).zip(logits).filter(|(id, _)| !named(*id)).map(|(_, l)| *l).collect();
    others.sort_by(|a, b| b.total_cmp(a));
    let least = match keep {
        Keep::Largest(k) => f64::from(others[k - 1]),
        Keep::Within(margin) => f64::from(others[0]) - margin,
    };
    let kept = |(id, logit): &(u32, &f32)| named(*id) || f64::from(**logit) >= least;
    (0..).zip(logits).filter(kept).map(|(id, _)| id).collect()
}

#[test]
fn the_screened_head_finds_what_the_full_head_finds() {
    let states = match std::env::var("BITNET_SCREEN_STATES") {
        Ok(number) => number.parse().expect("BITNET_SCREEN_STATES is a number"),
        Err(_) => STATES,
    };
    let mut random = Random::new(11);
    for dtype in [DType::BF16, DType::F32] {
        let table = table(&mut random, dtype);
        let stored = screen::build(&table).unwrap();
        let levels = Isa::detected();
        let backends: Vec<CpuBackend> = levels
            .iter()
            .map(|&isa| {
                let options =
                    CpuOptions { isa: Some(isa), threads: Some(1), ..CpuOptions::default() };
                CpuBackend::new(options).unwrap()
            })
            .collect();
        let screen = backends[0].load_screen(&stored).unwrap().unwrap();
        let (mut exact, mut candidates) = (Vec::new(), Vec::new());
        let mut rescored = 0;
        for number in 0..states / 2 {
            // An input of ones has the norm 1, so that the weight is the hidden state.
            let hidden = state(&mut random, &table, number % 10);
            let count = random.below(4);
            let mut ids: Vec<u32> = (0..count).map(|_| random.below(ROWS + 9) as u32).collect();
            ids.sort_unstable();
            ids.dedup();
            let keep = match random.below(4) {
                0 => Keep::Within(f64::from(random.signed().abs()) * 9.0),
                1 => Keep::Largest(40),
                _ => Keep::Largest(1),
            };
            let mut first: Option<Vec<Candidate>> = None;
            // Every level now and then, two of them always.
            let some = if number % 16 == 0 { 0 } else { levels.len().saturating_sub(2) };
            for backend in &backends[some..] {
                let norm = Norm { weight: backend.load_vector(&hidden).unwrap(), eps: 0.0 };
                let loaded = backend.load_table(&table).unwrap();
                let mut x = backend.buffer(1, COLS).unwrap();
                backend.write(&mut x, COLS, &[1.0; COLS]);
                let mut out = backend.buffer(1, ROWS).unwrap();
                backend.head(&x, &[0], &norm, &loaded, &mut out);
                backend.read(&out, 1, &mut exact).unwrap();
                backend
                    .screened_head(
                        &x,
                        &[Pick { row: 0, keep, exact_ids: &ids }],
                        &norm,
                        &loaded,
                        &screen,
                        std::slice::from_mut(&mut candidates),
                    )
                    .unwrap();
                assert!(candidates.is_sorted_by(|a, b| a.id < b.id));
                for Candidate { id, logit } in &candidates {
                    assert_eq!(logit.to_bits(), exact[*id as usize].to_bits(), "state {number}");
                }
                let found = |id| candidates.binary_search_by_key(&id, |c| c.id).is_ok();
                let missing = needed(&exact, keep, &ids).into_iter().find(|&id| !found(id));
                assert_eq!(missing, None, "state {number}, {keep:?}, {}", backend.name());
                let first = first.get_or_insert_with(|| candidates.clone());
                assert!(*first == candidates, "state {number}: {} differs", backend.name());
            }
            rescored += candidates.len();
        }
        assert!(rescored < states / 2 * ROWS / 2, "{rescored} rows of {states} states");
    }
}

#[test]
fn hidden_states_that_are_not_finite_give_every_logit() {
    let table = table(&mut Random::new(2), DType::BF16);
    let backend = CpuBackend::new(CpuOptions::default()).unwrap();
    let screen = backend.load_screen(&screen::build(&table).unwrap()).unwrap().unwrap();
    let mut x = backend.buffer(1, COLS).unwrap();
    backend.write(&mut x, COLS, &[1.0; COLS]);
    let mut weight = vec![1.0; COLS];
    weight[7] = f32::NAN;
    let norm = Norm { weight, eps: 0.0 };
    let mut candidates = Vec::new();
    backend
        .screened_head(
            &x,
            &[Pick { row: 0, keep: Keep::Largest(1), exact_ids: &[] }],
            &norm,
            &table,
            &screen,
            std::slice::from_mut(&mut candidates),
        )
        .unwrap();
    assert_eq!(candidates.len(), ROWS);
    assert!(candidates.iter().all(|c| c.logit.is_nan()));
    let counts = backend.shortcut_counts();
    assert_eq!((counts.head_rows, counts.head_rows_rescored), (ROWS as u64, ROWS as u64));
}
