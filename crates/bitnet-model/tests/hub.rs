//! The hub's client against a hub on this machine that does everything wrong.

use std::collections::BTreeMap;
use std::fs;
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::Duration;

use bitnet_model::hub::{FetchProgress, FetchState, Hub, HubError, HubName, Pulled};
use bitnet_model::source;
use bitnet_testing::hub::{Asked, Fault, HubEmulator};
use bitnet_testing::{folder_contents, golden, tiny_model};
use tempfile::TempDir;

const NAME: &str = "org/story";
const WEIGHTS: &str = "model.safetensors";

/// A hub with the small model, and an empty cache.
struct Setting {
    emulator: HubEmulator,
    folder: TempDir,
    commit: String,
}

impl Setting {
    fn new() -> Self {
        let (emulator, folder) = (HubEmulator::start(), tempfile::tempdir().unwrap());
        let commit = emulator.add_folder(NAME, &tiny_model());
        Setting { emulator, folder, commit }
    }

    fn hub(&self) -> Hub {
        Hub {
            endpoint: self.emulator.endpoint().to_owned(),
            token: None,
            cache: self.folder.path().join("hub"),
            offline: false,
            timeout: Duration::from_secs(10),
            retry_pause: Duration::from_millis(1),
        }
    }

    fn pull(&self) -> Result<Pulled, HubError> {
        pull(&self.hub(), NAME)
    }

    fn refused(&self, hub: &Hub, name: &str) -> String {
        let error = pull(hub, name).unwrap_err().to_string();
        error.replace(self.emulator.endpoint(), "HUB").replace(&self.cache_path(), "CACHE")
    }

    fn cache_path(&self) -> String {
        self.hub().cache.display().to_string()
    }

    fn repository(&self) -> PathBuf {
        self.hub().cache.join("models--org--story")
    }

    /// The contents of the cache without locks: links as what they say, files as what is in them.
    fn contents(&self) -> BTreeMap<String, Vec<u8>> {
        let mut contents = folder_contents(&self.hub().cache);
        contents.retain(|name, _| !name.starts_with("/.locks"));
        contents
    }

    /// The requests for the contents of the weights, from the second server.
    fn weights_asked(&self) -> Vec<Asked> {
        let mut asked = self.emulator.take_asked();
        asked.retain(|asked| asked.storage && asked.path.ends_with(WEIGHTS));
        asked
    }
}

fn pull(hub: &Hub, name: &str) -> Result<Pulled, HubError> {
    hub.pull(&HubName::parse(name).unwrap(), &mut |_| ControlFlow::Continue(()))
}

fn weights() -> Vec<u8> {
    fs::read(tiny_model().join(WEIGHTS)).unwrap()
}

/// What an undisturbed download leaves.
fn undisturbed() -> BTreeMap<String, Vec<u8>> {
    let setting = Setting::new();
    setting.pull().unwrap();
    setting.contents()
}

#[test]
fn a_model_lies_in_the_cache_as_all_programs_have_it() {
    let setting = Setting::new();
    let pulled = setting.pull().unwrap();
    let snapshot = setting.repository().join("snapshots").join(&setting.commit);
    assert_eq!(pulled.path, snapshot);
    assert_eq!(
        fs::read(setting.repository().join("refs/main")).unwrap(),
        setting.commit.as_bytes()
    );
    let mut files: Vec<_> = fs::read_dir(&snapshot)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    files.sort();
    let expected = [
        "config.json",
        "generation_config.json",
        WEIGHTS,
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer_config.json",
    ];
    assert_eq!(files, expected, "and no README.md");
    // `git hash-object config.json` and `sha256sum model.safetensors` are the blobs' names.
    for name in expected {
        let link = fs::read_link(snapshot.join(name)).unwrap();
        assert!(link.starts_with("../../blobs"), "{}", link.display());
        let digits = link.file_name().unwrap().len();
        assert_eq!(digits, if name == WEIGHTS { 64 } else { 40 }, "{name}");
        assert_eq!(
            fs::read(snapshot.join(name)).unwrap(),
            fs::read(tiny_model().join(name)).unwrap()
        );
    }
    assert_eq!(pulled.fetched_bytes, pulled.bytes);
    let checkpoint = source::open(pulled.path.to_str().unwrap()).unwrap();
    assert_eq!(checkpoint.description.path, snapshot);
    assert_eq!(setting.hub().cached(&HubName::parse(NAME).unwrap()).unwrap(), Some(snapshot));
}

