//! Sampling as a whole: against the golden filter chains, and its promises as properties.

use bitnet_inference::sampler::{
    Candidate, Candidates, Chain, Filter, History, SampleError, Sampled, Sampler, SamplingParams,
};
use proptest::prelude::*;
use serde_json::Value;

/// Kept ids with their probabilities, in rank order.
fn kept(logits: &[f32], filters: &[Filter], output: &[u32]) -> Vec<(u32, f64)> {
    let mut candidates = Candidates::default();
    candidates.set_logits(logits).unwrap();
    let mut chain = Chain::new(filters.to_vec()).unwrap();
    let kept = chain.apply(&mut candidates, History::new(output, output.len())).unwrap();
    kept.candidates().iter().map(|c| c.id).zip(kept.probabilities()).collect()
}

fn token(sampled: Result<Sampled, SampleError>) -> u32 {
    sampled.unwrap().token
}

// Golden chains.

fn number(value: &Value) -> f64 {
    match value.as_str() {
        Some("-inf") => f64::NEG_INFINITY,
        Some(other) => panic!("number {other}"),
        None => value.as_f64().unwrap(),
    }
}

fn filter(step: &Value) -> Filter {
    let value = &step["value"];
    let share = || value.as_f64().unwrap();
    let single = |value: &Value| value.as_f64().unwrap() as f32;
    let whole = || value.as_u64().unwrap() as usize;
    match step["step"].as_str().unwrap() {
        "temperature" => Filter::Temperature(single(value)),
        "top_k" => Filter::TopK(whole()),
        "top_p" => Filter::TopP(share()),
        "min_p" => Filter::MinP(share()),
        "typical_p" => Filter::Typical(share()),
        "repetition_penalty" => Filter::RepetitionPenalty { penalty: single(value), last_n: None },
        "presence_frequency" => Filter::PresenceFrequency {
            presence: single(&value[0]),
            frequency: single(&value[1]),
            last_n: None,
        },
        "no_repeat_ngram" => Filter::NoRepeatNgram(whole()),
        "epsilon_cutoff" => Filter::EpsilonCutoff(share()),
        "eta_cutoff" => Filter::EtaCutoff(share()),
        other => panic!("step {other}"),
    }
}

#[test]
fn every_golden_chain_keeps_the_same_tokens_with_the_same_probabilities() {
    let Some(path) = bitnet_testing::golden("sampling.json") else { return };
    let golden: Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert_eq!(cases.len(), 186);
    for case in cases {
        let name = case["logits"].as_str().unwrap();
        let context = || format!("{name} {}", case["chain"]);
        let logits = golden["logits"][name].as_array().unwrap();
        let logits: Vec<f32> = logits.iter().map(|l| number(l) as f32).collect();
        let previous = case["previous"].as_array().unwrap();
        let previous: Vec<u32> = previous.iter().map(|t| t.as_u64().unwrap() as u32).collect();
        let filters: Vec<Filter> = case["chain"].as_array().unwrap().iter().map(filter).collect();
        let expected: Vec<u64> =
            case["kept"].as_array().unwrap().iter().map(|t| t.as_u64().unwrap()).collect();
        let mut expected_probabilities: Vec<f64> =
            case["probs"].as_array().unwrap().iter().map(number).collect();

        let result = kept(&logits, &filters, &previous);
        let mut probabilities = vec![0.0; logits.len()];
        for &(id, p) in &result {
            probabilities[id as usize] = p;
        }
        // Which of several equal logits survives top-p is left open by the reference's sort.
        let open = ["ties", "flat"].contains(&name)
            && filters.iter().any(|f| matches!(f, Filter::TopP(_)));
        if open {
            assert_eq!(result.len(), expected.len(), "{}", context());
            probabilities.sort_by(f64::total_cmp);
            expected_probabilities.sort_by(f64::total_cmp);
        } else {
            let mut ids: Vec<u64> = result.iter().map(|&(id, _)| u64::from(id)).collect();
            ids.sort_unstable();
            assert_eq!(ids, expected, "{}", context());
        }
        for (ours, theirs) in probabilities.iter().zip(&expected_probabilities) {
            assert!((ours - theirs).abs() <= 1e-6, "{}: {ours} {theirs}", context());
        }
    }
}

// Parameters.

