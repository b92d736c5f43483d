//! A Hugging Face hub on this machine, that can do everything wrong that a hub, or the network before it,
//! can.
//!
//! Its answers have the shape of the real ones: `huggingface_hub`, the hub's own client, downloads from it
//! (`scripts/check_hub_cache.py`). Large files are not served by the hub itself but by a second server,
//! to which it redirects.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::{self, BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use sha2::Sha256;

/// What can go wrong with one answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The connection ends after so many bytes of the contents.
    Drop(u64),
    /// This status in place of the contents.
    Status(u16),
    /// A busy hub, that says how many seconds to wait.
    Busy(u64),
    /// A length that is so many bytes too large, and then zeros.
    Longer(u64),
    /// More bytes than the file has, without a length before them.
    Endless,
    /// Other bytes than the file has.
    OtherBytes,
    /// The whole file, whatever part was asked for.
    NoRange,
    /// No answer for this time, and then none at all.
    Silence(Duration),
    /// A redirect to the same page.
    Circle,
}

/// A request that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Asked {
    /// Whether it was the second server that was asked.
    pub storage: bool,
    /// The path.
    pub path: String,
    /// `Authorization`, as it was sent.
    pub authorization: Option<String>,
    /// `Range`, as it was sent.
    pub range: Option<String>,
}

/// The hub. Its threads end with the process.
pub struct HubEmulator {
    endpoint: String,
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    /// Address of the second server.
    storage: String,
    repositories: HashMap<String, Repository>,
    /// By the name of a file, or `api`: what goes wrong, one after another.
    faults: HashMap<String, Vec<Fault>>,
    asked: Vec<Asked>,
    /// Bytes after which there is a pause, and the pause.
    pace: Option<(usize, Duration)>,
}

/// The files of a commit.
type Files = BTreeMap<String, Arc<Stored>>;

#[derive(Default)]
struct Repository {
    /// The commit of `main`.
    main: String,
    commits: HashMap<String, Files>,
    /// Who may read it; `None` for all.
    token: Option<String>,
    gated: bool,
}

struct Stored {
    bytes: Vec<u8>,
    sha1: String,
    /// Of files that the second server has.
    sha256: Option<String>,
}

impl Stored {
    fn new(name: &str, bytes: Vec<u8>) -> Self {
        let ending = name.rsplit('.').next().unwrap_or_default();
        let is_large = ["safetensors", "bin", "gguf", "bitnet", "model"].contains(&ending);
        let header = format!("blob {}\0", bytes.len());
        let sha1 = hex(&Sha1::new_with_prefix(header).chain_update(&bytes).finalize());
        Stored { sha1, sha256: is_large.then(|| hex(&Sha256::digest(&bytes))), bytes }
    }

    /// Its name in a cache.
    fn tag(&self) -> &str {
        self.sha256.as_ref().unwrap_or(&self.sha1)
    }
}

impl HubEmulator {
    /// A hub without models.
    pub fn start() -> Self {
        let state = Arc::new(Mutex::new(State::default()));
        let storage = serve(state.clone(), true);
        let endpoint = serve(state.clone(), false);
        lock(&state).storage = storage;
        HubEmulator { endpoint, state }
    }

    /// What `HF_ENDPOINT` is set to.
    pub fn endpoint(&self) -> &str {
        &self.endpoint
    }

    /// Puts the files of a folder, and of folders in it, into a repository as its newest commit, which is
    /// returned.
    pub fn add_folder(&self, repository: &str, folder: &Path) -> String {
        fn gather(folder: &Path, prefix: &str, files: &mut Vec<(String, Vec<u8>)>) {
            for entry in fs::read_dir(folder).expect("a folder") {
                let path = entry.expect("an entry").path();
                let name = format!("{prefix}{}", path.file_name().unwrap().to_string_lossy());
                match path.is_dir() {
                    true => gather(&path, &format!("{name}/"), files),
                    false => files.push((name, fs::read(&path).expect("a file"))),
                }
            }
        }
        let mut files = Vec::new();
        gather(folder, "", &mut files);
        self.add(repository, files)
    }