#[test]
fn what_is_there_is_not_fetched_again() {
    let setting = Setting::new();
    let first = setting.pull().unwrap();
    setting.emulator.take_asked();
    let again = setting.pull().unwrap();
    assert_eq!((again.fetched_bytes, again.path, again.bytes), (0, first.path, first.bytes));
    assert_eq!(setting.emulator.take_asked().len(), 1, "the list of files");

    // A newer commit with one other file.
    let mut files = Vec::new();
    for entry in fs::read_dir(tiny_model()).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        files.push((name, fs::read(path).unwrap()));
    }
    files.push(("chat_template.jinja".to_owned(), b"{{ messages }}".to_vec()));
    let commit = setting.emulator.add(NAME, files);
    let newer = setting.pull().unwrap();
    assert!(newer.path.ends_with(&commit));
    assert_eq!((newer.fetched_bytes, newer.bytes), (14, first.bytes + 14));
    // The older one is still there for who names it.
    assert!(
        pull(&setting.hub(), &format!("{NAME}@{}", setting.commit)).unwrap().fetched_bytes == 0
    );
}

#[test]
fn a_download_goes_on_where_the_connection_broke() {
    let setting = Setting::new();
    setting.emulator.fail(WEIGHTS, [Fault::Drop(100_000), Fault::Drop(0), Fault::Drop(1)]);
    setting.pull().unwrap();
    let ranges: Vec<_> = setting.weights_asked().into_iter().map(|asked| asked.range).collect();
    let range = |from: u32| Some(format!("bytes={from}-"));
    assert_eq!(ranges, [None, range(100_000), range(100_000), range(100_001)]);
    assert_eq!(setting.contents(), undisturbed());
}

#[test]
fn every_answer_that_is_wrong_once_is_got_over() {
    for fault in [
        Fault::NoRange,
        Fault::OtherBytes,
        Fault::Longer(10),
        Fault::Endless,
        Fault::Status(403),
        Fault::Status(500),
        Fault::Busy(0),
        Fault::Silence(Duration::ZERO),
    ] {
        let setting = Setting::new();
        setting.emulator.fail(WEIGHTS, [Fault::Drop(1000), fault.clone()]);
        setting.pull().unwrap();
        assert_eq!(setting.contents(), undisturbed(), "{fault:?}");
    }
    let setting = Setting::new();
    setting
        .emulator
        .fail("api", [Fault::Status(503), Fault::Busy(0), Fault::Silence(Duration::ZERO)]);
    setting.pull().unwrap();
    assert_eq!(setting.contents(), undisturbed());
}

#[test]
fn an_answer_that_stays_wrong_is_an_error_and_leaves_nothing_that_looks_whole() {
    let reason = |fault: Fault| {
        let setting = Setting::new();
        setting.emulator.fail(WEIGHTS, vec![fault; 10]);
        let error = setting.refused(&setting.hub(), NAME);
        assert_eq!(setting.hub().cached(&HubName::parse(NAME).unwrap()).unwrap(), None);
        assert!(!setting.repository().join("snapshots").exists());
        // It has not been left in a state that it cannot get out of.
        setting.emulator.fail(WEIGHTS, []);
        setting.pull().unwrap();
        assert_eq!(setting.contents(), undisturbed());
        error
    };
    let size = weights().len();
    let again = "tried 6 times: check the connection and run the same command again, it goes on where it \
                 stopped";
    let file = format!("{NAME}: {WEIGHTS}");
    assert_eq!(
        reason(Fault::Longer(10)),
        format!("{file}: the server announces {} bytes and {size} are missing; {again}", size + 10)
    );
    assert_eq!(
        reason(Fault::Endless),
        format!("{file}: the server sends more bytes than the file has; {again}")
    );
    let error = reason(Fault::OtherBytes);
    assert!(
        error
            .starts_with(&format!("{file}: what arrived is not what the hub has: its SHA-256 is "))
    );
    let error = reason(Fault::Status(503));
    assert!(error.contains("answers with status 503; tried 6 times"), "{error}");
    let error = reason(Fault::Drop(0));
    assert!(error.contains("the connection broke"), "{error}");
}

#[test]
fn a_server_that_is_silent_is_not_waited_for_without_end() {
    let setting = Setting::new();
    let hub = Hub { timeout: Duration::from_millis(50), ..setting.hub() };
    setting.emulator.fail("api", vec![Fault::Silence(Duration::from_secs(60)); 4]);
    let error = setting.refused(&hub, NAME);
    assert!(error.contains("HUB cannot be reached") && error.contains("tried 4 times"), "{error}");
}

