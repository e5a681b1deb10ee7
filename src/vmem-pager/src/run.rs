//! What ends a run early: a signal, or the time that it may take.
//!
//! Everything that waits polls [`Run::check`], or a [`Progress`] that is cancelled with the run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use migration::Progress;
use parking_lot::Mutex;
use program::signals::{SIGINT, SIGTERM, Signals};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::error::PagerError;

/// A peer that neither sends nor reads anything for this long is taken for gone.
pub const SILENCE: Duration = Duration::from_secs(60);
/// How often a wait looks whether the run has ended.
pub const POLL: Duration = Duration::from_millis(50);

/// One run of the program, and what ends it early.
#[derive(Debug)]
pub struct Run {
    /// What can be seen of it. Cancelled once the run is to end.
    pub progress: Arc<Progress>,
    begun: Instant,
    timeout: Option<Duration>,
    /// How long a peer may be silent.
    silence: Duration,
    why: Mutex<Option<Why>>,
    /// Neither signals nor time end it any more.
    held: AtomicBool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Why {
    Signal,
    Time,
}

impl Run {
    /// Begins now, and may take as long as `timeout`, if there is one.
    pub fn new(timeout: Option<Duration>) -> Arc<Self> {
        Self::with_silence(timeout, SILENCE)
    }

    /// As [`Run::new`], with another bound for the silence of a peer.
    pub fn with_silence(timeout: Option<Duration>, silence: Duration) -> Arc<Self> {
        let progress = Arc::new(Progress::new());
        let (begun, why, held) = (Instant::now(), Mutex::new(None), AtomicBool::new(false));
        Arc::new(Self { progress, begun, timeout, silence, why, held })
    }

    /// How long a peer may be silent before it is taken for gone.
    pub fn silence(&self) -> Duration {
        self.silence
    }

    /// How long the run may still take; `None` without a bound.
    pub fn left(&self) -> Option<Duration> {
        self.timeout.map(|timeout| timeout.saturating_sub(self.begun.elapsed()))
    }

    /// Ends the run on SIGTERM and SIGINT, and when its time is over, by a thread that lives as long as
    /// the process.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub fn watch(self: &Arc<Self>, signals: Signals) -> Result<(), PagerError> {
        let run = Arc::clone(self);
        let watch = move || {
            let wait = Timespec { tv_sec: 0, tv_nsec: POLL.subsec_nanos().into() };
            loop {
                // An error may only be an interruption.
                let _ = poll(&mut [PollFd::new(&signals, PollFlags::IN)], Some(&wait));
                match signals.next() {
                    Ok(Some(SIGTERM | SIGINT)) => run.end(Why::Signal),
                    Ok(_) => {}
                    Err(_) => thread::sleep(POLL),
                }
                let _ = run.check("");
            }
        };
        let thread = thread::Builder::new().name("signals".to_owned()).spawn(watch);
        thread.map(drop).map_err(PagerError::system("start a thread"))
    }

    /// Ends the run as a signal does.
    pub fn interrupt(&self) {
        self.end(Why::Signal);
    }

    /// From here on neither a signal nor the time ends the run: ending it would lose a guest. What a peer is
    /// silent for still does.
    pub fn hold(&self) {
        self.held.store(true, Ordering::Release);
    }

    fn end(&self, why: Why) {
        if self.held.load(Ordering::Acquire) {
            return;
        }
        self.why.lock().get_or_insert(why);
        self.progress.cancel();
    }

    /// Whether the run continues; `what` is what is waited for, as "QEMU has not connected".
    ///
    /// # Errors
    ///
    /// Why it does not.
    pub fn check(&self, what: &str) -> Result<(), PagerError> {
        if self.left() == Some(Duration::ZERO) {
            self.end(Why::Time);
        }
        match *self.why.lock() {
            None => Ok(()),
            Some(Why::Signal) => Err(PagerError::Interrupted),
            Some(Why::Time) => {
                let after = self.timeout.unwrap_or_default();
                Err(PagerError::TimedOut { what: what.to_owned(), after })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_ends_by_the_first_reason_and_cancels_what_it_does() {
        let run = Run::new(Some(Duration::ZERO));
        assert!(!run.progress.is_cancelled());
        let error = run.check("QEMU has not connected").unwrap_err();
        assert_eq!(error.to_string(), "timed out after 0 s: QEMU has not connected");
        assert_eq!(error.exit_status(), 3);
        run.interrupt();
        assert_eq!(run.check("").unwrap_err().exit_status(), 3);
        assert!(run.progress.is_cancelled());

        let held = Run::new(Some(Duration::ZERO));
        held.hold();
        held.interrupt();
        held.check("").unwrap();
        assert!(!held.progress.is_cancelled());

        let run = Run::new(None);
        run.check("").unwrap();
        run.interrupt();
        assert!(matches!(run.check(""), Err(PagerError::Interrupted)));
        assert!(run.progress.is_cancelled());
    }
}
