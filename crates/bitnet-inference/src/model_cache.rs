//! [`ModelCache`]: several models behind names, within a budget of memory.
//!
//! One lock guards the books, and nothing slow is done under it: models are loaded, dropped and looked
//! up in the file system by whoever needs it, while others get theirs. Each name has a lock of its own
//! for loading, so that a model is loaded once, whoever asks for it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::SystemTime;

use bitnet_model::source::{self, Checkpoint};
use bitnet_model::weights::least_bytes;

use crate::builder::{InferenceEngineBuilder, MemorySize};
use crate::error::Error;
use crate::inference_engine::{InferenceEngine, must_generate};
use crate::model::{Model, go_on, one_device};

/// Models by name, each with an engine, loaded when they are first asked for.
///
/// **Budget.** The cache counts the bytes of weights ([`Model::weight_bytes`]), mapped and of their
/// own, and never holds more than its budget. Keys and values, up to what the builder says for each
/// engine, and vocabularies come on top. To make room it drops models that nobody uses, the one whose
/// last request is longest ago first. A model is in use as long as an engine that
/// [`get`](ModelCache::get) gave out, a stream or an answer of it lives; then it is never dropped.
///
/// **New versions.** [`swap`](ModelCache::swap) puts a new version in the place of an old one: who
/// asks afterwards gets the new one, and what runs on the old one ends there, whose memory is free,
/// and not counted any more, when the last of it has ended.
///
/// **Files.** Before a loaded model is given out, the files of its weights are compared with what they
/// were: size, time of the last change and, on Unix, which file it is. Where one has changed, the
/// model is loaded anew, as if by a swap. A file that is gone changes nothing as long as the model
/// is loaded. Replace files by renaming another into their place: who rewrites or cuts short a file
/// that is mapped changes weights under requests that are running, or ends the program.
///
/// ```
/// use bitnet_inference::{GenerationParams, InferenceEngine, MemorySize, ModelCache};
///
/// let cache = ModelCache::new(MemorySize::GB(4), InferenceEngine::builder())?;
/// cache.insert("stories", "tiny");
/// // Loaded here, and from then on at hand.
/// let engine = cache.get("stories")?;
/// let text = engine.generate("Once upon a time", GenerationParams::default()).wait()?.text;
/// # assert!(!text.is_empty());
/// assert_eq!(cache.statistics().loaded, 1);
/// # Ok::<(), bitnet_inference::Error>(())
/// ```
pub struct ModelCache {
    builder: InferenceEngineBuilder,
    budget: u64,
    books: Mutex<Books>,
}

/// What a cache holds and what it has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CacheStatistics {
    /// Names.
    pub models: usize,
    /// Of those, models that are loaded.
    pub loaded: usize,
    /// Versions that were replaced or removed, and are still in use.
    pub retired: usize,
    /// Bytes of the weights of all these, mapped and not.
    pub bytes: u64,
    /// Requests for models that were at hand.
    pub hits: u64,
    /// Requests that had to load a model, or wait until another did.
    pub misses: u64,
    /// Models that were dropped to make room.
    pub evictions: u64,
    /// Versions that took the place of another: by a swap, or because a file has changed.
    pub swaps: u64,
}

#[derive(Default)]
struct Books {
    entries: BTreeMap<String, Entry>,
    retired: Vec<Retired>,
    /// Bytes of models that are being loaded.
    reserved: u64,
    /// Counts up with every request, and with every name.
    clock: u64,
    hits: u64,
    misses: u64,
    evictions: u64,
    swaps: u64,
}

/// A name.
struct Entry {
    /// What the model is loaded from.
    model: String,
    /// When the name was inserted: the same name may be inserted again.
    inserted: u64,
    last_request: u64,
    /// Held by whoever loads it.
    turn: Arc<Mutex<()>>,
    resident: Option<Resident>,
}

/// A loaded model.
struct Resident {
    engine: Arc<InferenceEngine>,
    model: Weak<Model>,
    files: Arc<[FileStamp]>,
    bytes: u64,
}

/// A version that has lost its name.
struct Retired {
    model: Weak<Model>,
    bytes: u64,
}

/// What tells one state of a file from another.
#[derive(Debug, Clone, PartialEq, Eq)]
struct FileStamp {
    path: PathBuf,
    /// Length, last change, and number of the file; `None` if it is not there.
    state: Option<(u64, Option<SystemTime>, u64)>,
}

