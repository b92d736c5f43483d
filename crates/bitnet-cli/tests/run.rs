//! `bitnet run`, as users and programs see it.

mod support;

use bitnet_testing::golden::GoldenModel;
use support::{Folder, bitnet, ids, joined, json_of, stdout_of};

const PROMPT: &str = "Once upon a time";

#[test]
fn greedy_tokens_are_those_of_transformers_up_to_the_first_near_tie() {
    let Some(folder) = bitnet_testing::golden("tiny") else { return };
    let golden = GoldenModel::read(&folder);
    let mut compared = 0;
    for prompt in &golden.prompts {
        let run = json_of(&[
            "run",
            "--tokens",
            &joined(&prompt.ids),
            "-n",
            "32",
            "--ignore-eos",
            "--json",
        ]);
        assert_eq!(ids(&run["prompt_tokens"]), prompt.ids);
        assert_eq!(run["finish_reason"], "length");
        let clear = prompt.greedy_margin.iter().take_while(|margin| **margin > 0.3).count();
        compared += clear;
        let tokens = ids(&run["tokens"]);
        assert_eq!(tokens.len(), 32);
        assert_eq!(tokens[..clear], prompt.greedy[..clear]);
    }
    assert!(compared > 10, "only {compared} tokens were compared");
}

#[test]
fn every_clear_greedy_step_of_transformers_is_taken_after_the_same_prefix() {
    let Some(folder) = bitnet_testing::golden("tiny") else { return };
    let golden = GoldenModel::read(&folder);
    let prompt = &golden.prompts[1];
    for step in 0..prompt.greedy.len() {
        let prefix = [&prompt.ids, &prompt.greedy[..step]].concat();
        let run =
            json_of(&["run", "--tokens", &joined(&prefix), "-n", "1", "--ignore-eos", "--json"]);
        let token = ids(&run["tokens"])[0];
        if prompt.greedy_margin[step] > 0.3 {
            assert_eq!(token, prompt.greedy[step], "step {step}");
        } else {
            assert!([prompt.greedy[step], prompt.greedy_second[step]].contains(&token));
        }
    }
}

#[test]
fn text_output_is_the_prompt_its_continuation_and_a_newline() {
    let run = json_of(&["run", PROMPT, "-n", "20", "--json"]);
    let continuation = run["text"].as_str().unwrap();
    assert_eq!(stdout_of(&["run", PROMPT, "-n", "20"]), format!("{PROMPT}{continuation}\n"));

    let tokens = joined(&ids(&run["prompt_tokens"]));
    assert_eq!(stdout_of(&["run", "--tokens", &tokens, "-n", "20"]), format!("{continuation}\n"));
    assert_eq!(stdout_of(&["run", PROMPT, "-n", "0"]), format!("{PROMPT}\n"));
}

#[test]
fn a_prompt_file_and_stdin_are_taken_as_they_are() {
    let folder = Folder::new();
    folder.write("prompt.txt", PROMPT);
    let expected = stdout_of(&["run", PROMPT, "-n", "5"]);
    let from_file = folder.run(&["run", "--file", "prompt.txt", "-n", "5"]);
    assert_eq!((from_file.code, &from_file.stdout), (Some(0), &expected));
    let from_stdin = folder.run_with_input(&["run", "-f", "-", "-n", "5"], PROMPT.as_bytes());
    assert_eq!((from_stdin.code, &from_stdin.stdout), (Some(0), &expected));
}

#[test]
fn json_has_the_promised_shape() {
    let run = json_of(&["run", PROMPT, "-n", "3", "--logprobs", "2", "--json"]);
    let keys: Vec<&String> = run.as_object().unwrap().keys().collect();
    for key in ["prompt_tokens", "tokens", "text", "finish_reason", "timing", "logprobs"] {
        assert!(run.get(key).is_some(), "{key} is not in {keys:?}");
    }
    assert_eq!(keys.len(), 6);
    assert!(run["timing"]["prompt_ms"].as_f64().unwrap() > 0.0);
    assert!(run["timing"]["decode_tokens_per_s"].as_f64().unwrap() > 0.0);
    for (entry, token) in run["logprobs"].as_array().unwrap().iter().zip(ids(&run["tokens"])) {
        assert_eq!(entry["token"], token);
        let top = entry["top"].as_array().unwrap();
        assert_eq!(top.len(), 2);
        // Greedy: the token is the most probable one.
        assert_eq!((&top[0]["token"], &top[0]["logprob"]), (&entry["token"], &entry["logprob"]));
        assert!(entry["logprob"].as_f64().unwrap() < 0.0);
    }
    assert!(json_of(&["run", PROMPT, "-n", "1", "--json"]).get("logprobs").is_none());
}

