//! Shared parts of this project's tests: where golden data lies, and what backends must do.
#![forbid(unsafe_code)]

pub mod conformance;
pub mod golden;
mod random;

pub use random::Random;

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

/// A file or folder of the training and test data: from the copy in this crate, or from
/// `../shared/data` beside the workspace. `None`, after saying so, where neither has it.
pub fn shared_data(path: &str) -> Option<PathBuf> {
    let copy = Path::new(env!("CARGO_MANIFEST_DIR")).join("data");
    first_existing(path, [copy, workspace_root().join("../shared/data")])
}
