//! Requests that end early, that are refused and that break, beside others that go on.

use super::*;

#[test]
fn a_full_ring_pauses_its_request_and_no_other() {
    let model = tiny(1);
    let engine =
        model.engine(EngineOptions { max_sequences: 2, ..EngineOptions::default() }).unwrap();
    let mut slow = request(&[1, 2, 3], &options(100));
    slow.buffer = 5;
    let mut slow = engine.submit(slow).unwrap();
    let mut quick = engine.submit(request(&[4, 5], &options(200))).unwrap();
    let (tokens, _) = read(&mut quick);
    assert_eq!(tokens, alone(&model, &[4, 5], &options(200)).tokens);
    let statistics = engine.statistics().unwrap();
    assert_eq!(statistics.output_tokens, 200 + 5, "{statistics:?}");
    let (tokens, finish) = read(&mut slow);
    assert_eq!(tokens, alone(&model, &[1, 2, 3], &options(100)).tokens);
    assert_eq!(finish.unwrap().reason, FinishReason::Length);
    idle(&engine);
}

#[test]
fn a_reader_that_goes_away_takes_its_request_along() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut streams: Vec<TokenStream> = (0..4)
        .map(|_| {
            let mut request = request(&[1, 2, 3], &options(400));
            request.buffer = 10;
            engine.submit(request).unwrap()
        })
        .collect();
    assert!(matches!(streams[0].next(), Some(Ok(Event::Token(_)))));
    drop(streams);
    // Without their readers, full rings would never be read.
    let statistics = idle(&engine);
    assert!(statistics.output_tokens <= 4 * 11, "{statistics:?}");
}

#[test]
fn a_panicking_logits_processor_fails_its_own_request() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut other = engine.submit(request(&[4, 5], &options(50))).unwrap();
    let mut request = request(&[1, 2, 3], &options(50));
    request.processors.push(Box::new(|_: &[u32], output_tokens: usize, _: &mut [f32]| {
        assert!(output_tokens < 3, "three is enough");
    }));
    let mut failing = engine.submit(request).unwrap();
    let (tokens, end) = read(&mut failing);
    assert_eq!(tokens, alone(&model, &[1, 2, 3], &options(3)).tokens);
    assert!(
        matches!(&end, Err(Error::ProcessorPanicked { message }) if message == "three is enough")
    );
    assert_eq!(read(&mut other).0, alone(&model, &[4, 5], &options(50)).tokens);
    idle(&engine);
}

#[test]
fn logits_processors_change_what_is_sampled() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut request = request(&[1, 2, 3], &options(4));
    request.processors.push(Box::new(
        |tokens: &[u32], output_tokens: usize, logits: &mut [f32]| {
            assert_eq!(tokens.len(), 3 + output_tokens);
            logits[100 + output_tokens] = 1e9;
        },
    ));
    let (tokens, _) = read(&mut engine.submit(request).unwrap());
    assert_eq!(tokens, [100, 101, 102, 103]);
}

#[test]
fn a_deadline_ends_a_request_and_no_other() {
    let model = tiny(1);
    let engine =
        model.engine(EngineOptions { max_sequences: 1, ..EngineOptions::default() }).unwrap();
    let mut running = engine.submit(request(&[4, 5], &options(50))).unwrap();
    let mut late = request(&[1, 2, 3], &options(50));
    late.deadline = Some(Instant::now());
    let (tokens, end) = read(&mut engine.submit(late).unwrap());
    assert!(tokens.is_empty() && matches!(end, Err(Error::DeadlineExceeded)));
    assert_eq!(read(&mut running).0.len(), 50);

    // One that pauses for ever is ended too.
    let mut paused = request(&[1, 2, 3], &options(50));
    (paused.buffer, paused.deadline) = (2, Some(Instant::now() + Duration::from_millis(300)));
    let mut paused = engine.submit(paused).unwrap();
    idle(&engine);
    let (tokens, end) = read(&mut paused);
    assert!(tokens.len() <= 2 && matches!(end, Err(Error::DeadlineExceeded)));
}

#[test]
fn bad_requests_are_refused_with_the_reason() {
    let model = tiny(1);
    let context = model.config().context_length;
    let small = EngineOptions {
        kv_bytes: kv_bytes(&model, 64),
        max_sequences: 1,
        queue: 1,
        ..EngineOptions::default()
    };
    let engine = model.engine(small).unwrap();
    let refused = |prompt: Vec<u32>, options: GenerateOptions| {
        engine.submit(request(&prompt, &options)).err().expect("it is refused").to_string()
    };
    assert!(refused(vec![], options(5)).contains("empty"));
    assert!(refused(vec![1, 5000], options(5)).contains("5000"));
    assert!(refused(vec![1; context + 1], options(5)).contains("context"));
    assert!(
        refused(vec![1; 60], options(6)).contains("65 tokens but the KV cache has room for 64")
    );
    let mut bad = options(5);
    bad.sampling.top_p = 2.0;
    assert!(refused(vec![1], bad).contains("top_p"));

    // The same with no room at all, and with as much as is needed.
    let none = model.engine(EngineOptions { kv_bytes: 0, ..small }).unwrap();
    assert!(matches!(
        none.submit(request(&[1], &options(1))),
        Err(Error::KvBudget { needed: 1, room: 0 })
    ));
    let (tokens, _) = read(&mut engine.submit(request(&[1; 60], &options(5))).unwrap());
    assert_eq!(tokens, alone(&model, &[1; 60], &options(5)).tokens);

    let mut patient = options(60);
    patient.sampling.temperature = 1.0;
    let streams: Vec<TokenStream> = (0..2)
        .map(|_| {
            let mut request = request(&[1], &patient);
            request.buffer = 1;
            engine.submit(request).unwrap()
        })
        .collect();
    assert!(refused(vec![1], options(5)).contains("2 requests"));
    drop(streams);
    idle(&engine);
    engine.submit(request(&[1], &options(5))).unwrap();
}

