//! What a step takes from the heap. In a program of its own, because it counts every thread.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use bitnet_core::backend::KvType;
use bitnet_inference::{Model, ModelOptions, SessionOptions};

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

#[test]
fn a_step_between_two_growths_of_the_store_allocates_nothing() {
    // One thread: which worker first takes a part, and so first needs room, is a matter of chance.
    let model =
        Model::open("tiny", &ModelOptions { threads: Some(1), ..ModelOptions::default() }).unwrap();
    for kv_type in [KvType::F32, KvType::F16, KvType::Int8] {
        let mut session =
            model.session(SessionOptions { kv_type, ..SessionOptions::default() }).unwrap();
        let mut logits = Vec::new();
        // Blocks of 16 tokens: 40 tokens take three, and token 48 doubles them to six.
        session.feed(&[7; 40], &mut logits).unwrap();
        for token in 40..48 {
            session.feed(&[token], &mut logits).unwrap();
        }
        let before = ALLOCATIONS.load(Ordering::Relaxed);
        session.feed(&[48], &mut logits).unwrap();
        let grown = ALLOCATIONS.load(Ordering::Relaxed);
        assert_ne!(grown, before, "the counter counts");
        for token in 49..96 {
            session.feed(&[token], &mut logits).unwrap();
        }
        assert_eq!(ALLOCATIONS.load(Ordering::Relaxed), grown, "{kv_type:?}");
    }
}
