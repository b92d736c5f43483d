//! What an engine counts for those who watch it. Each test has a recorder of its own.

use std::collections::{BTreeMap, BTreeSet};
use std::thread;
use std::time::Instant;

use bitnet_inference::telemetry::{
    ACCEPTED_TOKENS, ADMITTED_TOKENS, DECODE_TOKENS, EVICTED_KV_BLOCKS, KV_BLOCKS, OUTPUT_TOKENS,
    PREEMPTIONS, PREFILL_TOKENS, PROPOSED_TOKENS, REJECTED_REQUESTS, REQUEST_SECONDS, REQUESTS,
    REUSED_TOKENS, RUNNING_REQUESTS, STEP_SECONDS, STEP_SEQUENCES, STEP_TOKENS,
    TIME_TO_FIRST_TOKEN_SECONDS, WAITING_REQUESTS,
};
use bitnet_inference::{
    Engine, EngineOptions, EngineStatistics, Error, Event, KvType, Model, ModelOptions, Request,
    SamplingParams, Speculation, TokenStream,
};
use metrics_util::debugging::{DebugValue, DebuggingRecorder, Snapshotter};

/// Everything that was recorded: counters and gauges by `name` or `name{label}`, histograms by name.
#[derive(Default)]
struct Watch {
    numbers: BTreeMap<String, f64>,
    histograms: BTreeMap<String, Vec<f64>>,
}

impl Watch {
    /// Starts an engine that reports to a recorder.
    fn start(start: impl FnOnce() -> Engine) -> (Engine, Watched) {
        let recorder = DebuggingRecorder::new();
        let engine = metrics::with_local_recorder(&recorder, start);
        (engine, Watched { snapshotter: recorder.snapshotter(), watch: Watch::default() })
    }

    fn number(&self, key: &str) -> f64 {
        *self.numbers.get(key).unwrap_or_else(|| panic!("{key} is not there: {:?}", self.numbers))
    }

    fn labelled(&self, name: &str, label: &str) -> f64 {
        self.number(&format!("{name}{{{label}}}"))
    }

    fn values(&self, name: &str) -> &[f64] {
        &self.histograms[name]
    }
}

struct Watched {
    snapshotter: Snapshotter,
    watch: Watch,
}

impl Watched {
    /// What was recorded until now. A snapshot sets everything to zero, so they are added up.
    fn look(&mut self) -> &Watch {
        let Watch { numbers, histograms } = &mut self.watch;
        for (key, _, _, value) in self.snapshotter.snapshot().into_vec() {
            let name = key.key().name().to_owned();
            let labels: Vec<String> =
                key.key().labels().map(|l| format!("{}={}", l.key(), l.value())).collect();
            let full = match labels.is_empty() {
                true => name.clone(),
                false => format!("{name}{{{}}}", labels.join(",")),
            };
            match value {
                DebugValue::Counter(count) => *numbers.entry(full).or_default() += count as f64,
                DebugValue::Gauge(change) => *numbers.entry(full).or_default() += change.0,
                DebugValue::Histogram(values) => {
                    histograms.entry(name).or_default().extend(values.iter().map(|value| value.0));
                }
            }
        }
        &self.watch
    }

    /// Waits until something holds, which it will before the test's runner loses patience.
    fn until(&mut self, holds: impl Fn(&Watch) -> bool) {
        while !holds(self.look()) {
            thread::yield_now();
        }
    }

    /// Every gauge is zero.
    fn assert_at_rest(&mut self) {
        let watch = self.look();
        for name in [RUNNING_REQUESTS, WAITING_REQUESTS] {
            assert_eq!(watch.number(name), 0.0, "{name}");
        }
        for state in ["used", "idle", "free"] {
            assert_eq!(watch.labelled(KV_BLOCKS, &format!("state={state}")), 0.0, "{state}");
        }
    }

    /// The counters are those that the engine gives itself.
    fn assert_counts(&mut self, statistics: &EngineStatistics) {
        let watch = self.look();
        let decoded =
            statistics.computed_tokens - statistics.prefill_tokens - statistics.proposed_tokens;
        for (name, count) in [
            (PREFILL_TOKENS, statistics.prefill_tokens),
            (DECODE_TOKENS, decoded),
            (PROPOSED_TOKENS, statistics.proposed_tokens),
            (ACCEPTED_TOKENS, statistics.accepted_tokens),
            (OUTPUT_TOKENS, statistics.output_tokens),
            (ADMITTED_TOKENS, statistics.kv.admitted_tokens),
            (REUSED_TOKENS, statistics.kv.reused_tokens),
            (EVICTED_KV_BLOCKS, statistics.kv.evicted_blocks),
            (PREEMPTIONS, statistics.preemptions),
        ] {
            assert_eq!(watch.number(name), count as f64, "{name}");
        }
        assert_eq!(watch.values(STEP_SECONDS).len() as u64, statistics.steps);
        let tokens: f64 = watch.values(STEP_TOKENS).iter().sum();
        assert_eq!(tokens, statistics.computed_tokens as f64);
    }
}

