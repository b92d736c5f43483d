//! Models from a hub on this machine, by the real program: fetched, run, listed, removed, and everything
//! that can go wrong on the way.

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use bitnet_testing::hub::{Fault, HubEmulator};
use bitnet_testing::{Random, folder_contents, tiny_model};
use serde_json::Value;
use support::{Folder, Outcome, stdout_of};

const NAME: &str = "org/story";
const WEIGHTS: &str = "model.safetensors";

fn hub() -> HubEmulator {
    let hub = HubEmulator::start();
    hub.add_folder(NAME, &tiny_model());
    hub
}

/// The program, with the hub in reach and the cache in its folder.
fn online(folder: &Folder, hub: &HubEmulator, arguments: &[&str]) -> Command {
    let mut command = folder.command(arguments);
    command.env("HF_ENDPOINT", hub.endpoint()).env_remove("HF_HUB_OFFLINE");
    command
}

fn done(command: Command) -> Outcome {
    let outcome = Outcome::of(command);
    assert_eq!(outcome.code, Some(0), "{}", outcome.stderr);
    outcome
}

/// What a command that fails says, after `error: `.
fn refusal(command: Command, code: i32) -> String {
    let outcome = Outcome::of(command);
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(code), ""), "{}", outcome.stderr);
    let lines: Vec<_> = outcome.stderr.lines().filter(|line| line.starts_with("error: ")).collect();
    let [line] = lines.as_slice() else { panic!("one sentence: {}", outcome.stderr) };
    line["error: ".len()..].to_owned()
}

/// All files and links of the cache.
fn contents(folder: &Folder) -> BTreeMap<String, Vec<u8>> {
    folder_contents(&folder.path("hf/hub"))
}

/// What an undisturbed `pull` leaves.
fn undisturbed(hub: &HubEmulator) -> BTreeMap<String, Vec<u8>> {
    let folder = Folder::new();
    done(online(&folder, hub, &["pull", NAME]));
    contents(&folder)
}

#[test]
fn a_model_is_pulled_run_offline_listed_and_removed() {
    let (folder, hub) = (Folder::new(), hub());
    let pulled = done(online(&folder, &hub, &["pull", NAME]));
    let path = pulled.stdout.trim_end();
    assert!(Path::new(path).join("config.json").exists(), "{path}");
    assert!(pulled.stderr.starts_with("fetching org/story\norg/story: 1."), "{}", pulled.stderr);
    assert!(pulled.stderr.contains(" fetched in "), "{}", pulled.stderr);

    let prompt = ["Once upon a time", "-n", "8"];
    let expected = stdout_of(&[&["run"], &prompt[..]].concat());
    let offline = |arguments: &[&str]| done(folder.command(arguments)).stdout;
    assert_eq!(offline(&[&["run", "-m", NAME], &prompt[..]].concat()), expected);
    for command in [&["tokenize", "a", "-m", NAME][..], &["info", "-m", NAME]] {
        offline(command);
    }

    let list: Value = serde_json::from_str(&offline(&["list", "--json"])).unwrap();
    let model = &list["models"][0];
    assert_eq!(list["models"].as_array().unwrap().len(), 1);
    assert_eq!(
        (model["model"].as_str(), model["format"].as_str()),
        (Some(NAME), Some("safetensors"))
    );
    assert_eq!((model["path"].as_str(), &model["revisions"][0]), (Some(path), &"main".into()));
    let table = offline(&["list"]);
    assert!(table.contains("org/story  main ("), "{table}");

    assert_eq!(
        refusal(folder.command(&["rm", NAME]), 2),
        "org/story is removed only after a question: add --yes to say yes now"
    );
    let removed = done(folder.command(&["rm", NAME, "--yes"]));
    let size = model["bytes"].as_u64().unwrap() as f64 / 1e6;
    assert_eq!(removed.stderr, format!("removed org/story: {size:.2} MB freed\n"));
    assert!(!folder.path("hf/hub/models--org--story").exists());
    let empty = done(folder.command(&["list"]));
    assert!(empty.stdout.is_empty() && empty.stderr.contains("no models in"), "{empty:?}");
}

