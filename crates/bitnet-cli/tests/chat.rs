//! `bitnet chat` by lines of stdin: what a script sees.

mod support;

use std::fs;

use serde_json::{Value, json};
use support::{Folder, Outcome, json_of};

const GREEDY: [&str; 5] = ["chat", "--temperature", "0", "-n", "12"];

fn chat(folder: &Folder, arguments: &[&str], input: &str) -> Outcome {
    folder.run_with_input(&[&GREEDY[..], arguments].concat(), input.as_bytes())
}

/// What was printed by a chat that went well.
#[track_caller]
fn answers(folder: &Folder, arguments: &[&str], input: &str) -> String {
    let outcome = chat(folder, arguments, input);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome.stdout
}

#[track_caller]
fn fails(outcome: Outcome, sentence: &str) {
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let last = outcome.stderr.lines().last().unwrap();
    assert_eq!(last, format!("error: {sentence}"));
}

fn saved(folder: &Folder, name: &str) -> Value {
    serde_json::from_str(&fs::read_to_string(folder.path(name)).unwrap()).unwrap()
}

#[test]
fn the_first_answer_is_that_of_run_and_the_next_knows_it() {
    let folder = Folder::new();
    let run = json_of(&["run", "--chat", "Hello", "--system", "Be kind.", "-n", "12", "--json"]);
    let text = run["text"].as_str().unwrap();
    let input = "Hello\n/save one.json\nWhy?\n/save two.json\n";
    let printed = answers(&folder, &["--system", "Be kind."], input);
    assert!(printed.starts_with(text.trim_start()), "{printed}");

    let one = saved(&folder, "one.json");
    assert_eq!(one["system"], "Be kind.");
    assert_eq!(
        one["messages"],
        json!([{"role": "user", "content": "Hello"}, {"role": "assistant", "content": text}])
    );
    // The second answer is that of a model that reads the whole conversation.
    let two = saved(&folder, "two.json");
    let mut messages = two["messages"].as_array().unwrap().clone();
    let answer = messages.pop().unwrap()["content"].as_str().unwrap().to_owned();
    messages.insert(0, json!({"role": "system", "content": "Be kind."}));
    folder.write("messages.json", Value::from(messages).to_string());
    let tokenized = folder.run(&["tokenize", "--chat", "messages.json", "--json"]);
    let prompt: Value = serde_json::from_str(&tokenized.stdout).unwrap();
    let prompt = support::joined(&support::ids(&prompt["ids"]));
    let expected = json_of(&["run", "--tokens", &prompt, "-n", "12", "--json"]);
    assert_eq!(answer, expected["text"].as_str().unwrap());
}

#[test]
fn what_is_taken_back_is_as_if_it_had_never_been_said() {
    let folder = Folder::new();
    let plain = answers(&folder, &["--quiet"], "One\nTwo\n");
    let input = "One\nThree\n/undo\nTwo\n";
    let undone = answers(&folder, &["--quiet"], input);
    let three = answers(&folder, &["--quiet"], "One\nThree\n");
    let (one, two) = plain.split_at(plain.find('\n').unwrap() + 1);
    assert_eq!(undone, format!("{three}{two}"));
    assert!(three.starts_with(one));
    assert_eq!(answers(&folder, &["--quiet"], "One\n/clear\nOne\n"), one.repeat(2));
    // With temperature 0 an answer that is given again is the same.
    assert_eq!(answers(&folder, &["--quiet"], "One\n/regen\nTwo\n"), format!("{one}{plain}"));
}

#[test]
fn regen_takes_the_next_seed_and_set_another_one() {
    let folder = Folder::new();
    let run = |input: &str| {
        let arguments = ["chat", "--temperature", "1.5", "--seed", "3", "-n", "8", "--quiet"];
        let outcome = folder.run_with_input(&arguments, input.as_bytes());
        assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
        outcome.stdout
    };
    let again = run("Hello\n/regen\n");
    let (first, second) = again.split_at(again.find('\n').unwrap() + 1);
    assert_ne!(first, second);
    assert_eq!(run("/set seed 4\nHello\n"), second);
    let run = json_of(&[
        "run",
        "--chat",
        "Hello",
        "--temperature",
        "1.5",
        "--top-p",
        "0.9",
        "--seed",
        "3",
        "-n",
        "8",
        "--json",
    ]);
    assert_eq!(first, format!("{}\n", run["text"].as_str().unwrap().trim_start()));
}

#[test]
fn a_saved_conversation_goes_on_where_it_was() {
    let folder = Folder::new();
    let arguments = ["--quiet", "--system", "Be kind."];
    let whole = answers(&folder, &arguments, "One\n/set seed 9\n/save a b.json\nTwo\n");
    let rest = answers(&folder, &["--quiet"], "/load a b.json\nTwo\n");
    // The last message is shown again, and then comes the answer.
    assert_eq!(rest, whole);
    let conversation = saved(&folder, "a b.json");
    assert_eq!(conversation["settings"]["seed"], 9);
    assert_eq!(conversation["settings"]["max_tokens"], 12);
    assert_eq!(conversation["model"], "tiny");
    let text = fs::read_to_string(folder.path("a b.json")).unwrap();
    assert!(text.contains("\n  \"system\": \"Be kind.\",\n"), "{text}");
}

