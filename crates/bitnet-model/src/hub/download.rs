//! One file of the hub into the cache: resumed, checked, and by one program at a time.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use sha2::Digest;
use ureq::http::StatusCode;

use super::FetchState;
use super::cache::{Repository, make_parent, open_lock};
use super::client::{Attempts, Checksum, Client, Failure, RemoteFile};
use super::error::HubError;

/// Bytes read at once.
const PIECE: usize = 256 << 10;

/// How often it is looked whether another program is done.
const WAIT: Duration = Duration::from_millis(100);

/// Attempts in a row that bring nothing new.
const ATTEMPTS: u32 = 6;

/// What is told how many bytes of the file are there.
pub(super) type OnBytes<'a> = &'a mut dyn FnMut(u64, FetchState<'_>) -> Result<(), HubError>;

/// A file on its way into the cache.
pub(super) struct Download<'a> {
    pub client: &'a Client<'a>,
    pub repository: &'a Repository,
    pub commit: &'a str,
    pub file: &'a str,
    pub remote: &'a RemoteFile,
}

impl Download<'_> {
    fn path(&self) -> PathBuf {
        self.repository.blob(self.remote.checksum.digits())
    }

    /// Where the file is while it is not whole. Other programs of this name's making go on with it too.
    fn incomplete(&self) -> PathBuf {
        self.repository.blob(&format!("{}.incomplete", self.remote.checksum.digits()))
    }

    /// Bytes that are in the cache.
    pub(super) fn bytes_there(&self) -> u64 {
        if self.is_there() {
            return self.remote.bytes;
        }
        let partial = self.incomplete().metadata().map_or(0, |metadata| metadata.len());
        partial.min(self.remote.bytes)
    }

    /// Whether the file is in the cache, in the snapshot itself or as a blob. A blob gets its name when its
    /// contents have been checked.
    pub(super) fn is_there(&self) -> bool {
        self.is_linked() || has_length(&self.path(), self.remote.bytes)
    }

    /// Whether the snapshot has the file.
    pub(super) fn is_linked(&self) -> bool {
        has_length(&self.named(), self.remote.bytes)
    }

    /// Where a file that is there can be read.
    pub(super) fn path_there(&self) -> PathBuf {
        if self.is_linked() { self.named() } else { self.path() }
    }

    fn named(&self) -> PathBuf {
        self.repository.snapshot(self.commit).join(self.file)
    }

    /// Fetches what is missing.
    pub(super) fn run(&self, on_bytes: OnBytes<'_>) -> Result<(), HubError> {
        if self.is_there() {
            return Ok(());
        }
        let path = self.path();
        make_parent(&path)?;
        let lock = self.repository.lock(self.remote.checksum.digits());
        let held = open_lock(&lock)?;
        loop {
            match held.try_lock() {
                Ok(()) => break,
                Err(TryLockError::WouldBlock) => {
                    on_bytes(self.bytes_there(), FetchState::Waiting)?;
                    thread::sleep(WAIT);
                }
                // Two programs may then write one file, and the checksum tells.
                Err(TryLockError::Error(error)) if error.kind() == ErrorKind::Unsupported => break,
                Err(TryLockError::Error(error)) => {
                    return Err(HubError::write(&lock, 0, &error));
                }
            }
        }
        if self.is_there() {
            return Ok(());
        }
        let incomplete = self.incomplete();
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(false).open(&incomplete);
        let file = file.map_err(|error| HubError::write(&incomplete, self.remote.bytes, &error))?;
        let mut partial = Partial::new(file, incomplete.clone(), self.remote)?;
        self.complete(&mut partial, on_bytes)?;
        partial.sync()?;
        drop(partial);
        fs::rename(&incomplete, &path).map_err(|error| HubError::write(&path, 0, &error))
    }

    /// Reads until the file is whole and right, however often the connection breaks.
    fn complete(&self, partial: &mut Partial<'_>, on_bytes: OnBytes<'_>) -> Result<(), HubError> {
        let mut attempts = Attempts::new(ATTEMPTS, self.client.hub.retry_pause);
        let mut most = partial.length;
        let mut was_wrong = false;
        loop {
            let result = if partial.length < self.remote.bytes {
                self.read(partial, on_bytes)
            } else {
                Ok(())
            };
            match result {
                Ok(()) => {
                    let found = partial.checksum();
                    if found == self.remote.checksum.digits() {
                        return Ok(());
                    }
                    partial.restart()?;
                    // The first time it may be the fault of whoever began the file.
                    if was_wrong {
                        return Err(self.wrong(found));
                    }
                    was_wrong = true;
                    on_bytes(0, FetchState::Retrying { reason: "the checksum is wrong" })?;
                }
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { reason, pause }) => {
                    if partial.length > most {
                        most = partial.length;
                        attempts.start_over();
                    }
                    let what = format!("{}: {}", self.client.name, self.file);
                    let there = partial.length;
                    attempts.again(&what, &reason, pause, |reason| {
                        on_bytes(there, FetchState::Retrying { reason })
                    })?;
                }
            }
        }
    }

    /// One request for what is missing, and its answer.
    fn read(&self, partial: &mut Partial<'_>, on_bytes: OnBytes<'_>) -> Result<(), Failure> {
        let response = self.client.file(self.commit, self.file, partial.length)?;
        let header = |name: &str| response.headers().get(name)?.to_str().ok();
        let from = match response.status() {
            StatusCode::PARTIAL_CONTENT => header("Content-Range").and_then(first_byte),
            StatusCode::OK => Some(0),
            _ => None,
        };
        if from != Some(partial.length) {
            partial.restart().map_err(Failure::Final)?;
        }
        // All of it again, or nothing that could be used.
        if from != Some(0) && from != Some(partial.length) {
            return Err(Failure::passing("the server sends another part than it was asked for"));
        }
        let announced = header("Content-Length").and_then(|length| length.parse::<u64>().ok());
        let missing = self.remote.bytes - partial.length;
        if announced.is_some_and(|announced| announced != missing) {
            return Err(Failure::passing(format!(
                "the server announces {} bytes and {missing} are missing",
                announced.unwrap_or(0)
            )));
        }
        let mut body = response.into_body().into_reader();
        let mut piece = vec![0; PIECE];
        loop {
            on_bytes(partial.length, FetchState::Downloading).map_err(Failure::Final)?;
            let count = match body.read(&mut piece) {
                Ok(0) if partial.length == self.remote.bytes => return Ok(()),
                Ok(0) => return Err(Failure::passing("the connection ended too early")),
                Ok(count) => count,
                Err(error) => {
                    return Err(Failure::passing(format!("the connection broke ({error})")));
                }
            };
            if partial.length + count as u64 > self.remote.bytes {
                partial.restart().map_err(Failure::Final)?;
                return Err(Failure::passing("the server sends more bytes than the file has"));
            }
            partial.push(&piece[..count]).map_err(Failure::Final)?;
        }
    }

    fn wrong(&self, found: String) -> HubError {
        HubError::Checksum {
            name: self.client.name.to_string(),
            file: self.file.to_owned(),
            digest: match self.remote.checksum {
                Checksum::Sha256(_) => "SHA-256",
                Checksum::GitSha1(_) => "SHA-1",
            },
            found,
            expected: self.remote.checksum.digits().to_owned(),
        }
    }
}

