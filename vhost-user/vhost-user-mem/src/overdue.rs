//! A bound on the end of a connection.

use std::io;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread;
use std::time::Duration;

/// How long an end may take.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// While nothing is done that takes its time.
    pub idle: Duration,
    /// Altogether.
    pub total: Duration,
}

/// Watches the end of a connection from a thread of its own, which is there before the end begins:
/// then there may be no other thread to be had.
#[derive(Debug)]
pub struct Overdue {
    begin: Sender<()>,
}

impl Overdue {
    /// Calls `give_up` when an end that has [begun](Self::begin) is not over (this value dropped)
    /// in time. What is done while `busy` is not held against it, up to the total.
    ///
    /// # Errors
    ///
    /// When there is no thread to be had.
    pub fn new(
        patience: Patience,
        busy: impl Fn() -> bool + Send + 'static,
        give_up: impl FnOnce() + Send + 'static,
    ) -> io::Result<Self> {
        let (begin, begun) = channel();
        let watch = move || {
            if begun.recv().is_err() {
                return;
            }
            let step = patience.idle / 10;
            let (mut idle, mut total) = (Duration::ZERO, Duration::ZERO);
            while idle < patience.idle && total < patience.total {
                if begun.recv_timeout(step) != Err(RecvTimeoutError::Timeout) {
                    return;
                }
                total += step;
                idle = if busy() { Duration::ZERO } else { idle + step };
            }
            give_up();
        };
        thread::Builder::new().name("overdue".to_owned()).spawn(watch)?;
        Ok(Self { begin })
    }

    /// The end begins; it is over when this value is dropped.
    pub fn begin(&self) {
        // The thread is there until then.
        let _ = self.begin.send(());
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    const SHORT: Patience =
        Patience { idle: Duration::from_millis(20), total: Duration::from_millis(200) };

    /// An end that is over after `lasts`: whether it was given up.
    fn given_up(patience: Patience, busy: bool, lasts: Option<Duration>) -> bool {
        let given_up = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&given_up);
        let (said, hear) = channel();
        let give_up = move || {
            flag.store(true, Ordering::SeqCst);
            let _ = said.send(());
        };
        let overdue = Overdue::new(patience, move || busy, give_up).unwrap();
        overdue.begin();
        match lasts {
            // `hear` fails when the watch has ended without giving up.
            None => hear.recv().unwrap_or(()),
            Some(lasts) => thread::sleep(lasts),
        }
        drop(overdue);
        let _ = hear.recv();
        given_up.load(Ordering::SeqCst)
    }

    #[test]
    fn an_end_that_is_stuck_is_given_up_busy_or_not() {
        assert!(given_up(SHORT, false, None));
        assert!(given_up(SHORT, true, None));
    }

    #[test]
    fn an_end_that_is_over_is_not() {
        let long = Patience { idle: Duration::from_secs(60), total: Duration::from_secs(60) };
        assert!(!given_up(long, false, Some(Duration::ZERO)));
        let busy = Patience { idle: Duration::from_millis(20), ..long };
        assert!(!given_up(busy, true, Some(Duration::from_millis(100))));
    }

    #[test]
    fn a_connection_that_has_not_ended_is_not_watched() {
        let (said, hear) = channel();
        let overdue = Overdue::new(SHORT, || false, move || said.send(()).unwrap()).unwrap();
        thread::sleep(Duration::from_millis(60));
        drop(overdue);
        assert!(hear.recv().is_err());
    }
}