#[test]
fn the_default_is_greedy_with_nothing_to_apply() {
    let params = SamplingParams::default();
    assert!(params.is_greedy());
    assert_eq!(params.filters(), []);
    params.validate().unwrap();
}

#[test]
fn filters_apply_in_the_documented_order() {
    let params = SamplingParams {
        logit_bias: vec![(3, 1.0)],
        repetition_penalty: 1.1,
        presence_penalty: 0.2,
        frequency_penalty: 0.3,
        repeat_last_n: Some(64),
        top_k: 40,
        temperature: 0.6,
        top_p: 0.9,
        min_p: 0.05,
        typical_p: 0.8,
        seed: 1,
        logprobs: None,
    };
    let last_n = Some(64);
    assert_eq!(
        params.filters(),
        [
            Filter::LogitBias(vec![(3, 1.0)]),
            Filter::RepetitionPenalty { penalty: 1.1, last_n },
            Filter::PresenceFrequency { presence: 0.2, frequency: 0.3, last_n },
            Filter::TopK(40),
            Filter::Temperature(0.6),
            Filter::TopP(0.9),
            Filter::MinP(0.05),
            Filter::Typical(0.8),
        ]
    );
}

#[test]
fn a_bad_value_is_named_with_what_it_may_be() {
    let sentence = |change: fn(&mut SamplingParams)| {
        let mut params = SamplingParams::default();
        change(&mut params);
        let error = params.validate().unwrap_err();
        assert_eq!(Sampler::new(&params).unwrap_err(), error);
        error.to_string()
    };
    let temperature = "0 (greedy) or a number of at least 0.00001";
    let share = "a number above 0 and at most 1";
    for (ours, expected) in [
        (sentence(|p| p.temperature = -1.0), format!("temperature is -1.0; give {temperature}")),
        (sentence(|p| p.temperature = f32::NAN), format!("temperature is NaN; give {temperature}")),
        (sentence(|p| p.temperature = 1e-30), format!("temperature is 1e-30; give {temperature}")),
        (
            sentence(|p| p.temperature = f32::INFINITY),
            format!("temperature is inf; give {temperature}"),
        ),
        (sentence(|p| p.top_p = 0.0), format!("top_p is 0.0; give {share}")),
        (sentence(|p| p.top_p = 1.5), format!("top_p is 1.5; give {share}")),
        (sentence(|p| p.top_p = f64::NAN), format!("top_p is NaN; give {share}")),
        (sentence(|p| p.typical_p = -0.5), format!("typical_p is -0.5; give {share}")),
        (sentence(|p| p.min_p = 1.5), "min_p is 1.5; give a number from 0 (off) to 1".into()),
        (sentence(|p| p.min_p = f64::NAN), "min_p is NaN; give a number from 0 (off) to 1".into()),
        (
            sentence(|p| p.repetition_penalty = 0.0),
            "repetition_penalty is 0.0; give a number above 0".into(),
        ),
        (
            sentence(|p| p.presence_penalty = f32::NAN),
            "presence_penalty is NaN; give a finite number".into(),
        ),
        (
            sentence(|p| p.frequency_penalty = f32::INFINITY),
            "frequency_penalty is inf; give a finite number".into(),
        ),
        (
            sentence(|p| p.logit_bias = vec![(0, 1.0), (1, f32::NAN)]),
            "logit_bias is NaN; give a finite number, or -inf to ban the token".into(),
        ),
    ] {
        assert_eq!(ours, expected);
    }
    assert!(Chain::new(vec![Filter::TopK(0)]).is_err());
    assert!(Chain::new(vec![Filter::NoRepeatNgram(0)]).is_err());
    assert!(Chain::new(vec![Filter::EtaCutoff(1.0)]).is_err());
}

// Greedy.

#[test]
fn greedy_takes_the_largest_logit_and_of_equal_ones_the_lowest_id() {
    let mut sampler = Sampler::new(&SamplingParams::default()).unwrap();
    // Long enough for whole vector lanes and a tail, with the largest in every place.
    for place in 0..100 {
        let mut logits = vec![-1.0f32; 100];
        logits[place] = 2.0;
        logits[99] = 2.0;
        assert_eq!(token(sampler.sample(&logits, &[], 0)), place as u32);
    }
    assert_eq!(token(sampler.sample(&[-0.0, 0.0], &[], 0)), 0);
    assert_eq!(token(sampler.sample(&[f32::NEG_INFINITY, -5.0], &[], 0)), 1);
}

