//! `bitnet convert`: the file it writes is the model it read, and it destroys nothing.

mod support;

use std::fs;

use support::{Folder, Outcome, refused, stdout_of};

#[track_caller]
fn succeeds(folder: &Folder, arguments: &[&str]) -> Outcome {
    let outcome = folder.run(arguments);
    assert_eq!(outcome.code, Some(0), "{arguments:?}: {}", outcome.stderr);
    outcome
}

#[test]
fn the_file_writes_the_same_story() {
    let folder = Folder::new();
    let convert = ["convert", "tiny", "t.bitnet", "--layout", "portable", "--verify"];
    let outcome = succeeds(&folder, &convert);
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
fn either_layout_writes_the_same_story() {
    let folder = Folder::new();
    for (layout, stored) in
        [("portable", "28 x 2-bit tiles"), ("compact", "24 x 5-bit triples, 4 x 8-bit quintuples")]
    {
        succeeds(&folder, &["convert", "tiny", "t.bitnet", "--layout", layout, "--verify"]);
        let info = succeeds(&folder, &["info", "-m", "t.bitnet"]).stdout;
        assert!(info.contains(&format!("\nstored as        {stored}\n")), "{info}");
        // Every processor runs it.
        let story = ["run", "-m", "t.bitnet", "-n", "20", "Once upon a time"];
        let mut plain = folder.command(&story);
        let plain = plain.env("BITNET_ISA", "scalar").output().unwrap();
        assert_eq!(String::from_utf8_lossy(&plain.stdout), succeeds(&folder, &story).stdout);
        assert!(plain.status.success() && plain.stdout.len() > 60);
    }
    // What this processor is fastest with is one of the two.
    succeeds(&folder, &["convert", "tiny", "t.bitnet"]);
    let outcome = folder.run(&["convert", "tiny", "t.gguf", "--layout", "portable"]);
    assert_eq!(outcome.code, Some(2));
    assert_eq!(outcome.stderr, "error: --layout is for .bitnet files\n");
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
fn flags_that_do_not_fit_the_format_are_wrong_usage() {
    let folder = Folder::new();
    let refused = |arguments: &[&str], words: &str| {
        let outcome = folder.run(&[&["convert", "tiny"], arguments].concat());
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{arguments:?}");
        assert!(outcome.stderr.contains(words), "{arguments:?}: {}", outcome.stderr);
    };
    refused(&["t", "--to", "ggml"], "possible values");
    refused(&[], "OUT");
    refused(&["t.bitnet", "--type", "i2_s"], "--type is for GGUF files");
    refused(&["t", "--to", "hf", "--type", "i2_s"], "--type is for GGUF files");
    refused(&["t.bitnet", "--head", "f16"], "--head is for GGUF files");
    refused(&["t", "--to", "hf", "--head", "q6_k"], "bf16, f16 or f32");
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 0);
}

#[test]
fn every_format_goes_back_to_the_same_story() {
    let folder = Folder::new();
    let story = ["run", "Once upon a time", "-n", "40"];
    let expected = stdout_of(&story);
    let mut from = "tiny";
    for (to, flags) in [
        ("a.gguf", &["--type", "i2_s"][..]),
        ("b", &["--to", "hf-packed"]),
        ("c.GGUF", &["--type", "tq2_0"]),
        ("d.gguf", &["--type", "tq1_0", "--head", "bf16"]),
        ("e.gguf", &["--type", "q2_0", "--head", "f32"]),
        ("f", &["--to", "hf-packed", "--head", "bf16"]),
        ("g.bitnet", &[]),
    ] {
        let outcome = succeeds(&folder, &[&["convert", from, to, "--verify"], flags].concat());
        assert!(
            outcome.stderr.ends_with("\nverified: the same results to the last bit\n"),
            "{from} to {to}: {}",
            outcome.stderr
        );
        assert_eq!(succeeds(&folder, &[&story[..], &["-m", to]].concat()).stdout, expected, "{to}");
        from = to;
    }
    let rounded =
        succeeds(&folder, &["convert", "g.bitnet", "h.gguf", "--head", "q8_0", "--verify"]);
    let line = rounded.stderr.lines().last().unwrap();
    assert!(line.starts_with("verified: results differ by at most "), "{line}");
    assert!(line.contains("of 16 positions") && line.contains("(bound 0.5)"), "{line}");
}

#[test]
fn a_dense_model_is_ternarised_when_asked_and_measured() {
    let Some(path) = bitnet_testing::golden("trilm") else { return };
    let folder = Folder::new();
    let weights = folder.copy_of(&path, "dense").join("model.safetensors");
    // Another mantissa for every second number: no longer one magnitude per row.
    let mut bytes = fs::read(&weights).unwrap();
    let data = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    bytes[data..].iter_mut().step_by(4).for_each(|byte| *byte ^= 0x55);
    fs::write(&weights, bytes).unwrap();

    let outcome = folder.run(&["convert", "dense", "d.bitnet"]);
    assert_eq!(outcome.code, Some(1));
    assert!(
        outcome.stderr.contains("`bitnet convert --ternarise` makes one"),
        "{}",
        outcome.stderr
    );
    folder.write("text", "a few words to measure by");
    let flags = ["convert", "dense", "d.bitnet", "--ternarise", "--text", "text"];
    let stderr = succeeds(&folder, &flags).stderr;
    let line = |start: &str| {
        let found = stderr.lines().find(|line| line.starts_with(start));
        found.unwrap_or_else(|| panic!("{start}: {stderr}")).to_owned()
    };
    assert!(line("note: ternarising").ends_with("the model is ruined"), "{stderr}");
    let changed = line("changed of the weights (relative norm): self_attn.q_proj ");
    assert_eq!(changed.matches(" %").count(), 7, "{changed}");
    let perplexity = line("perplexity of ");
    assert!(perplexity.contains(" before, ") && perplexity.ends_with(" after"), "{perplexity}");
    succeeds(&folder, &["run", "a", "-m", "d.bitnet", "-n", "2"]);
    // It is one like others now.
    succeeds(&folder, &["convert", "d.bitnet", "d", "--to", "hf-packed", "--verify"]);

    refused(
        folder.run(&["convert", "tiny", "t.bitnet", "--ternarise"]),
        1,
        "tiny: is a ternary model already: leave out --ternarise",
    );
    let verified = ["convert", "dense", "e.bitnet", "--ternarise", "--verify"];
    assert_eq!(folder.run(&verified).code, Some(2));
    assert_eq!(folder.run(&["convert", "dense", "e.bitnet", "--text", "text"]).code, Some(2));
}

#[test]
fn what_a_format_cannot_hold_is_one_sentence() {
    let Some(path) = bitnet_testing::golden("llama-1.58-packed") else { return };
    let path = path.to_str().unwrap();
    let folder = Folder::new();
    refused(
        folder.run(&["convert", path, "l.gguf"]),
        1,
        &format!(
            "{path}: a GGUF file cannot hold this model: TQ2_0 has blocks of 256 weights, which \
             `ffn_down` of 256 x 640 does not fill"
        ),
    );
    assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 0);
}

