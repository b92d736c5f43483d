//! `bitnet tokenize` and `bitnet detokenize` against Hugging Face `tokenizers`.

mod support;

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;

use serde_json::{Value, json};
use support::{Folder, ids, joined, json_of, stdout_of};

fn golden_json(path: &str) -> Option<Value> {
    let path = bitnet_testing::golden(path)?;
    Some(serde_json::from_slice(&fs::read(path).unwrap()).unwrap())
}

/// A model with the tokenizer of the golden vectors.
fn model() -> Option<String> {
    Some(bitnet_testing::golden("bitnet-1bitllm")?.display().to_string())
}

#[test]
fn lines_of_texts_become_the_ids_of_hugging_face() {
    let (Some(golden), Some(model)) = (golden_json("tokenizer/encode.json"), model()) else {
        return;
    };
    let vectors = golden["vectors"].as_array().unwrap();
    assert!(vectors.len() > 100);
    let input: String = vectors.iter().map(|vector| format!("{}\n", vector["text"])).collect();
    for (flags, key) in [
        (&["--json"][..], "ids_with_bos"),
        (&["--no-bos"][..], "ids"),
        (&["--no-bos", "--special-as-text"][..], "ids_special_as_text"),
    ] {
        let arguments = [&["tokenize", "--lines", "-m", &model], flags].concat();
        let outcome = Folder::new().run_with_input(&arguments, input.as_bytes());
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        let lines: Vec<&str> = outcome.stdout.lines().collect();
        assert_eq!(lines.len(), vectors.len());
        for (vector, line) in vectors.iter().zip(lines) {
            // Only texts that look like special tokens have the third kind.
            let expected = vector.get(key).unwrap_or(&vector["ids"]);
            assert_eq!(line, json!({"ids": expected}).to_string(), "{}", vector["text"]);
        }
    }
}

#[test]
fn each_line_is_answered_before_the_next_is_read() {
    let folder = Folder::new();
    let mut command = folder.command(&["tokenize", "--lines"]);
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    let mut answers = BufReader::new(child.stdout.take().unwrap()).lines();
    for text in ["Hello", "", "a\nb"] {
        writeln!(stdin, "{}", json!(text)).unwrap();
        let answer: Value = serde_json::from_str(&answers.next().unwrap().unwrap()).unwrap();
        assert_eq!(answer, json_of(&["tokenize", text, "--json"]));
    }
    drop(stdin);
    assert_eq!(child.wait().unwrap().code(), Some(0));
}

#[test]
fn ids_become_the_text_of_hugging_face() {
    let (Some(golden), Some(model)) = (golden_json("tokenizer/encode.json"), model()) else {
        return;
    };
    let vectors = golden["vectors"].as_array().unwrap();
    for vector in vectors.iter().filter(|v| !ids(&v["ids"]).is_empty()).step_by(7) {
        let tokens = joined(&ids(&vector["ids"]));
        let arguments = ["detokenize", "-m", &model, "--tokens", &tokens, "--json"];
        assert_eq!(json_of(&arguments)["text"], vector["decode"]);
        let skipping = [&arguments[..], &["--skip-special"]].concat();
        assert_eq!(json_of(&skipping)["text"], vector["decode_skip_special"]);
    }
}

#[test]
fn conversations_become_the_text_and_ids_of_hugging_face() {
    let (Some(golden), Some(model)) = (golden_json("chat.json"), model()) else { return };
    let folder = Folder::new();
    for (name, template) in golden["templates"].as_object().unwrap() {
        let copy = folder.copy_of(model.as_ref(), name);
        fs::write(copy.join("chat_template.jinja"), template.as_str().unwrap()).unwrap();
    }
    let mut compared = 0;
    for case in golden["cases"].as_array().unwrap().iter().step_by(3) {
        folder.write("messages.json", case["messages"].to_string());
        let template = case["template"].as_str().unwrap();
        let mut arguments = vec!["tokenize", "-m", template, "--chat", "messages.json", "--json"];
        if case["add_generation_prompt"] == false {
            arguments.push("--no-generation-prompt");
        }
        let outcome = folder.run(&arguments);
        let Some(text) = case.get("text") else { continue };
        assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
        let result: Value = serde_json::from_str(&outcome.stdout).unwrap();
        assert_eq!(result["text"], *text);
        // The tokenizer begins every text with this token, and a template may do so itself.
        const BOS: u32 = 1012;
        let mut expected = ids(&case["ids"]);
        if expected.first() != Some(&BOS) {
            expected.insert(0, BOS);
        }
        assert_eq!(ids(&result["ids"]), expected);
        compared += 1;
    }
    assert!(compared > 5);
}

#[test]
fn people_see_each_token_on_a_line() {
    let table = "\
2036  \"<|begin_of_text|>\"
1345  \"Hello\"
 220  \" \"
2045  \"<|eot_id|>\"
1392  \" world\"
";
    assert_eq!(stdout_of(&["tokenize", "Hello <|eot_id|> world"]), table);
    assert_eq!(stdout_of(&["detokenize", "--tokens", "1345,1392"]), "Hello world\n");
}

#[test]
fn people_see_the_text_of_a_conversation_above_its_tokens() {
    let folder = Folder::new();
    folder.write("messages.json", r#"[{"role": "user", "content": "Hi"}]"#);
    let table = folder.run(&["tokenize", "--chat", "messages.json"]).stdout;
    let json = folder.run(&["tokenize", "--chat", "messages.json", "--json"]).stdout;
    let json: Value = serde_json::from_str(&json).unwrap();
    let (text, tokens) = table.rsplit_once("\n\n").unwrap();
    assert_eq!(text, json["text"].as_str().unwrap().trim_end_matches('\n'));
    assert_eq!(tokens.lines().count(), ids(&json["ids"]).len());
}