#[test]
fn greedy_takes_the_largest_logit_even_where_typical_would_remove_it() {
    let mut logits = vec![3.0; 31];
    logits[12] = 3.5;
    let typical = Filter::Typical(0.5);
    assert!(kept(&logits, std::slice::from_ref(&typical), &[]).iter().all(|k| k.0 != 12));
    let params = SamplingParams { typical_p: 0.5, ..Default::default() };
    assert_eq!(token(Sampler::new(&params).unwrap().sample(&logits, &[], 0)), 12);
}

#[test]
fn greedy_heeds_bias_and_penalties() {
    let params = SamplingParams {
        logit_bias: vec![(0, f32::NEG_INFINITY), (7, 100.0)],
        repetition_penalty: 2.0,
        ..Default::default()
    };
    let mut sampler = Sampler::new(&params).unwrap();
    let logits = [9.0, 4.0, 3.0, 1.0];
    assert_eq!(token(sampler.sample(&logits, &[], 0)), 1);
    assert_eq!(token(sampler.sample(&logits, &[1], 0)), 2);
}

#[test]
fn logits_that_make_no_distribution_are_errors() {
    let sampled = SamplingParams { temperature: 0.7, ..Default::default() };
    let adjusted = SamplingParams { repetition_penalty: 1.1, ..Default::default() };
    for params in [SamplingParams::default(), adjusted, sampled] {
        let mut sampler = Sampler::new(&params).unwrap();
        let mut sample = |logits: &[f32]| sampler.sample(logits, &[0], 0);
        assert_eq!(sample(&[]), Err(SampleError::NoLogits));
        assert_eq!(sample(&[f32::NEG_INFINITY; 3]), Err(SampleError::NothingLeft));
        let error = sample(&[0.0, f32::INFINITY]).unwrap_err();
        assert_eq!(error, SampleError::BadLogit { id: 1, logit: f32::INFINITY });
        for nan in [f32::NAN, -f32::NAN] {
            let error = sample(&[0.0, 1.0, nan, 3.0]).unwrap_err();
            assert!(matches!(error, SampleError::BadLogit { id: 2, .. }));
        }
        // The sampler is as good as new afterwards.
        assert_eq!(token(sample(&[-50.0, 50.0])), 1);
    }
}

#[test]
fn an_overflow_on_the_way_is_an_error() {
    let chain = vec![Filter::LogitBias(vec![(0, 3e38), (0, 3e38)])];
    let mut sampler = Sampler::with_chain(Chain::new(chain).unwrap(), 0);
    let error = sampler.sample(&[1.0, 2.0], &[], 0).unwrap_err();
    assert_eq!(error, SampleError::BadLogit { id: 0, logit: f32::INFINITY });

    let params = SamplingParams { temperature: 1e-5, ..Default::default() };
    let error = Sampler::new(&params).unwrap().sample(&[1e35, 2.0], &[], 0).unwrap_err();
    assert_eq!(error, SampleError::BadLogit { id: 0, logit: f32::INFINITY });
}

#[test]
fn banning_every_token_is_an_error() {
    let params = SamplingParams {
        temperature: 1.0,
        logit_bias: vec![(0, f32::NEG_INFINITY), (1, f32::NEG_INFINITY)],
        ..Default::default()
    };
    for top_p in [1.0, 0.5] {
        for min_p in [0.0, 0.5] {
            let mut sampler =
                Sampler::new(&SamplingParams { top_p, min_p, ..params.clone() }).unwrap();
            assert_eq!(sampler.sample(&[1.0, 2.0], &[], 0), Err(SampleError::NothingLeft));
        }
    }
}

// History.

#[test]
fn the_repetition_penalty_looks_at_the_prompt_and_the_others_only_at_the_output() {
    let repetition = SamplingParams { repetition_penalty: 2.0, ..Default::default() };
    let presence = SamplingParams { presence_penalty: 1.5, ..Default::default() };
    let logits = [2.0, 1.5, 1.0];
    let history = [0, 1];
    let pick = |params: &SamplingParams, output| {
        token(Sampler::new(params).unwrap().sample(&logits, &history, output))
    };
    assert_eq!(pick(&repetition, 0), 0); // 1.0, 0.75, 1.0
    assert_eq!(pick(&repetition, 2), 0);
    assert_eq!(pick(&presence, 0), 0); // 2.0, 1.5, 1.0
    assert_eq!(pick(&presence, 1), 0); // 2.0, 0.0, 1.0
    assert_eq!(pick(&presence, 2), 2); // 0.5, 0.0, 1.0
}