#[test]
fn whoever_has_read_the_end_finds_a_place() {
    let model = tiny(1);
    let one = EngineOptions { max_sequences: 1, queue: 0, ..EngineOptions::default() };
    let engine = model.engine(one).unwrap();
    for _ in 0..1000 {
        let mut stream = engine.submit(request(&[1], &options(1))).unwrap();
        assert!(read(&mut stream).1.is_ok());
    }
}

#[test]
fn no_tokens_are_generated_where_none_are_asked_for() {
    let engine = tiny(1).engine(EngineOptions::default()).unwrap();
    let (tokens, end) = read(&mut engine.submit(request(&[1, 2], &options(0))).unwrap());
    assert_eq!((tokens.len(), end.unwrap().reason), (0, FinishReason::Length));
}

#[test]
fn a_prompt_that_fills_the_context_has_one_token_after_it() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let context = model.config().context_length;
    for (length, tokens) in [(context, 1), (context - 1, 2)] {
        let request = request(&vec![5; length], &options(4));
        let (found, end) = read(&mut engine.submit(request).unwrap());
        assert_eq!((found.len(), end.unwrap().reason), (tokens, FinishReason::Length));
        assert_eq!(found, alone(&model, &vec![5; length], &options(4)).tokens);
    }
}

#[test]
fn a_prompt_that_fills_the_kv_budget_comes_again_as_often_as_it_is_sent() {
    let model = tiny(1);
    let kv_bytes = kv_bytes(&model, 64);
    let engine = model.engine(EngineOptions { kv_bytes, ..EngineOptions::default() }).unwrap();
    let expected = alone(&model, &[5; 64], &options(1)).tokens;
    for _ in 0..3 {
        let mut request = request(&[5; 64], &options(1));
        // A request that is stuck fails the test instead of hanging it.
        request.deadline = Some(Instant::now() + Duration::from_secs(20));
        let (tokens, end) = read(&mut engine.submit(request).unwrap());
        assert_eq!((&tokens, end.unwrap().reason), (&expected, FinishReason::Length));
    }
}

#[test]
fn if_the_step_thread_dies_nobody_waits_for_ever() {
    let engine = tiny(1).engine(EngineOptions::default()).unwrap();
    let mut other = engine.submit(request(&[4, 5], &options(400))).unwrap();
    let mut unruly = request(&[1, 2, 3], &options(2));
    unruly.processors.push(Box::new(Unruly));
    let mut unruly = engine.submit(unruly).unwrap();
    assert_eq!(read(&mut unruly).0.len(), 2);
    assert!(matches!(read(&mut other).1, Err(Error::EngineStopped { .. })));
    assert!(other.next().is_none());
    let refused = engine.submit(request(&[4, 5], &options(1))).err();
    assert!(matches!(refused, Some(Error::EngineStopped { .. })), "{refused:?}");
    assert!(matches!(engine.statistics(), Err(Error::EngineStopped { .. })));
}

#[test]
fn a_stream_outlives_the_engine_it_came_from() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions::default()).unwrap();
    let mut stream = engine.submit(request(&[4, 5], &options(200))).unwrap();
    drop(engine);
    assert_eq!(read(&mut stream).0, alone(&model, &[4, 5], &options(200)).tokens);
}

#[test]
fn more_sequences_than_are_screened_together_get_their_tokens() {
    let model = tiny(1);
    let options = EngineOptions { max_sequences: 150, ..EngineOptions::default() };
    let engine = model.engine(options).unwrap();
    let streams: Vec<(Vec<u32>, TokenStream)> = (0..150)
        .map(|index| {
            let prompt = vec![index, 7];
            let mut request = request(&prompt, &self::options(5));
            request.speculation = (index % 2 == 0).then(Speculation::prompt_lookup);
            (prompt, engine.submit(request).unwrap())
        })
        .collect();
    for (prompt, mut stream) in streams {
        assert_eq!(read(&mut stream).0, alone(&model, &prompt, &self::options(5)).tokens);
    }
}

#[test]
fn whoever_drops_the_last_stream_does_not_wait_for_the_step() {
    let engine = tiny(1).engine(EngineOptions::default()).unwrap();
    let (in_step, step_begun) = std::sync::mpsc::channel();
    let (go_on, may_go_on) = std::sync::mpsc::channel::<()>();
    let mut slow = request(&[1, 2, 3], &options(50));
    slow.processors.push(Box::new(move |_: &[u32], _: usize, _: &mut [f32]| {
        let _ = in_step.send(());
        let _ = may_go_on.recv();
    }));
    let stream = engine.submit(slow).unwrap();
    drop(engine);
    step_begun.recv().unwrap();
    let (dropped, is_dropped) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        drop(stream);
        dropped.send(()).unwrap();
    });
    assert!(is_dropped.recv_timeout(Duration::from_secs(60)).is_ok(), "it waits for the step");
    drop(go_on);
    // The thread ends, and with it the processor.
    while step_begun.recv().is_ok() {}
}
