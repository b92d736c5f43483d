//! Keeps an engine busy with random requests and prints what becomes of them and of the memory:
//! `cargo run --release -p bitnet-inference --example soak -- [SECONDS] [MODEL]`.
//! Every request must get the tokens that it gets alone, none may be stuck, and at the end every block of
//! keys and values must be free or idle.

mod load;

use std::time::{Duration, Instant};
use std::{env, fs, process};

use bitnet_inference::{Error, Model, ModelOptions};
use load::{Load, options};

/// Resident memory in kB, where the system says it.
fn resident() -> Option<u64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    line.trim().trim_end_matches(" kB").parse().ok()
}

fn main() -> Result<(), Error> {
    let mut arguments = env::args().skip(1);
    let seconds = arguments.next().map_or(10, |text| text.parse().expect("a number of seconds"));
    let model = arguments.next().unwrap_or_else(|| "tiny".to_owned());
    let model = Model::open(&model, &ModelOptions::default())?;
    let engine = model.engine(options(&model))?;
    let mut load = Load::new(&model, &engine, 1);
    let path = env::temp_dir().join(format!("bitnet-soak-{}.kv", process::id()));
    let (start, length) = (Instant::now(), Duration::from_secs(seconds));
    let mut report = Duration::ZERO;
    while start.elapsed() < length {
        for _ in 0..100 {
            load.turn();
        }
        load.save_and_restore(&path);
        if start.elapsed() >= report {
            let resident = resident().map_or("unknown".to_owned(), |kb| format!("{kb} kB"));
            println!("{:4} s: {resident} resident, {:?}", start.elapsed().as_secs(), load.tally);
            report += length.div_f64(20.0).max(Duration::from_secs(1));
        }
    }
    load.finish();
    let _ = fs::remove_file(path);
    let statistics = loop {
        let statistics = engine.statistics()?;
        if statistics.running + statistics.waiting == 0 {
            break statistics;
        }
    };
    let resident = resident().map_or("unknown".to_owned(), |kb| format!("{kb} kB"));
    println!("at the end: {resident} resident, {:?}\n{statistics:?}", load.tally);
    assert_eq!(load.tally.stuck, 0, "stuck requests");
    assert_eq!(statistics.kv.used_blocks, 0, "blocks in use");
    Ok(())
}