#[test]
fn the_summary_is_one_line_on_stderr_and_quiet_leaves_it_out() {
    let loud = bitnet(&["run", PROMPT, "-n", "3"]);
    assert_eq!(loud.stderr.matches('\n').count(), 1);
    assert!(loud.stderr.starts_with("5 prompt tokens in "), "{}", loud.stderr);
    assert!(loud.stderr.contains(", 3 tokens in "), "{}", loud.stderr);
    assert!(loud.stderr.ends_with(" tokens/s)\n"), "{}", loud.stderr);
    assert!(!loud.stderr.contains('\x1b'), "colour without a terminal");
    let quiet = bitnet(&["run", PROMPT, "-n", "3", "--quiet"]);
    assert_eq!((quiet.stdout, quiet.stderr.as_str()), (loud.stdout, ""));
}

#[test]
fn the_same_seed_gives_the_same_text_and_another_seed_another() {
    let with_seed = |seed| {
        stdout_of(&[
            "run",
            PROMPT,
            "-n",
            "30",
            "--temperature",
            "1",
            "--top-p",
            "0.95",
            "--seed",
            seed,
        ])
    };
    assert_eq!(with_seed("7"), with_seed("7"));
    assert_ne!(with_seed("7"), with_seed("8"));
}

#[test]
fn threads_change_nothing() {
    let with_threads = |threads| {
        let run = json_of(&[
            "run",
            PROMPT,
            "-n",
            "40",
            "--temperature",
            "1",
            "--json",
            "--threads",
            threads,
        ]);
        (run["tokens"].clone(), run["text"].clone())
    };
    let one = with_threads("1");
    assert_eq!(one, with_threads("2"));
    assert_eq!(one, with_threads("5"));
}

#[test]
fn a_stop_text_ends_the_output_before_it() {
    let whole = json_of(&["run", PROMPT, "-n", "60", "--json"]);
    let text = whole["text"].as_str().unwrap();
    let at = text.find("park").expect("the story goes to the park");
    let run = json_of(&["run", PROMPT, "-n", "60", "--stop", "zebra", "--stop", "park", "--json"]);
    assert_eq!(run["text"].as_str().unwrap(), &text[..at]);
    assert_eq!(run["finish_reason"], "stop");
    let shown = stdout_of(&["run", PROMPT, "-n", "60", "--stop", "park"]);
    assert_eq!(shown, format!("{PROMPT}{}\n", &text[..at]));
}

#[test]
fn an_end_token_ends_the_text_and_is_not_in_it_unless_it_is_ignored() {
    // A bias large enough makes the end token the next one.
    let ended = json_of(&["run", PROMPT, "--logit-bias", "2037=1000", "--json"]);
    assert_eq!(ended["finish_reason"], "stop");
    assert_eq!((&ended["tokens"], &ended["text"]), (&serde_json::json!([]), &"".into()));
    let ignored =
        json_of(&["run", PROMPT, "--logit-bias", "2037=1000", "--ignore-eos", "-n", "4", "--json"]);
    assert_eq!(ids(&ignored["tokens"]), [2037; 4]);
    assert_eq!(ignored["finish_reason"], "length");
}

#[test]
fn a_banned_token_does_not_occur() {
    let free = ids(&json_of(&["run", PROMPT, "-n", "20", "--json"])["tokens"]);
    let ban = format!("{}=-inf", free[0]);
    let banned =
        ids(&json_of(&["run", PROMPT, "-n", "20", "--logit-bias", &ban, "--json"])["tokens"]);
    assert!(!banned.contains(&free[0]));
}

