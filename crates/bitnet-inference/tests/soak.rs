//! A short part of what `examples/soak` does for as long as one likes.

#[path = "../examples/soak/load.rs"]
mod load;

use bitnet_inference::{Model, ModelOptions};
use load::{Load, options};

#[test]
fn under_random_load_every_request_gets_its_tokens_or_its_end() {
    let model =
        Model::open("tiny", &ModelOptions { threads: Some(1), ..ModelOptions::default() }).unwrap();
    let engine = model.engine(options(&model)).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let mut load = Load::new(&model, &engine, 7);
    for round in 0..30 {
        for _ in 0..40 {
            load.turn();
        }
        load.save_and_restore(&folder.path().join(round.to_string()));
    }
    load.finish();
    let tally = &load.tally;
    println!("{tally:?}");
    assert_eq!(tally.stuck, 0);
    assert!(tally.finished > 100 && tally.cancelled > 10 && tally.late > 0, "{tally:?}");
    assert!(tally.dropped > 0 && tally.restored > 0, "{tally:?}");
    let statistics = loop {
        let statistics = engine.statistics().unwrap();
        if statistics.running + statistics.waiting == 0 {
            break statistics;
        }
    };
    println!("{statistics:?}");
    assert_eq!(statistics.kv.used_blocks, 0);
    assert!(statistics.preemptions > 10 && statistics.kv.evicted_blocks > 10, "{statistics:?}");
}
