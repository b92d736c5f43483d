//! `bitnet bench`: what it prints, and what it refuses. No test looks at how fast anything was.

mod support;

use serde_json::{Value, json};
use support::{Folder, bitnet, json_of, stdout_of};

const QUICK: [&str; 9] = ["bench", "-p", "40", "-n", "3", "--reps", "2", "-t", "1"];

fn with<'a>(more: &[&'a str]) -> Vec<&'a str> {
    [&QUICK[..], more].concat()
}

#[test]
fn json_has_the_machine_and_a_row_for_each_test() {
    let report = json_of(&with(&["--format", "json", "-d", "0,20", "-b", "1,2"]));
    for name in ["cpu", "instruction_set", "os", "version", "date"] {
        assert!(report["machine"][name].as_str().is_some_and(|text| !text.is_empty()), "{name}");
    }
    assert!(report["machine"]["cores"].as_u64() >= Some(1));
    let rows = report["rows"].as_array().unwrap();
    let names: Vec<&str> = rows.iter().map(|row| row["test"].as_str().unwrap()).collect();
    let expected = ["pp40", "tg3", "pp40@20", "tg3@20", "pp40x2", "tg3x2", "pp40x2@20", "tg3x2@20"];
    assert_eq!(names, expected);
    for row in rows {
        assert_eq!(row["threads"], 1);
        assert_eq!(row["repetitions"], 2);
        let speed = |name: &str| row["tokens_per_s"][name].as_f64().unwrap();
        assert!(0.0 < speed("min") && speed("min") <= speed("median"), "{row}");
        assert!(speed("median") <= speed("max"), "{row}");
        for name in ["gmac_per_s", "gb_per_s"] {
            assert!(row[name].as_f64().unwrap() > 0.0, "{name}");
        }
        // Nobody asked for ceilings.
        for name in ["mac_ceiling_share", "read_ceiling_share", "beyond_read_share"] {
            assert!(row[name].is_null(), "{name}");
        }
        // What is deeper is held against the same at the start of a context.
        let name = row["test"].as_str().unwrap();
        match name.strip_suffix("@20") {
            None => assert!(row["beyond"].is_null() && row["beyond_ms"].is_null(), "{row}"),
            Some(shallow) => {
                assert_eq!(row["beyond"], shallow);
                assert!(row["beyond_kv_bytes"].as_f64().unwrap() > 0.0, "{row}");
                assert!(row["beyond_ms"].is_number(), "{row}");
            }
        }
        assert!(row["ternary_macs_per_token"].as_f64().unwrap() <= 2_359_296.0);
    }
    let sparsity = report["model"]["gate_sparsity"].as_f64().unwrap();
    assert!((0.0..1.0).contains(&sparsity), "{sparsity}");
}

#[test]
fn csv_and_markdown_have_the_same_cells_in_every_line() {
    let csv = stdout_of(&with(&["--format", "csv"]));
    let lines: Vec<Vec<&str>> = csv.lines().map(|line| line.split(',').collect()).collect();
    assert_eq!(lines.len(), 3, "{csv}");
    assert!(lines.iter().all(|line| line.len() == lines[0].len()), "{csv}");
    for name in ["test", "threads", "tokens_per_s_median", "gb_per_s", "gate_sparsity"] {
        assert!(lines[0].contains(&name), "{name}: {csv}");
    }
    let md = stdout_of(&with(&["--format", "md"]));
    let rows: Vec<&str> = md.lines().filter(|line| line.starts_with('|')).collect();
    assert_eq!(rows.len(), 4, "{md}");
    assert!(rows.iter().all(|row| row.matches('|').count() == rows[0].matches('|').count()));
}

#[test]
fn the_table_fits_a_terminal() {
    let table = stdout_of(&with(&["-d", "64,400", "-b", "2", "--ceilings"]));
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    for text in ["read beside the tests: ", "shares are of ", "depth ", "tg3x2@64 "] {
        assert!(table.contains(text), "{text}: {table}");
    }
    assert!(table.contains("gates at zero: "), "{table}");
}

