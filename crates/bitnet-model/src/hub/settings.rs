//! What the environment says about the hub and its cache.

use std::env;
use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::error::HubError;

/// The hub and its cache on this machine.
#[derive(Clone)]
pub struct Hub {
    /// Address of the hub, without a slash at its end.
    pub endpoint: String,
    /// Who is asking; sent to the endpoint only, never to where it redirects.
    pub token: Option<String>,
    /// The folder that all programs share.
    pub cache: PathBuf,
    /// Whether the network must not be used.
    pub offline: bool,
    /// How long the hub may be silent.
    pub timeout: Duration,
    /// The pause before a request is made again; it doubles each time.
    pub retry_pause: Duration,
}

const ENDPOINT: &str = "https://huggingface.co";

impl Hub {
    /// The settings of `HF_ENDPOINT`, `HF_TOKEN`, `HF_TOKEN_PATH`, `HF_HUB_CACHE`, `HF_HOME`,
    /// `HF_HUB_OFFLINE`, `HF_HUB_DOWNLOAD_TIMEOUT` and their older names, as the hub's own client reads
    /// them. An empty variable is none.
    ///
    /// # Errors
    /// If there is no home folder to put the cache in, or a variable has a value that it cannot have.
    pub fn from_env() -> Result<Self, HubError> {
        Self::from_variables(|name| env::var_os(name), env::home_dir())
    }

    fn from_variables(
        variable: impl Fn(&str) -> Option<OsString>,
        home: Option<PathBuf>,
    ) -> Result<Self, HubError> {
        let value = |name: &str| variable(name).filter(|value| !value.is_empty());
        let text = |name: &'static str| match value(name).map(OsString::into_string) {
            None => Ok(None),
            Some(Ok(text)) => Ok(Some(text)),
            Some(Err(_)) => Err(HubError::Setting { name, reason: "is not UTF-8".to_owned() }),
        };
        let path = |name: &str| value(name).map(|path| expanded(path.into(), home.as_deref()));
        let is_on = |name: &'static str| -> Result<bool, HubError> {
            let value = text(name)?.unwrap_or_default().to_ascii_uppercase();
            Ok(["1", "ON", "YES", "TRUE"].contains(&value.as_str()))
        };

        let own = path("HF_HOME").or_else(|| {
            let caches = path("XDG_CACHE_HOME").or_else(|| Some(home.as_ref()?.join(".cache")))?;
            Some(caches.join("huggingface"))
        });
        let cache = path("HF_HUB_CACHE")
            .or_else(|| path("HUGGINGFACE_HUB_CACHE"))
            .or_else(|| Some(own.as_ref()?.join("hub")))
            .ok_or_else(|| HubError::Setting {
                name: "HF_HUB_CACHE",
                reason:
                    "is not set, and there is no home folder: set it to the folder that models \
                         are to lie in"
                        .to_owned(),
            })?;

        let endpoint = text("HF_ENDPOINT")?.unwrap_or_else(|| ENDPOINT.to_owned());
        if !endpoint.starts_with("https://") && !endpoint.starts_with("http://") {
            return Err(HubError::Setting {
                name: "HF_ENDPOINT",
                reason: format!("is {endpoint:?}: it must begin with https:// or http://"),
            });
        }

        let given = text("HF_TOKEN")?.or(text("HUGGING_FACE_HUB_TOKEN")?);
        let kept = || {
            let file = path("HF_TOKEN_PATH").or_else(|| Some(own.as_ref()?.join("token")))?;
            fs::read_to_string(file).ok()
        };
        let token = match is_on("HF_HUB_DISABLE_IMPLICIT_TOKEN")? {
            true => None,
            false => given.or_else(kept).map(|token| token.trim().to_owned()),
        };
        let token = token.filter(|token| !token.is_empty());
        if token.as_ref().is_some_and(|token| !token.bytes().all(|byte| byte.is_ascii_graphic())) {
            let reason = "has characters that no token has: copy it again".to_owned();
            return Err(HubError::Setting { name: "HF_TOKEN", reason });
        }

        let timeout = match text("HF_HUB_DOWNLOAD_TIMEOUT")? {
            None => 30,
            Some(seconds) => {
                seconds.parse().ok().filter(|&seconds| seconds > 0).ok_or_else(|| {
                    let reason = format!("is {seconds:?}: it must be a number of seconds");
                    HubError::Setting { name: "HF_HUB_DOWNLOAD_TIMEOUT", reason }
                })?
            }
        };
        Ok(Hub {
            endpoint: endpoint.trim_end_matches('/').to_owned(),
            token,
            cache,
            offline: is_on("HF_HUB_OFFLINE")? || is_on("TRANSFORMERS_OFFLINE")?,
            timeout: Duration::from_secs(timeout),
            retry_pause: Duration::from_millis(500),
        })
    }
}

