//! What an engine shows of requests, steps and loading through `tracing`. In a program of its own,
//! because a subscriber hears every thread.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex};

use bitnet_inference::{EngineOptions, Model, ModelOptions, Request, SamplingParams};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Level, Subscriber};
use tracing_subscriber::layer::{Context, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::{Layer, Registry};

/// A span with the last value of each of its fields.
#[derive(Debug, Clone)]
struct Shown {
    name: &'static str,
    level: Level,
    fields: BTreeMap<&'static str, String>,
}

impl Visit for Shown {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.fields.insert(field.name(), format!("{value:?}"));
    }
}

impl Shown {
    fn number(&self, field: &str) -> usize {
        self.fields[field].parse().unwrap_or_else(|_| panic!("{field} of {self:?}"))
    }
}

/// Keeps the spans that are closed.
#[derive(Clone, Default)]
struct Keep(Arc<Mutex<Vec<Shown>>>);

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Keep {
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let metadata = attributes.metadata();
        let fields = BTreeMap::new();
        let mut shown = Shown { name: metadata.name(), level: *metadata.level(), fields };
        attributes.record(&mut shown);
        context.span(id).unwrap().extensions_mut().insert(shown);
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        let span = context.span(id).unwrap();
        values.record(span.extensions_mut().get_mut::<Shown>().unwrap());
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let shown = context.span(&id).unwrap().extensions_mut().remove::<Shown>().unwrap();
        self.0.lock().unwrap().push(shown);
    }
}

#[test]
fn requests_steps_and_loading_are_spans_with_what_they_took() {
    let keep = Keep::default();
    tracing::subscriber::set_global_default(Registry::default().with(keep.clone())).unwrap();
    let options = ModelOptions { threads: Some(1), ..ModelOptions::default() };
    let model = Model::open("tiny", &options).unwrap();
    let engine = model.engine(EngineOptions::default()).unwrap();
    for (prompt_tokens, max_tokens) in [(20, 5), (7, 3)] {
        let prompt = vec![7 + max_tokens as u32; prompt_tokens];
        let request = Request::new(prompt, SamplingParams::default(), max_tokens);
        let mut stream = engine.submit(request).unwrap();
        while let Some(event) = stream.next() {
            event.unwrap();
        }
    }
    drop(engine);

    let shown = keep.0.lock().unwrap().clone();
    let named = |name| shown.iter().filter(move |span| span.name == name);
    let [load] = named("load_model").collect::<Vec<_>>()[..] else { panic!("{shown:?}") };
    assert_eq!(load.level, Level::INFO);
    assert_eq!((&load.fields["model"][..], load.number("devices")), ("tiny", 1));

    let [first, second] = named("request").collect::<Vec<_>>()[..] else { panic!("{shown:?}") };
    for (request, id, prompt_tokens, output_tokens) in [(first, 0, 20, 5), (second, 1, 7, 3)] {
        assert_eq!(request.level, Level::DEBUG);
        assert_eq!(request.number("id"), id);
        assert_eq!(request.number("prompt_tokens"), prompt_tokens);
        assert_eq!(request.number("output_tokens"), output_tokens);
        assert_eq!(request.fields["finish_reason"], "\"length\"");
    }

    // A prompt in one step, and one for each token of the output but the last.
    let rows: Vec<usize> = named("step").map(|step| step.number("rows")).collect();
    assert_eq!(rows, [20, 1, 1, 1, 1, 7, 1, 1]);
    for step in named("step") {
        assert_eq!((step.level, step.number("sequences")), (Level::TRACE, 1));
    }
}