#[test]
fn the_token_goes_to_the_hub_and_nowhere_else() {
    let setting = Setting::new();
    setting.emulator.protect(NAME, "hf_secret", false);
    let hub = Hub { token: Some("hf_secret".to_owned()), ..setting.hub() };
    pull(&hub, NAME).unwrap();
    let asked = setting.emulator.take_asked();
    assert!(asked.iter().any(|asked| asked.storage), "the weights lie on the second server");
    for asked in asked {
        let expected = (!asked.storage).then(|| "Bearer hf_secret".to_owned());
        assert_eq!(asked.authorization, expected, "{}", asked.path);
    }
}

#[test]
fn who_may_not_have_a_model_is_told_what_to_do() {
    let setting = Setting::new();
    let hub = setting.hub();
    let with_token = Hub { token: Some("hf_other".to_owned()), ..hub.clone() };
    assert_eq!(
        setting.refused(&hub, "org/nothing"),
        "org/nothing: HUB has no such model, or it is private: check the name, or set HF_TOKEN to a token \
         that may read it"
    );
    assert_eq!(
        setting.refused(&with_token, "org/nothing"),
        "org/nothing: HUB has no such model that your token may read: check the name and HF_TOKEN"
    );
    assert_eq!(
        setting.refused(&hub, "org/story@v9"),
        "org/story@v9: HUB has the model, but no revision `v9` of it: check the name after @"
    );
    setting.emulator.protect(NAME, "hf_secret", true);
    assert_eq!(
        setting.refused(&hub, NAME),
        "org/story: its owner gives it only to those who accept conditions: accept them on HUB/org/story and \
         set HF_TOKEN to your token"
    );
    assert!(setting.refused(&with_token, NAME).ends_with("with the account of your HF_TOKEN"));
    setting.emulator.fail("api", [Fault::Status(403)]);
    assert_eq!(
        setting.refused(&hub, NAME),
        "org/story: HUB refuses access (status 403): set HF_TOKEN to a token that may read it"
    );
    assert!(!hub.cache.exists(), "nothing has been written");
}

#[test]
fn answers_that_no_hub_gives_are_refused() {
    let setting = Setting::new();
    let refused = |fault: Fault| {
        setting.emulator.fail("api", vec![fault; 20]);
        setting.refused(&setting.hub(), NAME)
    };
    assert_eq!(refused(Fault::Circle), "org/story: HUB redirects in a circle: check HF_ENDPOINT");
    assert!(refused(Fault::Status(200)).contains("HUB answers no description of a model"));
    assert_eq!(
        refused(Fault::Status(418)),
        "org/story: HUB answers with status 418: check HF_ENDPOINT"
    );
    let nowhere = Hub { endpoint: "http://127.0.0.1:1".to_owned(), ..setting.hub() };
    assert!(setting.refused(&nowhere, NAME).contains("http://127.0.0.1:1 cannot be reached"));
}

#[test]
fn file_names_that_leave_the_folder_are_not_taken() {
    let setting = Setting::new();
    let files = ["../x.gguf", "/x.gguf", "a/../../x.gguf", "C:x.gguf"]
        .map(|name| (name.to_owned(), b"GGUF".to_vec()));
    setting.emulator.add("org/evil", files.to_vec());
    let error = setting.refused(&setting.hub(), "org/evil");
    assert!(error.contains("has no model that can be read"), "{error}");
}

#[test]
fn a_sharded_model_has_the_shards_of_its_index() {
    let Some(folder) = golden("bitnet-sharded") else { return };
    let setting = Setting::new();
    setting.emulator.add_folder("org/sharded", &folder);
    let pulled = pull(&setting.hub(), "org/sharded").unwrap();
    source::open(pulled.path.to_str().unwrap()).unwrap();
    assert!(pulled.path.join("model.safetensors.index.json").exists());
    assert!(!pulled.path.join("golden.safetensors").exists());
}

#[test]
fn of_several_files_one_is_chosen_by_name() {
    let Some(gguf) = golden("gguf/bitnet-packed-TQ2_0.gguf") else { return };
    let setting = Setting::new();
    let bytes = fs::read(gguf).unwrap();
    let files = ["a-TQ2_0.gguf", "b-TQ1_0.gguf"].map(|name| (name.to_owned(), bytes.clone()));
    setting.emulator.add("org/gguf", files.to_vec());
    assert_eq!(
        setting.refused(&setting.hub(), "org/gguf"),
        "org/gguf: has several models: a-TQ2_0.gguf, b-TQ1_0.gguf; choose one, such as org/gguf:a-TQ2_0.gguf"
    );
    let hub = setting.hub();
    let pulled = pull(&hub, "org/gguf:b-TQ1_0.gguf").unwrap();
    assert!(pulled.path.ends_with("b-TQ1_0.gguf"));
    source::open(pulled.path.to_str().unwrap()).unwrap();
    // There is only one in the cache.
    assert_eq!(hub.cached(&HubName::parse("org/gguf").unwrap()).unwrap(), Some(pulled.path));
    pull(&hub, "org/gguf:a-TQ2_0.gguf").unwrap();
    assert!(hub.cached(&HubName::parse("org/gguf").unwrap()).is_err());
    let names: Vec<_> = hub.list().unwrap().into_iter().map(|model| model.name).collect();
    assert_eq!(names, ["org/gguf:a-TQ2_0.gguf", "org/gguf:b-TQ1_0.gguf"]);
}