impl std::fmt::Debug for Hub {
    /// Everything but the token.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Hub")
            .field("endpoint", &self.endpoint)
            .field("token", &self.token.as_ref().map(|_| ".."))
            .field("cache", &self.cache)
            .field("offline", &self.offline)
            .field("timeout", &self.timeout)
            .field("retry_pause", &self.retry_pause)
            .finish()
    }
}

/// The path with the home folder in place of a `~` at its beginning.
fn expanded(path: PathBuf, home: Option<&Path>) -> PathBuf {
    match (path.strip_prefix("~"), home) {
        (Ok(rest), Some(home)) => home.join(rest),
        _ => path,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(variables: &[(&str, &str)]) -> Result<Hub, HubError> {
        let find = |name: &str| variables.iter().find(|(known, _)| *known == name);
        let variable = |name: &str| find(name).map(|(_, value)| OsString::from(value));
        Hub::from_variables(variable, Some(PathBuf::from("/home/me")))
    }

    #[test]
    fn the_cache_is_where_the_first_of_five_variables_says() {
        let cache = |variables: &[(&str, &str)]| hub(variables).unwrap().cache;
        let mut variables = vec![];
        assert_eq!(cache(&variables), Path::new("/home/me/.cache/huggingface/hub"));
        for (name, value, expected) in [
            ("XDG_CACHE_HOME", "/xdg", "/xdg/huggingface/hub"),
            ("HF_HOME", "~/hf", "/home/me/hf/hub"),
            ("HUGGINGFACE_HUB_CACHE", "/older", "/older"),
            ("HF_HUB_CACHE", "/newer", "/newer"),
        ] {
            variables.push((name, value));
            assert_eq!(cache(&variables), Path::new(expected));
        }
        variables.push(("HF_HUB_CACHE", ""));
        variables.swap_remove(3);
        assert_eq!(cache(&variables), Path::new("/older"), "empty is none");
        assert!(Hub::from_variables(|_| None, None).is_err(), "there is nowhere to put it");
    }

    #[test]
    fn the_token_is_in_a_variable_or_in_a_file_and_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let home = folder.path().to_str().unwrap();
        let token = |variables: &[(&str, &str)]| hub(variables).unwrap().token;
        assert_eq!(token(&[("HF_HOME", home)]), None);
        fs::write(folder.path().join("token"), "hf_kept\n").unwrap();
        assert_eq!(token(&[("HF_HOME", home)]).as_deref(), Some("hf_kept"));
        let given = [("HF_HOME", home), ("HF_TOKEN", " hf_given ")];
        assert_eq!(token(&given).as_deref(), Some("hf_given"));
        assert_eq!(token(&[("HF_HOME", home), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert!(!format!("{:?}", hub(&given)).contains("hf_given"));
        assert!(hub(&[("HF_TOKEN", "hf_\nx")]).is_err());
    }

    #[test]
    fn switches_and_numbers_are_read_as_the_hubs_client_reads_them() {
        for (value, expected) in
            [("1", true), ("yes", true), ("True", true), ("0", false), ("", false)]
        {
            assert_eq!(hub(&[("HF_HUB_OFFLINE", value)]).unwrap().offline, expected, "{value}");
        }
        assert_eq!(hub(&[("HF_ENDPOINT", "http://a/")]).unwrap().endpoint, "http://a");
        assert!(hub(&[("HF_ENDPOINT", "a")]).unwrap_err().to_string().contains("https://"));
        assert!(hub(&[("HF_HUB_DOWNLOAD_TIMEOUT", "0")]).is_err());
    }
}
