//! What a step takes from the heap. In a program of its own, because it counts every thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bitnet_core::backend::KvType;
use bitnet_inference::{
    Device, EngineOptions, Model, ModelOptions, Request, SamplingParams, SessionOptions,
    Speculation,
};
use bitnet_testing::altered_tiny_model;

static ALLOCATIONS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator, which keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::Relaxed);
        // SAFETY: passed on.
        unsafe { System.realloc(memory, layout, size) }
    }
}

#[global_allocator]
static COUNTING: Counting = Counting;

/// One test, since the thread that reports the end of another would be counted as well.
#[test]
fn steps_allocate_nothing() {
    a_step_between_two_growths_of_the_store_allocates_nothing();
    the_engine_allocates_nothing_between_admissions();
}

fn a_step_between_two_growths_of_the_store_allocates_nothing() {
    // One thread: which worker first takes a part, and so first needs room, is a matter of chance.
    let model =
        Model::open("tiny", &ModelOptions { threads: Some(1), ..ModelOptions::default() }).unwrap();
    for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
        let mut session =
            model.session(SessionOptions { kv_type, ..SessionOptions::default() }).unwrap();
        let mut logits = Vec::new();
        // Blocks of 64 tokens: 160 tokens take three, and token 192 doubles them to six.
        session.feed(&[7; 160], &mut logits).unwrap();
        for token in 160..192 {
            session.feed(&[token], &mut logits).unwrap();
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        session.feed(&[192], &mut logits).unwrap();
        let grown = ALLOCATIONS.load(Ordering::Relaxed);
        assert_ne!(grown, before, "the counter counts");
        for token in 193..384 {
            session.feed(&[token], &mut logits).unwrap();
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), grown, "{kv_type:?}");
    }
}

fn the_engine_allocates_nothing_between_admissions() {
    const WARM_UP: usize = 50;
    const STEPS: usize = 500;
    static COUNTS: [AtomicUsize; 2] = [const { AtomicUsize::new(0) }; 2];

    let folder = tempfile::tempdir().unwrap();
    // 550 steps need a longer context than the built-in model has.
    let context = |tokens| format!("\"max_position_embeddings\": {tokens}");
    altered_tiny_model(folder.path(), "config.json", &context(512), &context(1024));
    // A draft model that is right often, and not always.
    let draft_folder = tempfile::tempdir().unwrap();
    let theta = |theta| format!("\"rope_theta\": {theta}");
    altered_tiny_model(draft_folder.path(), "config.json", &theta("10000.0"), &theta("7000.0"));
    let neutral = SamplingParams::default();
    let ways = [
        neutral.clone(),
        SamplingParams { temperature: 0.8, top_k: 20, top_p: 0.9, ..neutral.clone() },
        SamplingParams { temperature: 1.2, min_p: 0.05, ..neutral.clone() },
        SamplingParams { repetition_penalty: 1.2, presence_penalty: 0.3, ..neutral.clone() },
        SamplingParams { temperature: 1.0, ..neutral.clone() },
        SamplingParams { logit_bias: vec![(3, 2.0)], repetition_penalty: 1.1, ..neutral },
    ];
    for (threads, copies, stages, speculates) in [
        (1, false, 1, false),
        (1, true, 1, false),
        (2, true, 1, false),
        (1, true, 2, false),
        (1, false, 1, true),
        // With more threads, which of them first needs room for some rows is a matter of chance.
        (1, true, 1, true),
    ] {
        let options = ModelOptions { threads: Some(threads), copies, ..ModelOptions::default() };
        let (path, devices) = (folder.path().to_str().unwrap(), vec![Device::Cpu; stages]);
        let model = Model::open_distributed(path, &devices, &options).unwrap();
        // It guesses for every third, and every third guesses for itself.
        let draft = Model::open(draft_folder.path().to_str().unwrap(), &options).unwrap();
        let engine = match speculates {
            true => model.engine_with_draft(&draft, EngineOptions::default()),
            false => model.engine(EngineOptions::default()),
        };
        let engine = engine.unwrap();
        // The kernels' room grows with the rows of a step, and a step of one row takes a way of its
        // own: here both models meet the fewest and the most. A request before the others keeps the
        // engine until they are there, however busy the machine is.
        for (requests, guesses) in [(1, false), (1, speculates), (16, speculates)] {
            let all_are_there = Arc::new(AtomicBool::new(false));
            let wait = all_are_there.clone();
            let mut before = Request::new(vec![7; 20], SamplingParams::default(), 1);
            before.processors.push(Box::new(move |_: &[u32], _: usize, _: &mut [f32]| {
                while !wait.load(Ordering::SeqCst) {
                    std::thread::yield_now();
                }
            }));
            let mut streams = vec![engine.submit(before).unwrap()];
            streams.extend((0..requests).map(|_| {
                let mut request = Request::new(vec![7; 20], SamplingParams::default(), 300);
                request.speculation = guesses.then(Speculation::draft_model);
                engine.submit(request).unwrap()
            }));
            all_are_there.store(true, Ordering::SeqCst);
            for mut stream in streams {
                while stream.next().is_some() {}
            }
        }
        COUNTS[1].store(0, Ordering::SeqCst);
        let streams: Vec<_> = (0..16usize)
            .map(|index| {
                let sampling = SamplingParams { seed: index as u64, ..ways[index % 6].clone() };
                let prompt = vec![7 + index as u32; 20];
                let mut request = Request::new(prompt, sampling, WARM_UP + STEPS + 30);
                request.buffer = WARM_UP + STEPS + 30;
                request.speculation = match index % 3 {
                    0 if speculates => Some(Speculation::prompt_lookup()),
                    1 if speculates => Some(Speculation::draft_model()),
                    _ => None,
                };
                if index == 15 {
                    // The last to come sees when the steps of all begin and end.
                    request.processors.push(Box::new(
                        |_: &[u32], position: usize, _: &mut [f32]| {
                            let now = || ALLOCATIONS.load(Ordering::SeqCst);
                            match position {
                                WARM_UP => COUNTS[0].store(now(), Ordering::SeqCst),
                                p if p == WARM_UP + STEPS => {
                                    COUNTS[1].store(now(), Ordering::SeqCst)
                                }
                                _ => {}
                            }
                        },
                    ));
                }
                engine.submit(request).unwrap()
            })
            .collect();
        // This thread does nothing meanwhile, so that every allocation is one of a step.
        let patience = Instant::now() + Duration::from_secs(120);
        while COUNTS[1].load(Ordering::SeqCst) == 0 {
            assert!(Instant::now() < patience, "the engine is stuck");
            std::thread::sleep(Duration::from_millis(5));
        }
        let statistics = engine.statistics().unwrap();
        assert_eq!(statistics.preemptions, 0);
        if speculates {
            let rejected = statistics.proposed_tokens - statistics.accepted_tokens;
            assert!(statistics.accepted_tokens > 500 && rejected > 500, "{statistics:?}");
        } else {
            assert_eq!(statistics.running, 16);
        }
        let [start, end] = COUNTS.each_ref().map(|count| count.load(Ordering::SeqCst));
        assert_eq!(
            end - start,
            0,
            "{threads} threads, copies {copies}, {stages} stages, speculates {speculates}"
        );
        drop(streams);
    }
}
