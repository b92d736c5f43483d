//! What makes the program pleasant in a shell: completions and manual pages.

mod support;

use std::fs;

use support::{Folder, bitnet, stdout_of};

#[test]
fn every_usual_shell_gets_a_script_with_all_commands() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let script = stdout_of(&["completions", shell]);
        for word in ["tokenize", "doctor", "temperature"] {
            assert!(script.contains(word), "{shell}: {word}");
        }
    }
    let refused = bitnet(&["completions", "cmd.exe"]);
    assert_eq!(refused.code, Some(2), "{}", refused.stderr);
}

#[test]
fn a_script_is_one_that_bash_reads() {
    let folder = Folder::new();
    folder.write("bitnet.bash", stdout_of(&["completions", "bash"]));
    let Ok(bash) = std::process::Command::new("bash")
        .args(["-c", "source bitnet.bash && complete -p bitnet"])
        .current_dir(folder.path(""))
        .output()
    else {
        return println!("skipped: there is no bash here");
    };
    assert!(bash.status.success(), "{}", String::from_utf8_lossy(&bash.stderr));
}

#[test]
fn manual_pages_are_there_for_the_program_and_each_command() {
    let folder = Folder::new();
    let run = folder.run(&["man", "share/man1"]);
    assert_eq!((run.code, run.stdout.as_str()), (Some(0), ""), "{}", run.stderr);
    let page = |name: &str| fs::read_to_string(folder.path(&format!("share/man1/{name}"))).unwrap();
    assert!(page("bitnet.1").contains("Runs ternary"));
    assert!(page("bitnet-run.1").contains("temperature"));

    folder.write("file", "");
    let refused = folder.run(&["man", "file"]);
    assert_eq!(refused.code, Some(1));
    assert!(refused.stderr.starts_with("error: file: cannot be made"), "{}", refused.stderr);
}
