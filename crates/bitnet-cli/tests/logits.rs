//! `bitnet logits` against transformers and against the library.

mod support;

use bitnet_inference::{Model, ModelOptions, SessionOptions};
use bitnet_testing::golden::{GoldenModel, deviation, largest_difference};
use serde_json::Value;
use support::{joined, json_of, stdout_of};

fn rows(output: &Value) -> Vec<Vec<f32>> {
    serde_json::from_value(output["logits"].clone()).expect("rows of numbers")
}

#[test]
fn logits_are_those_of_transformers() {
    let Some(folder) = bitnet_testing::golden("tiny") else { return };
    let golden = GoldenModel::read(&folder);
    let prompt = joined(&golden.prompts[1].ids);
    let last = rows(&json_of(&["logits", "--tokens", &prompt, "--json"]));
    let expected = golden.f32("logits.last.1").unwrap();
    assert_eq!(last.len(), 1);
    assert!(largest_difference(&expected, &last[0]) <= 1e-4 * deviation(&expected));
    let all = rows(&json_of(&["logits", "--tokens", &prompt, "--all", "--json"])).concat();
    let expected = golden.f32("logits.all.1").unwrap();
    assert!(largest_difference(&expected, &all) <= 1e-4 * deviation(&expected));
}

#[test]
fn json_numbers_read_back_as_the_same_bits_in_the_fewest_digits() {
    let tokens = [2036, 17, 900];
    let model = Model::open("tiny", &ModelOptions::default()).unwrap();
    let mut session = model.session(SessionOptions::default()).unwrap();
    let mut expected = Vec::new();
    session.feed_showing_all(&tokens, |row| expected.extend_from_slice(row)).unwrap();

    let text = stdout_of(&["logits", "--tokens", "2036,17,900", "--all", "--json"]);
    let inner = text.strip_prefix("{\"logits\":[[").unwrap().strip_suffix("]]}\n").unwrap();
    let numbers: Vec<&str> = inner.split("],[").flat_map(|row| row.split(',')).collect();
    assert_eq!(numbers.len(), expected.len());
    for (number, expected) in numbers.iter().zip(expected) {
        assert_eq!(number.parse::<f32>().unwrap().to_bits(), expected.to_bits(), "{number}");
        // Rust's own shortest form, which may leave out the point.
        let digits = |text: &str| text.bytes().filter(u8::is_ascii_digit).count();
        assert!(digits(number) <= digits(&format!("{expected:?}")), "{number}");
    }
}

#[test]
fn threads_and_position_in_the_output_change_no_bit() {
    let tokens = ["logits", "--tokens", "2036,17,900", "--json"];
    let last = stdout_of(&tokens);
    for threads in ["1", "3"] {
        assert_eq!(stdout_of(&[&tokens[..], &["--threads", threads]].concat()), last);
    }
    let all = rows(&json_of(&[&tokens[..], &["--all"]].concat()));
    assert_eq!(all.len(), 3);
    assert_eq!(all[2], rows(&serde_json::from_str(&last).unwrap())[0]);
}

#[test]
fn people_see_the_ten_most_probable_tokens_best_first() {
    let table = stdout_of(&["logits", "--tokens", "2036,17,900"]);
    let lines: Vec<&str> = table.lines().collect();
    assert_eq!(lines.len(), 11);
    assert!(lines[0].split_whitespace().eq(["id", "token", "logit", "probability"]), "{table}");
    let row = &rows(&json_of(&["logits", "--tokens", "2036,17,900", "--json"]))[0];
    let best = bitnet_testing::golden::argmax(row).to_string();
    assert_eq!(lines[1].split_whitespace().next(), Some(best.as_str()));
    let every_position = stdout_of(&["logits", "--tokens", "2036,17,900", "--all"]);
    assert_eq!(every_position.lines().count(), 4);
    assert!(every_position.lines().last().unwrap().contains(&best));
}

#[test]
fn a_smaller_kv_type_changes_the_logits_a_little() {
    let logits = |kv_type| {
        rows(&json_of(&["logits", "--tokens", "2036,17,900,4", "--json", "--kv-type", kv_type]))
    };
    let exact = logits("f32").concat();
    for kv_type in ["f16", "int8"] {
        let approximate = logits(kv_type).concat();
        let error = largest_difference(&exact, &approximate) / deviation(&exact);
        assert!(error > 0.0 && error < 0.3, "{kv_type}: {error}");
    }
}
