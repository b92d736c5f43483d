//! Questions to the hub.

use std::collections::BTreeMap;
use std::io::Read;
use std::thread;
use std::time::Duration;

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, utf8_percent_encode};
use serde::Deserialize;
use ureq::http::{HeaderMap, Response, StatusCode};
use ureq::{Agent, Body};

use super::cache::{is_commit, is_hex};
use super::error::HubError;
use super::name::{HubName, is_relative};
use super::settings::Hub;

/// A revision of a repository, as the hub describes it.
pub(super) struct Revision {
    pub commit: String,
    pub files: BTreeMap<String, RemoteFile>,
}

/// A file on the hub.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct RemoteFile {
    pub bytes: u64,
    pub checksum: Checksum,
}

/// What a file is known by, in hexadecimal digits: this is also its name in the cache.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Checksum {
    /// Of large files: SHA-256 of the contents.
    Sha256(String),
    /// Of small files: SHA-1 of `blob LENGTH\0` and the contents, as git has it.
    GitSha1(String),
}

impl Checksum {
    pub(super) fn digits(&self) -> &str {
        match self {
            Checksum::Sha256(digits) | Checksum::GitSha1(digits) => digits,
        }
    }
}

/// Why a request had no useful answer.
pub(super) enum Failure {
    /// It may have one the next time.
    Passing {
        reason: String,
        /// The pause that the hub asks for.
        pause: Option<Duration>,
    },
    /// It will have none.
    Final(HubError),
}

impl Failure {
    pub(super) fn passing(reason: impl ToString) -> Self {
        Failure::Passing { reason: reason.to_string(), pause: None }
    }
}

/// Longest pause that a hub can ask for.
const MAX_PAUSE: Duration = Duration::from_secs(60);

/// Most redirects of one request.
const MAX_REDIRECTS: usize = 10;

/// Longest answer about a model: some 50 thousand files.
const MAX_ANSWER_BYTES: u64 = 16 << 20;

/// What may stand in a path as it is. `/` separates the folders of a file, but not in a revision.
const PATH: &AsciiSet = &NON_ALPHANUMERIC.remove(b'-').remove(b'.').remove(b'_').remove(b'~');
const FOLDERS: &AsciiSet = &PATH.remove(b'/');

/// Asks the hub about one model.
pub(super) struct Client<'a> {
    pub hub: &'a Hub,
    pub name: &'a HubName,
    agent: Agent,
}

impl<'a> Client<'a> {
    pub(super) fn new(hub: &'a Hub, name: &'a HubName) -> Self {
        let agent = Agent::config_builder()
            .http_status_as_error(false)
            // Followed here, because the token must not follow.
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(concat!("bitnet/", env!("CARGO_PKG_VERSION")))
            .accept_encoding("identity")
            .timeout_connect(Some(hub.timeout))
            .timeout_recv_response(Some(hub.timeout))
            .timeout_per_read(Some(hub.timeout))
            .build();
        Client { hub, name, agent: agent.into() }
    }

