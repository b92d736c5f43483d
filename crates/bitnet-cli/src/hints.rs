//! Names that are like one that does not exist.

use std::fs;
use std::path::{Path, PathBuf};

/// Likeness from which on a name is worth a hint, from 0 to 1: `clap` says the same of flags.
const ALIKE: f64 = 0.7;

/// The name that is most like another one.
pub fn closest<'a>(name: &str, known: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let alike = known.map(|other| (strsim::jaro(name, other), other));
    let (likeness, other) = alike.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (likeness > ALIKE).then_some(other)
}

/// The path beside a model that is not there whose name is most like it.
pub fn closest_path(model: &Path) -> Option<PathBuf> {
    if model.exists() {
        return None;
    }
    let folder = model.parent().filter(|folder| !folder.as_os_str().is_empty());
    let entries = fs::read_dir(folder.unwrap_or(Path::new("."))).ok()?;
    let names: Vec<String> =
        entries.filter_map(|entry| entry.ok()?.file_name().into_string().ok()).collect();
    let name = closest(model.file_name()?.to_str()?, names.iter().map(String::as_str))?;
    Some(folder.map_or(name.into(), |folder| folder.join(name)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_that_are_alike_are_hinted_at() {
        let known = ["temperature", "top-k", "threads"];
        assert_eq!(closest("temprature", known.into_iter()), Some("temperature"));
        assert_eq!(closest("thread", known.into_iter()), Some("threads"));
        assert_eq!(closest("model", known.into_iter()), None);
        assert_eq!(closest("x", [].into_iter()), None);
    }
}