#[test]
fn penalties_forget_what_is_older_than_their_window() {
    let base = SamplingParams { repetition_penalty: 10.0, ..Default::default() };
    let logits = [3.0, 2.0, 1.0];
    let pick = |repeat_last_n| {
        let params = SamplingParams { repeat_last_n, ..base.clone() };
        token(Sampler::new(&params).unwrap().sample(&logits, &[0, 1], 2))
    };
    assert_eq!(pick(None), 2);
    assert_eq!(pick(Some(9)), 2);
    assert_eq!(pick(Some(1)), 0);
    assert_eq!(pick(Some(0)), 0);
}

// Log-probabilities.

#[test]
fn log_probabilities_are_those_of_the_unmodified_logits() {
    let logits = [1.0f32, 3.0, 3.0, -2.0, f32::NEG_INFINITY];
    let total: f64 = logits.iter().map(|&l| f64::from(l).exp()).sum();
    let expected = |id: usize| f64::from(logits[id]) - total.ln();
    for temperature in [0.0, 0.3, 2.0] {
        let params = SamplingParams {
            temperature,
            top_k: 2,
            logit_bias: vec![(1, f32::NEG_INFINITY)],
            logprobs: Some(3),
            ..Default::default()
        };
        let sampled = Sampler::new(&params).unwrap().sample(&logits, &[], 0).unwrap();
        let logprob = sampled.logprob.unwrap();
        assert!((logprob - expected(sampled.token as usize)).abs() < 1e-12);
        let ids: Vec<u32> = sampled.top_logprobs.iter().map(|t| t.0).collect();
        assert_eq!(ids, [1, 2, 0]);
        for (id, logprob) in sampled.top_logprobs {
            assert!((logprob - expected(id as usize)).abs() < 1e-12);
        }
    }
    let all = SamplingParams { logprobs: Some(99), ..Default::default() };
    let sampled = Sampler::new(&all).unwrap().sample(&logits, &[], 0).unwrap();
    assert_eq!(sampled.top_logprobs.len(), 5);
    assert_eq!(sampled.top_logprobs[4], (4, f64::NEG_INFINITY));
    let error = Sampler::new(&all).unwrap().sample_candidates(&[], &[], 0).unwrap_err();
    assert_eq!(error, SampleError::LogprobsOfSomeLogits);
}

// The draw.

/// Pearson's statistic of observed counts against expected ones.
fn chi_square(counts: &[u64], probabilities: &[f64]) -> f64 {
    let n = counts.iter().sum::<u64>() as f64;
    let term = |(&count, &p): (&u64, &f64)| (count as f64 - n * p).powi(2) / (n * p);
    counts.iter().zip(probabilities).map(term).sum()
}

#[test]
fn tokens_come_as_often_as_their_probabilities_say() {
    let logits: Vec<f32> = (0..16).map(|i| ((i * 7 % 16) as f32 - 8.0) / 4.0).collect();
    let total: f64 = logits.iter().map(|&l| (f64::from(l) / 0.8).exp()).sum();
    let probabilities: Vec<f64> =
        logits.iter().map(|&l| (f64::from(l) / 0.8).exp() / total).collect();
    for seed in 0..8 {
        let params = SamplingParams { temperature: 0.8, seed, ..Default::default() };
        let mut sampler = Sampler::new(&params).unwrap();
        let mut counts = [0u64; 16];
        for position in 0..40_000 {
            counts[token(sampler.sample(&logits, &[], position)) as usize] += 1;
        }
        // Mean 15, standard deviation sqrt(30): 1 chance in 10 000 to be above 44.3 or below 2.1.
        let statistic = chi_square(&counts, &probabilities);
        assert!((2.1..44.3).contains(&statistic), "seed {seed}: {statistic}");
    }
}

