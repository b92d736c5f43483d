//! `bitnet batch`: rows in, results out, in every format, after kills, and with rows that are bad.

mod support;

use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::Field;
use serde_json::{Value, json};
use support::{Folder, Outcome, json_of, refused};

const PROMPTS: [&str; 4] = ["Once upon a time", "The little dog", "One day, Lily", "Tom and Sam"];

/// Runs a batch that must go well.
#[track_caller]
fn batch(folder: &Folder, arguments: &[&str]) -> Outcome {
    let outcome = folder.run(&[&["batch"], arguments].concat());
    assert_eq!(outcome.code, Some(0), "{arguments:?}: {}", outcome.stderr);
    outcome
}

fn read(folder: &Folder, name: &str) -> String {
    fs::read_to_string(folder.path(name)).unwrap()
}

fn json_lines(text: &str) -> Vec<Value> {
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn each_row_gets_what_run_gives_it_with_its_own_seed() {
    let folder = Folder::new();
    folder.write("in.txt", PROMPTS.join("\n"));
    let flags = ["-n", "12", "--temperature", "0.8", "--seed", "40"];
    batch(&folder, &[&["in.txt", "-o", "out.jsonl"], &flags[..]].concat());
    let results = json_lines(&read(&folder, "out.jsonl"));
    assert_eq!(results.len(), PROMPTS.len());
    for (index, (prompt, result)) in PROMPTS.iter().zip(&results).enumerate() {
        let seed = (40 + index).to_string();
        let run = json_of(&[
            "run",
            prompt,
            "-n",
            "12",
            "--temperature",
            "0.8",
            "--seed",
            &seed,
            "--json",
        ]);
        let expected = json!({
            "prompt": prompt,
            "output": run["text"],
            "finish_reason": run["finish_reason"],
            "tokens": run["tokens"].as_array().unwrap().len(),
            "error": null,
        });
        assert_eq!(*result, expected);
    }
    assert!(!folder.path("out.jsonl.part").exists());
    assert!(!folder.path("out.jsonl.tmp").exists());
}

#[test]
fn no_row_depends_on_how_many_run_at_once() {
    let folder = Folder::new();
    folder.write("in.txt", PROMPTS.join("\n").repeat(3));
    for concurrency in ["1", "3", "16"] {
        let output = format!("{concurrency}.csv");
        let flags = ["-n", "10", "--temperature", "1", "--concurrency", concurrency];
        batch(&folder, &[&["in.txt", "-o", &output], &flags[..]].concat());
        assert_eq!(read(&folder, &output), read(&folder, "1.csv"));
    }
}

#[test]
fn a_row_can_be_a_message_or_json_by_a_schema() {
    let folder = Folder::new();
    folder.write("in.jsonl", "{\"name\":\"Lily\",\"age\":3}\n\n{\"name\":\"Tom\",\"age\":null}\n");
    let template = "Tell me about {{ name }}{% if age %}, {{ age }}{% endif %}.";
    let flags = ["--template", template, "--system", "Be brief.", "--chat", "-n", "9"];
    batch(&folder, &[&["in.jsonl", "-o", "chat.jsonl"], &flags[..]].concat());
    let results = json_lines(&read(&folder, "chat.jsonl"));
    for (message, result) in ["Tell me about Lily, 3.", "Tell me about Tom."].iter().zip(&results) {
        let run =
            json_of(&["run", "--chat", message, "--system", "Be brief.", "-n", "9", "--json"]);
        assert_eq!(result["output"], run["text"]);
    }
    assert_eq!(results[1]["age"], Value::Null);

    let schema = json!({
        "type": "object",
        "properties": {"pet": {"enum": ["cat", "dog"]}},
        "required": ["pet"],
        "additionalProperties": false,
    });
    folder.write("schema.json", schema.to_string());
    let flags = ["--template", "{{ name }} has a ", "--json-schema", "schema.json", "-n", "100"];
    batch(&folder, &[&["in.jsonl", "-o", "pets.jsonl"], &flags[..]].concat());
    for result in json_lines(&read(&folder, "pets.jsonl")) {
        let pet: Value = serde_json::from_str(result["output"].as_str().unwrap()).unwrap();
        assert!(["cat", "dog"].contains(&pet["pet"].as_str().unwrap()));
    }
}

/// A table with what formats find hard.
const HARD: &str = "id,text\n1,\"a|b\\c, \"\"d\"\"\ne\"\n2,plain\n";

#[test]
fn every_format_has_the_same_results() {
    let folder = Folder::new();
    folder.write("in.csv", HARD);
    // An output with a line break, a quote and a bar in it.
    let flags = ["--template", "{{ text }}", "--regex", "x\\|\"\ny,z"];
    for format in ["txt", "jsonl", "csv", "md", "parquet"] {
        let output = format!("out.{format}");
        batch(&folder, &[&["in.csv", "-o", &output], &flags[..]].concat());
    }
    let hard = "a|b\\c, \"d\"\ne";
    let results = json_lines(&read(&folder, "out.jsonl"));
    let tokens = results[0]["tokens"].as_u64().unwrap();
    assert!(tokens > 0);
    let expected = json!({
        "id": "1", "text": hard, "output": "x|\"\ny,z", "finish_reason": "stop",
        "tokens": tokens, "error": null,
    });
    assert_eq!(results[0], expected);
    assert_eq!(read(&folder, "out.txt"), "x|\"\\ny,z\n".repeat(2));
    assert_eq!(
        read(&folder, "out.csv"),
        format!(
            "id,text,output,finish_reason,tokens,error\n\
             1,\"a|b\\c, \"\"d\"\"\ne\",\"x|\"\"\ny,z\",stop,{tokens},\n\
             2,plain,\"x|\"\"\ny,z\",stop,{tokens},\n"
        )
    );
    assert_eq!(
        read(&folder, "out.md"),
        format!(
            "| id | text | output | finish_reason | tokens | error |\n\
             | --- | --- | --- | --- | --- | --- |\n\
             | 1 | a\\|b\\\\c, \"d\"<br>e | x\\|\"<br>y,z | stop | {tokens} |  |\n\
             | 2 | plain | x\\|\"<br>y,z | stop | {tokens} |  |\n"
        )
    );
    let file = fs::File::open(folder.path("out.parquet")).unwrap();
    let rows = SerializedFileReader::new(file).unwrap();
    assert_eq!(rows.metadata().file_metadata().num_rows(), 2);
    let row = rows.get_row_iter(None).unwrap().next().unwrap().unwrap();
    let fields: Vec<(&str, Field)> =
        row.get_column_iter().map(|(name, field)| (name.as_str(), field.clone())).collect();
    let text = |text: &str| Field::Str(text.to_owned());
    let expected = [
        ("id", text("1")),
        ("text", text(hard)),
        ("output", text("x|\"\ny,z")),
        ("finish_reason", text("stop")),
        ("tokens", Field::Long(tokens as i64)),
        ("error", Field::Null),
    ];
    assert_eq!(fields, expected);
}

#[test]
fn a_bad_row_has_its_reason_and_the_others_go_on() {
    let folder = Folder::new();
    let long = "the cat ".repeat(600);
    folder.write("in.csv", format!("prompt,note\nOne day,a\nTwo\n{long},b\nThree,c,d\nLast,e\n"));
    let outcome = batch(&folder, &["in.csv", "-o", "out.jsonl", "-n", "3"]);
    let results = json_lines(&read(&folder, "out.jsonl"));
    let errors: Vec<Option<&str>> = results.iter().map(|result| result["error"].as_str()).collect();
    assert_eq!(errors[0], None);
    assert_eq!(errors[1], Some("line 3: has 1 fields where the header has 2"));
    assert!(errors[2].unwrap().contains("do not fit the model's context of 512"), "{errors:?}");
    assert_eq!(errors[3], Some("line 5: has 3 fields where the header has 2"));
    assert_eq!(errors[4], None);
    assert_eq!(results[3]["prompt"], "Three");
    assert!(results[0]["tokens"] == 3 && results[4]["tokens"] == 3, "{results:?}");
    let note = "note: 3 of 5 rows failed; the first, row 2: line 3: has 1 fields";
    assert!(outcome.stderr.starts_with(note), "{}", outcome.stderr);

    folder.write("in.jsonl", "{\"prompt\": \"One\"}\n{\"prompt\"\n[1]\n{\"text\": \"Two\"}\n");
    let outcome = folder.run(&[
        "batch",
        "in.jsonl",
        "-o",
        "strict.jsonl",
        "-n",
        "3",
        "--strict",
        "--json",
        "--quiet",
    ]);
    assert_eq!(outcome.code, Some(1));
    assert_eq!(outcome.stderr, "error: 3 of 4 rows failed: see `error` in strict.jsonl\n");
    let summary: Value = serde_json::from_str(&outcome.stdout).unwrap();
    assert_eq!((&summary["rows"], &summary["failed"]), (&json!(4), &json!(3)));
    let results = json_lines(&read(&folder, "strict.jsonl"));
    assert_eq!(results[1]["error"], "line 2: is not JSON: EOF while parsing an object at column 9");
    assert_eq!(results[2]["error"], "line 3: is no JSON object");
    assert_eq!(results[3]["error"], "has no field `prompt` for the prompt");
}

#[test]
fn an_empty_line_of_text_stays_an_empty_line() {
    let folder = Folder::new();
    folder.write("in.txt", "One\n\nTwo\n");
    batch(&folder, &["in.txt", "-o", "out.txt", "-n", "3"]);
    let lines: Vec<String> = read(&folder, "out.txt").lines().map(str::to_owned).collect();
    assert_eq!(lines.len(), 3);
    assert!(!lines[0].is_empty() && lines[1].is_empty() && !lines[2].is_empty());
}

/// Random numbers that are the same in every run of the test.
fn next_random(state: &mut u64) -> u64 {
    *state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
    *state >> 33
}

#[test]
fn after_twenty_kills_the_result_is_that_of_an_undisturbed_run() {
    let folder = Folder::new();
    let rows: Vec<String> = (0..60)
        .map(|row| format!("{{\"id\": {row}, \"prompt\": \"{} {row}\"}}", PROMPTS[row % 4]))
        .collect();
    folder.write("in.jsonl", rows.join("\n"));
    let flags = ["-n", "24", "--temperature", "0.9", "--seed", "5", "--threads", "1"];
    let started = Instant::now();
    batch(&folder, &[&["in.jsonl", "-o", "calm.jsonl"], &flags[..]].concat());
    let whole = started.elapsed();
    let calm = read(&folder, "calm.jsonl");

    let arguments = [&["batch", "in.jsonl", "-o", "out.jsonl"], &flags[..]].concat();
    let part = folder.path("out.jsonl.part");
    let (mut kills, mut state, mut ends) = (0, 7, 0);
    while kills < 20 {
        let mut child =
            folder.command(&arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        std::thread::sleep(whole.mul_f64((next_random(&mut state) % 1000) as f64 / 1000.0));
        child.kill().unwrap();
        let ended = child.wait().unwrap().success();
        let out = folder.path("out.jsonl");
        if !ended {
            kills += 1;
            assert!(!out.exists() || part.exists() || read(&folder, "out.jsonl") == calm);
        }
        if out.exists() && !part.exists() {
            assert_eq!(read(&folder, "out.jsonl"), calm);
            fs::remove_file(out).unwrap();
            ends += 1;
        } else if kills % 5 == 2 && part.exists() {
            // As if the disk had kept half of the last line.
            let length = fs::metadata(&part).unwrap().len();
            let file = fs::OpenOptions::new().write(true).open(&part).unwrap();
            file.set_len(length - length.min(9)).unwrap();
        }
    }
    if !folder.path("out.jsonl").exists() {
        batch(&folder, &arguments[1..]);
    }
    assert_eq!(read(&folder, "out.jsonl"), calm);
    assert!(!part.exists() && !folder.path("out.jsonl.tmp").exists());
    println!("{ends} runs came to the end before their kill");
}

#[test]
fn results_of_other_inputs_models_and_flags_are_not_mixed() {
    let folder = Folder::new();
    folder.write("in.txt", PROMPTS.join("\n"));
    batch(&folder, &["in.txt", "-o", "out.txt", "-n", "4"]);
    let whole = read(&folder, "out.txt");
    let run = |arguments: &[&str]| folder.run(&[&["batch"], arguments].concat());
    refused(
        run(&["in.txt", "-o", "out.txt", "-n", "4"]),
        1,
        "out.txt: is there already: choose another OUT, or --restart to replace it",
    );

    // A full disk, in small: the journal is whole, and the output cannot be renamed into its place.
    fs::remove_file(folder.path("out.txt")).unwrap();
    fs::create_dir(folder.path("out.txt")).unwrap();
    fs::write(folder.path("out.txt.part"), "").unwrap();
    let outcome = run(&["in.txt", "-o", "out.txt", "-n", "4"]);
    assert_eq!(outcome.code, Some(1));
    assert!(outcome.stderr.contains("4 rows are kept"), "{}", outcome.stderr);
    fs::remove_dir(folder.path("out.txt")).unwrap();

    let other = |what: &str| {
        format!(
            "out.txt.part: has 4 results of {what}: use the same again, or --restart to begin anew"
        )
    };
    refused(run(&["in.txt", "-o", "out.txt", "-n", "5"]), 1, &other("other flags"));
    folder.model("altered");
    let config = folder.path("altered").join("config.json");
    let text = fs::read_to_string(&config)
        .unwrap()
        .replace("\"rms_norm_eps\": 1e-05", "\"rms_norm_eps\": 1e-04");
    fs::write(&config, text).unwrap();
    refused(
        run(&["in.txt", "-o", "out.txt", "-n", "4", "-m", "altered"]),
        1,
        &other("another model"),
    );
    folder.write("in.txt", "Once");
    refused(run(&["in.txt", "-o", "out.txt", "-n", "4"]), 1, &other("another input"));

    folder.write("in.txt", PROMPTS.join("\n"));
    batch(&folder, &["in.txt", "-o", "out.txt", "-n", "4"]);
    assert_eq!(read(&folder, "out.txt"), whole);
    folder.write("in.txt", "Once");
    batch(&folder, &["in.txt", "-o", "out.txt", "-n", "4", "--restart"]);
    assert_eq!(read(&folder, "out.txt").lines().count(), 1);
}

#[test]
fn ctrl_c_says_how_to_go_on() {
    if !cfg!(unix) {
        println!("skipped: this system has no `kill`");
        return;
    }
    let folder = Folder::new();
    folder.write("in.txt", "Once upon a time\n".repeat(400));
    let mut command = folder.command(&["batch", "in.txt", "-o", "out.txt", "--ignore-eos"]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let part = folder.path("out.txt.part");
    let deadline = Instant::now() + Duration::from_secs(120);
    let lines = |path: &Path| fs::read_to_string(path).map_or(0, |text| text.lines().count());
    while lines(&part) < 3 {
        assert!(Instant::now() < deadline, "no result came");
        std::thread::sleep(Duration::from_millis(20));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(130));
    let kept = lines(&part) - 1;
    let sentence =
        format!("error: stopped after {kept} of 400 rows: the same command goes on from there\n");
    assert_eq!(String::from_utf8(output.stderr).unwrap(), sentence);
}

#[test]
fn what_cannot_work_is_refused_before_anything_is_computed() {
    let folder = Folder::new();
    folder.write("in.csv", "title,text\na,b\n");
    folder.write("twice.csv", "a,a\n1,2\n");
    folder.write("empty.csv", "");
    folder.write("schema.json", "{\"type\": \"elephant\"}");
    let run = |arguments: &[&str]| folder.run(&[&["batch"], arguments].concat());
    let template = ["--template", "{{ text }}"];
    refused(
        run(&["in.csv", "-o", "out.csv"]),
        2,
        "in.csv: has no column `prompt` for the prompt, but title, text: see --template",
    );
    refused(
        run(&["in.csv", "-o", "out.csv", "--template", "Summarise {text}"]),
        2,
        "--template: uses no field, and all prompts would be the same: write a field as \
         {{ prompt }}, in two pairs of braces",
    );
    refused(
        run(&["in.csv", "-o", "out.xlsx", "--template", "{{ text }}"]),
        2,
        "out.xlsx: the name tells no format: give --to text, jsonl, csv, md or parquet",
    );
    refused(
        run(&["in.csv", "-o", "in.csv", "--template", "{{ text }}"]),
        2,
        &format!(
            "{}: is IN and OUT at once: choose another OUT",
            fs::canonicalize(folder.path("in.csv")).unwrap().display()
        ),
    );
    refused(
        run(&["twice.csv", "-o", "out.csv", "--template", "{{ a }}"]),
        1,
        "twice.csv: line 1: has two columns `a`: give each a name of its own",
    );
    refused(
        run(&["empty.csv", "-o", "out.csv", "--template", "{{ a }}"]),
        1,
        "empty.csv: is empty: its first line must name the columns",
    );
    let nowhere = run(&[&["in.csv", "-o", "nowhere/out.csv"], &template[..]].concat());
    assert_eq!(nowhere.code, Some(1));
    assert!(nowhere.stderr.contains("nowhere/out.csv.part: cannot be written"), "{nowhere:?}");
    assert!(nowhere.stderr.contains("make its folder first"), "{nowhere:?}");
    let schema = ["--json-schema", "schema.json"];
    let invalid = run(&[&["in.csv", "-o", "out.csv"], &template[..], &schema].concat());
    assert_eq!(invalid.code, Some(1));
    assert!(invalid.stderr.starts_with("error: the JSON schema"), "{invalid:?}");
    assert_eq!(invalid.stderr.matches('\n').count(), 1);
    refused(
        run(&["in.csv", "-o", "out.csv", "--template", "{{ text }}", "-m", "nowhere"]),
        1,
        "nowhere: no such file or directory; give the folder of a Hugging Face checkpoint, a \
         .gguf or .bitnet file, or `tiny` for the model that is built in",
    );
    assert!(!folder.path("out.csv").exists() && !folder.path("out.csv.part").exists());
}

#[cfg(unix)]
#[test]
fn a_folder_where_nobody_may_write_is_said_at_once() {
    use std::os::unix::fs::PermissionsExt;

    let folder = Folder::new();
    folder.write("in.txt", "One");
    fs::create_dir(folder.path("closed")).unwrap();
    fs::set_permissions(folder.path("closed"), fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(folder.path("closed").join("probe"), "").is_ok() {
        println!("skipped: this user may write everywhere");
        return;
    }
    refused(
        folder.run(&["batch", "in.txt", "-o", "closed/out.txt"]),
        1,
        "closed/out.txt.part: cannot be written: Permission denied (os error 13): choose a place \
         where you may write",
    );
}

/// A limit on the size of files stands for a disk that fills up: the last write takes what fits.
#[cfg(unix)]
#[test]
fn when_no_more_can_be_written_what_is_there_is_kept() {
    let folder = Folder::new();
    folder.write("in.txt", PROMPTS.join("\n").repeat(9));
    let flags = ["-n", "20", "--ignore-eos", "--threads", "1"];
    batch(&folder, &[&["in.txt", "-o", "calm.jsonl"], &flags[..]].concat());

    let arguments = [&["batch", "in.txt", "-o", "out.jsonl"], &flags[..]].concat();
    let program = folder.command(&arguments);
    let mut limited = Command::new("bash");
    limited.current_dir(folder.path(""));
    limited.args(["-c", "ulimit -f 2; trap '' XFSZ; exec \"$0\" \"$@\""]);
    let Ok(output) = limited.arg(program.get_program()).args(program.get_args()).output() else {
        println!("skipped: bash is not here");
        return;
    };
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(1), "{stderr}");
    let part = fs::read_to_string(folder.path("out.jsonl.part")).unwrap();
    assert!(!part.ends_with('\n'), "a line is torn");
    let kept = part.lines().count() - 2;
    assert!(kept > 0);
    let reason = "out.jsonl.part: cannot be written: File too large (os error 27)";
    let sentence =
        format!("error: {reason}; {kept} rows are kept, and the same command goes on from there\n");
    assert_eq!(stderr, sentence);

    let outcome = batch(&folder, &arguments[1..]);
    assert!(outcome.stderr.contains(&format!("{kept} of 28 rows are done already")), "{outcome:?}");
    assert_eq!(read(&folder, "out.jsonl"), read(&folder, "calm.jsonl"));
}