    /// Puts files into a repository as its newest commit, which is returned.
    pub fn add(&self, repository: &str, files: Vec<(String, Vec<u8>)>) -> String {
        let files: Files = files
            .into_iter()
            .map(|(name, bytes)| (name.clone(), Arc::new(Stored::new(&name, bytes))))
            .collect();
        let mut digest = Sha1::new_with_prefix(repository);
        files.iter().for_each(|(name, file)| digest.update(format!("{name} {}\n", file.sha1)));
        let commit = hex(&digest.finalize());
        let mut state = self.lock();
        let repository = state.repositories.entry(repository.to_owned()).or_default();
        repository.commits.insert(commit.clone(), files);
        repository.main = commit.clone();
        commit
    }

    /// Gives a repository only to those who send this token; `gated` says whether others are told that
    /// it is there.
    pub fn protect(&self, repository: &str, token: &str, gated: bool) {
        let mut state = self.lock();
        let repository = state.repositories.get_mut(repository).expect("a repository");
        (repository.token, repository.gated) = (Some(token.to_owned()), gated);
    }

    /// Lets the next answers about a file go wrong, one after another; of `api` those about models.
    pub fn fail(&self, file: &str, faults: impl IntoIterator<Item = Fault>) {
        let mut faults: Vec<Fault> = faults.into_iter().collect();
        faults.reverse();
        self.lock().faults.insert(file.to_owned(), faults);
    }

    /// Makes a pause after so many bytes of contents, over and over.
    pub fn set_pace(&self, bytes: usize, pause: Duration) {
        self.lock().pace = Some((bytes, pause));
    }

    /// What has been asked since the last time.
    pub fn take_asked(&self) -> Vec<Asked> {
        std::mem::take(&mut self.lock().asked)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().expect("no panic while it was held")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Starts a server and returns its address.
fn serve(state: Arc<Mutex<State>>, storage: bool) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let address = format!("http://{}", listener.local_addr().expect("an address"));
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let state = state.clone();
            // Who asked may be gone before the answer ends.
            thread::spawn(move || answer(&state, storage, stream).ok());
        }
    });
    address
}

fn answer(state: &Mutex<State>, storage: bool, stream: TcpStream) -> io::Result<()> {
    let mut lines = BufReader::new(stream.try_clone()?).lines();
    let request = lines.next().unwrap_or_else(|| Ok(String::new()))?;
    let mut headers = HashMap::new();
    for line in lines {
        let line = line?;
        let Some((name, value)) = line.split_once(':') else { break };
        headers.insert(name.to_ascii_lowercase(), value.trim().to_owned());
    }
    let mut words = request.split(' ');
    let (method, target) = (words.next().unwrap_or_default(), words.next().unwrap_or_default());
    let path = decoded(target.split('?').next().unwrap_or_default());
    let authorization = headers.remove("authorization");
    let range = headers.remove("range");
    let asked = Asked { storage, path: path.clone(), authorization, range };
    lock(state).asked.push(asked.clone());

    let reply = Reply { state, stream, is_head: method == "HEAD" };
    let parts: Vec<&str> = path.trim_start_matches('/').splitn(5, '/').collect();
    match parts.as_slice() {
        ["api", "models", org, name] => reply.about(&asked, &format!("{org}/{name}"), "", "main"),
        ["api", "models", org, name, rest] => {
            let (what, revision) = rest.split_once('/').unwrap_or((rest, ""));
            reply.about(&asked, &format!("{org}/{name}"), what, revision)
        }
        [org, name, "resolve", revision, file] => {
            reply.file(&asked, &format!("{org}/{name}"), revision, file)
        }
        _ => reply.status(404, &[], b"no such page"),
    }
}

struct Reply<'a> {
    state: &'a Mutex<State>,
    stream: TcpStream,
    is_head: bool,
}

