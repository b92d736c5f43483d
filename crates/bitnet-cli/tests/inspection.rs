//! `bitnet info`, `devices`, `doctor`, `embed` and the help pages.

mod support;

use bitnet_inference::{Model, ModelOptions, SessionOptions};
use serde_json::Value;
use support::{Folder, bitnet, json_of, stdout_of};

const COMMANDS: [&str; 20] = [
    "run",
    "chat",
    "batch",
    "logits",
    "tokenize",
    "detokenize",
    "embed",
    "pull",
    "list",
    "rm",
    "convert",
    "info",
    "devices",
    "doctor",
    "bench",
    "perplexity",
    "eval",
    "config",
    "completions",
    "man",
];

#[test]
fn the_program_alone_says_what_to_do_first() {
    let outcome = bitnet(&[]);
    assert_eq!((outcome.code, outcome.stderr.as_str()), (Some(0), ""));
    assert!(outcome.stdout.contains("  bitnet run \"Once upon a time\"\n"), "{}", outcome.stdout);
}

#[test]
fn help_lists_exactly_the_commands_there_are() {
    let help = stdout_of(&["--help"]);
    let commands = help.split_once("Commands:\n").unwrap().1.split_once("\n\n").unwrap().0;
    let listed: Vec<&str> =
        commands.lines().map(|line| line.split_whitespace().next().unwrap()).collect();
    assert_eq!(listed, COMMANDS);
}

#[test]
fn help_fits_a_terminal_of_80_columns() {
    let pages = COMMANDS.iter().map(|command| stdout_of(&[command, "--help"]));
    for page in pages.chain([stdout_of(&["--help"])]) {
        for line in page.lines() {
            assert!(line.chars().count() <= 80, "{line}");
        }
    }
}

#[test]
fn the_version_is_that_of_the_package() {
    assert_eq!(stdout_of(&["--version"]), format!("bitnet {}\n", env!("CARGO_PKG_VERSION")));
}

#[test]
fn info_tells_people_what_the_model_is() {
    let table = "\
model            tiny
format           built in (safetensors)
architecture     BitNet b1.58
output           text
layers           4
hidden size      256
feed-forward     512, relu2
attention        4 heads of 64, 2 key/value heads
rope             theta 10000
vocabulary       2048 tokens
context          512 tokens
ternary weights  2 359 296, 590 kB at two bits each
stored as        28 x packed 2-bit
linear input     int8
embedding        BF16, 1.05 MB
output head      the embedding
KV per token     4.10 kB (f32), 2.05 kB (f16), 1.09 kB (int8)
chat template    yes
end tokens       2037 <|end_of_text|>, 2044 <|eom_id|>, 2045 <|eot_id|>
";
    assert_eq!(stdout_of(&["info"]), table);
}

#[test]
fn info_tells_programs_the_same() {
    let info = json_of(&["info", "--json"]);
    assert_eq!(info["hidden_size"], 256);
    // 4 layers of 256 x (256 + 128 + 128 + 256) + 3 x 256 x 512 weights, four to a byte.
    assert_eq!(info["ternary_weights"], 2_359_296);
    assert_eq!(info["packed_bytes"], 2_359_296 / 4);
    // 4 layers, keys and values, 2 heads of 64; int8 has one f32 scale per head.
    assert_eq!(info["kv_bytes_per_token"]["f32"], 4 * 2 * 2 * 64 * 4);
    assert_eq!(info["kv_bytes_per_token"]["int8"], 4 * 2 * 2 * (64 + 4));
    assert_eq!(info["head"], Value::Null);
    assert_eq!(info["end_tokens"][2]["text"], "<|eot_id|>");
}

#[test]
fn info_describes_every_kind_of_model() {
    for name in [
        "bitnet-1bitllm",
        "bonsai",
        "gemma3-embedding",
        "llama-1.58-packed",
        "llama3-rope",
        "qwen3-embedding",
        "trilm",
        "gguf/bitnet-packed-TQ2_0.gguf",
        "gguf/qwen3-embedding-I2_S.gguf",
    ] {
        let Some(path) = bitnet_testing::golden(name) else { continue };
        let path = path.display().to_string();
        let info = json_of(&["info", "-m", &path, "--json"]);
        assert_eq!(info["model"], path);
        assert_eq!(info["output"] == "text", !name.contains("embedding"), "{name}");
        let table = stdout_of(&["info", "-m", &path]);
        assert!(table.contains(info["architecture"].as_str().unwrap()), "{table}");
    }
}

