//! The way of events from the engine's thread to whoever asked.
//!
//! Each request has a ring of its own, with one writer and one reader. Neither waits for the other:
//! a request whose ring is full pauses, and a reader that finds nothing is woken later.

use std::future::poll_fn;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use atomic_waker::AtomicWaker;
use rtrb::{Consumer, Producer, RingBuffer};

use crate::engine::Link;
use crate::error::Error;
use crate::request::{Event, Usage};

/// What both ends of a stream see besides the ring.
#[derive(Default)]
struct Signal {
    reader: AtomicWaker,
    /// The reader is gone.
    cancelled: AtomicBool,
    /// The writer is gone.
    closed: AtomicBool,
    // What the request has taken until now, which the reader cannot count.
    reused_tokens: AtomicUsize,
    proposed_tokens: AtomicUsize,
    accepted_tokens: AtomicUsize,
    dropped_tokens: AtomicUsize,
}

/// The engine's end of a stream.
pub(crate) struct EventSender {
    ring: Producer<Result<Event, Error>>,
    signal: Arc<Signal>,
    max_latency: Duration,
    /// When the first token came that the reader was not woken for.
    untold: Option<Instant>,
}

impl EventSender {
    /// Whether nobody reads any more.
    pub(crate) fn is_cancelled(&self) -> bool {
        self.signal.cancelled.load(Ordering::Acquire)
    }

    /// Whether there is no room for a token and an end.
    pub(crate) fn is_full(&self) -> bool {
        self.room() == 0
    }

    /// Tokens that there is room for, besides an end.
    pub(crate) fn room(&self) -> usize {
        self.ring.slots().saturating_sub(1)
    }

    /// Says what the request has taken before the next token.
    pub(crate) fn set_usage(&self, usage: Usage) {
        self.signal.reused_tokens.store(usage.reused_tokens, Ordering::Relaxed);
        self.signal.proposed_tokens.store(usage.proposed_tokens, Ordering::Relaxed);
        self.signal.accepted_tokens.store(usage.accepted_tokens, Ordering::Relaxed);
        self.signal.dropped_tokens.store(usage.dropped_tokens, Ordering::Relaxed);
    }

    /// Sends an event. There is room for it if the stream was not [full](EventSender::is_full).
    pub(crate) fn send(&mut self, event: Result<Event, Error>) {
        let time = match &event {
            Ok(Event::Token(token)) => Some(token.time),
            _ => None,
        };
        let sent = self.ring.push(event);
        assert!(sent.is_ok(), "a request whose ring is full is paused");
        match time {
            Some(now) if !self.is_full() => {
                self.untold.get_or_insert(now);
                self.tell(now);
            }
            _ => self.tell_now(),
        }
    }

    /// Wakes the reader if it was left asleep for long enough.
    pub(crate) fn tell(&mut self, now: Instant) {
        let late = |since| now.saturating_duration_since(since) >= self.max_latency;
        if self.untold.is_some_and(late) {
            self.tell_now();
        }
    }

    /// Whether there are tokens that the reader was not woken for.
    pub(crate) fn is_untold(&self) -> bool {
        self.untold.is_some()
    }

    /// Wakes the reader.
    pub(crate) fn tell_now(&mut self) {
        self.untold = None;
        self.signal.reader.wake();
    }
}

impl Drop for EventSender {
    fn drop(&mut self) {
        self.signal.closed.store(true, Ordering::Release);
        self.signal.reader.wake();
    }
}

/// The events of one request, as they come. Dropping it cancels the request: it takes part in no
/// step after the one that is running.
pub struct TokenStream {
    ring: Consumer<Result<Event, Error>>,
    signal: Arc<Signal>,
    link: Arc<Link>,
    /// The engine's replica that has the request.
    replica: usize,
    finished: bool,
}

impl TokenStream {
    /// Both ends of a stream with room for `buffer` tokens and an end.
    pub(crate) fn new(
        link: Arc<Link>,
        replica: usize,
        buffer: usize,
        max_latency: Duration,
    ) -> (EventSender, TokenStream) {
        let (producer, consumer) = RingBuffer::new(buffer.max(1) + 1);
        let signal = Arc::new(Signal::default());
        let sender =
            EventSender { ring: producer, signal: Arc::clone(&signal), max_latency, untold: None };
        (sender, TokenStream { ring: consumer, signal, link, replica, finished: false })
    }

