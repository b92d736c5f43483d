//! What the program says of files, flags and texts it cannot use: one sentence, nothing on stdout,
//! and status 1, or 2 where the command line itself is wrong.

mod support;

use std::fs;
use std::path::Path;

use serde_json::{Value, json};
use support::{Folder, refused};

fn edit_json(path: &Path, edit: impl FnOnce(&mut Value)) {
    let mut value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    edit(&mut value);
    fs::write(path, value.to_string()).unwrap();
}

/// The refusal of a copy of the small model whose `config.json` was edited.
#[track_caller]
fn refused_config(edit: impl FnOnce(&mut Value), sentence: &str) {
    let folder = Folder::new();
    edit_json(&folder.model("model").join("config.json"), edit);
    refused(folder.run(&["run", "x", "-m", "model"]), 1, sentence);
}

#[test]
fn a_model_that_is_not_there() {
    refused(
        Folder::new().run(&["run", "x", "-m", "nowhere"]),
        1,
        "nowhere: no such file or directory; give the folder of a Hugging Face checkpoint, a \
         .gguf or .bitnet file, or `tiny` for the model that is built in",
    );
}

#[test]
fn weights_that_do_not_begin_as_they_should() {
    let folder = Folder::new();
    let model = folder.model("model");
    fs::write(model.join("model.safetensors"), b"not a model at all, whatever it is").unwrap();
    refused(
        folder.run(&["run", "x", "-m", "model"]),
        1,
        "model/model.safetensors: is not a safetensors file: its header would have \
         8029109312199880558 bytes, more than 100000000",
    );
    folder.write("model.gguf", b"GGML and more");
    refused(
        folder.run(&["run", "x", "-m", "model.gguf"]),
        1,
        "model.gguf: is not a GGUF file: it does not begin with `GGUF`; download the file again",
    );
}

#[test]
fn a_truncated_tensor() {
    let folder = Folder::new();
    let weights = folder.model("model").join("model.safetensors");
    let bytes = fs::read(&weights).unwrap();
    fs::write(&weights, &bytes[..bytes.len() - 1000]).unwrap();
    refused(
        folder.run(&["run", "x", "-m", "model"]),
        1,
        "model/model.safetensors: tensor `model.layers.3.self_attn.v_proj.weight`: truncated: it \
         ends at byte 1657104 but the file has 1656104 bytes; download the file again",
    );
}

#[test]
fn a_weight_that_is_not_ternary() {
    let folder = Folder::new();
    let weights = folder.model("model").join("model.safetensors");
    let mut bytes = fs::read(&weights).unwrap();
    let header_bytes = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..8 + header_bytes]).unwrap();
    let begin = &header["model.layers.2.mlp.up_proj.weight"]["data_offsets"][0];
    // Byte 5 holds column 5 of rows 0, 128, 256 and 384; its second code becomes 3.
    bytes[8 + header_bytes + begin.as_u64().unwrap() as usize + 5] |= 3 << 2;
    fs::write(&weights, bytes).unwrap();
    refused(
        folder.run(&["run", "x", "-m", "model"]),
        1,
        "model/model.safetensors: tensor `model.layers.2.mlp.up_proj.weight`: illegal ternary code \
         3 at row 128, column 5: only 0, 1 and 2 (weights -1, 0, +1) exist",
    );
}

#[test]
fn a_shape_that_contradicts_the_configuration() {
    refused_config(
        |config| config["intermediate_size"] = json!(1024),
        "model/model.safetensors: tensor `model.layers.0.mlp.gate_proj.weight`: has shape [128, \
         256] but the configuration makes it [256, 256]",
    );
}

#[test]
fn a_missing_hyper_parameter() {
    refused_config(
        |config| drop(config.as_object_mut().unwrap().remove("hidden_size")),
        "model/config.json: `hidden_size` is missing: the model cannot be described without it",
    );
}