#[test]
fn a_command_that_runs_a_model_fetches_it_once() {
    let (folder, hub) = (Folder::new(), hub());
    let run = ["run", "Once", "-n", "2", "-m", NAME];
    let first = done(online(&folder, &hub, &run));
    assert!(first.stderr.contains("fetching org/story\n"), "{}", first.stderr);
    assert!(!hub.take_asked().is_empty());
    let second = done(online(&folder, &hub, &run));
    assert_eq!(second.stdout, first.stdout);
    assert!(!second.stderr.contains("fetching"), "{}", second.stderr);
    assert_eq!(hub.take_asked(), []);

    // Those that only look do not.
    let folder = Folder::new();
    let refused = refusal(online(&folder, &hub, &["tokenize", "a", "-m", NAME]), 1);
    assert!(refused.ends_with("fetch it with `bitnet pull org/story`"), "{refused}");
    assert_eq!(hub.take_asked(), []);
    let quiet = done(online(&folder, &hub, &["pull", NAME, "--json", "--quiet"]));
    assert_eq!(quiet.stderr, "");
    let json: Value = serde_json::from_str(&quiet.stdout).unwrap();
    assert_eq!(json["bytes"], json["fetched_bytes"]);
}

#[test]
fn two_programs_fetch_each_file_once() {
    let hub = hub();
    let expected = undisturbed(&hub);
    hub.take_asked();
    hub.set_pace(100_000, Duration::from_millis(20));
    let folder = Folder::new();
    let start = || {
        let mut command = online(&folder, &hub, &["pull", NAME]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    };
    let outputs = [start(), start()].map(|child| child.wait_with_output().unwrap());
    for output in &outputs {
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
    assert_eq!(outputs[0].stdout, outputs[1].stdout);
    let asked = hub.take_asked();
    let weights = asked.iter().filter(|asked| asked.storage && asked.path.ends_with(WEIGHTS));
    assert_eq!(weights.count(), 1);
    assert_eq!(contents(&folder), expected);
}

/// Waits until the program ends by itself or the time is over, then kills it.
fn kill_after(mut child: Child, time: Duration) -> bool {
    let end = Instant::now() + time;
    while Instant::now() < end {
        if child.try_wait().unwrap().is_some() {
            return false;
        }
        thread::sleep(Duration::from_millis(1));
    }
    let was_running = child.try_wait().unwrap().is_none();
    child.kill().unwrap();
    child.wait().unwrap();
    was_running
}

#[test]
fn what_is_killed_at_any_moment_is_finished_by_the_next() {
    let hub = hub();
    hub.set_pace(200_000, Duration::from_millis(15));
    let started = Instant::now();
    let expected = undisturbed(&hub);
    let whole_ms = started.elapsed().as_millis() as usize;
    let mut random = Random::new(20);
    let mut killed = 0;
    for _ in 0..20 {
        let folder = Folder::new();
        let mut command = online(&folder, &hub, &["pull", NAME]);
        let child = command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let time = Duration::from_millis(random.below(whole_ms) as u64);
        killed += usize::from(kill_after(child, time));
        // What is there is no model, or all of it.
        let offline = Outcome::of(folder.command(&["tokenize", "a", "-m", NAME]));
        assert!(
            offline.code == Some(0) || offline.stderr.contains("not a whole model"),
            "{offline:?}"
        );
        done(online(&folder, &hub, &["pull", NAME]));
        assert_eq!(contents(&folder), expected, "after {time:?}");
    }
    assert!(killed > 0, "all had ended before");
}

#[cfg(unix)]
#[test]
fn ctrl_c_leaves_what_has_come_for_the_next_time() {
    let (folder, hub) = (Folder::new(), hub());
    hub.set_pace(20_000, Duration::from_millis(20));
    let mut command = online(&folder, &hub, &["pull", NAME]);
    let child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let has_begun = |path: &Path| {
        let blobs = fs::read_dir(path).into_iter().flatten();
        let sizes = blobs.map(|blob| blob.unwrap().metadata().map_or(0, |metadata| metadata.len()));
        sizes.max() > Some(500_000)
    };
    while !has_begun(&folder.path("hf/hub/models--org--story/blobs")) {
        thread::sleep(Duration::from_millis(5));
    }
    let kill = Command::new("kill").args(["-INT", &child.id().to_string()]).status().unwrap();
    assert!(kill.success());
    let output = child.wait_with_output().unwrap();
    assert_eq!((output.status.code(), output.stdout.as_slice()), (Some(130), &b""[..]));
    assert_eq!(String::from_utf8(output.stderr).unwrap(), "fetching org/story\n");

    hub.take_asked();
    hub.set_pace(usize::MAX, Duration::ZERO);
    done(online(&folder, &hub, &["pull", NAME]));
    let asked = hub.take_asked();
    assert!(asked.iter().any(|asked| asked.storage && asked.range.is_some()), "{asked:?}");
    assert_eq!(contents(&folder), undisturbed(&hub));
}

#[cfg(unix)]
#[test]
fn a_file_that_may_not_grow_is_reported_and_gone_on_with() {
    let (folder, hub) = (Folder::new(), hub());
    let pull = online(&folder, &hub, &["pull", NAME]);
    let mut limited = Command::new("bash");
    // 1000 kB; without the trap the signal would end the program.
    let script = r#"trap '' XFSZ; ulimit -f 1000; exec "$0" pull org/story"#;
    limited.args(["-c", script]).arg(pull.get_program()).current_dir(folder.path(""));
    for (name, value) in pull.get_envs() {
        match value {
            Some(value) => limited.env(name, value),
            None => limited.env_remove(name),
        };
    }
    if Command::new("bash").arg("--version").output().is_err() {
        return println!("skipped: there is no bash here");
    }
    let refused = refusal(limited, 1);
    assert!(refused.contains(".incomplete: no room for the missing "), "{refused}");
    assert!(
        refused.ends_with("run the same command again, it goes on where it stopped"),
        "{refused}"
    );
    hub.take_asked();
    done(pull);
    let asked = hub.take_asked();
    let resumed = asked.iter().find(|asked| asked.storage).unwrap();
    assert_eq!(resumed.range.as_deref(), Some("bytes=1024000-"));
    assert_eq!(contents(&folder), undisturbed(&hub));
}

#[cfg(target_os = "linux")]
#[test]
fn a_full_disk_is_reported_and_gone_on_with() {
    let (folder, hub) = (Folder::new(), hub());
    let pull = online(&folder, &hub, &["pull", NAME]);
    // A disk of 1 MB that this test alone sees, and that then grows.
    let script = r#"
        mkdir hf && mount -t tmpfs -o size=1m none hf || exit 77
        "$0" pull org/story && exit 78
        mount -o remount,size=8m hf && "$0" pull org/story"#;
    let mut full = Command::new("unshare");
    full.args(["-rm", "bash", "-c", script]).arg(pull.get_program()).current_dir(folder.path(""));
    for (name, value) in pull.get_envs() {
        match value {
            Some(value) => full.env(name, value),
            None => full.env_remove(name),
        };
    }
    let Ok(output) = full.output() else { return println!("skipped: there is no unshare here") };
    let stderr = String::from_utf8_lossy(&output.stderr);
    if output.status.code() == Some(77) || stderr.contains("unshare failed") {
        return println!("skipped: this user may not mount a disk");
    }
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("no room for the missing "), "{stderr}");
    assert!(stderr.contains("No space left on device"), "{stderr}");
    let asked = hub.take_asked();
    let last = asked.iter().rfind(|asked| asked.storage).unwrap();
    assert!(last.range.is_some(), "{last:?}");
}

#[test]
fn what_cannot_be_had_is_said_in_a_sentence() {
    let (folder, hub) = (Folder::new(), hub());
    let pull = |name: &str| online(&folder, &hub, &["pull", name]);
    let endpoint = hub.endpoint();
    assert_eq!(
        refusal(pull("org/nothing"), 1),
        format!(
            "org/nothing: {endpoint} has no such model, or it is private: check the name, or set HF_TOKEN to \
             a token that may read it"
        )
    );
    assert_eq!(
        refusal(pull("nothing"), 2),
        "`nothing` is not the name of a model on the hub: give org/name, org/name@REVISION or org/name:FILE"
    );
    let refused = refusal(folder.command(&["run", "x", "-m", NAME]), 1);
    assert!(refused.contains("and HF_HUB_OFFLINE forbids to fetch it"), "{refused}");
    hub.fail("api", [Fault::Status(404)]);
    assert!(refusal(pull(NAME), 1).contains("has no such model"));
    folder.write("hf", "");
    let refused = refusal(pull(NAME), 1);
    assert!(refused.contains("cannot be written: "), "{refused}");
    assert!(refused.contains("set HF_HUB_CACHE to another folder"), "{refused}");
}

#[test]
fn a_token_in_a_variable_or_in_the_file_opens_a_private_model() {
    let (folder, hub) = (Folder::new(), hub());
    hub.protect(NAME, "hf_secret", false);
    let pull = || online(&folder, &hub, &["pull", NAME]);
    let refused = refusal(pull(), 1);
    assert!(refused.ends_with("or set HF_TOKEN to a token that may read it"), "{refused}");
    let mut wrong = pull();
    wrong.env("HF_TOKEN", "hf_wrong");
    let refused = refusal(wrong, 1);
    assert!(
        refused.ends_with("check the name and HF_TOKEN") && !refused.contains("hf_wrong"),
        "{refused}"
    );
    fs::create_dir(folder.path("hf")).unwrap();
    folder.write("hf/token", "hf_secret\n");
    done(pull());
}