#[test]
fn a_model_without_a_tokenizer_says_what_it_needs() {
    let setting = Setting::new();
    let file = |name: &str| (name.to_owned(), fs::read(tiny_model().join(name)).unwrap());
    setting.emulator.add("org/bare", vec![file("config.json"), file(WEIGHTS)]);
    let pulled = pull(&setting.hub(), "org/bare").unwrap();
    assert!(pulled.notes[0].starts_with("org/bare has no tokenizer"), "{:?}", pulled.notes);
    let name = HubName::parse("org/bare").unwrap();
    assert_eq!(setting.hub().cached(&name).unwrap(), None);
    fs::copy(tiny_model().join("tokenizer.json"), pulled.path.join("tokenizer.json")).unwrap();
    assert_eq!(setting.hub().cached(&name).unwrap(), Some(pulled.path));
}

#[test]
fn two_at_once_fetch_each_file_once() {
    let setting = Setting::new();
    setting.emulator.set_pace(100_000, Duration::from_millis(5));
    let waited = std::thread::scope(|scope| {
        let threads = [(); 4].map(|()| {
            scope.spawn(|| {
                let mut waited = false;
                let name = HubName::parse(NAME).unwrap();
                let pulled = setting.hub().pull(&name, &mut |now: FetchProgress<'_>| {
                    waited |= now.state == FetchState::Waiting;
                    assert!(now.bytes <= now.total_bytes);
                    ControlFlow::Continue(())
                });
                pulled.unwrap();
                waited
            })
        });
        threads.map(|thread| thread.join().unwrap())
    });
    assert!(waited.contains(&true), "all but one wait");
    assert_eq!(setting.weights_asked().len(), 1);
    assert_eq!(setting.contents(), undisturbed());
}

#[test]
fn a_download_that_is_cancelled_can_go_on() {
    let setting = Setting::new();
    setting.emulator.set_pace(100_000, Duration::from_millis(1));
    let name = HubName::parse(NAME).unwrap();
    let cancelled = setting.hub().pull(&name, &mut |now: FetchProgress<'_>| match now.file
        == WEIGHTS
        && now.bytes > now.total_bytes / 2
    {
        true => ControlFlow::Break(()),
        false => ControlFlow::Continue(()),
    });
    assert!(matches!(cancelled.unwrap_err(), HubError::Cancelled { .. }));
    let listed = setting.hub().list().unwrap();
    assert_eq!((listed.len(), listed[0].format, listed[0].name.as_str()), (1, None, NAME));
    setting.weights_asked();
    let pulled = setting.pull().unwrap();
    assert!(pulled.fetched_bytes <= pulled.bytes / 2);
    assert!(setting.weights_asked()[0].range.is_some());
    assert_eq!(setting.contents(), undisturbed());
}

#[test]
fn offline_the_cache_is_enough_or_the_model_is_refused() {
    let setting = Setting::new();
    let offline = Hub { offline: true, ..setting.hub() };
    assert_eq!(
        setting.refused(&offline, NAME),
        "org/story: is no path here, and not a whole model in the cache CACHE, and HF_HUB_OFFLINE forbids to \
         fetch it: unset it, or choose a model that `bitnet list` shows"
    );
    let online = setting.pull().unwrap();
    setting.emulator.take_asked();
    let pulled = pull(&offline, NAME).unwrap();
    assert_eq!((pulled.path, pulled.bytes, pulled.fetched_bytes), (online.path, online.bytes, 0));
    assert!(setting.emulator.take_asked().is_empty());
}