/// The beginning of a file, and the digest of it.
struct Partial<'a> {
    file: File,
    path: PathBuf,
    remote: &'a RemoteFile,
    length: u64,
    digest: FileDigest,
}

impl<'a> Partial<'a> {
    /// Goes on with what is in the file.
    fn new(file: File, path: PathBuf, remote: &'a RemoteFile) -> Result<Self, HubError> {
        let digest = FileDigest::new(remote);
        let mut partial = Partial { file, path, remote, length: 0, digest };
        let mut piece = vec![0; PIECE];
        loop {
            let count = match partial.file.read(&mut piece) {
                Ok(0) => return Ok(partial),
                Ok(count) => count,
                Err(error) => return Err(HubError::read(&partial.path, &error)),
            };
            partial.digest.update(&piece[..count]);
            partial.length += count as u64;
            if partial.length > remote.bytes {
                partial.restart()?;
                return Ok(partial);
            }
        }
    }

    fn push(&mut self, bytes: &[u8]) -> Result<(), HubError> {
        let missing = self.remote.bytes - self.length;
        self.file.write_all(bytes).map_err(|error| HubError::write(&self.path, missing, &error))?;
        self.digest.update(bytes);
        self.length += bytes.len() as u64;
        Ok(())
    }

    fn restart(&mut self) -> Result<(), HubError> {
        self.length = 0;
        self.digest = FileDigest::new(self.remote);
        let emptied = self.file.set_len(0).and_then(|()| self.file.seek(SeekFrom::Start(0)));
        emptied.map(drop).map_err(|error| HubError::write(&self.path, self.remote.bytes, &error))
    }

    fn sync(&self) -> Result<(), HubError> {
        self.file.sync_all().map_err(|error| HubError::write(&self.path, 0, &error))
    }

    fn checksum(&mut self) -> String {
        std::mem::replace(&mut self.digest, FileDigest::new(self.remote)).digits()
    }
}

enum FileDigest {
    Sha256(sha2::Sha256),
    Sha1(sha1::Sha1),
}

impl FileDigest {
    fn new(remote: &RemoteFile) -> Self {
        match remote.checksum {
            Checksum::Sha256(_) => FileDigest::Sha256(sha2::Sha256::new()),
            Checksum::GitSha1(_) => {
                let header = format!("blob {}\0", remote.bytes);
                FileDigest::Sha1(sha1::Sha1::new_with_prefix(header))
            }
        }
    }

    fn update(&mut self, bytes: &[u8]) {
        match self {
            FileDigest::Sha256(digest) => digest.update(bytes),
            FileDigest::Sha1(digest) => digest.update(bytes),
        }
    }

    fn digits(self) -> String {
        let digits = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            FileDigest::Sha256(digest) => digits(&digest.finalize()),
            FileDigest::Sha1(digest) => digits(&digest.finalize()),
        }
    }
}

fn has_length(path: &Path, bytes: u64) -> bool {
    path.metadata().is_ok_and(|metadata| metadata.is_file() && metadata.len() == bytes)
}

/// The first byte of `bytes 5-9/10`.
fn first_byte(range: &str) -> Option<u64> {
    range.strip_prefix("bytes ")?.split('-').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn digests_are_those_of_git_and_of_sha256() {
        let digits = |checksum| {
            let mut digest = FileDigest::new(&RemoteFile { bytes: 6, checksum });
            digest.update(b"hel");
            digest.update(b"lo\n");
            digest.digits()
        };
        // `git hash-object` and `sha256sum` of a file with `hello` and a line end.
        let sha1 = "ce013625030ba8dba906f756967f9e9ca394464a";
        assert_eq!(digits(Checksum::GitSha1(String::new())), sha1);
        let sha256 = "5891b5b522d5df086d0ff0b110fbd9d21bb4fc7163af34d08286a2e846f6be03";
        assert_eq!(digits(Checksum::Sha256(String::new())), sha256);
    }

    #[test]
    fn ranges_are_read() {
        assert_eq!(first_byte("bytes 5-9/10"), Some(5));
        for other in ["bytes */10", "items 5-9/10", "5-9/10", ""] {
            assert_eq!(first_byte(other), None, "{other}");
        }
    }
}