#[test]
fn an_unknown_architecture() {
    let folder = Folder::new();
    edit_json(&folder.model("model").join("config.json"), |config| {
        config["architectures"] = json!(["MambaForCausalLM"]);
    });
    let outcome = folder.run(&["info", "-m", "model"]);
    let sentence = "error: model/config.json: `architectures` is [\"MambaForCausalLM\"], which is \
                    not supported; known are BitNetForCausalLM, ";
    assert!(outcome.stderr.starts_with(sentence), "{}", outcome.stderr);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""));
}

#[test]
fn an_unknown_quantisation() {
    refused_config(
        |config| config["quantization_config"]["quant_method"] = json!("gptq"),
        "model/config.json: `quantization_config` has quant_method `gptq`: only `bitnet` is ternary",
    );
}

#[test]
fn a_model_that_does_not_fit_into_memory() {
    let folder = Folder::new();
    edit_json(&folder.model("model").join("config.json"), |config| {
        config["intermediate_size"] = json!(1 << 24);
        config["num_hidden_layers"] = json!(1000);
    });
    let outcome = folder.run(&["run", "x", "-m", "model"]);
    let (needed, available) = outcome.stderr.split_once(" but only ").unwrap();
    assert_eq!(needed, "error: loading model needs 3.22 TB");
    assert!(available.ends_with("B of memory are available\n"), "{available}");
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""));
}

#[test]
fn a_base_model_cannot_chat() {
    let folder = Folder::new();
    edit_json(&folder.model("base").join("tokenizer_config.json"), |config| {
        config.as_object_mut().unwrap().remove("chat_template").expect("the template");
    });
    let sentence = "base is a base model without a chat template: leave out --chat to continue a \
                    text, or choose a chat model";
    refused(folder.run(&["run", "--chat", "Hello", "-m", "base"]), 1, sentence);
    refused(folder.run(&["tokenize", "--chat", "x.json", "-m", "base"]), 1, sentence);
    assert_eq!(folder.run(&["run", "Hello", "-m", "base", "-n", "1"]).code, Some(0));
}

#[test]
fn token_ids_that_the_model_does_not_have() {
    let folder = Folder::new();
    let sentence = "token id 2048 does not exist: the model has 2048 tokens, 0 to 2047";
    refused(folder.run(&["run", "--tokens", "1,2048"]), 1, sentence);
    refused(folder.run(&["logits", "--tokens", "2048", "--json"]), 1, sentence);
    refused(
        folder.run(&["detokenize", "--tokens", "2048"]),
        1,
        "token id 2048 is not in the vocabulary of 2048 tokens",
    );
    refused(
        folder.run(&["run", "x", "--logit-bias", "2048=1"]),
        1,
        "--logit-bias: token id 2048 does not exist: the model has 2048 tokens",
    );
}

#[test]
fn a_prompt_longer_than_the_context() {
    let folder = Folder::new();
    folder.write("long.txt", "word ".repeat(600));
    let sentence = "603 tokens do not fit the model's context of 512: shorten the prompt";
    refused(folder.run(&["run", "--file", "long.txt"]), 1, sentence);
    refused(folder.run(&["run", "--file", "long.txt", "--json"]), 1, sentence);
}

#[test]
fn prompt_files_that_are_not_there_or_no_text() {
    let folder = Folder::new();
    folder.write("latin1.txt", b"caf\xe9 and more");
    refused(
        folder.run(&["run", "--file", "latin1.txt"]),
        1,
        "latin1.txt: is not UTF-8 text: the byte at offset 3 belongs to no character; save it as \
         UTF-8",
    );
    refused(
        folder.run_with_input(&["run", "--file", "-"], b"\xff"),
        1,
        "stdin: is not UTF-8 text: the byte at offset 0 belongs to no character; save it as UTF-8",
    );
    let missing = folder.run(&["run", "--file", "missing.txt"]);
    assert!(missing.stderr.starts_with("error: missing.txt: cannot be read: "));
    assert_eq!((missing.code, missing.stderr.lines().count()), (Some(1), 1));
}

