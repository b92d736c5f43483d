//! Places for requests, before any of them is scheduled.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// No place for another request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{limit} requests are running or waiting, and there is no place for more: try again later")]
pub struct QueueFull {
    /// Requests there is place for.
    pub limit: usize,
}

/// Places for requests, running and waiting ones alike, at all replicas together. Whoever submits
/// takes one first, so that a refusal is immediate and nothing grows without bound.
#[derive(Debug)]
pub(crate) struct Places {
    limit: usize,
    taken: AtomicUsize,
    /// Of those, how many at each replica.
    of_replicas: Vec<AtomicUsize>,
}

impl Places {
    pub(crate) fn new(limit: usize, replicas: usize) -> Arc<Self> {
        let of_replicas = (0..replicas).map(|_| AtomicUsize::new(0)).collect();
        Arc::new(Places { limit, taken: AtomicUsize::new(0), of_replicas })
    }

    /// Takes a place until it is dropped: at the replica with the fewest requests, the first of
    /// equals, and at one that has `ended` only if all have.
    pub(crate) fn enter(
        self: &Arc<Self>,
        ended: impl Fn(usize) -> bool,
    ) -> Result<Place, QueueFull> {
        let more = |taken| (taken < self.limit).then_some(taken + 1);
        if self.taken.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_err() {
            return Err(QueueFull { limit: self.limit });
        }
        let requests = |replica: &usize| self.of_replicas[*replica].load(Ordering::Relaxed);
        let replica = (0..self.of_replicas.len())
            .min_by_key(|replica| (ended(*replica), requests(replica)))
            .expect("there is a replica");
        self.of_replicas[replica].fetch_add(1, Ordering::Relaxed);
        Ok(Place { places: Arc::clone(self), replica })
    }
}

/// One of the [`Places`].
#[derive(Debug)]
pub(crate) struct Place {
    places: Arc<Places>,
    replica: usize,
}

impl Place {
    /// The replica it is at.
    pub(crate) fn replica(&self) -> usize {
        self.replica
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.places.of_replicas[self.replica].fetch_sub(1, Ordering::Relaxed);
        self.places.taken.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
impl Places {
    pub(crate) fn limit(&self) -> usize {
        self.limit
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}
