//! What a channel takes, and what may be spent of it.
//!
//! Time in which nothing is sent on purpose, as that in which dirty pages are collected, does not count: the
//! channel is no slower for it.
//!
//! What is allowed is counted in bytes on the wire. How long the rest takes is not: a page of zeros is 9
//! bytes there, and a whole page of what is left. So that is counted in what less is left.

use std::time::{Duration, Instant};

pub use token_bucket::TokenBucket;

mod token_bucket;

/// How long bandwidth is measured for before it is believed (QEMU's BUFFER_DELAY).
const WINDOW: Duration = Duration::from_millis(100);

/// Measures what is sent, and spends no more than is allowed.
#[derive(Debug)]
pub struct Bandwidth {
    limit: Option<u64>,
    window_start: Instant,
    window_bytes: u64,
    /// What less is left since the window began, bytes.
    window_handled: u64,
    per_second: Option<f64>,
}

impl Bandwidth {
    /// At most `limit` bytes a second; 0 is no limit.
    pub fn new(limit: Option<u64>, written: u64) -> Self {
        Self::new_at(Instant::now(), limit, written)
    }

    pub(crate) fn new_at(now: Instant, limit: Option<u64>, written: u64) -> Self {
        Self {
            limit: limit.filter(|&limit| limit != 0),
            window_start: now,
            window_bytes: written,
            window_handled: 0,
            per_second: None,
        }
    }

    /// From now on at most `limit` bytes a second; 0 is no limit. How fast that is, is measured anew.
    pub fn set_limit(&mut self, limit: Option<u64>, written: u64) {
        self.set_limit_at(Instant::now(), limit, written);
    }

    fn set_limit_at(&mut self, now: Instant, limit: Option<u64>, written: u64) {
        let limit = limit.filter(|&limit| limit != 0);
        if limit == self.limit {
            return;
        }
        *self = Self::new_at(now, limit, written);
    }

    /// What goes between two looks at what is left, bytes.
    pub(crate) fn step(&self) -> u64 {
        self.budget(self.window_bytes)
    }

    /// Bytes a second, as what less is left; `None` as long as nothing was measured.
    pub(crate) fn per_second(&self) -> Option<f64> {
        self.per_second.filter(|&per_second| per_second > 0.0)
    }

    /// One that was measured.
    #[cfg(test)]
    pub(crate) fn measured(per_second: f64) -> Self {
        Self { per_second: Some(per_second), ..Self::new(None, 0) }
    }

    /// What may be written before the next [`spent`](Self::spent), bytes.
    pub fn budget(&self, written: u64) -> u64 {
        /// Without a limit, so much that what is cancelled or refused is soon noticed.
        const UNLIMITED: u64 = 64 << 20;
        let Some(limit) = self.limit else { return UNLIMITED };
        let window = (limit as f64 * WINDOW.as_secs_f64()) as u64;
        let left = window.saturating_sub(written - self.window_bytes);
        left.clamp(1, UNLIMITED)
    }

    /// Leaves time out in which nothing could be sent; it has just passed.
    pub fn leave_out(&mut self, time: Duration) {
        self.window_start += time;
    }

    /// Takes note of what was sent, as bytes of which there are as many less to send.
    pub fn handled(&mut self, bytes: u64) {
        self.window_handled += bytes;
    }

    /// Takes note of what was written; how long to wait before more may be.
    pub fn spent(&mut self, written: u64) -> Duration {
        self.spent_at(Instant::now(), written)
    }

    pub(crate) fn spent_at(&mut self, now: Instant, written: u64) -> Duration {
        let elapsed = now.saturating_duration_since(self.window_start);
        let bytes = written - self.window_bytes;
        if let Some(limit) = self.limit {
            let allowed = limit as f64 * WINDOW.as_secs_f64();
            if bytes as f64 >= allowed && elapsed < WINDOW {
                return WINDOW - elapsed;
            }
        }
        // The first figure is wanted early: a small guest is sent in less than a window.
        if elapsed >= WINDOW || self.per_second.is_none() {
            self.per_second = Some(self.window_handled as f64 / elapsed.as_secs_f64().max(1e-6));
        }
        if elapsed >= WINDOW {
            (self.window_start, self.window_bytes, self.window_handled) = (now, written, 0);
        }
        Duration::ZERO
    }