impl Reply<'_> {
    fn status(mut self, status: u16, headers: &[(&str, &str)], body: &[u8]) -> io::Result<()> {
        self.head(status, Some(body.len() as u64), headers)?;
        if self.is_head { Ok(()) } else { self.stream.write_all(body) }
    }

    fn head(
        &mut self,
        status: u16,
        bytes: Option<u64>,
        headers: &[(&str, &str)],
    ) -> io::Result<()> {
        let mut head = format!("HTTP/1.1 {status} {status}\r\nConnection: close\r\n");
        if let Some(bytes) = bytes {
            head.push_str(&format!("Content-Length: {bytes}\r\n"));
        }
        headers.iter().for_each(|(name, value)| head.push_str(&format!("{name}: {value}\r\n")));
        self.stream.write_all(format!("{head}\r\n").as_bytes())
    }

    /// The files of a revision, or the answer to who must not have them.
    fn revision(
        &self,
        asked: &Asked,
        name: &str,
        revision: &str,
    ) -> Result<(String, Files), (u16, &'static str)> {
        let state = lock(self.state);
        let is_anonymous = asked.authorization.is_none();
        // As the hub does: who does not say who he is learns nothing.
        let unknown = (if is_anonymous { 401 } else { 404 }, "RepoNotFound");
        let Some(repository) = state.repositories.get(name) else { return Err(unknown) };
        if let Some(token) = repository.token.as_ref().filter(|_| !asked.storage)
            && asked.authorization.as_ref() != Some(&format!("Bearer {token}"))
        {
            let gated = (if is_anonymous { 401 } else { 403 }, "GatedRepo");
            return Err(if repository.gated { gated } else { unknown });
        }
        let commit = if revision == "main" { &repository.main } else { revision };
        let files = repository.commits.get(commit).ok_or((404, "RevisionNotFound"))?;
        Ok((commit.to_owned(), files.clone()))
    }

    /// A repository, or with `tree` its files.
    fn about(self, asked: &Asked, name: &str, what: &str, revision: &str) -> io::Result<()> {
        if let Some(fault) = self.fault("api") {
            return self.refuse(&fault, &asked.path);
        }
        let (commit, files) = match self.revision(asked, name, revision) {
            Ok(found) => found,
            Err((status, code)) => return self.status(status, &[("X-Error-Code", code)], b"{}"),
        };
        let answer: Value = match what {
            "tree" => files
                .iter()
                .map(|(path, file)| {
                    let size = file.bytes.len();
                    let mut entry =
                        json!({"type": "file", "path": path, "size": size, "oid": file.sha1});
                    if let Some(sha256) = &file.sha256 {
                        entry["lfs"] = json!({"oid": sha256, "size": size, "pointerSize": 130});
                    }
                    entry
                })
                .collect(),
            _ => {
                let sibling = |(path, file): (&String, &Arc<Stored>)| {
                    let size = file.bytes.len();
                    let mut entry = json!({"rfilename": path, "size": size, "blobId": file.sha1});
                    if let Some(sha256) = &file.sha256 {
                        entry["lfs"] = json!({"sha256": sha256, "size": size, "pointerSize": 130});
                    }
                    entry
                };
                json!({
                    "_id": "0", "id": name, "modelId": name, "sha": commit, "private": false,
                    "gated": false, "disabled": false, "tags": [], "downloads": 0, "likes": 0,
                    "siblings": files.iter().map(sibling).collect::<Vec<_>>(),
                })
            }
        };
        let body = answer.to_string();
        self.status(200, &[("Content-Type", "application/json")], body.as_bytes())
    }

    fn file(self, asked: &Asked, name: &str, revision: &str, path: &str) -> io::Result<()> {
        let (commit, files) = match self.revision(asked, name, revision) {
            Ok(found) => found,
            Err((status, code)) => return self.status(status, &[("X-Error-Code", code)], b""),
        };
        let Some(file) = files.get(path) else {
            return self.status(404, &[("X-Error-Code", "EntryNotFound")], b"");
        };
        let tag = format!("\"{}\"", file.tag());
        if file.sha256.is_some() && !asked.storage {
            let storage = lock(self.state).storage.clone();
            let size = file.bytes.len().to_string();
            let location = format!("{storage}{}", asked.path);
            let headers = [
                ("Location", location.as_str()),
                ("X-Repo-Commit", &commit),
                ("X-Linked-Etag", &tag),
                ("X-Linked-Size", &size),
            ];
            return self.status(302, &headers, b"");
        }
        let fault = if self.is_head { None } else { self.fault(path) };
        self.contents(asked, file, &[("ETag", &tag), ("X-Repo-Commit", &commit)], fault)
    }

    fn contents(
        mut self,
        asked: &Asked,
        file: &Stored,
        headers: &[(&str, &str)],
        fault: Option<Fault>,
    ) -> io::Result<()> {
        let from = asked.range.as_ref().filter(|_| fault != Some(Fault::NoRange));
        let from =
            from.and_then(|range| range.strip_prefix("bytes=")?.strip_suffix('-')?.parse().ok());
        let from: usize = from.unwrap_or(0);
        let bytes = &file.bytes;
        if from >= bytes.len() && from > 0 {
            return self.status(416, headers, b"");
        }
        let range = format!("bytes {from}-{}/{}", bytes.len().saturating_sub(1), bytes.len());
        let mut headers = headers.to_vec();
        let status = if from > 0 { 206 } else { 200 };
        if from > 0 {
            headers.push(("Content-Range", &range));
        }
        let rest = &bytes[from..];
        let length = rest.len() as u64;
        match fault {
            None | Some(Fault::NoRange) => {
                self.head(status, Some(length), &headers)?;
                self.body(rest)
            }
            Some(Fault::Drop(after)) => {
                self.head(status, Some(length), &headers)?;
                self.body(&rest[..rest.len().min(after as usize)])
            }
            Some(Fault::Longer(more)) => {
                self.head(status, Some(length + more), &headers)?;
                self.body(rest)?;
                self.body(&vec![0; more as usize])
            }
            Some(Fault::Endless) => {
                self.head(status, None, &headers)?;
                self.body(rest)?;
                self.body(&[0; 1000])
            }
            Some(Fault::OtherBytes) => {
                self.head(status, Some(length), &headers)?;
                self.body(&rest.iter().map(|byte| byte ^ 1).collect::<Vec<_>>())
            }
            Some(fault) => self.refuse(&fault, &asked.path),
        }
    }

    /// The contents, in pieces if a pace is set.
    fn body(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.is_head {
            return Ok(());
        }
        let pace = lock(self.state).pace;
        let (size, pause) = pace.unwrap_or((bytes.len().max(1), Duration::ZERO));
        for piece in bytes.chunks(size) {
            self.stream.write_all(piece)?;
            thread::sleep(pause);
        }
        Ok(())
    }

    /// The answer of a fault that gives no contents.
    fn refuse(self, fault: &Fault, path: &str) -> io::Result<()> {
        match fault {
            Fault::Status(status) => self.status(*status, &[], b""),
            Fault::Busy(seconds) => self.status(429, &[("Retry-After", &seconds.to_string())], b""),
            Fault::Circle => self.status(302, &[("Location", path)], b""),
            Fault::Silence(time) => {
                thread::sleep(*time);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn fault(&self, file: &str) -> Option<Fault> {
        lock(self.state).faults.get_mut(file)?.pop()
    }
}

/// A path without its percent signs.
fn decoded(path: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = path.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let digits = after.get(..2).and_then(|digits| std::str::from_utf8(digits).ok());
        let byte = digits.and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (first, byte) {
            (b'%', Some(byte)) => {
                bytes.push(byte);
                rest = &after[2..];
            }
            _ => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}
