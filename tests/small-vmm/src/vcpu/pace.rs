//! How fast vCPUs go: as fast as they can, at a rate, or held back by a migration.

use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

/// What keeps threads from running.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// Pages a second of all threads together; 0 for no limit.
    limit: AtomicU64,
    /// Share of the time, 0 to 99.
    throttle: AtomicU8,
}

impl Pace {
    pub(super) fn limit(&self, pages_per_second: Option<u64>) {
        self.limit.store(pages_per_second.unwrap_or(0), Ordering::Relaxed);
    }

    pub(super) fn throttle(&self, percent: u8) {
        self.throttle.store(percent.min(99), Ordering::Relaxed);
    }

    /// How long to rest after `pages` (of all threads) took `busy`.
    pub(super) fn rest(&self, pages: u64, busy: Duration) -> Duration {
        let limit = self.limit.load(Ordering::Relaxed);
        let at_rate = match limit {
            0 => busy,
            limit => busy.max(Duration::from_secs_f64(pages as f64 / limit as f64)),
        };
        let awake = 100 - u32::from(self.throttle.load(Ordering::Relaxed));
        (at_rate * 100 / awake).saturating_sub(busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rate_and_throttle_add_up() {
        let pace = Pace::default();
        let busy = Duration::from_millis(10);
        assert_eq!(pace.rest(100, busy), Duration::ZERO);
        pace.throttle(75);
        assert_eq!(pace.rest(100, busy), Duration::from_millis(30));
        pace.limit(Some(1000));
        assert_eq!(pace.rest(100, busy), Duration::from_millis(390));
        pace.throttle(0);
        assert_eq!(pace.rest(100, busy), Duration::from_millis(90));
        assert_eq!(pace.rest(5, busy), Duration::ZERO);
    }
}