#[test]
fn conversations_and_lines_that_are_not_what_they_should_be() {
    let folder = Folder::new();
    folder.write("messages.json", r#"{"role": "user"}"#);
    refused(
        folder.run(&["tokenize", "--chat", "messages.json"]),
        1,
        "messages.json: is not a list of messages with `role` and `content`: invalid type: map, \
         expected a sequence at line 1 column 0",
    );
    let outcome = folder.run_with_input(&["tokenize", "--lines"], b"\"a\"\nb\n\"c\"\n");
    assert_eq!(outcome.code, Some(1));
    assert_eq!(outcome.stdout, "{\"ids\":[2036,64]}\n");
    let sentence = "error: stdin, line 2: is not a JSON string such as \"Hello\": expected value \
                    at line 1 column 1\n";
    assert_eq!(outcome.stderr, sentence);
}

#[test]
fn devices_that_the_program_is_built_without() {
    for device in ["gpu", "mlx"] {
        refused(
            Folder::new().run(&["run", "x", "--device", device]),
            1,
            &format!(
                "device `{device}` is not available: this program is built without it; use \
                 --device cpu"
            ),
        );
    }
}

#[test]
fn an_instruction_set_that_does_not_exist() {
    let folder = Folder::new();
    let output = folder.command(&["run", "x"]).env("BITNET_ISA", "mmx").output().unwrap();
    assert_eq!(output.status.code(), Some(1));
    let sentence = "error: device `cpu` is not available: BITNET_ISA: unknown instruction set \
                    `mmx`: choose scalar, avx2, avxvnni, avx512 or neon\n";
    assert_eq!(String::from_utf8(output.stderr).unwrap(), sentence);
}

#[test]
fn a_text_generator_makes_no_embeddings_and_an_embedding_model_no_text() {
    let folder = Folder::new();
    refused(
        folder.run(&["embed", "Hello"]),
        1,
        "tiny generates text and makes no embeddings: choose an embedding model",
    );
    let Some(model) = bitnet_testing::golden("qwen3-embedding") else { return };
    folder.copy_of(&model, "embedding");
    let sentence = "embedding makes embeddings and does not write text: use `bitnet embed`, or \
                    choose another model";
    refused(folder.run(&["run", "x", "-m", "embedding", "-q"]), 1, sentence);
    refused(folder.run(&["logits", "--tokens", "1", "-m", "embedding", "-q"]), 1, sentence);
}

#[test]
fn constraints_that_cannot_be_kept() {
    let folder = Folder::new();
    folder.write("schema.json", r#"{"type": "array", "uniqueItems": true}"#);
    folder.write("grammar.lark", "start: word\n");
    for (flag, value, sentence) in [
        (
            "--json-schema",
            "{",
            "the JSON schema cannot be used: it is not JSON: EOF while parsing an object at line 1 column 1",
        ),
        (
            "--json-schema",
            "schema.json",
            "the JSON schema cannot be used: Unimplemented keys: [\"uniqueItems\"]",
        ),
        (
            "--json-schema",
            r#"{"type": "integer", "minimum": 2, "maximum": 1}"#,
            "nothing satisfies the JSON schema: minimum (2) is greater than maximum (1)",
        ),
        ("--regex", "(", "the regular expression cannot be used: unclosed group"),
        (
            "--grammar",
            "grammar.lark",
            "the Lark grammar cannot be used: line 1, column 8: unknown name: \"word\"",
        ),
    ] {
        refused(folder.run(&["run", "x", flag, value]), 1, sentence);
        refused(folder.run(&["run", "x", flag, value, "--json"]), 1, sentence);
    }
    for flag in ["--json-schema", "--grammar"] {
        let missing = folder.run(&["run", "x", flag, "missing.json"]);
        assert!(missing.stderr.starts_with("error: missing.json: cannot be read: "));
        assert_eq!((missing.code, missing.stderr.lines().count()), (Some(1), 1));
        refused(
            folder.run_with_input(&["run", "--file", "-", flag, "-"], b"x"),
            2,
            "stdin cannot be both the prompt and the constraint: put one into a file",
        );
    }
}

#[test]
fn names_cannot_control_the_terminal() {
    let outcome = Folder::new().run(&["info", "-m", "\u{1b}[2J\nerror: x"]);
    assert_eq!((outcome.code, outcome.stderr.lines().count()), (Some(1), 1), "{}", outcome.stderr);
    assert!(outcome.stderr.starts_with("error: \\u{1b}[2J\\nerror: x: no such file"));
}

#[test]
fn wrong_usage_is_one_sentence_with_a_hint_and_status_2() {
    let hint = "For more information, try '--help'.";
    for (arguments, sentence) in [
        (&["run"][..], "there is no prompt: give a text, --file FILE (- is stdin) or --tokens IDS"),
        (
            &["tokenize"],
            "there is nothing to tokenize: give a text, --chat MESSAGES.json or --lines",
        ),
        (&["run", "x", "--top-p", "2"], "--top-p is 2.0: give a number above 0 and at most 1"),
        (&["run", "x", "--typical", "0"], "--typical is 0.0: give a number above 0 and at most 1"),
        (
            &["run", "x", "--temperature", "-1"],
            "--temperature is -1.0: give 0 (greedy) or a number of at least 0.00001",
        ),
        (&["run", "x", "--repeat-penalty", "0"], "--repeat-penalty is 0.0: give a number above 0"),
    ] {
        refused(Folder::new().run(arguments), 2, sentence);
    }
    for (arguments, sentence) in [
        (
            &["run", "x", "--tokens", "1"][..],
            "the argument '[PROMPT]' cannot be used with '--tokens <IDS>'",
        ),
        (
            &["run", "x", "--file", "x"],
            "the argument '[PROMPT]' cannot be used with '--file <FILE>'",
        ),
        (
            &["run", "--tokens", "1,b"],
            "invalid value 'b' for '--tokens <IDS>': give token ids with commas between them, such \
             as 1,2,3",
        ),
        (
            &["run", "--tokens", "4294967296"],
            "invalid value '4294967296' for '--tokens <IDS>': no model has a token id that large",
        ),
        (
            &["run", "x", "--threads", "0"],
            "invalid value '0' for '--threads <N>': give a number from 1 to 1024",
        ),
        (
            &["run", "x", "--threads", "100000"],
            "invalid value '100000' for '--threads <N>': give a number from 1 to 1024",
        ),
        (
            &["run", "x", "--logit-bias", "5"],
            "invalid value '5' for '--logit-bias <ID=B>': give a token id and a number, such as \
             42=-1.5 or 42=-inf",
        ),
        (
            &["run", "x", "--system", "y"],
            "the following required arguments were not provided: --chat",
        ),
        (
            &["run", "x", "--logprobs", "1"],
            "the following required arguments were not provided: --json",
        ),
        (
            &["run", "x", "--regex", "a", "--grammar", "b"],
            "the argument '--regex <TEXT>' cannot be used with '--grammar <FILE>'",
        ),
        (&["logits"], "the following required arguments were not provided: --tokens <IDS>"),
        (&["frobnicate"], "unrecognized subcommand 'frobnicate'"),
    ] {
        refused(Folder::new().run(arguments), 2, &format!("{sentence}\n{hint}"));
    }
}

#[test]
fn flags_of_what_is_not_built_are_refused() {
    for arguments in [&["run", "x", "--draft", "tiny"][..], &["serve"], &["train"]] {
        let outcome = Folder::new().run(arguments);
        assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(2), ""), "{arguments:?}");
    }
}
