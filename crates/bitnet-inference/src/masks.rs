//! Masks off the step thread.
//!
//! When a token of a constrained request is known, its grammar goes to a worker thread, which finds
//! the tokens that may come next while the step loop computes the token's logits. The mask is needed
//! only when these are sampled from. Where it is not there by then, the logits wait for it with their
//! request, which takes part in no step meanwhile; everybody else goes on.
//!
//! One worker serves all requests of a replica, in the order in which their tokens came: a mask takes microseconds
//! where a step takes milliseconds, and more threads would take cores from the kernels. The limits of
//! [`grammar`](crate::grammar) bound how long one can keep it.

use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{self, JoinHandle, Thread};

use crate::grammar::{ConstraintError, Grammar, STACK_BYTES};

type Advanced = Result<Grammar, ConstraintError>;

/// A grammar that goes on by a token.
struct Job {
    grammar: Grammar,
    token: u32,
    reply: Sender<Advanced>,
}

/// The thread that computes masks. It starts with the first of them.
#[derive(Default)]
pub(crate) struct MaskWorker {
    running: Option<(Sender<Job>, JoinHandle<()>)>,
}

impl MaskWorker {
    /// Takes a job. The calling thread is woken when it is done.
    fn take(&mut self, job: Job) {
        let running = match self.running.take() {
            Some(running) => Ok(running),
            None => MaskWorker::start(),
        };
        match running {
            Ok(running) => {
                // Were the thread gone, the lost reply would say so.
                let _ = running.0.send(job);
                self.running = Some(running);
            }
            Err(reason) => {
                let _ = job.reply.send(Err(ConstraintError::Unavailable { reason }));
            }
        }
    }

    fn start() -> Result<(Sender<Job>, JoinHandle<()>), String> {
        let (jobs, inbox) = channel();
        let step_thread = thread::current();
        let thread = thread::Builder::new()
            .name("bitnet-masks".to_owned())
            .stack_size(STACK_BYTES)
            .spawn(move || work(&inbox, &step_thread))
            .map_err(|error| format!("the thread for masks cannot be started: {error}"))?;
        Ok((jobs, thread))
    }
}

fn work(inbox: &Receiver<Job>, step_thread: &Thread) {
    for Job { mut grammar, token, reply } in inbox {
        let advanced = grammar.advance(token).map(|()| grammar);
        // A request that has ended needs no mask.
        let _ = reply.send(advanced);
        step_thread.unpark();
    }
}

impl Drop for MaskWorker {
    fn drop(&mut self) {
        if let Some((jobs, thread)) = self.running.take() {
            drop(jobs);
            // If it panicked, it has said so.
            let _ = thread.join();
        }
    }
}

/// The grammar of a request, wherever it is.
pub(crate) struct Guide {
    place: Place,
    /// Logits `[vocabulary]` that wait for the mask.
    late: Option<Vec<f32>>,
}

enum Place {
    Here(Advanced),
    /// With the worker.
    Away(Receiver<Advanced>),
}

impl Guide {
    /// At the beginning of an output.
    pub(crate) fn new(grammar: Grammar) -> Self {
        Guide { place: Place::Here(Ok(grammar)), late: None }
    }

    /// Looks whether the grammar has come back; true if it has just now.
    pub(crate) fn poll(&mut self) -> bool {
        let Place::Away(answer) = &self.place else { return false };
        self.place = Place::Here(match answer.try_recv() {
            Ok(advanced) => advanced,
            Err(TryRecvError::Empty) => return false,
            Err(TryRecvError::Disconnected) => Err(ConstraintError::Unavailable {
                reason: "the thread for masks has ended".to_owned(),
            }),
        });
        true
    }

    /// The grammar, or why there is none any more; `None` while it is with the worker.
    pub(crate) fn grammar(&self) -> Option<Result<&Grammar, &ConstraintError>> {
        match &self.place {
            Place::Here(advanced) => Some(advanced.as_ref()),
            Place::Away(_) => None,
        }
    }

    /// Sends the grammar on by a token.
    pub(crate) fn advance(&mut self, token: u32, worker: &mut MaskWorker) {
        let (reply, answer) = channel();
        // Without a grammar the reply is lost, which is an error of the request.
        if let Place::Here(Ok(grammar)) = std::mem::replace(&mut self.place, Place::Away(answer)) {
            worker.take(Job { grammar, token, reply });
        }
    }

    /// Lets logits wait for the mask.
    pub(crate) fn keep(&mut self, logits: &[f32]) {
        self.late = Some(logits.to_vec());
    }

    /// The logits that waited, if there are any.
    pub(crate) fn take_late(&mut self) -> Option<Vec<f32>> {
        self.late.take()
    }
}