fn tiny() -> Model {
    Model::open("tiny", &ModelOptions { threads: Some(1), ..ModelOptions::default() }).unwrap()
}

/// A prompt of 20 tokens that shares no prefix with those of other numbers.
fn prompt(number: u32) -> Vec<u32> {
    (0..20).map(|i| 100 + number + 7 * i).collect()
}

fn request(number: u32, max_tokens: usize) -> Request {
    Request::new(prompt(number), SamplingParams::default(), max_tokens)
}

/// The generated tokens, whatever the end.
fn read(mut stream: TokenStream) -> Vec<u32> {
    let mut tokens = Vec::new();
    while let Some(event) = stream.next() {
        if let Ok(Event::Token(token)) = event {
            tokens.push(token.id);
        }
    }
    tokens
}

#[test]
fn every_token_and_every_end_is_counted_once() {
    let model = tiny();
    let engine = || model.engine(EngineOptions::default()).unwrap();
    let tokens = read(engine().submit(request(3, 10)).unwrap());
    let (end, before_end) = (tokens[6], tokens.iter().position(|id| *id == tokens[6]).unwrap());

    let options = EngineOptions { max_sequences: 2, queue: 0, ..EngineOptions::default() };
    let (engine, mut watched) = Watch::start(|| model.engine(options).unwrap());
    // Two that nobody reads pause after their first token and keep their places.
    let unread: Vec<TokenStream> = [0, 1]
        .into_iter()
        .map(|number| engine.submit(Request { buffer: 1, ..request(number, 10) }).unwrap())
        .collect();
    let refused = engine.submit(request(2, 10));
    assert!(matches!(refused.err(), Some(Error::QueueFull(_))));
    watched.until(|watch| watch.number(OUTPUT_TOKENS) == 2.0);
    let watch = watched.look();
    assert_eq!(watch.number(RUNNING_REQUESTS), 2.0);
    assert_eq!(watch.labelled(KV_BLOCKS, "state=used"), 4.0);
    assert!(watch.labelled(KV_BLOCKS, "state=free") > 0.0);
    drop(unread);
    // The first block of each prompt can be used again.
    watched.until(|watch| {
        watch.number(RUNNING_REQUESTS) == 0.0 && watch.labelled(KV_BLOCKS, "state=idle") == 2.0
    });

    assert_eq!(read(engine.submit(request(3, 10)).unwrap()), tokens);
    let ended = Request { end_ids: BTreeSet::from([end]), ..request(4, 10) };
    let ended = Request { prompt: prompt(3), ..ended };
    assert_eq!(read(engine.submit(ended).unwrap()).len(), before_end);
    let late = Request { deadline: Some(Instant::now()), ..request(5, 10) };
    assert_eq!(read(engine.submit(late).unwrap()).len(), 0);
    let mut broken = request(6, 10);
    broken.processors.push(Box::new(|_: &[u32], _: usize, _: &mut [f32]| panic!("of the test")));
    assert_eq!(read(engine.submit(broken).unwrap()).len(), 0);
    assert_eq!(read(engine.submit(request(7, 0)).unwrap()).len(), 0);
    let empty = Request::new(Vec::new(), SamplingParams::default(), 10);
    assert!(matches!(engine.submit(empty).err(), Some(Error::EmptyPrompt)));
    drop(engine);

    watched.assert_at_rest();
    let watch = watched.look();
    for (outcome, count) in
        [("cancelled", 2.0), ("length", 2.0), ("stop", 1.0), ("deadline", 1.0), ("failed", 1.0)]
    {
        assert_eq!(watch.labelled(REQUESTS, &format!("outcome={outcome}")), count, "{outcome}");
    }
    for reason in ["queue_full", "invalid"] {
        assert_eq!(watch.labelled(REJECTED_REQUESTS, &format!("reason={reason}")), 1.0);
    }
    for (name, count) in [
        // Of the prompt that comes twice, a block of 16 is found.
        (ADMITTED_TOKENS, 5 * 20),
        (REUSED_TOKENS, 16),
        (PREFILL_TOKENS, 4 * 20 + 4),
        (OUTPUT_TOKENS, 2 + 10 + before_end),
        // The last token of an output is not computed, unless an end token follows.
        (DECODE_TOKENS, 9 + before_end),
        (PROPOSED_TOKENS, 0),
        (ACCEPTED_TOKENS, 0),
        (EVICTED_KV_BLOCKS, 0),
        (PREEMPTIONS, 0),
    ] {
        assert_eq!(watch.number(name), count as f64, "{name}");
    }
    let (seconds, tokens) = (watch.values(STEP_SECONDS), watch.values(STEP_TOKENS));
    assert!(seconds.iter().all(|time| *time > 0.0));
    assert_eq!(tokens.len(), seconds.len());
    assert_eq!(tokens.iter().sum::<f64>(), (84 + 9 + before_end) as f64);
    let sequences = watch.values(STEP_SEQUENCES);
    assert_eq!(sequences.len(), seconds.len());
    assert!(sequences.iter().all(|count| [1.0, 2.0].contains(count)));
    // All of them have an end, four a first token.
    assert_eq!(watch.values(REQUEST_SECONDS).len(), 7);
    assert_eq!(watch.values(TIME_TO_FIRST_TOKEN_SECONDS).len(), 4);
}

