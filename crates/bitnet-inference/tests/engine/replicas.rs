//! Several replicas behind one queue.

use super::*;

#[test]
fn replicas_share_the_requests_and_the_limit() {
    let model = tiny(1);
    let options = EngineOptions {
        replicas: 2,
        max_sequences: 1,
        queue: 1,
        kv_bytes: kv_bytes(&model, 128),
        ..EngineOptions::default()
    };
    let engine = model.engine(options).unwrap();
    assert_eq!(engine.statistics().unwrap().kv.blocks, 2 * 4);
    // Each replica has half of the keys and values, and a request is on one of them.
    assert!(matches!(
        engine.submit(request(&[1; 60], &self::options(6))),
        Err(Error::KvBudget { needed: 65, room: 64 })
    ));
    let paused = || {
        let mut request = request(&[1, 2], &self::options(60));
        request.buffer = 1;
        engine.submit(request).unwrap()
    };
    let streams = [paused(), paused(), paused()];
    let refused = engine.submit(request(&[1], &self::options(5))).err();
    assert!(matches!(refused, Some(Error::QueueFull(full)) if full.limit == 3), "{refused:?}");
    // Both run one at once, and nobody waits behind a request while a replica is free.
    let end = Instant::now() + Duration::from_secs(60);
    while engine.statistics().unwrap().running < 2 {
        assert!(Instant::now() < end, "{:?}", engine.statistics());
        std::thread::yield_now();
    }
    let expected = alone(&model, &[1, 2], &self::options(60)).tokens;
    for mut stream in streams {
        assert_eq!(read(&mut stream).0, expected);
    }
    idle(&engine);
}

#[test]
fn if_one_replica_dies_the_others_go_on() {
    let model = tiny(1);
    let engine = model.engine(EngineOptions { replicas: 2, ..EngineOptions::default() }).unwrap();
    // First the other, so that the unruly one cannot be done before it is there and take its replica
    // along.
    let mut other = engine.submit(request(&[4, 5], &options(400))).unwrap();
    let mut unruly = request(&[1, 2, 3], &options(2));
    unruly.processors.push(Box::new(Unruly));
    let mut unruly = engine.submit(unruly).unwrap();
    assert_eq!(read(&mut unruly).0.len(), 2);
    assert_eq!(read(&mut other).0, alone(&model, &[4, 5], &options(400)).tokens);
    let end = Instant::now() + Duration::from_secs(60);
    while engine.statistics().is_ok() {
        assert!(Instant::now() < end, "the thread has panicked");
        std::thread::yield_now();
    }
    // The thread ends a little later than its mailbox.
    let served = |_| match engine.submit(request(&[4, 5], &options(3))) {
        Ok(mut stream) => read(&mut stream).1.is_ok(),
        Err(error) => {
            assert!(matches!(error, Error::EngineStopped { .. }), "{error}");
            assert!(Instant::now() < end, "nobody serves");
            false
        }
    };
    assert!((0..).any(served));
}

#[test]
fn replicas_end_with_their_engine() {
    let engine = tiny(2).engine(EngineOptions { replicas: 3, ..EngineOptions::default() }).unwrap();
    let streams: Vec<_> =
        (0..6).map(|_| engine.submit(request(&[4, 5], &options(50))).unwrap()).collect();
    drop(engine);
    drop(streams);
}
