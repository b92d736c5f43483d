//! Several models in a budget: who is loaded, who has to go, and what runs meanwhile.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bitnet_inference::{
    CacheStatistics, Error, GenerationParams, InferenceEngine, MemorySize, Model, ModelCache,
    ModelOptions, StreamingConfig,
};
use bitnet_model::convert::{self, Options, Target};
use bitnet_model::source;
use bitnet_testing::{Random, golden};

const PROMPT: &str = "Once upon a time";
const TOKENS: [u32; 3] = [1, 2, 3];

/// Native files of two models that give different logits.
struct Files {
    folder: tempfile::TempDir,
    story: PathBuf,
    other: PathBuf,
}

impl Files {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let convert = |model: &str, name: &str| {
            let path = folder.path().join(name);
            let checkpoint = source::open(model).unwrap();
            let target = Target::Native { compact: true };
            convert::to(&checkpoint, &path, &target, Options::default(), |_, _| {}).unwrap();
            path
        };
        let story = convert("tiny", "story.bitnet");
        let other = convert(golden("trilm").unwrap().to_str().unwrap(), "other.bitnet");
        Files { folder, story, other }
    }

    /// A copy under another name.
    fn copy(&self, from: &Path, name: &str) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::copy(from, &path).unwrap();
        path
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn cache(budget: u64) -> ModelCache {
    let builder = InferenceEngine::builder().threads(1).memory_pool_size(MemorySize::MB(16));
    ModelCache::new(MemorySize::B(budget), builder).unwrap()
}

fn bytes(path: &Path) -> u64 {
    Model::open(text(path), &ModelOptions::default()).unwrap().weight_bytes().total()
}

/// The logits that a model gives alone.
fn logits(path: &Path) -> Vec<f32> {
    let mut engine = InferenceEngine::builder().threads(1).build().unwrap();
    engine.load_model(text(path)).unwrap();
    engine.infer(&TOKENS).wait().unwrap()
}

#[test]
fn models_are_loaded_when_they_are_asked_for_and_the_longest_unused_one_goes() {
    let files = Files::new();
    let size = bytes(&files.story);
    // Room for two.
    let cache = cache(2 * size + size / 2);
    for name in ["a", "b", "c"] {
        cache.insert(name, text(&files.copy(&files.story, name)));
    }
    assert_eq!(cache.statistics(), CacheStatistics { models: 3, ..CacheStatistics::default() });
    drop([cache.get("a").unwrap(), cache.get("b").unwrap(), cache.get("a").unwrap()]);
    let CacheStatistics { loaded, bytes, hits, misses, evictions, .. } = cache.statistics();
    assert_eq!((loaded, bytes, hits, misses, evictions), (2, 2 * size, 1, 2, 0));
    drop(cache.get("c").unwrap());
    drop(cache.get("a").unwrap());
    let CacheStatistics { loaded, bytes, hits, misses, evictions, .. } = cache.statistics();
    assert_eq!((loaded, bytes, hits, misses, evictions), (2, 2 * size, 2, 3, 1), "b has gone");
    drop(cache.get("b").unwrap());
    drop(cache.get("a").unwrap());
    let CacheStatistics { hits, misses, evictions, .. } = cache.statistics();
    assert_eq!((hits, misses, evictions), (3, 4, 2), "c has gone");
}

#[test]
fn models_in_use_stay_and_who_finds_no_room_hears_how_much_there_is() {
    let files = Files::new();
    let size = bytes(&files.story);
    let cache = cache(size + size / 2);
    cache.insert("a", text(&files.story));
    cache.insert("b", text(&files.copy(&files.story, "b")));
    let engine = cache.get("a").unwrap();
    let refused = |cache: &ModelCache| match cache.get("b").err().expect("there is no room") {
        Error::CacheFull { name, in_use, budget, .. } => (name, in_use, budget),
        error => panic!("{error}"),
    };
    assert_eq!(refused(&cache), ("b".to_owned(), size, size + size / 2));
    // What was asked of it is use as well.
    let params = GenerationParams { max_tokens: 60, ..GenerationParams::default() };
    let slow = StreamingConfig { buffer: 1, ..StreamingConfig::default() };
    let stream = engine.stream(PROMPT, params, slow).unwrap();
    drop(engine);
    assert_eq!(refused(&cache).1, size);
    drop(stream);
    assert!(cache.get("b").is_ok());
    assert_eq!((cache.statistics().loaded, cache.statistics().evictions), (1, 1));
}

