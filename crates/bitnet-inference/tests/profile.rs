//! The profile counts what a run has read and multiplied.

use bitnet_core::{OperationProfile, RunCodes, Shortcuts, TileLayout};
use bitnet_cpu::Isa;
use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_model::weights;
use bitnet_quant::packing::tile;

fn opened(profile: bool, shortcuts: Shortcuts) -> Model {
    let options = ModelOptions {
        threads: Some(2),
        shortcuts: Some(shortcuts),
        profile,
        ..ModelOptions::default()
    };
    Model::open("tiny", &options).unwrap()
}

/// Reads a prompt of five tokens, then two more, one after the other.
fn profile(model: &Model) -> Vec<OperationProfile> {
    let mut session = model.session(SessionOptions::default()).unwrap();
    let mut logits = Vec::new();
    for tokens in [&[1, 2, 3, 4, 5][..], &[6], &[7]] {
        session.feed(tokens, &mut logits).unwrap();
    }
    model.profile()
}

fn sum(
    profile: &[OperationProfile],
    single_row: bool,
    names: &[&str],
    value: impl Fn(&OperationProfile) -> u64,
) -> u64 {
    let chosen = |p: &&OperationProfile| p.single_row == single_row && names.contains(&p.name);
    profile.iter().filter(chosen).map(value).sum()
}

#[test]
fn every_weight_is_counted_once_per_step_and_every_product_once_per_token() {
    let model = opened(true, Shortcuts::NONE);
    let config = model.config();
    let ternary = weights::ternary_weights(config);
    let profile = profile(&model);
    // As the matrices lie.
    let (layout, codes) = match Isa::takes_compact(None).unwrap() {
        true => (TileLayout::Triples, RunCodes::Quintuples),
        false => (TileLayout::Bands, RunCodes::TwoBits),
    };
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (heads, kv) = (config.heads * config.head_size, config.kv_heads * config.head_size);
    let dense = [(heads, hidden), (kv, hidden), (kv, hidden), (hidden, heads)];
    let matrices = dense.into_iter().chain([(intermediate, hidden), (hidden, intermediate)]);
    let matrices = matrices.map(|shape| (layout, shape));
    let matrices = matrices.chain([(TileLayout::Rows(codes), (intermediate, hidden))]);
    let bytes_of = |(layout, (rows, cols))| tile::byte_len(layout, rows, cols).unwrap() as u64;
    let weight_bytes = config.layers.len() as u64 * matrices.map(bytes_of).sum::<u64>();
    let products = ["linears", "gate and up", "live rows"];
    for (single_row, steps, tokens) in [(false, 1, 5), (true, 2, 2)] {
        let bytes = sum(&profile, single_row, &products, |p| p.bytes);
        assert_eq!(bytes, steps * weight_bytes);
        assert_eq!(sum(&profile, single_row, &products, |p| p.macs), tokens * ternary);
    }
    // Tokens 1 to 5 see 1 to 5 tokens, the others 6 and 7.
    let layers = config.layers.len() as u64;
    let width = (config.heads * config.head_size) as u64;
    let row = (2 * 4 * config.kv_heads * config.head_size) as u64;
    for (single_row, seen, products) in [(false, 5, 15), (true, 13, 13)] {
        let attention =
            |value: fn(&OperationProfile) -> u64| sum(&profile, single_row, &["attention"], value);
        assert_eq!(attention(|p| p.bytes), layers * seen * row);
        assert_eq!(attention(|p| p.macs), layers * 2 * width * products);
    }
    // The head gives the logits of one row each time.
    let head = (model.vocab_size() * config.hidden_size) as u64;
    assert_eq!(sum(&profile, true, &["head in full"], |p| p.macs), 3 * head);
    assert!(profile.iter().all(|p| p.calls > 0 && !p.time.is_zero()));
}

#[test]
fn what_zeros_leave_out_is_not_counted() {
    let model = opened(true, Shortcuts::ALL);
    let profile = profile(&model);
    let counts = model.shortcut_counts();
    assert!(counts.up_rows_skipped > 0);
    let skipped = counts.up_rows_skipped * model.config().hidden_size as u64;
    let live = sum(&profile, true, &["live rows"], |p| p.macs);
    let layers = model.config().layers.len();
    let all = 2 * layers * model.config().intermediate_size * model.config().hidden_size;
    assert_eq!(live, all as u64 - skipped);
}

#[test]
fn nothing_is_noted_unasked() {
    assert!(profile(&opened(false, Shortcuts::ALL)).is_empty());
}
