//! Random load on an engine: lengths, priorities, clients, deadlines, readers that go away and
//! readers that stall, conversations past the context, and conversations that are saved and restored.

use std::path::Path;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::{self, Thread};
use std::time::{Duration, Instant};

use bitnet_inference::{
    ConversationError, Engine, EngineOptions, Error, Event, Model, Overflow, Request,
    SamplingParams, Speculation, TokenStream,
};
use bitnet_testing::Random;

/// How long a request that is being read may give nothing before it is called stuck.
const PATIENCE: Duration = Duration::from_secs(60);

/// Requests that are there at once.
const LIVE: usize = 24;

/// A budget of keys and values that is much too small for all of them: prefixes are evicted and
/// sequences are preempted.
pub fn options(model: &Model) -> EngineOptions {
    let defaults = EngineOptions::default();
    let layout = model.config().kv_layout(defaults.kv_type, defaults.block_tokens);
    EngineOptions {
        max_sequences: 8,
        step_tokens: 64,
        queue: 64,
        kv_bytes: 48 * layout.block_bytes() as u64,
        target_step_time: Some(Duration::from_millis(5)),
        ..defaults
    }
}

/// What has become of the requests.
#[derive(Debug, Default)]
pub struct Tally {
    /// Came to their end, with the tokens that they get alone.
    pub finished: u64,
    /// Were dropped by their reader.
    pub cancelled: u64,
    /// Came too late.
    pub late: u64,
    /// Gave nothing for a minute.
    pub stuck: u64,
    /// Tokens that were read.
    pub tokens: u64,
    /// Tokens that were dropped because the context was full.
    pub dropped: u64,
    /// Conversations that were saved and restored.
    pub restored: u64,
    /// Conversations for which there was no room.
    pub crowded: u64,
}

/// A request, and the tokens that it gets alone.
struct Case {
    prompt: Vec<u32>,
    sampling: SamplingParams,
    max_tokens: usize,
    expected: Vec<u32>,
}

struct Live {
    case: usize,
    read: usize,
    /// Tokens after which the reader goes away.
    cancel_after: Option<usize>,
    stream: TokenStream,
}

/// The load, from one thread.
pub struct Load<'a> {
    engine: &'a Engine,
    cases: Vec<Case>,
    live: Vec<Live>,
    random: Random,
    /// What has become of the requests so far.
    pub tally: Tally,
}

struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }
}

/// The next event; `None` if it does not come.
fn next(stream: &mut TokenStream) -> Option<Result<Event, Error>> {
    let waker = Waker::from(Arc::new(Unpark(thread::current())));
    let end = Instant::now() + PATIENCE;
    loop {
        if let Poll::Ready(event) = stream.poll_event(&mut Context::from_waker(&waker)) {
            return event;
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return None;
        }
        thread::park_timeout(left);
    }
}

impl Case {
    fn request(&self) -> Request {
        let Case { prompt, sampling, max_tokens, .. } = self;
        let mut request = Request::new(prompt.clone(), sampling.clone(), *max_tokens);
        request.overflow = Overflow::DropOldest { keep_first: 4 };
        request
    }
}

impl<'a> Load<'a> {
    /// Load on `engine` that depends on `seed`, of cases whose tokens another engine of the model has
    /// computed one by one.
    pub fn new(model: &Model, engine: &'a Engine, seed: u64) -> Self {
        let random = &mut Random::new(seed);
        let context = model.config().context_length;
        let quiet = model.engine(EngineOptions::default()).expect("there is memory for it");
        let prefix: Vec<u32> = (0..100).map(|i| i * 17 % 2000).collect();
        let mut case = |index: usize| {
            let mut prompt = if random.below(2) == 0 { prefix.clone() } else { Vec::new() };
            // Some fill the context, and some are longer.
            let length = match index % 8 {
                0 => context - 40 + random.below(80),
                _ => 1 + random.below(200),
            };
            prompt.resize_with(length, || random.below(2000) as u32);
            let sampling = SamplingParams {
                temperature: [0.0, 0.8][index % 2],
                top_k: 40,
                seed: random.bits(),
                ..SamplingParams::default()
            };
            let max_tokens = 1 + random.below(80);
            let mut case = Case { prompt, sampling, max_tokens, expected: Vec::new() };
            let mut stream = quiet.submit(case.request()).expect("it is a good request");
            while let Some(Ok(Event::Token(token))) = next(&mut stream) {
                case.expected.push(token.id);
            }
            case
        };
        let cases = (0..40).map(&mut case).collect();
        let random = Random::new(seed + 1);
        Load { engine, cases, live: Vec::new(), random, tally: Tally::default() }
    }

