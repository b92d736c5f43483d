//! `bitnet chat` at a terminal: the line editor, Ctrl-C, and what is drawn.
#![cfg(unix)]

mod support;

use std::fs;

use rexpect::process::WaitStatus;
use rexpect::session::{PtySession, spawn_command};
use support::Folder;

/// Far more than any step takes on a busy machine.
const PATIENCE_MS: u64 = 120_000;

fn start(folder: &Folder, arguments: &[&str]) -> PtySession {
    let mut command = folder.command(&[&["chat"], arguments].concat());
    // The terminal is to be its stdin too.
    let program = command.get_program().to_owned();
    let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
    command = std::process::Command::new(program);
    command.args(arguments).current_dir(folder.path(""));
    command.env("XDG_STATE_HOME", folder.path("state")).env("HOME", folder.path("home"));
    command.env("TERM", "xterm").env_remove("NO_COLOR");
    spawn_command(command, Some(PATIENCE_MS)).expect("a terminal")
}

/// Waits for a text, and says what came instead.
#[track_caller]
fn expect(session: &mut PtySession, text: &str) -> String {
    session.exp_string(text).unwrap_or_else(|error| panic!("{text:?}: {error}"))
}

/// Keys, without Enter after them.
fn press(session: &mut PtySession, keys: &str) {
    session.send(keys).and_then(|_| session.flush()).expect("keys are taken");
}

#[track_caller]
fn ends(session: &mut PtySession, code: i32) {
    session.exp_eof().expect("the program ends");
    match session.process().wait().expect("a status") {
        WaitStatus::Exited(_, status) => assert_eq!(status, code),
        other => panic!("{other:?}"),
    }
}

/// A copy of the small model that never comes to the end of its context.
fn endless(folder: &Folder) {
    let config = folder.model("endless").join("config.json");
    let text = fs::read_to_string(&config).unwrap();
    let context = "\"max_position_embeddings\": 512";
    assert!(text.contains(context));
    fs::write(&config, text.replace(context, "\"max_position_embeddings\": 1000000")).unwrap();
}

#[test]
fn ctrl_c_stops_the_answer_and_twice_at_an_empty_prompt_the_program() {
    let folder = Folder::new();
    endless(&folder);
    // No end token may come before Ctrl-C does.
    let ban = ["--logit-bias", "2037=-inf", "--logit-bias", "2045=-inf"];
    let mut session =
        start(&folder, &[&["-m", "endless", "--temperature", "1"], &ban[..]].concat());
    expect(&mut session, "/help lists commands");
    expect(&mut session, "> ");
    session.send_line("Tell me a story.").unwrap();
    // Its first lines.
    expect(&mut session, "reading");
    for _ in 0..4 {
        expect(&mut session, "\n");
    }
    session.send_control('c').unwrap();
    expect(&mut session, "stopped; what was said so far is kept");
    expect(&mut session, "> ");

    press(&mut session, "half a line");
    expect(&mut session, "half a line");
    session.send_control('c').unwrap();
    expect(&mut session, "> ");
    session.send_control('c').unwrap();
    expect(&mut session, "Ctrl-C again, Ctrl-D or /exit leaves");
    expect(&mut session, "> ");
    session.send_line("/stats").unwrap();
    expect(&mut session, "answers so far  1");
    expect(&mut session, "> ");
    session.send_control('c').unwrap();
    expect(&mut session, "> ");
    session.send_control('c').unwrap();
    ends(&mut session, 0);
}

#[test]
fn lines_go_on_and_names_are_completed() {
    let folder = Folder::new();
    folder.write("my notes.txt", "The dog is red.");
    let mut session = start(&folder, &["-n", "5", "--temperature", "0"]);
    expect(&mut session, "> ");
    session.send_line("one\\").unwrap();
    session.send_line("two").unwrap();
    expect(&mut session, "/512]");
    expect(&mut session, "> ");
    session.send_line("\"\"\"").unwrap();
    session.send_line("three").unwrap();
    session.send_line("four\"\"\"").unwrap();
    expect(&mut session, "/512]");
    expect(&mut session, "> ");
    press(&mut session, "/fi\t");
    expect(&mut session, "/file");
    press(&mut session, " my\t\n");
    expect(&mut session, "my notes.txt: ");
    expect(&mut session, "before your next message");
    expect(&mut session, "> ");
    session.send_line("five").unwrap();
    expect(&mut session, "/512]");
    session.send_line("/save out.json").unwrap();
    expect(&mut session, "out.json: written");
    session.send_control('d').unwrap();
    ends(&mut session, 0);

    let text = fs::read_to_string(folder.path("out.json")).unwrap();
    let conversation: serde_json::Value = serde_json::from_str(&text).unwrap();
    let said: Vec<&str> = conversation["messages"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|message| message["role"] == "user")
        .map(|message| message["content"].as_str().unwrap())
        .collect();
    assert_eq!(said, ["one\ntwo", "three\nfour", "The dog is red.\n\nfive"]);

    // The next one remembers what was typed.
    let mut session = start(&folder, &["-n", "5", "--temperature", "0"]);
    expect(&mut session, "> ");
    press(&mut session, "\x1b[A\x1b[A\n");
    expect(&mut session, "/512]");
    session.send_line("/save again.json").unwrap();
    expect(&mut session, "again.json: written");
    session.send_line("/exit").unwrap();
    ends(&mut session, 0);
    let text = fs::read_to_string(folder.path("again.json")).unwrap();
    assert!(text.contains("\"five\""), "{text}");
}

#[test]
fn an_error_does_not_end_the_chat_and_quiet_draws_no_colours() {
    let folder = Folder::new();
    let mut session = start(&folder, &["-n", "3", "--temperature", "0"]);
    expect(&mut session, "> ");
    session.send_line("/sing").unwrap();
    expect(&mut session, "there is no command /sing");
    session.send_line("Hello").unwrap();
    expect(&mut session, "\x1b[2m[");
    expect(&mut session, "/512]");
    session.send_line("/exit").unwrap();
    ends(&mut session, 0);

    let mut session = start(&folder, &["-n", "3", "--temperature", "0", "--quiet"]);
    let mut drawn = expect(&mut session, "> ");
    session.send_line("Hello").unwrap();
    drawn += &expect(&mut session, "\x1b[?2004l");
    drawn += &expect(&mut session, "> ");
    session.send_line("/exit").unwrap();
    drawn += &session.exp_eof().unwrap();
    assert!(!drawn.contains("\x1b[2m") && !drawn.contains("/512]"), "{drawn:?}");
}