#[test]
fn a_model_larger_than_the_budget_is_refused_with_both_sizes() {
    let files = Files::new();
    let size = bytes(&files.story);
    for budget in [size - 1, 1000] {
        let cache = cache(budget);
        cache.insert("a", text(&files.story));
        let error = cache.get("a").err().unwrap();
        let Error::ModelTooLarge { needed, budget: found, .. } = error else { panic!("{error}") };
        assert!(needed > budget && needed <= size && found == budget);
        let left = CacheStatistics { models: 1, misses: 1, ..CacheStatistics::default() };
        assert_eq!(cache.statistics(), left, "nothing is kept for it");
    }
}

#[test]
fn what_runs_on_a_model_that_is_swapped_ends_there_and_then_its_memory_is_free() {
    let files = Files::new();
    let cache = cache(1 << 30);
    cache.insert("m", text(&files.story));
    let engine = cache.get("m").unwrap();
    let params = GenerationParams { max_tokens: 60, ..GenerationParams::default() };
    let expected = engine.generate(PROMPT, params.clone()).wait().unwrap();
    let slow = StreamingConfig { buffer: 1, ..StreamingConfig::default() };
    let streams = [(); 3].map(|()| engine.stream(PROMPT, params.clone(), slow).unwrap());
    drop(engine);

    cache.swap("m", text(&files.other)).unwrap();
    let new = cache.get("m").unwrap();
    assert_eq!(new.infer(&TOKENS).wait().unwrap(), logits(&files.other));
    let (old_bytes, new_bytes) = (bytes(&files.story), bytes(&files.other));
    let CacheStatistics { loaded, retired, bytes, swaps, .. } = cache.statistics();
    assert_eq!((loaded, retired, bytes, swaps), (1, 1, old_bytes + new_bytes, 1));
    for stream in streams {
        assert_eq!(cache.statistics().retired, 1);
        let tokens = stream.blocking().flat_map(|event| event.unwrap().tokens);
        assert_eq!(tokens.map(|token| token.id).collect::<Vec<_>>(), expected.tokens);
    }
    let CacheStatistics { loaded, retired, bytes, .. } = cache.statistics();
    assert_eq!((loaded, retired, bytes), (1, 0, new_bytes));

    // What cannot be loaded changes nothing.
    assert!(matches!(cache.swap("m", "no such file"), Err(Error::Model(_))));
    assert!(Arc::ptr_eq(&cache.get("m").unwrap(), &new));
    drop(new);
    assert!(cache.remove("m") && !cache.remove("m"));
    assert!(matches!(cache.get("m"), Err(Error::UnknownModel { .. })));
    assert!(matches!(cache.swap("m", "tiny"), Err(Error::UnknownModel { .. })));
    let CacheStatistics { models, loaded, retired, bytes, .. } = cache.statistics();
    assert_eq!((models, loaded, retired, bytes), (0, 0, 0, 0));
}

// Elsewhere a file that is mapped cannot be replaced.
#[cfg(unix)]
#[test]
fn a_file_that_was_replaced_is_loaded_anew_and_one_that_is_gone_is_not_missed() {
    use std::time::{Duration, SystemTime};

    let files = Files::new();
    let path = files.copy(&files.story, "m.bitnet");
    let cache = cache(1 << 30);
    cache.insert("m", text(&path));
    let old = cache.get("m").unwrap();
    assert!(Arc::ptr_eq(&cache.get("m").unwrap(), &old));

    fs::rename(files.copy(&files.other, "new"), &path).unwrap();
    let new = cache.get("m").unwrap();
    assert_eq!(new.infer(&TOKENS).wait().unwrap(), logits(&files.other));
    assert_eq!(old.infer(&TOKENS).wait().unwrap(), logits(&files.story));
    assert_eq!((cache.statistics().swaps, cache.statistics().retired), (1, 1));
    drop(old);

    // Another time is another file.
    let file = fs::File::options().write(true).open(&path).unwrap();
    file.set_modified(SystemTime::now() + Duration::from_secs(1000)).unwrap();
    assert!(!Arc::ptr_eq(&cache.get("m").unwrap(), &new));
    assert_eq!((cache.statistics().swaps, cache.statistics().retired), (2, 1));
    drop((new, file));

    // A file that is broken: the error says so, until it is mended or gone.
    fs::write(files.folder.path().join("broken"), "<html>").unwrap();
    fs::rename(files.folder.path().join("broken"), &path).unwrap();
    let error = cache.get("m").err().unwrap().to_string();
    assert!(error.contains("m.bitnet"), "{error}");
    fs::remove_file(&path).unwrap();
    let engine = cache.get("m").unwrap();
    assert_eq!(engine.infer(&TOKENS).wait().unwrap(), logits(&files.other));
    let CacheStatistics { loaded, retired, bytes, .. } = cache.statistics();
    assert_eq!((loaded, retired, bytes), (1, 0, self::bytes(&files.other)));
}