impl FileStamp {
    fn of(path: &Path) -> Self {
        let state = fs::metadata(path).ok().map(|metadata| {
            #[cfg(unix)]
            let number = std::os::unix::fs::MetadataExt::ino(&metadata);
            #[cfg(not(unix))]
            let number = 0;
            (metadata.len(), metadata.modified().ok(), number)
        });
        FileStamp { path: path.to_owned(), state }
    }

    /// Whether another file is there now.
    fn is_changed(&self) -> bool {
        let now = FileStamp::of(&self.path);
        now.state.is_some() && now != *self
    }
}

impl Resident {
    /// The engine, in use from now on, and what its files were.
    fn lend(&self) -> (Arc<InferenceEngine>, Arc<[FileStamp]>) {
        (Arc::clone(&self.engine), Arc::clone(&self.files))
    }

    /// Whether anybody but the cache has it.
    fn is_in_use(&self) -> bool {
        // The engine itself has the model.
        Arc::strong_count(&self.engine) > 1 || self.model.strong_count() > 1
    }
}

/// Why there is no room.
enum Shortage {
    TooLarge,
    InUse(u64),
}

impl Books {
    /// Bytes of loaded models of which something holds.
    fn bytes_of(&self, holds: impl Fn(&Resident) -> bool) -> u64 {
        let residents = self.entries.values().filter_map(|entry| entry.resident.as_ref());
        residents.filter(|resident| holds(resident)).map(|resident| resident.bytes).sum()
    }

    /// Bytes of retired versions, once those are forgotten that have ended.
    fn retired_bytes(&mut self) -> u64 {
        self.retired.retain(|retired| retired.model.strong_count() > 0);
        self.retired.iter().map(|retired| retired.bytes).sum()
    }

    /// Makes room for so many bytes. Returns what has to go, for the caller to drop without the lock.
    fn make_room(&mut self, needed: u64, budget: u64) -> Result<Vec<Resident>, Shortage> {
        if needed > budget {
            return Err(Shortage::TooLarge);
        }
        let besides = self.retired_bytes() + self.reserved;
        let in_use = self.bytes_of(Resident::is_in_use) + besides;
        if in_use > budget - needed {
            return Err(Shortage::InUse(in_use));
        }
        let mut evicted = Vec::new();
        while self.bytes_of(|_| true) + besides > budget - needed {
            let idle = self.entries.values_mut().filter(|entry| {
                entry.resident.as_ref().is_some_and(|resident| !resident.is_in_use())
            });
            // Without the lock, what is in use can become idle, but not the other way round.
            let oldest = idle.min_by_key(|entry| entry.last_request);
            let oldest = oldest.expect("without the idle ones it would fit");
            evicted.extend(oldest.resident.take());
            self.evictions += 1;
        }
        Ok(evicted)
    }

    /// Takes the name from a version; returns it for the caller to drop without the lock.
    fn retire(&mut self, resident: Option<Resident>) -> Option<Resident> {
        if let Some(Resident { model, bytes, .. }) = &resident {
            self.retired.push(Retired { model: model.clone(), bytes: *bytes });
        }
        resident
    }
}

/// Bytes that are kept free for a model that is being loaded.
struct Reservation<'a> {
    cache: &'a ModelCache,
    bytes: u64,
}

impl Drop for Reservation<'_> {
    fn drop(&mut self) {
        self.cache.books().reserved -= self.bytes;
    }
}

/// What is to be loaded for a name.
struct Ticket<'a> {
    name: &'a str,
    model: String,
    /// Which entry of that name it is for.
    inserted: u64,
    /// Whether there is a version before.
    replaces: bool,
}

impl ModelCache {
    /// An empty cache that holds at most `budget` bytes of weights. Every model gets an engine that is
    /// set up as `builder` says.
    ///
    /// # Errors
    /// As [`InferenceEngineBuilder::build`].
    pub fn new(budget: MemorySize, builder: InferenceEngineBuilder) -> Result<Self, Error> {
        builder.clone().build()?;
        Ok(ModelCache { builder, budget: budget.bytes(), books: Mutex::default() })
    }

