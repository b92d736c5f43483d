//! `bitnet bench`: what it prints, and what it refuses. No test looks at how fast anything was.

mod support;

use support::{bitnet, json_of, stdout_of};

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
        for name in ["mac_ceiling_share", "read_ceiling_share"] {
            assert!(row[name].is_null(), "{name}");
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
    let table = stdout_of(&with(&["-d", "100", "-b", "2"]));
    assert!(table.lines().all(|line| line.chars().count() <= 80), "{table}");
    assert!(table.contains("gates at zero: "), "{table}");
    assert!(table.contains("tg3x2@100"), "{table}");
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