    /// What the revision of the name is by now, and its files. `retrying` is told of each failure after
    /// which it is tried again.
    pub(super) fn revision(
        &self,
        mut retrying: impl FnMut(&str) -> Result<(), HubError>,
    ) -> Result<Revision, HubError> {
        let revision = utf8_percent_encode(self.name.revision(), PATH);
        let (endpoint, repository) = (&self.hub.endpoint, self.name.repository());
        let url = format!("{endpoint}/api/models/{repository}/revision/{revision}?blobs=true");
        let mut attempts = Attempts::new(4, self.hub.retry_pause);
        loop {
            let answer = self.get(&url, 0).and_then(|response| {
                let mut bytes = Vec::new();
                let mut reader = response.into_body().into_reader().take(MAX_ANSWER_BYTES);
                reader.read_to_end(&mut bytes).map_err(Failure::passing)?;
                Ok(bytes)
            });
            match answer {
                Ok(bytes) => return self.read_revision(&bytes),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Passing { reason, pause }) => {
                    attempts.again(&self.name.to_string(), &reason, pause, &mut retrying)?;
                }
            }
        }
    }

    /// The rest of a file of the repository, from the byte `from` on, or all of it if the server
    /// knows no ranges.
    pub(super) fn file(
        &self,
        commit: &str,
        file: &str,
        from: u64,
    ) -> Result<Response<Body>, Failure> {
        let (endpoint, repository) = (&self.hub.endpoint, self.name.repository());
        let file = utf8_percent_encode(file, FOLDERS);
        self.get(&format!("{endpoint}/{repository}/resolve/{commit}/{file}"), from)
    }

    fn get(&self, url: &str, from: u64) -> Result<Response<Body>, Failure> {
        let mut url = url.to_owned();
        for _ in 0..=MAX_REDIRECTS {
            let is_hub = origin(&url) == origin(&self.hub.endpoint);
            let mut request = self.agent.get(&url);
            if let Some(token) = self.hub.token.as_ref().filter(|_| is_hub) {
                request = request.header("Authorization", format!("Bearer {token}"));
            }
            if from > 0 {
                request = request.header("Range", format!("bytes={from}-"));
            }
            let response = request.call().map_err(|error| {
                Failure::passing(format!("{} cannot be reached ({error})", origin(&url)))
            })?;
            let status = response.status();
            if status.is_redirection() {
                url = location(&url, response.headers()).ok_or_else(|| {
                    let reason = format!("redirects with status {} to nowhere", status.as_u16());
                    Failure::Final(self.strange_answer(reason))
                })?;
            } else if status.is_success() || status == StatusCode::RANGE_NOT_SATISFIABLE {
                return Ok(response);
            } else {
                return Err(self.refusal(&url, is_hub, status, response.headers()));
            }
        }
        Err(Failure::Final(self.strange_answer("redirects in a circle".to_owned())))
    }

    fn refusal(&self, url: &str, is_hub: bool, status: StatusCode, headers: &HeaderMap) -> Failure {
        let header = |name: &str| headers.get(name).and_then(|value| value.to_str().ok());
        let (name, endpoint) = (self.name.to_string(), self.hub.endpoint.clone());
        let token = self.hub.token.is_some();
        let code = header("X-Error-Code").unwrap_or_default();
        let status = status.as_u16();
        // An address that the hub gave out may be too old: it gives out another.
        if !is_hub || status == 408 || status == 429 || status >= 500 {
            let seconds = header("Retry-After").and_then(|seconds| seconds.trim().parse().ok());
            let pause = seconds.map(|seconds| Duration::from_secs(seconds).min(MAX_PAUSE));
            let what = if status == 429 { ": too many requests" } else { "" };
            let reason = format!("{} answers with status {status}{what}", origin(url));
            return Failure::Passing { reason, pause };
        }
        Failure::Final(match (code, status) {
            ("GatedRepo", _) => {
                let page = format!("{endpoint}/{}", self.name.repository());
                HubError::Gated { name, page, token }
            }
            ("RevisionNotFound", _) => {
                let revision = self.name.revision().to_owned();
                HubError::UnknownRevision { name, revision, endpoint }
            }
            ("RepoNotFound", _) | (_, 404) => HubError::UnknownModel { name, endpoint, token },
            // Without a token the hub does not say whether there is such a model.
            (_, 401) if !token => HubError::UnknownModel { name, endpoint, token },
            (_, 401 | 403) => HubError::Refused { name, endpoint, status, token },
            _ => self.strange_answer(format!("answers with status {status}")),
        })
    }

    fn strange_answer(&self, reason: String) -> HubError {
        let (name, endpoint) = (self.name.to_string(), self.hub.endpoint.clone());
        HubError::Answer { name, endpoint, reason }
    }

    fn read_revision(&self, bytes: &[u8]) -> Result<Revision, HubError> {
        #[derive(Deserialize)]
        struct Answer {
            sha: String,
            siblings: Vec<Sibling>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Sibling {
            rfilename: String,
            size: Option<u64>,
            blob_id: Option<String>,
            lfs: Option<Lfs>,
        }
        #[derive(Deserialize)]
        struct Lfs {
            sha256: String,
            size: u64,
        }

        let strange = |reason: &str| self.strange_answer(format!("answers {reason}"));
        let answer: Answer = serde_json::from_slice(bytes)
            .map_err(|error| strange(&format!("no description of a model ({error})")))?;
        if !is_commit(&answer.sha) {
            return Err(strange("with a commit that is none"));
        }
        let mut files = BTreeMap::new();
        for Sibling { rfilename: name, size, blob_id, lfs } in answer.siblings {
            let file = match (size, blob_id, lfs) {
                (_, _, Some(Lfs { sha256, size })) if sha256.len() == 64 && is_hex(&sha256) => {
                    RemoteFile { bytes: size, checksum: Checksum::Sha256(sha256) }
                }
                (Some(bytes), Some(sha1), None) if is_commit(&sha1) => {
                    RemoteFile { bytes, checksum: Checksum::GitSha1(sha1) }
                }
                _ => return Err(strange(&format!("without size and checksum of {name:?}"))),
            };
            if is_relative(&name) {
                files.insert(name, file);
            }
        }
        Ok(Revision { commit: answer.sha, files })
    }
}

/// Attempts at one thing, with longer and longer pauses between them.
pub(super) struct Attempts {
    most: u32,
    made: u32,
    first_pause: Duration,
}

impl Attempts {
    pub(super) fn new(most: u32, first_pause: Duration) -> Self {
        Attempts { most, made: 0, first_pause }
    }

    /// After an attempt that got further than all before.
    pub(super) fn start_over(&mut self) {
        self.made = 0;
    }

    /// Waits for the next attempt after one that failed.
    ///
    /// # Errors
    /// If it was the last, or `retrying` says so.
    pub(super) fn again(
        &mut self,
        what: &str,
        reason: &str,
        pause: Option<Duration>,
        mut retrying: impl FnMut(&str) -> Result<(), HubError>,
    ) -> Result<(), HubError> {
        self.made += 1;
        if self.made == self.most {
            let (name, reason) = (what.to_owned(), reason.to_owned());
            return Err(HubError::Unreachable { name, reason, attempts: self.made });
        }
        retrying(reason)?;
        thread::sleep(pause.unwrap_or(self.first_pause * (1 << (self.made - 1))));
        Ok(())
    }
}

/// Scheme, host and port of an address.
fn origin(url: &str) -> &str {
    let host = url.find("://").map_or(0, |scheme| scheme + 3);
    let end = url[host..].find(['/', '?', '#']).map_or(url.len(), |length| host + length);
    &url[..end]
}

/// Where an answer redirects to.
fn location(url: &str, headers: &HeaderMap) -> Option<String> {
    let location = headers.get("Location")?.to_str().ok()?;
    if location.starts_with("http://") || location.starts_with("https://") {
        Some(location.to_owned())
    } else if location.starts_with('/') && !location.starts_with("//") {
        Some(format!("{}{location}", origin(url)))
    } else {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_port_scheme_or_user_is_another_origin() {
        assert_eq!(origin("https://a.b/c/d?e"), "https://a.b");
        assert_eq!(origin("http://a:1?x"), "http://a:1");
        let own = origin("https://a.b");
        for other in
            ["http://a.b/", "https://a.b:1/", "https://a.b.c/", "https://a.b@c/", "https://a.bc"]
        {
            assert_ne!(origin(other), own);
        }
    }
}
