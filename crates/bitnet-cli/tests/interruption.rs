//! Output that somebody cuts off: Ctrl-C, and pipes that close.
#![cfg(unix)]

mod support;

use std::fs;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use support::{Folder, stdout_of};

/// A copy of the small model that never comes to the end of its context.
fn endless(folder: &Folder) {
    let model = folder.model("endless");
    let path = model.join("config.json");
    let config = fs::read_to_string(&path).unwrap();
    let context = "\"max_position_embeddings\": 512";
    assert!(config.contains(context));
    fs::write(&path, config.replace(context, "\"max_position_embeddings\": 1000000")).unwrap();
}

const ENDLESS: [&str; 7] =
    ["run", "Once upon a time", "-m", "endless", "--ignore-eos", "-n", "1000000"];

fn start(folder: &Folder, arguments: &[&str]) -> Child {
    let mut command = folder.command(arguments);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

fn interrupt(child: &Child) {
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
}

#[test]
fn ctrl_c_keeps_the_text_so_far_and_ends_its_line() {
    let folder = Folder::new();
    endless(&folder);
    let mut child = start(&folder, &ENDLESS);
    let mut stdout = child.stdout.take().unwrap();
    let mut text = [0u8; 60];
    stdout.read_exact(&mut text).unwrap();
    interrupt(&child);
    let mut text = text.to_vec();
    stdout.read_to_end(&mut text).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(130));

    let text = String::from_utf8(text).unwrap();
    let story = text.strip_suffix('\n').expect("the line is ended");
    let expected = stdout_of(&["run", "Once upon a time", "--ignore-eos", "-n", "400"]);
    let expected = expected.strip_suffix('\n').unwrap();
    let common = story.len().min(expected.len());
    assert!(common >= 60);
    assert_eq!(story.as_bytes()[..common], expected.as_bytes()[..common]);
}

#[test]
fn ctrl_c_while_the_prompt_is_read_prints_nothing() {
    let folder = Folder::new();
    endless(&folder);
    let mut child = start(&folder, &["run", "--file", "-", "-m", "endless", "--json", "-n", "1"]);
    // More than a pipe holds: once it is written, the program has begun to read it.
    let prompt = "the little girl was happy ".repeat(40_000);
    child.stdin.take().unwrap().write_all(prompt.as_bytes()).unwrap();
    interrupt(&child);
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), "");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "");
}

#[test]
fn a_closed_pipe_ends_the_program_quietly() {
    let folder = Folder::new();
    endless(&folder);
    let mut child = start(&folder, &ENDLESS);
    let mut head = [0u8; 5];
    child.stdout.take().unwrap().read_exact(&mut head).unwrap();
    assert_eq!(&head, b"Once ");
    let mut stderr = String::new();
    child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert_eq!(stderr, "");
}

#[test]
fn a_closed_pipe_is_no_error_for_any_command() {
    let folder = Folder::new();
    for arguments in
        [&["logits", "--tokens", "1,2,3", "--all", "--json"][..], &["info"], &["--help"]]
    {
        let mut child = start(&folder, arguments);
        drop(child.stdout.take());
        let mut stderr = String::new();
        child.stderr.take().unwrap().read_to_string(&mut stderr).unwrap();
        assert_eq!((child.wait().unwrap().code(), stderr.as_str()), (Some(0), ""), "{arguments:?}");
    }
}