#[test]
fn prompts_of_several_sequences_may_take_several_steps() {
    // 4 x 64 tokens are two steps, each of which ends two of the prompts.
    let flags = ["bench", "-p", "64", "-n", "0", "-b", "1,4", "--reps", "1", "--format", "json"];
    let report = json_of(&flags);
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows[1]["test"], "pp64x4");
    assert_eq!(rows[1]["sequences"], 4);
    let [all, each] = ["/tokens_per_s/median", "/tokens_per_s_each"]
        .map(|name| rows[1].pointer(name).unwrap().as_f64().unwrap());
    assert!((all / each - 4.0).abs() < 1e-9, "{all} {each}");
}

#[test]
fn a_run_is_compared_with_an_earlier_one() {
    let folder = Folder::new();
    let flags = ["bench", "-p", "8,16", "-n", "2", "--reps", "2", "-t", "1"];
    let run = |more: &[&str]| folder.run(&[&flags[..], more].concat());
    let first = run(&["--format", "json"]);
    assert_eq!(first.code, Some(0), "{}", first.stderr);
    let mut before: Value = serde_json::from_str(&first.stdout).unwrap();
    assert!(before["rows"][0]["ratio"].is_null());
    // A machine a thousand times as fast, one a thousand times as slow, and a test that is not there.
    before["rows"][0]["tokens_per_s"]["median"] = json!(1e9);
    before["rows"][1]["tokens_per_s"]["median"] = json!(1e-3);
    before["rows"][2]["test"] = json!("tg9");
    before["machine"]["cpu"] = json!("Z80");
    folder.write("before.json", before.to_string());

    let report = run(&["--compare", "before.json", "--format", "json"]);
    assert_eq!(report.code, Some(0), "{}", report.stderr);
    assert!(report.stderr.contains("before.json is of another processor: Z80, not "));
    let report: Value = serde_json::from_str(&report.stdout).unwrap();
    let ratio = |row: usize| report["rows"][row]["ratio"].as_f64();
    assert!(ratio(0).unwrap() < 0.95 && ratio(1).unwrap() > 0.95 && ratio(2).is_none());
    assert_eq!(report["compared_with"]["file"], "before.json");

    let table = run(&["--compare", "before.json", "--fail-on-regression", "--quiet"]);
    assert_eq!(table.code, Some(1));
    assert_eq!(table.stderr, "error: pp8: more than 5 % slower than before\n");
    let slower: Vec<&str> = table.stdout.lines().filter(|line| line.ends_with("SLOWER")).collect();
    assert!(slower.len() == 1 && slower[0].starts_with("pp8 "), "{}", table.stdout);
    assert!(table.stdout.lines().all(|line| line.chars().count() <= 80), "{}", table.stdout);
}

#[test]
fn what_cannot_be_compared_is_refused_before_anything_is_measured() {
    let folder = Folder::new();
    folder.write("text.json", "{}");
    let refused = folder.run(&["bench", "--compare", "text.json"]);
    assert_eq!(refused.code, Some(1));
    let sentence = "error: text.json: holds no results as `bitnet bench --format json` prints them";
    assert!(refused.stderr.starts_with(sentence), "{}", refused.stderr);

    let flags = ["bench", "-p", "8", "-n", "0", "--reps", "1", "-t", "1"];
    let first = folder.run(&[&flags[..], &["--format", "json"]].concat());
    folder.write("pp8.json", first.stdout);
    let refused = folder.run(&["bench", "--compare", "pp8.json", "-p", "9"]);
    assert_eq!(refused.code, Some(1));
    let sentence =
        "error: pp8.json: has none of these tests, by as many threads: it has pp8 by 1\n";
    assert_eq!(refused.stderr, sentence);
}

#[test]
fn a_chart_has_a_bar_for_each_test_with_its_machine_and_date() {
    let folder = Folder::new();
    let model = folder.model("<odd> & \"name\"");
    let flags = ["bench", "-p", "8,16", "-n", "2", "--reps", "1", "-q", "--plot", "out.svg", "-m"];
    let run = folder.run(&[&flags[..], &[model.to_str().unwrap()]].concat());
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let svg = std::fs::read_to_string(folder.path("out.svg")).unwrap();
    let report = json_of(&with(&["--format", "json"]));
    let cpu = report["machine"]["cpu"].as_str().unwrap().replace('&', "&amp;");
    for text in ["<svg xmlns", ">pp8<", ">pp16<", ">tg2<", "&lt;odd&gt; &amp; ", &cpu, ", 20"] {
        assert!(svg.contains(text), "{text}: {svg}");
    }
    // The ground, and a bar each.
    assert_eq!(svg.matches("<rect").count(), 4, "{svg}");

    let refused = folder.run(&["bench", "-p", "8", "-n", "0", "--reps", "1", "--plot", "no/x.svg"]);
    assert_eq!(refused.code, Some(1));
    assert!(
        refused.stderr.ends_with(
            "error: no/x.svg: cannot be written: No such file or directory (os error 2)\n"
        ),
        "{}",
        refused.stderr
    );
}

