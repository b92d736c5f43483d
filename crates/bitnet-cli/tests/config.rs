//! Defaults from a file and from the environment: what comes before what, and what is refused.

mod support;

use serde_json::Value;
use support::{Folder, Outcome};

const FILE: &str = "\
threads = 1
max-tokens = 4
stop = [\"zebra\", \"yak\"]

[logits]
tokens = \"1,2\"

[run]
max-tokens = 5

[profile.short]
max-tokens = 6
[profile.short.run]
max-tokens = 2
json = true

[profile.other]
regex = \"[a-z ]+\"
";

/// The program with these variables, in a folder with a configuration file.
fn with(variables: &[(&str, &str)], file: &str, arguments: &[&str]) -> Outcome {
    let folder = Folder::new();
    folder.write("config.toml", file);
    folder.write("lark", "start: \"once\"");
    let mut command = folder.command(arguments);
    command.env("BITNET_CONFIG", "config.toml").envs(variables.iter().copied());
    let output = command.output().expect("the program starts");
    Outcome {
        code: output.status.code(),
        stdout: String::from_utf8(output.stdout).unwrap(),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// How many tokens a run generates.
fn tokens(variables: &[(&str, &str)], flags: &[&str]) -> usize {
    let arguments = [&["run", "Once upon", "--json"], flags].concat();
    let run = with(variables, &FILE.replace("[logits]\ntokens = \"1,2\"\n", ""), &arguments);
    assert_eq!(run.code, Some(0), "{}", run.stderr);
    let json: Value = serde_json::from_str(&run.stdout).unwrap();
    json["tokens"].as_array().unwrap().len()
}

#[test]
fn what_is_typed_comes_before_the_environment_the_profile_and_the_file() {
    let by_variable = [("BITNET_MAX_TOKENS", "3")];
    assert_eq!(tokens(&[], &[]), 5);
    assert_eq!(tokens(&[], &["--use", "short"]), 2);
    assert_eq!(tokens(&[("BITNET_USE", "short")], &[]), 2);
    assert_eq!(tokens(&[("BITNET_USE", "short")], &["--use", "other"]), 5);
    assert_eq!(tokens(&by_variable, &["--use", "short"]), 3);
    assert_eq!(tokens(&by_variable, &["--use", "short", "-n", "7"]), 7);
    assert_eq!(tokens(&[("BITNET_CONFIG", ""), ("BITNET_MAX_TOKENS", "")], &["-n", "9"]), 9);
}

#[test]
fn a_switch_can_be_on_by_default() {
    let run = with(&[], "[run]\njson = true\nmax-tokens = 1\n", &["run", "Once"]);
    assert!(run.stdout.starts_with("{\"prompt_tokens\":["), "{}", run.stdout);
    let run =
        with(&[("BITNET_JSON", "false")], "[run]\njson = true\nmax-tokens = 1\n", &["run", "Once"]);
    assert!(run.stdout.starts_with("Once"), "{}", run.stdout);
}

#[test]
fn a_default_gives_way_to_a_flag_that_contradicts_it() {
    let file = "[run]\nregex = \"[0-9]+\"\nmax-tokens = 8";
    let run = with(&[], file, &["run", "Once", "--grammar", "lark", "-q"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), "Onceonce\n"), "{}", run.stderr);
    let run = with(&[], "[run]\ntokens = [1, 2]\nmax-tokens = 1", &["run", "Once", "-q"]);
    assert!(run.stdout.starts_with("Once"), "{} {}", run.stdout, run.stderr);
}

#[test]
fn what_is_in_force_is_shown_with_where_it_comes_from() {
    let file = FILE.replace("[logits]\ntokens = \"1,2\"\n", "");
    let show = |arguments: &[&str]| with(&[("BITNET_THREADS", "2")], &file, arguments);
    let json: Value =
        serde_json::from_str(&show(&["config", "--json", "--use", "short"]).stdout).unwrap();
    assert_eq!((&json["profile"], &json["exists"]), (&"short".into(), &true.into()));
    assert_eq!(json["profiles"], serde_json::json!(["short", "other"]));
    let settings: Vec<String> = json["settings"]
        .as_array()
        .unwrap()
        .iter()
        .map(|s| format!("{} {} {} {}", s["command"], s["flag"], s["values"], s["origin"]))
        .collect();
    let expected = [
        r#"null "stop" ["zebra","yak"] "line 3""#,
        r#"null "threads" ["2"] "BITNET_THREADS""#,
        r#""run" "json" ["true"] "profile short, line 13""#,
        r#""run" "max-tokens" ["2"] "profile short, line 12""#,
    ];
    for line in expected {
        assert!(settings.iter().any(|setting| setting == line), "{line}: {settings:?}");
    }
    assert_eq!(show(&["config", "--path"]).stdout, "config.toml\n");
    let table = show(&["config"]).stdout;
    assert!(table.contains("run      --max-tokens  5"), "{table}");
}

#[test]
fn the_file_lies_where_such_files_lie() {
    let folder = Folder::new();
    let path = |variables: &[(&str, &str)]| {
        let mut command = folder.command(&["config", "--path"]);
        for name in ["BITNET_CONFIG", "XDG_CONFIG_HOME", "HOME", "APPDATA"] {
            command.env_remove(name);
        }
        let output = command.envs(variables.iter().copied()).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    if cfg!(windows) {
        return println!("skipped: the paths are those of Unix");
    }
    let home = ("HOME", "/home/x");
    assert_eq!(path(&[home]), (Some(0), "/home/x/.config/bitnet/config.toml\n".to_owned()));
    let xdg = ("XDG_CONFIG_HOME", "/xdg");
    assert_eq!(path(&[home, xdg]), (Some(0), "/xdg/bitnet/config.toml\n".to_owned()));
    assert_eq!(path(&[]), (Some(1), String::new()));
}

#[test]
fn mistakes_are_named_with_their_line() {
    let cases = [
        ("# x\ntreads = 1", "line 2: no command has a flag --treads: did you mean `threads`?"),
        (
            "threads = \"many\"",
            "line 1: threads: invalid value 'many' for '--threads <N>': give a number from 1 to 1024",
        ),
        ("json = 3", "line 1: json: is on or off: give true or false"),
        ("model = true", "line 1: model: takes a value and not true or false"),
        ("seed = [1, 2]", "line 1: seed: takes one value and not a list"),
        ("seed = 2020-01-01", "line 1: seed is a text, a number, true, false or a list"),
        ("[rum]\nseed = 1", "line 1: there is no command `rum`: did you mean `run`?"),
        ("[info]\nseed = 1", "line 2: `info` has no flag --seed"),
        ("[logits]\ntokens = 1", "line 2: --tokens has no default: type it each time"),
        ("[profile]\nx = 1", "line 2: a profile is a table: [profile.NAME]"),
        (
            "[profile.a]\n[profile.b]\nmodle = \"x\"",
            "line 3: no command has a flag --modle: did you mean `model`?",
        ),
        ("\nseed =", "line 2: "),
    ];
    for (file, sentence) in cases {
        let run = with(&[], file, &["run", "x"]);
        assert_eq!((run.code, run.stdout.as_str()), (Some(1), ""), "{file}");
        let expected = format!("error: config.toml, {sentence}");
        assert!(run.stderr.starts_with(&expected), "{file}: {}", run.stderr);
        assert_eq!(run.stderr.matches('\n').count(), 1, "{file}: {}", run.stderr);
        // Help is there all the same.
        assert_eq!(with(&[], file, &["--help"]).code, Some(0));
    }
    let refused = |variables: &[(&str, &str)], flags: &[&str], sentence: &str| {
        let run =
            with(variables, FILE.split("[logits]").next().unwrap(), &[&["config"], flags].concat());
        assert_eq!((run.code, run.stderr), (Some(1), format!("error: {sentence}\n")));
    };
    refused(&[], &["--use", "x"], "config.toml has no profile `x`: write one as [profile.x]");
    refused(
        &[("BITNET_SEED", "one")],
        &[],
        "BITNET_SEED: invalid value 'one' for '--seed <S>': invalid digit found in string",
    );
    refused(
        &[("BITNET_CONFIG", "nowhere.toml")],
        &[],
        "nowhere.toml: cannot be read: No such file or directory (os error 2)",
    );
}
