//! What the threads of both sides have in common: how they start, end and fail, and how long they are waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::{Builder, JoinHandle};
use std::time::{Duration, Instant};

use super::of_channel;
use crate::channel::patience::Patience;
use crate::error::MigrationError;

/// How often a wait looks whether it is cancelled.
pub(super) const MOMENT: Duration = Duration::from_millis(20);

/// Starts the thread of a channel. How `serve` ended is told to `ended`, also when it has panicked.
pub(super) fn start(
    number: usize,
    serve: impl FnOnce() -> Result<(), MigrationError> + Send + 'static,
    ended: impl FnMut(Result<(), MigrationError>) + Send + 'static,
) -> Result<JoinHandle<()>, MigrationError> {
    let thread = Builder::new().name(format!("pages-{number}")).spawn(move || {
        let mut telling = Telling { served: None, ended };
        telling.served = Some(serve());
    });
    thread.map_err(MigrationError::io("start a thread"))
}

/// Tells when it is dropped.
struct Telling<F: FnMut(Result<(), MigrationError>)> {
    /// `None` until the thread has served, and when it has panicked.
    served: Option<Result<(), MigrationError>>,
    ended: F,
}

impl<F: FnMut(Result<(), MigrationError>)> Drop for Telling<F> {
    fn drop(&mut self) {
        let panicked = || Err(MigrationError::OnChannel("its thread has panicked".to_owned()));
        (self.ended)(self.served.take().unwrap_or_else(panicked));
    }
}

/// The first failure of several threads, which is the reason of all.
#[derive(Default)]
pub(super) struct FirstFailure {
    error: Option<MigrationError>,
    has_failed: bool,
}

impl FirstFailure {
    pub(super) fn set(&mut self, number: usize, error: MigrationError) {
        if !self.has_failed {
            self.error = Some(of_channel(number, error));
        }
        self.has_failed = true;
    }

    pub(super) fn has_failed(&self) -> bool {
        self.has_failed
    }

    /// Why, once.
    pub(super) fn take(&mut self) -> Option<MigrationError> {
        self.error.take()
    }

    /// Fails once one has failed: the first time for its reason, then since its channel is closed while `what`.
    pub(super) fn check(&mut self, what: &'static str) -> Result<(), MigrationError> {
        match self.take() {
            Some(error) => Err(error),
            None if self.has_failed => Err(MigrationError::ChannelClosed(what)),
            None => Ok(()),
        }
    }
}

/// Patience with all threads, which lasts while bytes pass through any of them.
pub(crate) struct Watch {
    bytes: Arc<AtomicU64>,
    seen: u64,
    patience: Patience,
}

impl Watch {
    /// Waits for `limit`, all in all, while `bytes`, which counts what passes, does not grow.
    pub(super) fn new(limit: Duration, bytes: &Arc<AtomicU64>) -> Self {
        let (bytes, seen) = (Arc::clone(bytes), bytes.load(Ordering::Relaxed));
        Self { bytes, seen, patience: Patience::new(limit) }
    }

    /// It was waited since `begin`.
    pub(super) fn waited(&mut self, begin: Instant) {
        let passed = self.bytes.load(Ordering::Relaxed);
        self.patience.waited(begin.elapsed());
        self.patience.wrote(passed - std::mem::replace(&mut self.seen, passed));
    }

    /// The patience that is left.
    pub(super) fn patience(&self) -> Patience {
        self.patience
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn how_a_thread_ended_is_told_also_when_it_has_panicked() {
        let (tell, told) = channel();
        let ends: [fn() -> Result<(), MigrationError>; 3] =
            [|| Ok(()), || Err(MigrationError::Cancelled), || panic!("as a test has it")];
        for (number, serve) in ends.into_iter().enumerate() {
            let tell = tell.clone();
            let ended = move |served: Result<(), MigrationError>| {
                tell.send(served.map_err(|error| error.to_string())).unwrap();
            };
            let _ = start(number, serve, ended).unwrap().join();
        }
        let told: Vec<_> = told.try_iter().collect();
        assert_eq!(told[0], Ok(()));
        assert_eq!(told[1], Err(MigrationError::Cancelled.to_string()));
        assert!(told[2].as_ref().unwrap_err().contains("its thread has panicked"), "{told:?}");
        assert_eq!(told.len(), 3);
    }

    #[test]
    fn the_first_failure_is_the_reason_of_all_and_told_once() {
        let mut failure = FirstFailure::default();
        failure.check("pages were being sent").unwrap();
        failure.set(1, MigrationError::Unexpected("first".to_owned()));
        failure.set(0, MigrationError::Unexpected("second".to_owned()));
        assert!(failure.has_failed());
        let first = failure.check("pages were being sent").unwrap_err().to_string();
        assert!(first.contains("first") && first.contains('1'), "{first}");
        let then = failure.check("pages were being sent").unwrap_err();
        assert!(matches!(then, MigrationError::ChannelClosed("pages were being sent")), "{then}");
    }
}