#[test]
fn preemptions_and_speculation_are_counted_as_the_engine_counts_them() {
    let model = tiny();
    let layout = model.config().kv_layout(KvType::F32, 16);
    // Enough for four of the eight.
    let kv_bytes = (layout.block_bytes() * 18) as u64;
    let options = EngineOptions { kv_bytes, ..EngineOptions::default() };
    let (engine, mut watched) = Watch::start(|| model.engine(options).unwrap());
    let streams: Vec<TokenStream> = (0..8)
        .map(|number| {
            let speculation = (number % 2 == 0).then(Speculation::prompt_lookup);
            engine.submit(Request { speculation, buffer: 60, ..request(number, 60) }).unwrap()
        })
        .collect();
    for stream in streams {
        assert_eq!(read(stream).len(), 60);
    }
    let statistics = engine.statistics().unwrap();
    assert!(statistics.preemptions > 0, "{statistics:?}");
    assert!(statistics.proposed_tokens > 0, "{statistics:?}");
    assert!(statistics.kv.evicted_blocks > 0, "{statistics:?}");
    drop(engine);
    watched.assert_counts(&statistics);
    watched.assert_at_rest();
    assert_eq!(watched.look().labelled(REQUESTS, "outcome=length"), 8.0);
}

#[test]
fn replicas_and_engines_add_to_the_same_metrics() {
    let model = tiny();
    let options = EngineOptions { replicas: 2, ..EngineOptions::default() };
    let (two, mut watched) = Watch::start(|| {
        let one = model.engine(EngineOptions::default()).unwrap();
        read(one.submit(request(0, 5)).unwrap());
        model.engine(options).unwrap()
    });
    let streams: Vec<TokenStream> =
        (1..5).map(|number| two.submit(request(number, 5)).unwrap()).collect();
    streams.into_iter().for_each(|stream| assert_eq!(read(stream).len(), 5));
    drop(two);
    watched.assert_at_rest();
    let watch = watched.look();
    assert_eq!(watch.labelled(REQUESTS, "outcome=length"), 5.0);
    assert_eq!(watch.number(OUTPUT_TOKENS), 25.0);
    assert_eq!(watch.number(PREFILL_TOKENS), 100.0);
}

#[test]
fn the_table_of_the_document_has_every_metric_with_its_kind_and_unit() {
    let document = include_str!("../../../docs/engine.md");
    let recorder = DebuggingRecorder::new();
    let _engine = metrics::with_local_recorder(&recorder, || {
        tiny().engine(EngineOptions::default()).unwrap()
    });
    let mut rows = BTreeSet::new();
    for (key, unit, description, _) in recorder.snapshotter().snapshot().into_vec() {
        let name = key.key().name();
        let kind = format!("{:?}", key.kind()).to_lowercase();
        let unit = unit.unwrap_or_else(|| panic!("{name} has no unit")).as_str().to_owned();
        assert!(description.is_some());
        let row = format!("| `{name}` | {kind} | {unit} |");
        assert!(document.contains(&row), "docs/engine.md has no row {row}");
        rows.insert(row);
    }
    let documented = document.lines().filter(|line| line.starts_with("| `bitnet_engine_"));
    assert_eq!(documented.count(), rows.len());
}