#[test]
fn devices_lists_what_is_there_and_what_is_not() {
    let devices = json_of(&["devices", "--json"]);
    let devices = devices["devices"].as_array().unwrap();
    let names: Vec<&Value> = devices.iter().map(|device| &device["device"]).collect();
    assert_eq!(names, ["cpu", "gpu", "mlx"]);
    assert_eq!(devices[0]["available"], true);
    assert_eq!(devices[0]["instruction_sets"][0], "scalar");
    assert_eq!(devices[1]["available"], false);
    let table = stdout_of(&["devices"]);
    assert!(table.contains("\ngpu  no   this program is built without it"), "{table}");
}

#[test]
fn the_doctor_finds_the_built_in_model_computed_to_the_last_bit() {
    let report = json_of(&["doctor", "--json"]);
    let checks = report["checks"].as_array().unwrap();
    let compared: Vec<&Value> = checks.iter().filter(|check| !check["ok"].is_null()).collect();
    // Every instruction set, by one thread and by all.
    assert!(compared.len() >= 2);
    assert!(compared.iter().all(|check| check["ok"] == true), "{checks:?}");
    assert!(compared[0]["name"].as_str().unwrap().starts_with("tiny, scalar"));
    assert!(stdout_of(&["doctor"]).contains("ok, equal to the last bit"));
}

#[test]
fn a_fingerprint_written_here_is_found_again_and_one_that_differs_is_a_fault() {
    let folder = Folder::new();
    folder.model("model");
    let written = folder.run(&["doctor", "-m", "model", "--write", "model.json"]);
    assert_eq!(written.code, Some(0), "{}", written.stderr);
    let good = folder.run(&["doctor", "-m", "model", "--against", "model.json"]);
    assert_eq!(good.code, Some(0), "{}", good.stderr);

    let path = folder.path("model.json");
    let text = std::fs::read_to_string(&path).unwrap();
    let mut list: Value = serde_json::from_str(&text).unwrap();
    list[0]["tokens"][3] = (list[0]["tokens"][3].as_u64().unwrap() ^ 1).into();
    folder.write("other.json", list.to_string());
    let bad = folder.run(&["doctor", "-m", "model", "--against", "other.json"]);
    assert_eq!(bad.code, Some(1));
    assert!(bad.stdout.contains("FAULT: results differ"), "{}", bad.stdout);
    assert!(bad.stderr.starts_with("error: results differ"), "{}", bad.stderr);

    list[0]["weights_sha256"] = "0".into();
    folder.write("stranger.json", list.to_string());
    let stranger = folder.run(&["doctor", "-m", "model", "--against", "stranger.json"]);
    assert_eq!(stranger.code, Some(1));
    assert_eq!(
        stranger.stderr,
        "error: stranger.json: has no fingerprint of model: it is of another model, or one of the \
         two copies is damaged\n"
    );
}

#[test]
fn the_doctor_knows_the_built_in_model_by_its_weights() {
    let folder = Folder::new();
    folder.model("copy");
    let report = folder.run(&["doctor", "-m", "copy", "--json"]);
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    let last = report["checks"].as_array().unwrap().last().unwrap();
    assert_eq!((&last["name"], &last["ok"]), (&"comparison".into(), &true.into()));
}

#[test]
fn embed_prints_the_vector_that_the_library_makes_of_the_tokenized_text() {
    let Some(path) = bitnet_testing::golden("qwen3-embedding") else { return };
    let path = path.display().to_string();
    let text = "a small red house";
    let model = Model::open(&path, &ModelOptions::default()).unwrap();
    let tokens = support::ids(&json_of(&["tokenize", text, "-m", &path, "--json"])["ids"]);
    let expected = model.embed(&tokens, SessionOptions::default()).unwrap();
    let embedding = json_of(&["embed", text, "-m", &path, "--json"]);
    let embedding: Vec<f32> = serde_json::from_value(embedding["embedding"].clone()).unwrap();
    assert_eq!(embedding, expected);
    let line = stdout_of(&["embed", text, "-m", &path]);
    let numbers: Vec<f32> = line.split_whitespace().map(|n| n.parse().unwrap()).collect();
    assert_eq!(numbers, expected);
}