#[test]
fn a_model_that_another_program_has_not_finished_is_not_whole() {
    let setting = Setting::new();
    let pulled = setting.pull().unwrap();
    let name = HubName::parse(NAME).unwrap();
    // The hub's own client notes the files of a revision, and fetches them in any order.
    let trees = setting.repository().join("trees");
    fs::create_dir(&trees).unwrap();
    let tree = r#"{"format_version":1,"files":{"README.md":{},"config.json":{},"tokenizer_config.json":{}}}"#;
    fs::write(trees.join(format!("{}.json", setting.commit)), tree).unwrap();
    assert_eq!(setting.hub().cached(&name).unwrap(), Some(pulled.path.clone()));
    for missing in ["tokenizer_config.json", "tokenizer.json", WEIGHTS, "config.json"] {
        fs::remove_file(pulled.path.join(missing)).unwrap();
        assert_eq!(setting.hub().cached(&name).unwrap(), None, "{missing}");
        assert_eq!(setting.pull().unwrap().fetched_bytes, 0, "only the name was missing");
        assert!(setting.hub().cached(&name).unwrap().is_some());
    }
    // Links that lead nowhere.
    fs::remove_dir_all(setting.repository().join("blobs")).unwrap();
    assert_eq!(setting.hub().cached(&name).unwrap(), None);
    setting.pull().unwrap();
    assert!(setting.hub().cached(&name).unwrap().is_some());
}

#[test]
fn a_revision_goes_without_the_files_that_another_has() {
    let setting = Setting::new();
    setting.pull().unwrap();
    let file = |name: &str| (name.to_owned(), fs::read(tiny_model().join(name)).unwrap());
    let mut files = ["config.json", "tokenizer.json", WEIGHTS].map(file).to_vec();
    files.push(("chat_template.jinja".to_owned(), vec![b'x'; 1000]));
    let commit = setting.emulator.add(NAME, files);
    let newer = setting.pull().unwrap();
    let hub = setting.hub();
    let removal = |name: &str| hub.removal(&HubName::parse(name).unwrap());
    assert_eq!(hub.list().unwrap().len(), 2);

    let removal_of_newer = removal(&format!("{NAME}@{commit}")).unwrap();
    assert_eq!((removal_of_newer.bytes, removal_of_newer.shared_bytes), (1000, 0));
    removal_of_newer.execute().unwrap();
    assert!(!newer.path.exists());
    let older = format!("{NAME}@{}", setting.commit);
    let models = hub.list().unwrap();
    assert_eq!((models.len(), models[0].name.as_str()), (1, older.as_str()));
    assert!(hub.cached(&HubName::parse(&older).unwrap()).unwrap().is_some());
    assert!(removal(&format!("{NAME}@{commit}")).is_err());

    let all = removal(NAME).unwrap();
    assert_eq!(all.bytes, models[0].bytes);
    all.execute().unwrap();
    assert!(!setting.repository().exists());
    let error = removal(NAME).err().unwrap().to_string();
    assert!(error.contains("is not in the cache"), "{error}");
}

#[test]
fn the_list_has_what_can_be_read_and_nothing_else() {
    let setting = Setting::new();
    setting.pull().unwrap();
    let other = setting.hub().cache.join("models--org--bert/snapshots").join("0".repeat(40));
    fs::create_dir_all(&other).unwrap();
    fs::write(other.join("config.json"), r#"{"architectures":["BertModel"]}"#).unwrap();
    fs::write(other.join(WEIGHTS), "").unwrap();
    fs::create_dir_all(setting.hub().cache.join("datasets--org--words/blobs")).unwrap();
    let models = setting.hub().list().unwrap();
    let [model] = models.as_slice() else { panic!("{models:?}") };
    assert_eq!((model.name.as_str(), model.format), (NAME, Some("safetensors")));
    assert_eq!(
        (model.revisions.as_slice(), &model.commit),
        (&["main".to_owned()][..], &setting.commit)
    );
    assert!(model.bytes > weights().len() as u64 && model.last_used.is_some());
}

#[cfg(unix)]
#[test]
fn a_cache_that_cannot_be_written_is_named() {
    use std::os::unix::fs::PermissionsExt;
    let setting = Setting::new();
    fs::write(setting.folder.path().join("file"), "").unwrap();
    let hub = Hub { cache: setting.folder.path().join("file/hub"), ..setting.hub() };
    let error = setting.refused(&hub, NAME);
    assert!(error.contains("cannot be written: Not a directory"), "{error}");
    assert!(
        error.ends_with("make it accessible, or set HF_HUB_CACHE to another folder"),
        "{error}"
    );

    let locked = setting.folder.path().join("locked");
    fs::create_dir(&locked).unwrap();
    fs::set_permissions(&locked, fs::Permissions::from_mode(0o555)).unwrap();
    if fs::write(locked.join("x"), "").is_ok() {
        return println!("skipped: this user may write everywhere");
    }
    let hub = Hub { cache: locked, ..setting.hub() };
    assert!(setting.refused(&hub, NAME).contains("cannot be written: Permission denied"));
}