    fn books(&self) -> MutexGuard<'_, Books> {
        // Nothing panics in the middle of a change.
        self.books.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Says what a name stands for: `tiny`, a directory or a file, which is looked at when it is first
    /// asked for. If the name is there already, it stands for this from now on; what runs on the
    /// model before ends there.
    pub fn insert(&self, name: &str, model: &str) {
        let mut books = self.books();
        books.clock += 1;
        let entry = Entry {
            model: model.to_owned(),
            inserted: books.clock,
            last_request: books.clock,
            turn: Arc::default(),
            resident: None,
        };
        let before = books.entries.insert(name.to_owned(), entry);
        let before = books.retire(before.and_then(|entry| entry.resident));
        drop(books);
        drop(before);
    }

    /// Forgets a name; returns whether it was there. What runs on the model ends there.
    pub fn remove(&self, name: &str) -> bool {
        let mut books = self.books();
        let Some(entry) = books.entries.remove(name) else { return false };
        let before = books.retire(entry.resident);
        drop(books);
        drop(before);
        true
    }

    /// The engine of a model, which is in use until it, and everything that was asked of it, is
    /// dropped. If the model is not loaded, or a file of it has changed, this loads it, and waits; who
    /// asks for the same model meanwhile waits too, and who asks for another one does not.
    ///
    /// # Errors
    /// [`Error::UnknownModel`]; [`Error::ModelTooLarge`] and [`Error::CacheFull`] if there is no
    /// room; and whatever [`InferenceEngine::load_model`] finds. The next who asks tries again.
    pub fn get(&self, name: &str) -> Result<Arc<InferenceEngine>, Error> {
        let unknown = || Error::UnknownModel { name: name.to_owned() };
        let (turn, at_hand) = {
            let mut books = self.books();
            books.clock += 1;
            let now = books.clock;
            let entry = books.entries.get_mut(name).ok_or_else(unknown)?;
            entry.last_request = now;
            (Arc::clone(&entry.turn), entry.resident.as_ref().map(Resident::lend))
        };
        if let Some((engine, files)) = at_hand
            && !files.iter().any(FileStamp::is_changed)
        {
            self.books().hits += 1;
            return Ok(engine);
        }
        self.books().misses += 1;
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let (ticket, at_hand) = {
            let books = self.books();
            let Entry { model, inserted, resident, .. } =
                books.entries.get(name).ok_or_else(unknown)?;
            let (model, replaces) = (model.clone(), resident.is_some());
            let ticket = Ticket { name, model, inserted: *inserted, replaces };
            (ticket, resident.as_ref().map(Resident::lend))
        };
        if let Some((engine, files)) = at_hand
            && !files.iter().any(FileStamp::is_changed)
        {
            // Another has loaded it meanwhile.
            return Ok(engine);
        }
        self.load(ticket)
    }

    /// Loads another model and lets a name stand for it: who asks from then on gets this one, and what
    /// runs on the one before ends there. Until then, and if it fails, everything stays as it is,
    /// but that the model before may be dropped to make room if nobody uses it.
    ///
    /// # Errors
    /// As [`get`](ModelCache::get).
    pub fn swap(&self, name: &str, model: &str) -> Result<(), Error> {
        let (turn, inserted) = {
            let books = self.books();
            let entry = books.entries.get(name);
            let entry = entry.ok_or_else(|| Error::UnknownModel { name: name.to_owned() })?;
            (Arc::clone(&entry.turn), entry.inserted)
        };
        let _turn = turn.lock().unwrap_or_else(PoisonError::into_inner);
        let ticket = Ticket { name, model: model.to_owned(), inserted, replaces: true };
        self.load(ticket).map(drop)
    }

    /// What the cache holds and what it has done until now.
    pub fn statistics(&self) -> CacheStatistics {
        let mut books = self.books();
        let retired_bytes = books.retired_bytes();
        CacheStatistics {
            models: books.entries.len(),
            loaded: books.entries.values().filter(|entry| entry.resident.is_some()).count(),
            retired: books.retired.len(),
            bytes: books.bytes_of(|_| true) + retired_bytes,
            hits: books.hits,
            misses: books.misses,
            evictions: books.evictions,
            swaps: books.swaps,
        }
    }

    /// Loads a model and gives it the name, whose turn the caller holds.
    fn load(&self, ticket: Ticket<'_>) -> Result<Arc<InferenceEngine>, Error> {
        let checkpoint = source::open(&ticket.model)?;
        let Checkpoint { description, tensors } = &checkpoint;
        must_generate(description)?;
        let files = tensors.files().map(FileStamp::of).collect();
        let least = least_bytes(&description.path, &description.config, tensors)?;
        let reservation = self.reserve(ticket.name, least)?;

        let options = self.builder.model_options();
        let model = Model::load(checkpoint, &one_device(&options), &options, &mut go_on)?;
        let bytes = model.weight_bytes().total();
        let mut engine = InferenceEngine::with_builder(self.builder.clone());
        let model = engine.run(model)?;
        let engine = Arc::new(engine);
        let resident = Resident { engine: Arc::clone(&engine), model, files, bytes };
        self.install(ticket, reservation, resident)?;
        Ok(engine)
    }

