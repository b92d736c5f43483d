//! Runs the real program in a folder of its own and keeps all it prints.

// Each test binary uses a part of this.
#![allow(dead_code)]

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

/// What the program printed and how it ended.
#[derive(Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Exit status; `None` if a signal ended it.
    pub code: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

impl Outcome {
    /// Of a command that has not been started.
    pub fn of(mut command: Command) -> Self {
        from_output(command.output().expect("the program starts"))
    }
}

/// What would lead to a hub, a cache or an account of whoever runs the tests.
const HUB_VARIABLES: [&str; 14] = [
    "HF_ENDPOINT",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "HF_TOKEN_PATH",
    "HF_HUB_CACHE",
    "HUGGINGFACE_HUB_CACHE",
    "HF_HUB_DISABLE_IMPLICIT_TOKEN",
    "HF_HUB_DOWNLOAD_TIMEOUT",
    "ALL_PROXY",
    "all_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "HTTP_PROXY",
    "http_proxy",
];

/// A fresh folder to run the program in.
pub struct Folder(TempDir);

impl Folder {
    pub fn new() -> Self {
        Folder(tempfile::tempdir().expect("a temporary folder"))
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    pub fn write(&self, name: &str, contents: impl AsRef<[u8]>) {
        fs::write(self.path(name), contents).expect("a file in the temporary folder");
    }

    /// A copy of the built-in model's files, to be broken.
    pub fn model(&self, name: &str) -> PathBuf {
        self.copy_of(&bitnet_testing::tiny_model(), name)
    }

    pub fn copy_of(&self, model: &Path, name: &str) -> PathBuf {
        let copy = self.path(name);
        fs::create_dir(&copy).expect("a new folder");
        for entry in fs::read_dir(model).expect("a model folder") {
            let path = entry.expect("a file").path();
            fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("a copy");
        }
        copy
    }

    /// The program with these arguments, not yet started. It does not know who runs the tests: neither the
    /// network nor a cache of models.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_bitnet"));
        command.current_dir(self.0.path()).args(arguments).stdin(Stdio::null());
        for variable in HUB_VARIABLES {
            command.env_remove(variable);
        }
        command.env("HF_HUB_OFFLINE", "1").env("HF_HOME", self.path("hf"));
        // Whoever runs the tests may have defaults of their own.
        command.env("BITNET_CONFIG", "");
        command
    }

    pub fn run(&self, arguments: &[&str]) -> Outcome {
        Outcome::of(self.command(arguments))
    }

    pub fn run_with_input(&self, arguments: &[&str], input: &[u8]) -> Outcome {
        let mut command = self.command(arguments);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the program starts");
        let mut stdin = child.stdin.take().expect("a pipe");
        let input = input.to_vec();
        // It may end before it has read everything.
        let writer = std::thread::spawn(move || drop(stdin.write_all(&input)));
        let output = child.wait_with_output().expect("the program ends");
        writer.join().expect("no panic while writing");
        from_output(output)
    }
}

/// Runs the program in a folder that is empty.
pub fn bitnet(arguments: &[&str]) -> Outcome {
    Folder::new().run(arguments)
}

/// What a successful run printed.
pub fn stdout_of(arguments: &[&str]) -> String {
    let outcome = bitnet(arguments);
    assert_eq!(outcome.code, Some(0), "{arguments:?}: {}", outcome.stderr);
    outcome.stdout
}

/// The one line of JSON that a successful run printed.
pub fn json_of(arguments: &[&str]) -> Value {
    let stdout = stdout_of(arguments);
    assert_eq!(stdout.matches('\n').count(), 1, "{stdout}");
    serde_json::from_str(&stdout).expect("JSON")
}

/// Checks that the program said why it did nothing, in one sentence.
#[track_caller]
pub fn refused(outcome: Outcome, code: i32, sentence: &str) {
    let expected =
        Outcome { code: Some(code), stdout: String::new(), stderr: format!("error: {sentence}\n") };
    assert_eq!(outcome, expected);
}

/// Ids as a flag takes them.
pub fn joined(ids: &[u32]) -> String {
    ids.iter().map(u32::to_string).collect::<Vec<_>>().join(",")
}

/// The ids in a JSON list.
pub fn ids(list: &Value) -> Vec<u32> {
    serde_json::from_value(list.clone()).expect("a list of ids")
}

fn from_output(output: std::process::Output) -> Outcome {
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).expect("UTF-8"),
        stderr: String::from_utf8(output.stderr).expect("UTF-8"),
    }
}