#[test]
fn a_file_comes_before_the_next_message() {
    let folder = Folder::new();
    folder.write("notes.txt", "The dog is red.\n");
    answers(&folder, &[], "/file notes.txt\nWhat is red?\n/save out.json\n");
    let expected = "The dog is red.\n\nWhat is red?";
    assert_eq!(saved(&folder, "out.json")["messages"][0]["content"], expected);
}

#[test]
fn a_full_context_loses_its_oldest_turns_and_says_so() {
    let folder = Folder::new();
    let message = "Tell me a long story about a cat, a dog and a little girl in a big house.\n";
    let input = format!("{}/stats\n/save all.json\n", message.repeat(24));
    let outcome = chat(&folder, &[], &input);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    let notes = outcome.stderr.matches("note: the context is full: the oldest ").count();
    // Not with every message: half of the context is free again after each time.
    assert!((1..6).contains(&notes), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("left out\n"), "{}", outcome.stderr);
    // What the model does not read any more is still there.
    assert_eq!(saved(&folder, "all.json")["messages"].as_array().unwrap().len(), 48);
    for line in outcome.stderr.lines().filter(|line| line.starts_with('[')) {
        let meter = line[1..].split(']').next().unwrap();
        let (used, context) = meter.split_once('/').unwrap();
        assert_eq!(context, "512");
        assert!(used.parse::<usize>().unwrap() <= 512, "{line}");
    }
}

#[test]
fn a_base_model_is_refused_unless_it_is_forced() {
    let Some(path) = bitnet_testing::golden("trilm") else { return };
    let folder = Folder::new();
    folder.copy_of(&path, "base");
    fails(
        chat(&folder, &["-m", "base"], "Hello\n"),
        "base is a base model: it has no chat template, because it was taught to continue texts \
         and not to answer; use `bitnet run`, choose a chat model, or try with --force",
    );
    let forced = chat(&folder, &["-m", "base", "--force"], "Hello\n/save out.json\n");
    assert_eq!(forced.code, Some(0), "{}", forced.stderr);
    assert!(forced.stderr.contains("lines that begin with `User:`"), "{}", forced.stderr);
    let prompt = "User: Hello\nAssistant:";
    let run = folder.run(&["run", prompt, "-m", "base", "-n", "12", "--stop", "\nUser:", "--json"]);
    let run: Value = serde_json::from_str(&run.stdout).unwrap();
    assert_eq!(saved(&folder, "out.json")["messages"][1]["content"], run["text"]);
}

#[test]
fn a_script_ends_at_the_first_error() {
    let folder = Folder::new();
    folder.write("diary.txt", "dear diary");
    folder.write(
        "strange.json",
        json!({"model": "tiny", "system": null, "messages": []}).to_string(),
    );
    let long = "the cat ".repeat(600);
    for (input, sentence) in [
        ("/sing\n", "there is no command /sing: /help lists them"),
        ("/undo\n", "there is no message to take back"),
        ("/regen\n", "there is no message to answer again"),
        ("/set colour 1\n", "there is no setting `colour`: /set lists them"),
        ("/set top_p 2\n", "top_p is 2.0: give a number above 0 and at most 1"),
        ("/save\n", "/save needs the name of a file"),
        ("/load none.json\n", "none.json: cannot be read: No such file or directory (os error 2)"),
        (
            "/save diary.txt\n",
            "diary.txt: is there and is no conversation: choose another name, or delete it first",
        ),
        (
            "/save nowhere/a.json\n",
            "nowhere/a.json: cannot be written: No such file or directory (os error 2): make its \
             folder first",
        ),
        (
            "/load strange.json\n",
            "strange.json: is not a conversation that /save wrote: missing field `settings` at \
             line 1 column 44",
        ),
    ] {
        fails(chat(&folder, &[], input), sentence);
    }
    let outcome = chat(&folder, &[], &format!("{long}\n"));
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""));
    assert!(outcome.stderr.contains("do not fit the model's context of 512"), "{outcome:?}");
    assert_eq!(fs::read_to_string(folder.path("diary.txt")).unwrap(), "dear diary");
    let flags = folder.run(&["chat", "--temperature", "-1"]);
    assert_eq!(flags.code, Some(2));
}

#[test]
fn the_defaults_of_chat_are_its_own() {
    let outcome = Folder::new().run_with_input(&["chat"], b"/set\n");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(0), ""));
    let value = |name: &str| {
        let line = outcome.stderr.lines().find(|line| line.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    assert_eq!([value("temperature"), value("top_p"), value("max_tokens")], ["0.6", "0.9", "none"]);
    assert!(!outcome.stderr.contains('\x1b'), "no colours without a terminal");
}
