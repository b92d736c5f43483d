//! `bitnet convert`: the file it writes is the model it read, and it destroys nothing.

mod support;

use std::fs;

use support::{Folder, Outcome, stdout_of};

#[track_caller]
fn succeeds(folder: &Folder, arguments: &[&str]) -> Outcome {
    let outcome = folder.run(arguments);
    assert_eq!(outcome.code, Some(0), "{arguments:?}: {}", outcome.stderr);
    outcome
}

#[track_caller]
fn refused(outcome: Outcome, code: i32, sentence: &str) {
    let expected =
        Outcome { code: Some(code), stdout: String::new(), stderr: format!("error: {sentence}\n") };
    assert_eq!(outcome, expected);
}

#[test]
fn the_file_writes_the_same_story() {
    let folder = Folder::new();
    let outcome = succeeds(&folder, &["convert", "tiny", "t.bitnet", "--verify"]);
    assert_eq!(outcome.stdout, "");
    assert!(outcome.stderr.starts_with("t.bitnet: "), "{}", outcome.stderr);
    assert!(
        outcome.stderr.ends_with("\nverified: the same results to the last bit\n"),
        "{}",
        outcome.stderr
    );
    let story = ["run", "Once upon a time", "-n", "40"];
    let with_model = [&story[..], &["-m", "t.bitnet"]].concat();
    assert_eq!(succeeds(&folder, &with_model).stdout, stdout_of(&story));
    let info = succeeds(&folder, &["info", "-m", "t.bitnet", "--verify-checksums"]).stdout;
    assert!(info.contains("\nformat           native\n"), "{info}");
    assert!(info.contains("\nstored as        28 x 2-bit tiles\n"), "{info}");
    let rows = |text: &str| text.lines().filter(|l| !l.contains("t.bitnet")).count();
    assert_eq!(rows(&info) + 1, rows(&stdout_of(&["info"])), "{info}");
    // The folder it lies in is the model too.
    assert_eq!(succeeds(&folder, &["info", "-m", "."]).code, Some(0));
}

#[test]
fn quietly_it_says_nothing() {
    let outcome = Folder::new().run(&["convert", "tiny", "t.bitnet", "--to", "bitnet", "--quiet"]);
    let nothing = Outcome { code: Some(0), stdout: String::new(), stderr: String::new() };
    assert_eq!(outcome, nothing);
}

#[test]
fn an_embedding_model_is_verified_by_its_states() {
    let Some(path) = bitnet_testing::golden("qwen3-embedding") else { return };
    let folder = Folder::new();
    succeeds(&folder, &["convert", path.to_str().unwrap(), "e.bitnet", "--verify"]);
}

#[test]
fn the_model_itself_and_other_files_are_not_overwritten() {
    let folder = Folder::new();
    let weights = folder.model("model").join("model.safetensors");
    let before = fs::read(&weights).unwrap();
    let itself = "it is the model that is to be converted; give another name";
    let file = "model/model.safetensors";
    let sentence = format!("{file}: cannot be written: {itself}");
    refused(folder.run(&["convert", "model", file]), 1, &sentence);
    refused(
        folder.run(&["convert", "model", "model"]),
        1,
        "model: cannot be written: it is a folder; give the name of a file, such as model.bitnet",
    );
    refused(
        folder.run(&["convert", "model", "model/config.json"]),
        1,
        "model/config.json: cannot be written: there is another file of this name; give another \
         name, or remove it",
    );
    assert!(fs::read(&weights).unwrap() == before);

    succeeds(&folder, &["convert", "tiny", "t.bitnet"]);
    let sentence = format!("t.bitnet: cannot be written: {itself}");
    refused(
        folder.run(&["convert", "t.bitnet", "./t.bitnet"]),
        1,
        &sentence.replace("t.b", "./t.b"),
    );
    // An older conversion is replaced.
    succeeds(&folder, &["convert", "model", "t.bitnet"]);
}

#[test]
fn where_nothing_can_be_written() {
    let folder = Folder::new();
    folder.write("file", "");
    for (output, reason) in [
        ("nowhere/t.bitnet", "No such file or directory (os error 2)"),
        ("file/t.bitnet", "Not a directory (os error 20)"),
    ] {
        let sentence = format!("{output}: cannot be written: {reason}");
        refused(folder.run(&["convert", "tiny", output]), 1, &sentence);
    }
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 1);
}

#[test]
fn other_formats_are_wrong_usage() {
    let outcome = Folder::new().run(&["convert", "tiny", "t", "--to", "gguf"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""));
    assert_eq!(Folder::new().run(&["convert", "tiny"]).code, Some(2));
}

#[test]
fn a_damaged_file_is_told_by_its_checksums_alone() {
    let folder = Folder::new();
    succeeds(&folder, &["convert", "tiny", "t.bitnet"]);
    let mut bytes = fs::read(folder.path("t.bitnet")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    folder.write("t.bitnet", &bytes);
    succeeds(&folder, &["info", "-m", "t.bitnet"]);
    let outcome = folder.run(&["info", "-m", "t.bitnet", "--verify-checksums"]);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""));
    assert!(outcome.stderr.starts_with("error: t.bitnet: tensor `"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("its checksum differs"), "{}", outcome.stderr);
    refused(
        folder.run(&["info", "--verify-checksums"]),
        1,
        "tiny: is built in and has no checksums",
    );
}