#[test]
fn zero_leaves_a_test_out() {
    let report = json_of(&["bench", "-p", "0", "-n", "2", "--reps", "1", "--format", "json"]);
    assert_eq!(report["rows"].as_array().unwrap().len(), 1);
    assert_eq!(report["rows"][0]["test"], "tg2");
}

#[test]
fn what_cannot_be_measured_is_refused_in_a_sentence() {
    let cases: [(&[&str], i32, &str); 9] = [
        (&["-p", "0", "-n", "0"], 2, "nothing to measure"),
        (&["-p", "600"], 1, "pp600 needs 600 tokens, but the context of tiny has 512"),
        (&["-p", "many"], 2, "give a number from 0"),
        (&["-t", "0"], 2, "give a number from 1"),
        (&["-b", "0"], 2, "0"),
        (&["--reps", "0"], 2, "0"),
        (&["--shape", "gpt-2"], 2, "bitnet-2b-4t"),
        (&["--gate-sparsity", "0.5"], 2, "--shape"),
        (&["--shape", "llama3-8b", "--gate-sparsity", "0.5"], 2, "has no relu2 gates"),
    ];
    for (flags, code, words) in cases {
        let outcome = bitnet(&[&["bench"], flags].concat());
        assert_eq!(outcome.code, Some(code), "{flags:?}: {}", outcome.stderr);
        assert_eq!(outcome.stdout, "", "{flags:?}");
        assert!(outcome.stderr.contains(words), "{flags:?}: {}", outcome.stderr);
    }
    let outcome = bitnet(&["bench", "--shape", "bitnet-2b-4t", "--gate-sparsity", "2"]);
    assert_eq!(outcome.code, Some(2));
    assert!(outcome.stderr.contains("give a share from 0 to 1"), "{}", outcome.stderr);
}

#[test]
fn operations_have_rates_in_every_form() {
    let ops = |more: &[&'static str]| [&["bench", "--ops", "--reps", "1"][..], more].concat();
    let report = json_of(&ops(&["--format", "json", "-t", "1,2"]));
    let rows = report["rows"].as_array().unwrap();
    assert_eq!(rows.len() % 2, 0);
    assert_eq!(rows[0]["operation"], "BitLinear 256 to 256");
    assert_eq!(rows[0]["macs_per_pass"], 65_536);
    assert!(rows.iter().all(|row| row["passes_per_s"]["median"].as_f64().unwrap() > 0.0));

    let table = stdout_of(&ops(&[]));
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let csv = stdout_of(&ops(&["--format", "csv"]));
    let cells = |line: &str| line.split(',').count();
    assert!(csv.lines().all(|line| cells(line) == cells(csv.lines().next().unwrap())), "{csv}");
    let md = stdout_of(&ops(&["--format", "md"]));
    let rows: Vec<&str> = md.lines().filter(|line| line.starts_with('|')).collect();
    assert!(rows.iter().all(|row| row.matches('|').count() == rows[0].matches('|').count()));
}

#[test]
fn a_grade_comes_with_its_figures() {
    let report = json_of(&["bench", "--grade", "--reps", "1", "--format", "json"]);
    assert_eq!(report["iterations"], 4);
    for name in ["tokens_per_s", "batch_tokens_per_s", "passes_per_s", "memory_bytes"] {
        assert!(report[name].as_f64().unwrap() > 0.0, "{name}");
    }
    let marks = report["grades"].as_array().unwrap();
    let weights: u64 = marks.iter().map(|mark| mark["weight_percent"].as_u64().unwrap()).sum();
    assert_eq!((marks.len(), weights), (4, 100));
    assert!(["A+", "A", "B", "C", "D"].contains(&report["grade"].as_str().unwrap()));

    let table = stdout_of(&["bench", "--grade", "--reps", "1"]);
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    let refused = bitnet(&["bench", "--grade", "--format", "csv"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
}
