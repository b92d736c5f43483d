//! A conversion that is killed at any moment leaves nothing that looks whole, and the next one to the
//! same name writes what an undisturbed one writes.

#![cfg(unix)]

mod support;

use std::fs;
use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use support::Folder;

/// Moments to kill at, per format.
const KILLS: u32 = 20;

/// The files of a conversion by name; of one that is a file, itself.
fn contents(path: &Path) -> Vec<(String, Vec<u8>)> {
    if path.is_file() {
        return vec![(String::new(), fs::read(path).unwrap())];
    }
    let mut files: Vec<_> = fs::read_dir(path)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name().unwrap().to_str().unwrap().to_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

#[track_caller]
fn survives_kills(output: &str, to: &str) {
    let folder = Folder::new();
    let arguments = ["convert", "tiny", output, "--to", to, "--quiet"];
    let begun = Instant::now();
    assert_eq!(folder.run(&arguments).code, Some(0));
    let undisturbed = begun.elapsed();
    let path = folder.path(output);
    let expected = contents(&path);
    let remove = |path: &Path| match path.is_dir() {
        true => fs::remove_dir_all(path).unwrap(),
        false => fs::remove_file(path).unwrap(),
    };
    // The moments of a generator with a fixed seed (Knuth's MMIX), spread over a whole run.
    let mut random = 14_695_981_039_346_656_037u64;
    let mut killed = 0;
    for _ in 0..KILLS {
        remove(&path);
        random =
            random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let moment = undisturbed.mul_f64((random >> 40) as f64 / f64::from(1 << 24));
        let mut child = folder.command(&arguments).stdout(Stdio::null()).spawn().unwrap();
        std::thread::sleep(moment.min(Duration::from_secs(20)));
        child.kill().unwrap();
        let outcome = child.wait().unwrap();
        if outcome.success() || path.exists() {
            // It was done, so it is whole.
            assert!(contents(&path) == expected, "{to}: whole and different");
            continue;
        }
        killed += 1;
        assert_eq!(folder.run(&arguments).code, Some(0), "{to}");
        assert!(contents(&path) == expected, "{to}: other bytes after a kill at {moment:?}");
        let left: Vec<_> = fs::read_dir(folder.path("")).unwrap().collect();
        assert_eq!(left.len(), 1, "{to}: {left:?}");
    }
    println!("{to}: {killed} of {KILLS} were killed before they were done");
}

#[test]
fn a_native_file_survives_kills() {
    survives_kills("m.bitnet", "bitnet");
}

#[test]
fn a_gguf_file_survives_kills() {
    survives_kills("m.gguf", "gguf");
}

#[test]
fn a_hugging_face_folder_survives_kills() {
    survives_kills("m", "hf-packed");
}
