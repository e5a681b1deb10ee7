//! The freeze of one client, which ends when it is not renewed.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// Whether a client holds block state frozen, and until when.
#[derive(Debug)]
pub(super) struct Lease {
    expiry: Duration,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Number of the last freeze.
    number: u64,
    /// When it ends; `None` when it has.
    deadline: Option<Instant>,
}

impl Lease {
    pub(super) fn new(expiry: Duration) -> Self {
        Self { expiry, inner: Mutex::default() }
    }

    /// A freeze has begun, or is asked for again while it lasts: its number.
    pub(super) fn begin(&self, now: Instant) -> u64 {
        let mut inner = self.inner.lock();
        if inner.deadline.is_none() {
            inner.number += 1;
        }
        inner.deadline = Some(now + self.expiry);
        inner.number
    }

    /// Puts the end off; false when this freeze has ended.
    pub(super) fn renew(&self, number: u64, now: Instant) -> bool {
        let mut inner = self.inner.lock();
        let held = inner.number == number && inner.deadline.is_some_and(|deadline| now < deadline);
        if held {
            inner.deadline = Some(now + self.expiry);
        }
        held
    }

    /// Ends it; false when it had ended.
    pub(super) fn end(&self, number: u64) -> bool {
        let mut inner = self.inner.lock();
        inner.number == number && inner.deadline.take().is_some()
    }

    /// For how long it still lasts; `None` when there is none.
    pub(super) fn left(&self, now: Instant) -> Option<Duration> {
        let deadline = self.inner.lock().deadline?;
        Some(deadline.saturating_duration_since(now))
    }

    /// Ends it when it is over; its number then.
    pub(super) fn expire(&self, now: Instant) -> Option<u64> {
        let mut inner = self.inner.lock();
        inner.deadline.take_if(|deadline| *deadline <= now)?;
        Some(inner.number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_lasts_as_long_as_it_is_renewed() {
        let second = Duration::from_secs(1);
        let lease = Lease::new(30 * second);
        let start = Instant::now();
        assert_eq!((lease.left(start), lease.expire(start)), (None, None));
        assert!(!lease.renew(0, start) && !lease.end(0), "there is none");
        assert_eq!(lease.begin(start), 1);
        assert!(lease.renew(1, start + 29 * second));
        assert_eq!(lease.begin(start + 30 * second), 1, "the same one");
        assert_eq!(lease.left(start + 31 * second), Some(29 * second));
        assert_eq!(lease.expire(start + 59 * second), None);
        assert!(!lease.renew(1, start + 60 * second), "too late, though nothing has ended it yet");
        assert_eq!(lease.expire(start + 60 * second), Some(1));
        assert!(!lease.renew(1, start + 61 * second) && !lease.end(1));
        assert_eq!(lease.begin(start + 62 * second), 2);
        assert!(!lease.renew(1, start + 63 * second) && !lease.end(1), "of another freeze");
        assert!(lease.end(2));
        assert_eq!(lease.left(start + 64 * second), None);
    }
}
