//! `bitnet perplexity` and `bitnet eval`: what they print, and what they make of bad input.

mod support;

use std::fs;

use serde_json::Value;
use support::{Folder, bitnet};

const STORY: &str =
    "Once upon a time there was a little girl named Lily. She loved to play outside.";

const QUESTIONS: &str = r#"
{"prompt": "Once upon a time there was a little girl named", "choices": ["zebra the of", "Lily."], "answer": 1}
{"question": "Is it?", "choices": ["no"], "answer": 0}
{"query": "The dog was very", "choices": ["happy", "of", "walk"], "gold": 0}
not JSON
{"ctx": "She went to the park with her", "endings": ["mom.", "sky.", "blue."], "label": "0"}
{"question": "What do birds do?", "choices": {"text": ["They fly.", "They the."], "label": ["A", "B"]}, "answerKey": "B"}
"#;

#[test]
fn the_perplexity_of_files_is_theirs_and_that_of_all_together() {
    let folder = Folder::new();
    folder.write("a.txt", STORY);
    folder.write("b.txt", "Zebra of the the and quantum.");
    let run = folder.run(&["perplexity", "a.txt", "b.txt", "--json", "--context", "16"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let json: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&json["context"], &json["stride"]), (&16.into(), &8.into()));
    let number = |value: &Value, name: &str| value[name].as_f64().unwrap();
    let [a, b] = [&json["files"][0], &json["files"][1]];
    assert!(number(a, "perplexity") < 20.0 && number(b, "perplexity") > 100.0, "{json}");
    let nll = |value: &Value| number(value, "nll_per_token") * number(value, "tokens");
    assert!((nll(a) + nll(b) - nll(&json)).abs() < 1e-9);
    assert!((number(a, "nll_per_token").exp() - number(a, "perplexity")).abs() < 1e-9);
    let bits = nll(a) / std::f64::consts::LN_2 / STORY.len() as f64;
    assert!((number(a, "bits_per_byte") - bits).abs() < 1e-9);

    let table = folder.run(&["perplexity", "a.txt", "b.txt"]);
    assert!(table.stdout.contains("perplexity") && table.stdout.contains("together"));
    // Nobody watches: no bar.
    assert!(!table.stderr.contains('\r') && table.stderr.lines().count() == 1, "{}", table.stderr);
    let stdin = folder.run_with_input(&["perplexity", "-", "--json"], STORY.as_bytes());
    assert_eq!(stdin.code, Some(0), "{}", stdin.stderr);
}

#[test]
fn texts_that_have_no_perplexity_are_refused() {
    let folder = Folder::new();
    folder.write("empty.txt", "");
    folder.write("a.txt", STORY);
    let cases: [(&[&str], i32, &str); 4] = [
        (&["empty.txt"], 1, "empty.txt: has no token that could be scored: give a longer text"),
        (&["nowhere.txt"], 1, "nowhere.txt: cannot be read: "),
        (
            &["a.txt", "--context", "513"],
            1,
            "windows of 513 tokens that begin every 256 are not possible",
        ),
        (&[], 2, "<FILE>..."),
    ];
    for (flags, code, words) in cases {
        let run = folder.run(&[&["perplexity"], flags].concat());
        assert_eq!((run.code, run.stdout.as_str()), (Some(code), ""), "{flags:?}");
        assert!(run.stderr.contains(words), "{flags:?}: {}", run.stderr);
    }
}

#[test]
fn questions_are_answered_and_lines_that_are_none_left_out() {
    let folder = Folder::new();
    folder.write("q.jsonl", QUESTIONS);
    let run = folder.run(&["eval", "q.jsonl", "--json", "--output", "rows.jsonl"]);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    assert!(run.stderr.contains("note: q.jsonl, line 3: has fewer than two choices; left out\n"));
    assert!(run.stderr.contains("note: q.jsonl, line 5: is no JSON object; left out\n"));
    let json: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!((&json["questions"], &json["acc"]), (&4.into(), &0.75.into()));
    assert_eq!(json["skipped"].as_array().unwrap().len(), 2);
    // Three of four: the root of 0.75 * 0.25 / 3.
    assert_eq!(json["acc_stderr"], 0.25);
    let rows: Vec<Value> = fs::read_to_string(folder.path("rows.jsonl"))
        .unwrap()
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(Value::from(rows.clone()), json["rows"]);
    assert_eq!(
        (&rows[0]["line"], &rows[0]["choice"], &rows[0]["answer"]),
        (&2.into(), &1.into(), &1.into())
    );
    assert_eq!(rows[0]["bytes"], serde_json::json!([12, 5]));

    let table = folder.run(&["eval", "q.jsonl", "-q"]);
    assert!(table.stdout.contains("acc       0.7500          0.2500\n"), "{}", table.stdout);
    assert_eq!(folder.run(&["eval", "q.jsonl", "--chat"]).code, Some(0));
}

/// The sum that `eval` reports is what `perplexity` finds of the same tokens.
#[test]
fn choices_are_scored_as_texts_are() {
    let folder = Folder::new();
    folder.write(
        "q.jsonl",
        r#"{"prompt": "Once upon", "choices": ["a time", "there"], "answer": 0}"#,
    );
    let eval: Value =
        serde_json::from_str(&folder.run(&["eval", "q.jsonl", "--json"]).stdout).unwrap();
    let nll = |text: &str| {
        folder.write("t.txt", text);
        let run = folder.run(&["perplexity", "t.txt", "--json"]);
        let json: Value = serde_json::from_str(&run.stdout).unwrap();
        json["nll_per_token"].as_f64().unwrap() * json["tokens"].as_f64().unwrap()
    };
    let prompt = nll("Once upon");
    for (i, text) in ["Once upon a time", "Once upon there"].iter().enumerate() {
        let logprob = eval["rows"][0]["logprobs"][i].as_f64().unwrap();
        assert!((logprob + nll(text) - prompt).abs() < 1e-9, "{text}");
    }
}

