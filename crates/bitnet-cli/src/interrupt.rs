//! Ctrl-C: ends the program, or stops what can be stopped.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use atomic_waker::AtomicWaker;

static WATCHED: AtomicBool = AtomicBool::new(false);
static REQUESTED: AtomicBool = AtomicBool::new(false);
static WAKER: AtomicWaker = AtomicWaker::new();

/// While it lives, the first Ctrl-C only asks to stop. There is one at a time.
pub struct Watch(());

impl Watch {
    pub fn new() -> Self {
        REQUESTED.store(false, Ordering::SeqCst);
        WATCHED.store(true, Ordering::SeqCst);
        Watch(())
    }

    /// What becomes of `future`, or `None` once Ctrl-C asks to stop.
    pub async fn until<F: Future>(&self, future: F) -> Option<F::Output> {
        let mut future = pin!(future);
        poll_fn(|context| {
            WAKER.register(context.waker());
            match REQUESTED.load(Ordering::SeqCst) {
                true => Poll::Ready(None),
                false => future.as_mut().poll(context).map(Some),
            }
        })
        .await
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        WATCHED.store(false, Ordering::SeqCst);
    }
}

/// Somebody pressed Ctrl-C. Returns whether this is taken care of.
pub fn request() -> bool {
    let first = WATCHED.load(Ordering::SeqCst) && !REQUESTED.swap(true, Ordering::SeqCst);
    if first {
        WAKER.wake();
    }
    first
}
