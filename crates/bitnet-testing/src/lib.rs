//! Shared parts of this project's tests: where golden data lies, and what backends must do.
#![forbid(unsafe_code)]

pub mod conformance;
pub mod golden;
pub mod hub;
mod random;

pub use random::Random;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

fn workspace_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .ancestors()
        .nth(2)
        .expect("this crate lies two folders below the workspace")
}

fn first_existing(path: &str, roots: [PathBuf; 2]) -> Option<PathBuf> {
    let found = roots.iter().map(|root| root.join(path)).find(|candidate| candidate.exists());
    if found.is_none() {
        println!("skipped: {path} is in neither {} nor {}", roots[0].display(), roots[1].display());
    }
    found
}

/// A file or folder of the golden data: from the copy in this crate, or from `../shared/golden`
/// beside the workspace. `None`, after saying so, where neither has it.
pub fn golden(path: &str) -> Option<PathBuf> {
    let copy = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    first_existing(path, [copy, workspace_root().join("../shared/golden")])
}

/// The folder of the model that is built into the program.
pub fn tiny_model() -> PathBuf {
    workspace_root().join("models/tiny")
}

/// What is in a folder, by `/` and the path from there: of a file its bytes, of a link what it says.
///
/// # Panics
/// If something in it cannot be read.
pub fn folder_contents(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    fn gather(folder: &Path, prefix: &str, into: &mut BTreeMap<String, Vec<u8>>) {
        for entry in fs::read_dir(folder).expect("a folder") {
            let path = entry.expect("an entry of the folder").path();
            let name = path.file_name().expect("it has a name").to_string_lossy();
            let name = format!("{prefix}/{name}");
            if let Ok(target) = fs::read_link(&path) {
                into.insert(name, target.to_string_lossy().into_owned().into_bytes());
            } else if path.is_dir() {
                gather(&path, &name, into);
            } else {
                into.insert(name, fs::read(&path).expect("a file"));
            }
        }
    }
    let mut contents = BTreeMap::new();
    gather(folder, "", &mut contents);
    contents
}

/// Copies the model that is built into the program into a folder, with `after` in place of `before`
/// in one of its files.
///
/// # Panics
/// If a file cannot be copied, or `before` is not in it.
pub fn altered_tiny_model(folder: &Path, file: &str, before: &str, after: &str) {
    for entry in fs::read_dir(tiny_model()).expect("the folder of the model") {
        let path = entry.expect("an entry of the folder").path();
        if path.is_file() {
            fs::copy(&path, folder.join(path.file_name().expect("it has a name"))).expect("a copy");
        }
    }
    let text = fs::read_to_string(folder.join(file)).expect("a file of text");
    assert!(text.contains(before), "{before} is in {file}");
    fs::write(folder.join(file), text.replace(before, after)).expect("a changed copy");
}

/// A file or folder of the training and test data: from the copy in this crate, or from
/// `../shared/data` beside the workspace. `None`, after saying so, where neither has it.
pub fn shared_data(path: &str) -> Option<PathBuf> {
    let copy = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    first_existing(path, [copy, workspace_root().join("../shared/data")])
}