#[test]
fn folders_are_not_overwritten() {
    let folder = Folder::new();
    let model = folder.model("model");
    let before = fs::read_dir(&model).unwrap().count();
    refused(
        folder.run(&["convert", "model", "./model", "--to", "hf"]),
        1,
        "./model: cannot be written: it is the model that is to be converted; give another name",
    );
    refused(
        folder.run(&["convert", "tiny", "model", "--to", "hf"]),
        1,
        "model: cannot be written: there is something of this name; give another name, or remove it",
    );
    assert_eq!(fs::read_dir(&model).unwrap().count(), before);
    // Where the output would grow lies the model itself.
    fs::rename(&model, folder.path("m.part")).unwrap();
    refused(
        folder.run(&["convert", "m.part", "m", "--to", "hf"]),
        1,
        "m: cannot be written: the model that is to be converted lies where it would grow, m.part; \
         give another name",
    );
    assert_eq!(fs::read_dir(folder.path("m.part")).unwrap().count(), before);
    fs::create_dir(folder.path("empty")).unwrap();
    succeeds(&folder, &["convert", "tiny", "empty", "--to", "hf-packed"]);
}

#[cfg(unix)]
#[test]
fn a_disk_that_takes_no_more_is_one_sentence_and_nothing_is_left() {
    let folder = Folder::new();
    for (output, to) in [("t.bitnet", "bitnet"), ("t.gguf", "gguf"), ("t", "hf-packed")] {
        // No file may grow beyond 100 kB.
        let bitnet = env!("CARGO_BIN_EXE_bitnet");
        let limited = format!("trap '' XFSZ; ulimit -f 200; exec {bitnet} \"$@\"");
        let mut command = std::process::Command::new("sh");
        command.args(["-c", &limited, "sh", "convert", "tiny", output, "--to", to]);
        let result = command.current_dir(folder.path("")).output().unwrap();
        let stderr = String::from_utf8(result.stderr).unwrap();
        assert_eq!(result.status.code(), Some(1), "{to}: {stderr}");
        assert!(
            stderr.ends_with(": cannot be written: File too large (os error 27)\n"),
            "{stderr}"
        );
        assert!(stderr.starts_with(&format!("error: {output}")), "{stderr}");
        assert_eq!(stderr.lines().count(), 1, "{stderr}");
        assert_eq!(fs::read_dir(folder.path("")).unwrap().count(), 0, "{to}");
    }
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
