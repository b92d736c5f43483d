//! `OUT.part`: the results so far, so that nothing is computed twice after a kill.
//!
//! A line has a checksum, a space and JSON. The first says what is computed; each of the others is the
//! result of a row, in their order. A result is there once its line is whole: what a kill leaves of
//! a line, and what comes after damage, is cut off and computed again.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::input::Fields;
use crate::files::{cannot_be_written, with_suffix};

/// Longest time for which results are only in the memory of the system. A kill does not lose these, a
/// power failure does.
const SYNC: Duration = Duration::from_secs(2);

/// What is computed: two runs with the same plan give the same results.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Digest of the input.
    pub input: String,
    /// Digest of what the model computes for a fixed prompt.
    pub model: String,
    /// The flags that tell.
    pub settings: Value,
}

impl Plan {
    /// What is another in `other`.
    fn difference(&self, other: &Plan) -> Option<&'static str> {
        if self.input != other.input {
            Some("another input")
        } else if self.model != other.model {
            Some("another model")
        } else {
            (self.settings != other.settings).then_some("other flags")
        }
    }
}

/// The file, which this process alone has.
pub struct Journal {
    path: PathBuf,
    file: File,
    /// Bytes of whole lines.
    length: u64,
    rows: u64,
    synced: Instant,
}

impl Journal {
    /// Opens the journal of an output, or makes one. Nothing is written yet.
    pub fn open(output: &Path) -> Result<Self> {
        let path = with_suffix(output, ".part");
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)
            .map_err(|error| cannot_be_written(&path, &error))?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                bail!("{}: another process is writing it: wait for that one", path.display())
            }
            Err(TryLockError::Error(error)) => {
                bail!("{}: cannot be locked: {error}", path.display())
            }
        }
        Ok(Journal { path, file, length: 0, rows: 0, synced: Instant::now() })
    }

    /// Goes on with what is there, if it is of the same plan, or else begins.
    pub fn resume(&mut self, plan: &Plan, restart: bool) -> Result<()> {
        let Journal { path, file, length, rows, .. } = self;
        let mut found: Option<Plan> = None;
        if !restart {
            let mut lines = Lines::new(path, file)?;
            while let Some(json) = lines.next()? {
                match &found {
                    None => found = Some(serde_json::from_slice(&json).map_err(|_| foreign(path))?),
                    Some(_) => *rows += 1,
                }
            }
            if found.is_none() && !lines.may_have_been_begun() {
                return Err(foreign(path));
            }
            *length = lines.length;
        }
        if let Some(difference) = found.as_ref().and_then(|found| found.difference(plan)) {
            bail!(
                "{}: has {rows} results of {difference}: use the same again, or --restart to begin \
                 anew",
                path.display()
            );
        }
        file.set_len(*length)
            .and_then(|()| file.seek(SeekFrom::Start(*length)))
            .map_err(|error| cannot_be_written(path, &error))?;
        if found.is_none() {
            self.write(plan)?;
            self.sync()?;
        }
        Ok(())
    }

    /// Rows whose results are there.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Adds the result of the next row.
    pub fn append(&mut self, result: &Fields) -> Result<()> {
        self.write(result)?;
        self.rows += 1;
        if self.synced.elapsed() >= SYNC {
            self.sync()?;
        }
        Ok(())
    }

    /// Waits until all of it is on the disk.
    pub fn sync(&mut self) -> Result<()> {
        self.synced = Instant::now();
        self.file.sync_data().map_err(|error| cannot_be_written(&self.path, &error))
    }

    /// Calls `use_result` for each result.
    pub fn each(&mut self, mut use_result: impl FnMut(Fields) -> Result<()>) -> Result<()> {
        let mut lines = Lines::new(&self.path, &mut self.file)?;
        let mut count = 0;
        while let Some(json) = lines.next()? {
            if count > 0 {
                use_result(serde_json::from_slice(&json)?)?;
            }
            count += 1;
        }
        if count != self.rows + 1 {
            bail!("{}: was changed while it was in use: run this again", self.path.display());
        }
        Ok(())
    }

    /// The results are elsewhere now.
    pub fn remove(self) -> Result<()> {
        let Journal { path, file, .. } = self;
        // Windows removes no file that is open.
        drop(file);
        fs::remove_file(&path).map_err(|error| anyhow!("{}: {error}", path.display()))
    }

    /// Leaves nothing behind where nothing was computed.
    pub fn abandon(self) {
        if self.file.metadata().is_ok_and(|metadata| metadata.len() == 0) || self.is_bare() {
            let _ = self.remove();
        }
    }

    /// Whether it has a plan of this run and not one result.
    fn is_bare(&self) -> bool {
        self.rows == 0 && self.length > 0
    }

    fn write(&mut self, value: &impl Serialize) -> Result<()> {
        let json = serde_json::to_string(value)?;
        let line = format!("{:08x} {json}\n", crc32fast::hash(json.as_bytes()));
        // At once, so that a kill leaves at most one line that is not whole.
        self.file
            .write_all(line.as_bytes())
            .map_err(|error| cannot_be_written(&self.path, &error))?;
        self.length += line.len() as u64;
        Ok(())
    }
}