    /// Keeps room for a model that is about to be loaded.
    fn reserve(&self, name: &str, bytes: u64) -> Result<Reservation<'_>, Error> {
        let mut books = self.books();
        let evicted = books.make_room(bytes, self.budget);
        let evicted = evicted.map_err(|shortage| self.no_room(name, bytes, shortage))?;
        books.reserved += bytes;
        drop(books);
        drop(evicted);
        Ok(Reservation { cache: self, bytes })
    }

    /// Lets a loaded model have its name.
    fn install(
        &self,
        ticket: Ticket<'_>,
        mut reservation: Reservation<'_>,
        resident: Resident,
    ) -> Result<(), Error> {
        let Ticket { name, model, inserted, replaces } = ticket;
        let mut books = self.books();
        books.reserved -= std::mem::take(&mut reservation.bytes);
        // It may have turned out larger than what was kept for it.
        let evicted = books.make_room(resident.bytes, self.budget);
        let evicted = evicted.map_err(|shortage| self.no_room(name, resident.bytes, shortage))?;
        let entry = books.entries.get_mut(name).filter(|entry| entry.inserted == inserted);
        let before = match entry {
            Some(entry) => {
                entry.model = model;
                entry.resident.replace(resident)
            }
            // The name is gone, or another's. Whoever asked before that has this version.
            None => Some(resident),
        };
        let before = books.retire(before);
        books.swaps += u64::from(replaces);
        drop(books);
        drop((evicted, before));
        Ok(())
    }

    fn no_room(&self, name: &str, needed: u64, shortage: Shortage) -> Error {
        let (name, budget) = (name.to_owned(), self.budget);
        match shortage {
            Shortage::TooLarge => Error::ModelTooLarge { name, needed, budget },
            Shortage::InUse(in_use) => Error::CacheFull { name, needed, in_use, budget },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_for_one_model_does_not_keep_others_from_theirs() {
        let builder = InferenceEngine::builder().threads(1);
        let cache = ModelCache::new(MemorySize::GB(1), builder).unwrap();
        cache.insert("slow", "tiny");
        cache.insert("quick", "tiny");
        // As if it were being loaded.
        let turn = Arc::clone(&cache.books().entries["slow"].turn);
        let loading = turn.lock().unwrap();
        std::thread::scope(|scope| {
            let slow: Vec<_> = (0..3).map(|_| scope.spawn(|| cache.get("slow").unwrap())).collect();
            // All three have missed it, and wait.
            while cache.books().misses < 3 {
                std::thread::yield_now();
            }
            assert!(cache.get("quick").is_ok());
            assert_eq!(cache.statistics().loaded, 1);
            drop(loading);
            let slow: Vec<_> = slow.into_iter().map(|thread| thread.join().unwrap()).collect();
            assert!(slow.iter().all(|engine| Arc::ptr_eq(engine, &slow[0])), "it is loaded once");
        });
        let CacheStatistics { loaded, hits, misses, .. } = cache.statistics();
        assert_eq!((loaded, hits, misses), (2, 0, 4));
    }

    #[test]
    fn a_version_whose_name_went_away_while_it_was_loaded_serves_who_asked() {
        let builder = InferenceEngine::builder().threads(1);
        let cache = ModelCache::new(MemorySize::GB(1), builder).unwrap();
        cache.insert("a", "tiny");
        let ticket = Ticket {
            name: "a",
            model: "tiny".to_owned(),
            inserted: cache.books().entries["a"].inserted,
            replaces: false,
        };
        cache.remove("a");
        cache.insert("a", "another");
        let engine = cache.load(ticket).unwrap();
        let CacheStatistics { loaded, retired, bytes, .. } = cache.statistics();
        assert_eq!((loaded, retired), (0, 1));
        assert_eq!(bytes, engine.model().unwrap().weight_bytes().total());
        assert_eq!(cache.books().entries["a"].model, "another");
        drop(engine);
        assert_eq!((cache.statistics().retired, cache.statistics().bytes), (0, 0));
    }
}
