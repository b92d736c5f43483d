//! `BITNET_LOG`, which shows on stderr what took which time.

mod support;

use std::process::Output;

use support::Folder;

const RUN: [&str; 5] = ["run", "Once upon a time", "-n", "4", "-q"];

fn run(filter: Option<&str>) -> Output {
    let folder = Folder::new();
    let mut command = folder.command(&RUN);
    command.env_remove("BITNET_LOG");
    if let Some(filter) = filter {
        command.env("BITNET_LOG", filter);
    }
    command.output().unwrap()
}

#[test]
fn spans_go_to_stderr_and_leave_stdout_as_it_is() {
    let silent = run(None);
    assert!(silent.stderr.is_empty());
    for (filter, shown, hidden) in [
        ("", vec![], vec!["load_model", "generate", "step"]),
        ("info", vec!["load_model{model=tiny devices=1}"], vec!["generate", "step"]),
        ("debug", vec!["load_model", "generate{prompt_tokens="], vec!["step"]),
        ("bitnet_inference=trace", vec!["load_model", "generate", "step{sequences=1"], vec![]),
        ("off", vec![], vec!["load_model", "generate", "step"]),
    ] {
        let output = run(Some(filter));
        assert!(output.status.success());
        assert_eq!(output.stdout, silent.stdout, "{filter}");
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(shown.iter().all(|span| stderr.contains(span)), "{filter}: {stderr}");
        assert!(!hidden.iter().any(|span| stderr.contains(span)), "{filter}: {stderr}");
    }
}

#[test]
fn a_filter_that_is_none_is_refused() {
    let output = run(Some("bitnet=loud"));
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    assert_eq!(
        String::from_utf8(output.stderr).unwrap(),
        "error: BITNET_LOG: `bitnet=loud` is no filter: give info, debug, trace or a list such as \
         bitnet_inference=debug\n"
    );
}