    /// Waits for the next event; `None` after the end or an error.
    #[allow(clippy::should_implement_trait)] // not an iterator: that could not be awaited as well
    pub fn next(&mut self) -> Option<Result<Event, Error>> {
        block_on(poll_fn(|context| self.poll_event(context)))
    }

    /// The next event, if it is there: for `async` code.
    pub fn poll_event(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Event, Error>>> {
        if self.finished {
            return Poll::Ready(None);
        }
        if let Some(event) = self.pop() {
            return Poll::Ready(Some(event));
        }
        self.signal.reader.register(context.waker());
        // What came before the waker was there woke nobody.
        let closed = self.signal.closed.load(Ordering::Acquire);
        if let Some(event) = self.pop() {
            return Poll::Ready(Some(event));
        }
        if closed {
            self.finished = true;
            let reason = "its thread ended in the middle of the request".to_owned();
            return Poll::Ready(Some(Err(Error::EngineStopped { reason })));
        }
        Poll::Pending
    }

    /// The engine's replica that has the request.
    pub(crate) fn replica(&self) -> usize {
        self.replica
    }

    /// Lets the engine drop the request before its next step.
    pub(crate) fn cancel(&self) {
        self.signal.cancelled.store(true, Ordering::Release);
        self.link.wake();
    }

    /// Ready when the engine has let go of the request and its place is free.
    pub(crate) fn poll_closed(&mut self, context: &mut Context<'_>) -> Poll<()> {
        self.signal.reader.register(context.waker());
        match self.signal.closed.load(Ordering::Acquire) {
            true => Poll::Ready(()),
            false => Poll::Pending,
        }
    }

    /// What the request has taken by the last token that the engine has sent, for a reader that has
    /// counted so many tokens.
    pub(crate) fn usage(&self, prompt_tokens: usize, output_tokens: usize) -> Usage {
        Usage {
            prompt_tokens,
            reused_tokens: self.signal.reused_tokens.load(Ordering::Relaxed),
            output_tokens,
            proposed_tokens: self.signal.proposed_tokens.load(Ordering::Relaxed),
            accepted_tokens: self.signal.accepted_tokens.load(Ordering::Relaxed),
            dropped_tokens: self.signal.dropped_tokens.load(Ordering::Relaxed),
        }
    }

    /// The next event, if it is there.
    pub(crate) fn pop(&mut self) -> Option<Result<Event, Error>> {
        let event = self.ring.pop().ok()?;
        self.finished = !matches!(event, Ok(Event::Token(_)));
        // There is room in the ring now, for which the request may wait.
        self.link.wake();
        Some(event)
    }
}

impl Drop for TokenStream {
    fn drop(&mut self) {
        self.cancel();
    }
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// Runs a future on this thread, which sleeps while there is nothing to do.
pub(crate) fn block_on<F: Future>(future: F) -> F::Output {
    let mut future = pin!(future);
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let mut context = Context::from_waker(&waker);
    loop {
        match future.as_mut().poll(&mut context) {
            Poll::Ready(output) => return output,
            Poll::Pending => thread::park(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::request::Token;

    #[derive(Default)]
    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[test]
    fn a_reader_is_woken_for_several_tokens_at_once() {
        let latency = Duration::from_secs(5);
        let (mut sender, mut stream) = TokenStream::new(Link::to_nobody(), 0, 6, latency);
        let count = Arc::new(Count::default());
        let waker = Waker::from(Arc::clone(&count));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        // The reader looks in, finds nothing more and sleeps; returns how often it was woken before.
        let mut woken = || {
            let mut context = Context::from_waker(&waker);
            while stream.poll_event(&mut context).is_ready() {}
            count.0.swap(0, Ordering::Relaxed)
        };
        let send = |sender: &mut EventSender, time| {
            sender.send(Ok(Event::Token(Token { id: 1, logprobs: None, time })));
        };
        woken();
        for second in [0, 2, 4] {
            send(&mut sender, at(second));
        }
        sender.tell(at(4));
        assert!(sender.is_untold());
        assert_eq!(count.0.load(Ordering::Relaxed), 0);
        sender.tell(at(5));
        assert_eq!((woken(), sender.is_untold()), (1, false));
        // A token that comes late enough wakes by itself.
        send(&mut sender, at(10));
        send(&mut sender, at(15));
        assert_eq!(woken(), 1);
        // So does one that fills the ring.
        for _ in 0..6 {
            send(&mut sender, at(20));
        }
        assert_eq!(woken(), 1);
        // And an end.
        send(&mut sender, at(30));
        drop(sender);
        assert_eq!(count.0.load(Ordering::Relaxed), 1);
    }
}