    /// How long `bytes` that are left would take; `None` as long as nothing was measured.
    pub fn time_for(&self, bytes: u64) -> Option<Duration> {
        let per_second = self.per_second()?;
        Duration::try_from_secs_f64(bytes as f64 / per_second).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_gives_a_budget_for_each_window() {
        let mut bandwidth = Bandwidth::new(Some(10 << 20), 500);
        assert_eq!(bandwidth.budget(500), 1 << 20);
        assert_eq!(bandwidth.budget(500 + (1 << 19)), 1 << 19);
        assert_eq!(bandwidth.budget(500 + (2 << 20)), 1);
        assert!(bandwidth.spent(500 + (1 << 20)) > Duration::ZERO);
        assert_eq!(Bandwidth::new(None, 0).time_for(1), None);
        assert_eq!(Bandwidth::new(Some(0), 0).budget(1 << 40), Bandwidth::new(None, 0).budget(0));
    }

    #[test]
    fn another_limit_holds_at_once_and_how_fast_it_is_is_measured_anew() {
        let mut bandwidth = Bandwidth::new(Some(10 << 20), 0);
        let begin = bandwidth.window_start;
        bandwidth.handled(1 << 20);
        assert_eq!(bandwidth.spent_at(begin + WINDOW, 1 << 20), Duration::ZERO);
        assert_eq!(bandwidth.time_for(10 << 20), Some(Duration::from_secs(1)));
        // The same again changes nothing.
        bandwidth.set_limit_at(begin + 2 * WINDOW, Some(10 << 20), 1 << 20);
        assert_eq!(bandwidth.time_for(10 << 20), Some(Duration::from_secs(1)));
        bandwidth.set_limit_at(begin + 2 * WINDOW, Some(100 << 20), 1 << 20);
        assert_eq!((bandwidth.time_for(1), bandwidth.budget(1 << 20)), (None, 10 << 20));
        bandwidth.handled(10 << 20);
        assert_eq!(bandwidth.spent_at(begin + 3 * WINDOW, 11 << 20), Duration::ZERO);
        assert_eq!(bandwidth.time_for(10 << 20), Some(WINDOW));
        bandwidth.set_limit_at(begin + 3 * WINDOW, Some(0), 11 << 20);
        assert_eq!(bandwidth.budget(11 << 20), Bandwidth::new(None, 0).budget(0));
    }

    #[test]
    fn zeros_count_as_pages_for_the_time_and_as_bytes_for_the_limit() {
        let mut bandwidth = Bandwidth::new(Some(10 << 20), 0);
        let pages = 25_600;
        bandwidth.handled(pages * 4096);
        let begin = bandwidth.window_start;
        assert_eq!(bandwidth.budget(pages * 9), (1 << 20) - pages * 9);
        assert_eq!(bandwidth.spent_at(begin + WINDOW, pages * 9), Duration::ZERO);
        assert_eq!(bandwidth.time_for(300 << 20), Some(Duration::from_millis(300)));
        assert_eq!(bandwidth.budget(pages * 9), 1 << 20);
    }

    #[test]
    fn time_that_is_left_out_makes_the_channel_no_slower() {
        let mut bandwidth = Bandwidth::new(None, 0);
        let sync = Duration::from_millis(400);
        bandwidth.leave_out(sync);
        let now = bandwidth.window_start + Duration::from_millis(100);
        bandwidth.handled(100 << 20);
        assert_eq!(bandwidth.spent_at(now, 100 << 20), Duration::ZERO);
        assert_eq!(bandwidth.time_for(200 << 20), Some(Duration::from_millis(200)));
    }
}