fn foreign(path: &Path) -> anyhow::Error {
    anyhow!(
        "{}: is there and holds no results that can be used: choose another OUT, or delete it",
        path.display()
    )
}

/// The whole and undamaged lines at the beginning of a file.
struct Lines<'a> {
    path: &'a Path,
    reader: BufReader<&'a mut File>,
    /// Their bytes.
    length: u64,
    /// What comes after them.
    rest: Vec<u8>,
}

impl<'a> Lines<'a> {
    fn new(path: &'a Path, file: &'a mut File) -> Result<Self> {
        let sought = file.seek(SeekFrom::Start(0));
        sought.map_err(|error| anyhow!("{}: cannot be read: {error}", path.display()))?;
        Ok(Lines { path, reader: BufReader::new(file), length: 0, rest: Vec::new() })
    }

    /// The JSON of the next one.
    fn next(&mut self) -> Result<Option<Vec<u8>>> {
        let mut line = Vec::new();
        let read = self.reader.read_until(b'\n', &mut line);
        read.map_err(|error| anyhow!("{}: cannot be read: {error}", self.path.display()))?;
        let json = line.strip_suffix(b"\n").and_then(|line| {
            let (checksum, json) = line.split_at_checked(9)?;
            (*checksum == *format!("{:08x} ", crc32fast::hash(json)).as_bytes()).then_some(json)
        });
        match json {
            Some(json) => {
                self.length += line.len() as u64;
                Ok(Some(json.to_vec()))
            }
            None => {
                self.rest = line;
                Ok(None)
            }
        }
    }

    /// Whether a kill could have left this of a first line, which has not come.
    fn may_have_been_begun(&self) -> bool {
        let begins = |(at, byte): (usize, &u8)| match at {
            0..8 => byte.is_ascii_hexdigit(),
            8 => *byte == b' ',
            9 => *byte == b'{',
            _ => true,
        };
        !self.rest.ends_with(b"\n") && self.rest.iter().enumerate().all(begins)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn plan(input: &str) -> Plan {
        Plan { input: input.into(), model: "m".into(), settings: json!({"seed": 0}) }
    }

    fn result(value: u64) -> Fields {
        Fields::from_iter([("output".to_owned(), json!(value))])
    }

    fn contents(journal: &mut Journal) -> Vec<Fields> {
        let mut all = Vec::new();
        journal
            .each(|result| {
                all.push(result);
                Ok(())
            })
            .unwrap();
        all
    }

    #[test]
    fn whatever_a_kill_leaves_of_the_file_whole_results_are_kept() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let mut journal = Journal::open(&output).unwrap();
        journal.resume(&plan("a"), false).unwrap();
        (0..3).for_each(|value| journal.append(&result(value)).unwrap());
        drop(journal);
        let part = folder.path().join("out.part");
        let whole = fs::read(&part).unwrap();
        let ends: Vec<usize> =
            (0..whole.len()).filter(|at| whole[*at] == b'\n').map(|at| at + 1).collect();

        for length in 0..=whole.len() {
            fs::write(&part, &whole[..length]).unwrap();
            let mut journal = Journal::open(&output).unwrap();
            journal.resume(&plan("a"), false).unwrap();
            let kept = ends.iter().filter(|end| **end <= length).count().saturating_sub(1) as u64;
            assert_eq!(journal.rows(), kept, "{length}");
            (kept..3).for_each(|value| journal.append(&result(value)).unwrap());
            assert_eq!(contents(&mut journal), [result(0), result(1), result(2)]);
            drop(journal);
            assert_eq!(fs::read(&part).unwrap(), whole);
        }

        // Damage in the middle costs what comes after it.
        let mut damaged = whole.clone();
        damaged[ends[1] + 12] ^= 1;
        fs::write(&part, &damaged).unwrap();
        let mut journal = Journal::open(&output).unwrap();
        journal.resume(&plan("a"), false).unwrap();
        assert_eq!(contents(&mut journal), [result(0)]);
    }

    #[test]
    fn results_of_another_plan_and_files_of_others_are_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let output = folder.path().join("out");
        let mut journal = Journal::open(&output).unwrap();
        journal.resume(&plan("a"), false).unwrap();
        journal.append(&result(0)).unwrap();
        assert!(Journal::open(&output).is_err(), "it is in use");
        drop(journal);

        let mut journal = Journal::open(&output).unwrap();
        let error = journal.resume(&plan("b"), false).unwrap_err().to_string();
        assert!(error.contains("1 results of another input"), "{error}");
        drop(journal);
        let mut journal = Journal::open(&output).unwrap();
        journal.resume(&plan("b"), true).unwrap();
        assert_eq!(journal.rows(), 0);
        drop(journal);

        for text in ["dear diary\n", "dear diary"] {
            fs::write(folder.path().join("out.part"), text).unwrap();
            let mut journal = Journal::open(&output).unwrap();
            assert!(journal.resume(&plan("a"), false).is_err());
            journal.abandon();
            assert_eq!(fs::read_to_string(folder.path().join("out.part")).unwrap(), text);
        }
    }
}