/// Sums that transformers 5.23.0 (torch 2.9.1, float32, eager attention) gives for `tiny-trained`: of
/// `log_softmax` over the tokens of prompt, space and choice that come after those of the prompt.
const BY_TRANSFORMERS: [&[f64]; 4] = [
    &[-34.6808677, -0.6873646],
    &[-2.1553590, -13.0803661, -8.1509142],
    &[-1.7061594, -10.3709776, -15.3728223],
    &[-17.3262949, -27.8530636],
];

#[test]
fn choices_have_the_log_probabilities_that_transformers_gives() {
    let Some(model) = bitnet_testing::golden("tiny-trained") else { return };
    let folder = Folder::new();
    folder.write("q.jsonl", QUESTIONS);
    let run = folder.run(&["eval", "q.jsonl", "--json", "-m", model.to_str().unwrap()]);
    let json: Value = serde_json::from_str(&run.stdout).unwrap();
    for (row, expected) in json["rows"].as_array().unwrap().iter().zip(BY_TRANSFORMERS) {
        for (logprob, expected) in row["logprobs"].as_array().unwrap().iter().zip(expected) {
            // An int8 rounding may fall to the other side (docs/numerics.md).
            let error = (logprob.as_f64().unwrap() / expected - 1.0).abs();
            assert!(error < 2e-3, "{logprob} and {expected}");
        }
    }
}

#[test]
fn files_without_questions_are_refused() {
    let folder = Folder::new();
    folder.write("none.jsonl", "nothing\n\n");
    folder.write(
        "long.jsonl",
        format!(r#"{{"prompt": "{}", "choices": ["a", "b"], "answer": 0}}"#, "word ".repeat(600)),
    );
    for name in ["none.jsonl", "long.jsonl"] {
        let run = folder.run(&["eval", name, "-q"]);
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""));
        assert_eq!(run.stderr, format!("error: {name}: has no question that can be used\n"));
    }
    let run = folder.run(&["eval", "long.jsonl"]);
    assert!(
        run.stderr.contains("tokens do not fit the model's context of 512; left out"),
        "{}",
        run.stderr
    );
    folder.write("q.jsonl", QUESTIONS);
    let run = folder.run(&["eval", "q.jsonl", "--output", "no/rows.jsonl"]);
    assert!(run.stderr.starts_with("error: no/rows.jsonl: cannot be written: "), "{}", run.stderr);
}

#[test]
fn doctor_tells_a_model_that_writes_from_one_that_cannot() {
    let folder = Folder::new();
    folder.model("sound");
    let report = |model: &str| {
        let run = folder.run(&["doctor", "-m", model, "--json"]);
        let json: Value = serde_json::from_str(&run.stdout).unwrap();
        let checks = json["checks"].as_array().unwrap().clone();
        let find =
            move |name: &str| checks.iter().find(|check| check["name"] == name).unwrap().clone();
        (run.code, run.stderr, find)
    };
    let (code, stderr, check) = report("sound");
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(check("an easy text")["ok"], true);
    assert_eq!(check("chat template")["ok"], true);
    assert!(check("\"Once upon a time\" goes on")["finding"].as_str().unwrap().contains("little"));

    // The vocabulary of another model: every number is computed as it should be, of the wrong tokens.
    let path = folder.copy_of(&bitnet_testing::tiny_model(), "mixed").join("tokenizer.json");
    let mut tokenizer: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    for id in tokenizer["model"]["vocab"].as_object_mut().unwrap().values_mut() {
        let old = id.as_u64().unwrap();
        // 17 has no factor in common with 2000, so this is a permutation.
        *id = if old < 2000 { (old * 17 % 2000).into() } else { old.into() };
    }
    fs::write(&path, tokenizer.to_string()).unwrap();
    let (code, stderr, check) = report("mixed");
    assert_eq!((code, check("an easy text")["ok"].clone()), (Some(1), false.into()));
    assert!(stderr.starts_with("error: the model does not work as it should: "), "{stderr}");

    // An answer that ends with a token at which nothing stops.
    let path =
        folder.copy_of(&bitnet_testing::tiny_model(), "endless").join("tokenizer_config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let template = "{% for m in messages %}{{ m['content'] }}<|start_header_id|>{% endfor %}";
    config["chat_template"] = template.into();
    fs::write(&path, config.to_string()).unwrap();
    let (code, _, check) = report("endless");
    assert_eq!((code, check("chat template")["ok"].clone()), (Some(1), false.into()));
}

#[test]
fn a_model_that_is_not_there_is_looked_for_beside_it() {
    let folder = Folder::new();
    folder.model("bitnet-2b");
    for flags in [["info", "-m", "bitnet-2B"], ["bench", "-m", "bitnet2b"]] {
        let run = folder.run(&flags);
        assert_eq!(run.code, Some(1));
        assert!(run.stderr.ends_with("\nhint: is it bitnet-2b?\n"), "{}", run.stderr);
    }
    assert!(!bitnet(&["info", "-m", "bitnet-2b"]).stderr.contains("hint"));
}
