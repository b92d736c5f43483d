//! A hub on this machine with one model, for other programs and for looking at: `hub REPOSITORY FOLDER
//! [KILOBYTES_PER_SECOND]` prints its address and serves until stdin is closed.

use std::io::{self, Read};
use std::path::Path;
use std::time::Duration;

use bitnet_testing::hub::HubEmulator;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let (repository, folder, pace) = match arguments.as_slice() {
        [repository, folder] => (repository, folder, None),
        [repository, folder, pace] => (repository, folder, pace.parse::<usize>().ok()),
        _ => {
            eprintln!("usage: hub REPOSITORY FOLDER [KILOBYTES_PER_SECOND]");
            std::process::exit(2);
        }
    };
    let hub = HubEmulator::start();
    if let Some(kilobytes) = pace.filter(|&kilobytes| kilobytes > 0) {
        hub.set_pace(kilobytes * 50, Duration::from_millis(50));
    }
    hub.add_folder(repository, Path::new(folder));
    println!("{}", hub.endpoint());
    let _ = io::stdin().read_to_end(&mut Vec::new());
}