#[test]
fn generation_ends_with_the_context() {
    let run = json_of(&["run", PROMPT, "-n", "100000", "--ignore-eos", "--json"]);
    // The last token needs no room: nothing comes after it.
    assert_eq!(ids(&run["tokens"]).len() + 5, 512 + 1);
    assert_eq!(run["finish_reason"], "length");
}

#[test]
fn chat_puts_the_messages_into_the_template() {
    let folder = Folder::new();
    let messages =
        r#"[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]"#;
    folder.write("messages.json", messages);
    let tokenized = folder.run(&["tokenize", "--chat", "messages.json", "--json"]);
    let tokenized: serde_json::Value = serde_json::from_str(&tokenized.stdout).unwrap();
    let run = json_of(&["run", "--chat", "Hello", "--system", "Be brief.", "-n", "4", "--json"]);
    assert_eq!(run["prompt_tokens"], tokenized["ids"]);
    let answer = stdout_of(&["run", "--chat", "Hello", "--system", "Be brief.", "-n", "4"]);
    assert_eq!(answer, format!("{}\n", run["text"].as_str().unwrap()));
}

#[test]
fn a_profile_names_each_operation_its_bytes_and_its_bound() {
    let run = json_of(&["run", PROMPT, "-n", "3", "--profile", "--json"]);
    let profile = &run["profile"];
    assert!(profile["read_ceiling_gb_per_s"].as_f64().unwrap() > 0.0);
    let operations = profile["operations"].as_array().unwrap();
    let named = |name: &str| operations.iter().any(|operation| operation["name"] == name);
    assert!(["embedding", "linears", "attention", "gate and up"].into_iter().all(named));
    let wall =
        run["timing"]["prompt_ms"].as_f64().unwrap() + run["timing"]["decode_ms"].as_f64().unwrap();
    let inside: f64 = operations.iter().map(|operation| operation["ms"].as_f64().unwrap()).sum();
    assert!(inside <= wall, "{inside} ms of {wall}");
    assert_eq!(json_of(&["run", PROMPT, "-n", "3", "--json"])["profile"], serde_json::Value::Null);

    let shown = support::bitnet(&["run", PROMPT, "-n", "3", "--profile"]);
    assert!(shown.stderr.contains("bound by"), "{}", shown.stderr);
    assert!(shown.stderr.lines().all(|line| line.chars().count() <= 80), "{}", shown.stderr);
}

#[test]
fn a_constraint_is_what_the_output_is() {
    let folder = Folder::new();
    let schema = r#"{"type": "object", "properties": {"colour": {"enum": ["red", "blue"]}},
        "required": ["colour"], "additionalProperties": false,
        "x-guidance": {"whitespace_flexible": false}}"#;
    folder.write("schema.json", schema);
    folder.write("sum.lark", "start: N (\"+\" N)~2\nN: /[1-9][0-9]?/\n");
    let values = [r#"{"colour":"red"}"#, r#"{"colour":"blue"}"#];
    for schema in [schema, "schema.json"] {
        let outcome = folder.run(&["run", "It was ", "--json-schema", schema, "--json"]);
        let run: serde_json::Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert!(values.contains(&run["text"].as_str().unwrap()), "{run}");
        assert_eq!(run["finish_reason"], "stop");
    }
    let outcome = folder.run(&["run", "It was ", "--regex", "(red|blue), (red|blue)\\."]);
    let colours = outcome.stdout.strip_prefix("It was ").unwrap().strip_suffix(".\n").unwrap();
    assert!(colours.split(", ").all(|colour| ["red", "blue"].contains(&colour)), "{colours}");
    let sampled = ["--temperature", "1.5", "--seed", "4", "--grammar", "sum.lark"];
    let outcome = folder.run(&[&["run", "--tokens", "1,2,3"][..], &sampled].concat());
    let numbers: Vec<u32> =
        outcome.stdout.trim().split('+').map(|number| number.parse().unwrap()).collect();
    assert!(numbers.len() == 3 && numbers.iter().all(|number| (1..100).contains(number)));

    // One that has to be cut off says so.
    let outcome = folder.run(&["run", "It was ", "--regex", "(red|blue){9}", "-n", "3"]);
    let note = "note: the output is cut off and may not be what the constraint asks: raise -n\n";
    assert!(outcome.code == Some(0) && outcome.stderr.contains(note), "{}", outcome.stderr);
}