#[test]
fn a_token_depends_on_its_position_and_not_on_what_was_sampled_before() {
    let logits: Vec<f32> = (0..50).map(|i| (i % 7) as f32 / 3.0).collect();
    let sampler = |seed| {
        let params = SamplingParams { temperature: 1.1, top_k: 30, seed, ..Default::default() };
        Sampler::new(&params).unwrap()
    };
    let mut forward = sampler(5);
    let tokens: Vec<u32> =
        (0..64).map(|position| token(forward.sample(&logits, &[], position))).collect();
    let mut backward = sampler(5);
    for position in (0..64).rev() {
        let sampled = token(backward.sample(&logits, &[], position));
        assert_eq!(sampled, tokens[position as usize]);
    }
    let mut other = sampler(6);
    assert!((0..64).any(|p| token(other.sample(&logits, &[], p)) != tokens[p as usize]));
    assert!(tokens.iter().any(|t| *t != tokens[0]));
}

// Properties.

/// Logits on a coarse grid, so that ties are common, with some that cannot come.
fn some_logits() -> impl Strategy<Value = Vec<f32>> {
    let logit = prop_oneof![
        12 => (-24i32..24).prop_map(|i| i as f32 / 4.0),
        1 => Just(f32::NEG_INFINITY),
        1 => Just(-0.0f32),
    ];
    let possible = |logits: &Vec<f32>| logits.iter().any(|l| l.is_finite());
    prop::collection::vec(logit, 1..60).prop_filter("all impossible", possible)
}

fn some_filter() -> impl Strategy<Value = Filter> {
    let last_n = prop::option::of(0usize..12);
    prop_oneof![
        prop::collection::vec((0u32..70, -3f32..3.0), 0..4).prop_map(Filter::LogitBias),
        (0.5f32..2.0, last_n.clone())
            .prop_map(|(penalty, last_n)| Filter::RepetitionPenalty { penalty, last_n }),
        (-1f32..1.0, -1f32..1.0, last_n).prop_map(|(presence, frequency, last_n)| {
            Filter::PresenceFrequency { presence, frequency, last_n }
        }),
        (0.3f32..3.0).prop_map(Filter::Temperature),
        (1usize..40).prop_map(Filter::TopK),
        (0.01..=1.0).prop_map(Filter::TopP),
        (0.0..=1.0).prop_map(Filter::MinP),
        (0.01..=1.0).prop_map(Filter::Typical),
        (0.001..0.5).prop_map(Filter::EpsilonCutoff),
        (0.001..0.5).prop_map(Filter::EtaCutoff),
    ]
}

