//! Keeping threads on processors of their own, where the operating system lets a program choose.

#[cfg(target_os = "linux")]
use std::fs;
use std::io;

/// Processors this thread may run on, one for each physical core first, then the others.
#[cfg(target_os = "linux")]
pub(crate) fn processors() -> io::Result<Vec<usize>> {
    use rustix::thread::{CpuSet, sched_getaffinity};

    let allowed = sched_getaffinity(None)?;
    let (mut first, mut others) = (Vec::new(), Vec::new());
    for cpu in (0..CpuSet::MAX_CPU).filter(|&cpu| allowed.is_set(cpu)) {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        // "0,64" or "0-1": the first number is the core's first thread. Without the file, each
        // processor is taken for a core.
        let siblings = fs::read_to_string(path).unwrap_or_default();
        let leader = siblings.split([',', '-']).next().and_then(|n| n.trim().parse().ok());
        if leader.is_none_or(|leader: usize| leader == cpu) {
            first.push(cpu);
        } else {
            others.push(cpu);
        }
    }
    first.append(&mut others);
    Ok(first)
}

/// Keeps the calling thread on one processor.
#[cfg(target_os = "linux")]
pub(crate) fn pin(processor: usize) -> io::Result<()> {
    use rustix::thread::{CpuSet, sched_setaffinity};

    let mut only = CpuSet::new();
    only.set(processor);
    Ok(sched_setaffinity(None, &only)?)
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn processors() -> io::Result<Vec<usize>> {
    Err(io::Error::new(io::ErrorKind::Unsupported, "threads can be pinned on Linux only"))
}

#[cfg(not(target_os = "linux"))]
pub(crate) fn pin(_processor: usize) -> io::Result<()> {
    processors().map(|_| ())
}