#[test]
fn an_error_of_a_lazy_load_comes_with_the_request_and_the_next_one_tries_again() {
    let files = Files::new();
    let path = files.folder.path().join("later.bitnet");
    let cache = cache(1 << 30);
    cache.insert("m", text(&path));
    for _ in 0..2 {
        let error = cache.get("m").err().unwrap().to_string();
        assert!(error.contains("later.bitnet: no such file"), "{error}");
    }
    files.copy(&files.story, "later.bitnet");
    assert_eq!(cache.get("m").unwrap().infer(&TOKENS).wait().unwrap(), logits(&files.story));
    let embedder = golden("qwen3-embedding").unwrap();
    cache.insert("m", text(&embedder));
    assert!(matches!(cache.get("m"), Err(Error::WrongKind(_))));
    let CacheStatistics { models, loaded, bytes, .. } = cache.statistics();
    assert_eq!((models, loaded, bytes), (1, 0, 0));
}

#[test]
fn many_threads_get_what_they_ask_for_and_the_budget_holds() {
    let files = Files::new();
    let models = [&files.story, &files.other];
    let expected = models.map(|path| logits(path));
    let largest = bytes(&files.story).max(bytes(&files.other));
    // Too little for all of them.
    let budget = 2 * largest;
    let cache = cache(budget);
    // Of the story model, of the other one, and of either.
    for (name, model) in [("story", 0), ("other", 1), ("either", 0), ("comes and goes", 1)] {
        cache.insert(name, text(models[model]));
    }
    let allowed = |name: &str, logits: &Vec<f32>| match name {
        "story" => *logits == expected[0],
        "other" => *logits == expected[1],
        _ => expected.contains(logits),
    };
    std::thread::scope(|scope| {
        for seed in 0..4 {
            let (cache, allowed, models) = (&cache, &allowed, &models);
            scope.spawn(move || {
                let random = &mut Random::new(seed);
                for _ in 0..60 {
                    let model = text(models[random.below(2)]);
                    let name = ["story", "other", "either", "comes and goes"][random.below(4)];
                    let done = match (name, random.below(6)) {
                        ("either", 0) => cache.swap(name, model),
                        ("comes and goes", 0) => {
                            cache.remove(name);
                            Ok(())
                        }
                        ("comes and goes", 1) => {
                            cache.insert(name, model);
                            Ok(())
                        }
                        _ => cache.get(name).map(|engine| {
                            let logits = engine.infer(&TOKENS).wait().unwrap();
                            assert!(allowed(name, &logits), "{name}");
                        }),
                    };
                    match done {
                        Ok(()) | Err(Error::CacheFull { .. }) => {}
                        Err(Error::UnknownModel { name }) => assert_eq!(name, "comes and goes"),
                        Err(error) => panic!("{error}"),
                    }
                    let held = cache.statistics().bytes;
                    assert!(held <= budget, "{held} of {budget}");
                }
            });
        }
    });
    println!("{:?}", cache.statistics());
    assert_eq!(cache.statistics().retired, 0);
    // When all is quiet everybody finds room.
    cache.insert("comes and goes", text(&files.story));
    cache.swap("either", text(&files.story)).unwrap();
    for name in ["story", "other", "either", "comes and goes", "comes and goes"] {
        let logits = cache.get(name).unwrap().infer(&TOKENS).wait().unwrap();
        assert!(allowed(name, &logits), "{name}");
    }
    let CacheStatistics { hits, evictions, swaps, bytes, .. } = cache.statistics();
    assert!(hits > 0 && evictions > 0 && swaps > 0 && bytes <= budget);
    for name in ["story", "other", "either", "comes and goes"] {
        cache.remove(name);
    }
    let CacheStatistics { models, loaded, retired, bytes, .. } = cache.statistics();
    assert_eq!((models, loaded, retired, bytes), (0, 0, 0, 0));
}