fn ids(kept: &[(u32, f64)]) -> Vec<u32> {
    let mut ids: Vec<u32> = kept.iter().map(|k| k.0).collect();
    ids.sort_unstable();
    ids
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn probabilities_add_up_to_one_and_fall_in_rank_order(
        logits in some_logits(),
        filters in prop::collection::vec(some_filter(), 0..5),
        history in prop::collection::vec(0u32..70, 0..20),
    ) {
        let kept = kept(&logits, &filters, &history);
        prop_assert!(!kept.is_empty());
        prop_assert!((kept.iter().map(|k| k.1).sum::<f64>() - 1.0).abs() < 1e-12);
        prop_assert!(kept.is_sorted_by(|a, b| a.1 >= b.1));
        prop_assert!(kept.iter().all(|k| logits[k.0 as usize] != f32::NEG_INFINITY));
        let mut ids = ids(&kept);
        ids.dedup();
        prop_assert_eq!(ids.len(), kept.len());
    }

    #[test]
    fn a_chain_does_what_its_filters_do_one_by_one(
        logits in some_logits(),
        filters in prop::collection::vec(some_filter(), 0..5),
        history in prop::collection::vec(0u32..70, 0..20),
    ) {
        let together = kept(&logits, &filters, &history);
        let mut candidates = Candidates::default();
        candidates.set_logits(&logits).unwrap();
        let mut apart = Vec::new();
        for filter in filters.into_iter().chain([Filter::MinP(0.0)]) {
            let mut chain = Chain::new(vec![filter]).unwrap();
            let history = History::new(&history, history.len());
            let kept = chain.apply(&mut candidates, history).unwrap();
            let left = kept.candidates().to_vec();
            apart = left.iter().map(|c| c.id).zip(kept.probabilities()).collect();
            // Candidates anew, so that nothing known of the old ones can be used.
            candidates = Candidates::default();
            candidates.set_candidates(&left).unwrap();
        }
        prop_assert_eq!(together, apart);
    }

    #[test]
    fn any_permutation_of_the_candidates_gives_the_same_token(
        (logits, order) in some_logits().prop_flat_map(|logits| {
            let ids: Vec<u32> = (0..logits.len() as u32).collect();
            (Just(logits), Just(ids).prop_shuffle())
        }),
        filters in prop::collection::vec(some_filter(), 0..5),
        history in prop::collection::vec(0u32..70, 0..20),
        seed: u64,
    ) {
        let mut sampler = Sampler::with_chain(Chain::new(filters).unwrap(), seed);
        let candidates: Vec<Candidate> =
            order.iter().map(|&id| Candidate { id, logit: logits[id as usize] }).collect();
        for position in 0..8 {
            prop_assert_eq!(
                token(sampler.sample(&logits, &history, position)),
                token(sampler.sample_candidates(&candidates, &history, position))
            );
        }
    }

    #[test]
    fn the_survivors_of_the_first_filter_are_enough(
        logits in some_logits(),
        first in prop_oneof![
            (1usize..40).prop_map(Filter::TopK),
            (0.0..=1.0).prop_map(Filter::MinP),
        ],
        rest in prop::collection::vec(some_filter(), 0..4),
        history in prop::collection::vec(0u32..70, 0..20),
        also: u64,
    ) {
        let survivors = ids(&kept(&logits, std::slice::from_ref(&first), &[]));
        let candidates: Vec<Candidate> = (0..)
            .zip(&logits)
            .filter(|&(id, _)| survivors.contains(&id) || also >> (id % 64) & 1 == 1)
            .map(|(id, &logit)| Candidate { id, logit })
            .collect();
        let filters = std::iter::once(first).chain(rest).collect();
        let mut sampler = Sampler::with_chain(Chain::new(filters).unwrap(), also);
        for position in 0..8 {
            prop_assert_eq!(
                token(sampler.sample(&logits, &history, position)),
                token(sampler.sample_candidates(&candidates, &history, position))
            );
        }
    }

    #[test]
    fn a_wider_filter_keeps_all_that_a_narrower_one_keeps(
        logits in some_logits(),
        (k, more) in (1usize..30, 0usize..30),
        (a, b) in (0.01f64..0.99, 0.01f64..0.99),
    ) {
        let (low, high) = (a.min(b), a.max(b));
        for (narrow, wide) in [
            (Filter::TopK(k), Filter::TopK(k + more)),
            (Filter::TopP(low), Filter::TopP(high)),
            (Filter::MinP(high), Filter::MinP(low)),
            (Filter::Typical(low), Filter::Typical(high)),
            (Filter::EpsilonCutoff(high), Filter::EpsilonCutoff(low)),
            (Filter::EtaCutoff(high), Filter::EtaCutoff(low)),
        ] {
            let wide = ids(&kept(&logits, &[wide], &[]));
            let narrow = ids(&kept(&logits, &[narrow], &[]));
            prop_assert!(narrow.iter().all(|id| wide.contains(id)), "{narrow:?} {wide:?}");
        }
    }

    #[test]
    fn filters_keep_what_their_definitions_say(
        logits in some_logits(),
        k in 1usize..40,
        share in 0.01f64..0.99,
    ) {
        let all = kept(&logits, &[], &[]);
        let top = kept(&logits, &[Filter::TopK(k)], &[]);
        prop_assert!(top.len() >= k.min(all.len()));
        let least = logits[top[top.len() - 1].0 as usize];
        prop_assert_eq!(top.len(), logits.iter().filter(|&&l| l >= least).count());
        prop_assert!(top.len() <= k || logits.iter().filter(|&&l| l > least).count() < k);

        let mass: Vec<f64> = all.iter().scan(0.0, |sum, k| { *sum += k.1; Some(*sum) }).collect();
        let nucleus = kept(&logits, &[Filter::TopP(share)], &[]).len();
        prop_assert!(mass[nucleus - 1] >= share - 1e-12);
        prop_assert!(nucleus == 1 || mass[nucleus - 2] < share + 1e-12);

        let relative = kept(&logits, &[Filter::MinP(share)], &[]).len();
        prop_assert!(all[relative - 1].1 >= share * all[0].1 * (1.0 - 1e-12));
        prop_assert!(all.get(relative).is_none_or(|k| k.1 < share * all[0].1 * (1.0 + 1e-12)));
    }
}