    /// Lets one thing happen: a request comes, or one of those that are there is read for a while. The
    /// others stall meanwhile.
    pub fn turn(&mut self) {
        if self.live.len() < LIVE {
            self.submit();
        }
        if self.live.len() == LIVE || self.random.below(4) == 0 {
            let chosen = self.random.below(self.live.len());
            let most = 1 + self.random.below(100);
            self.read(chosen, most);
        }
    }

    /// Reads what is left to its end.
    pub fn finish(&mut self) {
        while !self.live.is_empty() {
            self.read(0, usize::MAX);
        }
    }

    /// Saves a random conversation and restores it.
    pub fn save_and_restore(&mut self, path: &Path) {
        let Self { engine, cases, random, tally, .. } = self;
        let prompt = &cases[random.below(cases.len())].prompt;
        let tokens = &prompt[..prompt.len().min(150)];
        let restored = engine.save(tokens, path).and_then(|()| engine.restore(path));
        match restored {
            Ok(found) => {
                assert_eq!(found, tokens);
                tally.restored += 1;
            }
            Err(Error::Conversation {
                reason: ConversationError::NoRoom { .. } | ConversationError::Displaced,
                ..
            }) => tally.crowded += 1,
            Err(error) => panic!("{error}"),
        }
    }

    fn submit(&mut self) {
        let Self { engine, cases, random, live, .. } = self;
        let case = random.below(cases.len());
        let mut request = cases[case].request();
        request.priority = random.below(3) as i32;
        request.client = random.below(4) as u64;
        request.buffer = 1 + random.below(40);
        request.max_latency = Duration::from_millis([0, 0, 20][random.below(3)]);
        request.speculation = (random.below(3) == 0).then(Speculation::prompt_lookup);
        if random.below(10) == 0 {
            let limit = Duration::from_millis(random.below(300) as u64);
            request.deadline = Some(Instant::now() + limit);
        }
        let cancel_after = (random.below(5) == 0).then(|| random.below(60));
        let stream = engine.submit(request).expect("there is a place for it");
        live.push(Live { case, read: 0, cancel_after, stream });
    }

    /// Reads up to so many tokens of a request.
    fn read(&mut self, chosen: usize, most: usize) {
        let Self { cases, live, tally, .. } = self;
        let Live { case, read, cancel_after, stream } = &mut live[chosen];
        let expected = &cases[*case].expected;
        for _ in 0..most {
            if cancel_after.is_some_and(|after| *read >= after) {
                tally.cancelled += 1;
                live.swap_remove(chosen);
                return;
            }
            match next(stream) {
                Some(Ok(Event::Token(token))) => {
                    assert_eq!(token.id, expected[*read], "token {read} of case {case}");
                    *read += 1;
                    tally.tokens += 1;
                    continue;
                }
                Some(Ok(Event::Finished(finish))) => {
                    assert_eq!(*read, expected.len(), "tokens of case {case}");
                    tally.dropped += finish.usage.dropped_tokens as u64;
                    tally.finished += 1;
                }
                Some(Err(Error::DeadlineExceeded)) => tally.late += 1,
                Some(Err(error)) => panic!("{error}"),
                None => tally.stuck += 1,
            }
            live.swap_remove(chosen);
            return;
        }
    }
}
