//! How fast memory that was not asked for is filled.

use std::time::Duration;

use migration::Bandwidth;
use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;

use crate::error::PagerError;
use crate::run::POLL;

/// Spreads what several threads fill over time.
pub(super) struct Pace {
    rate: Option<u64>,
    spent: Mutex<Spent>,
}

struct Spent {
    bandwidth: Bandwidth,
    bytes: u64,
}

impl Pace {
    /// So many bytes a second, if there is a limit.
    pub fn new(rate: Option<u64>) -> Self {
        let bandwidth = Bandwidth::new(rate, 0);
        Self { rate, spent: Mutex::new(Spent { bandwidth, bytes: 0 }) }
    }

    /// How many pages may be filled at a time, at most `most`: no more than the rate has in a hundredth of a
    /// second.
    pub fn pages(&self, most: u64) -> u64 {
        self.rate.map_or(most, |rate| (rate / 100 / TARGET_PAGE_SIZE).clamp(1, most))
    }

    /// Waits until more may be filled. `keep_on` says whether to wait any longer.
    ///
    /// # Errors
    ///
    /// Those of `keep_on`.
    pub fn wait(&self, keep_on: &dyn Fn() -> Result<(), PagerError>) -> Result<(), PagerError> {
        keep_on()?;
        while self.rate.is_some() {
            let pause = {
                let Spent { bandwidth, bytes } = &mut *self.spent.lock();
                bandwidth.spent(*bytes)
            };
            if pause == Duration::ZERO {
                break;
            }
            std::thread::sleep(pause.min(POLL));
            keep_on()?;
        }
        Ok(())
    }

    /// Notes that pages were filled.
    pub fn filled(&self, pages: u64) {
        self.spent.lock().bytes += pages * TARGET_PAGE_SIZE;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_beyond_the_rate_waits_and_is_asked_whether_to() {
        let pace = Pace::new(Some(10 << 20));
        assert_eq!(pace.pages(256), 25);
        assert_eq!(Pace::new(Some(1)).pages(256), 1);
        assert_eq!(Pace::new(None).pages(256), 256);
        pace.wait(&|| Ok(())).unwrap();
        pace.filled(1 << 20);
        // The next one waits.
        let asked = std::cell::Cell::new(0);
        let ended = pace.wait(&|| {
            asked.set(asked.get() + 1);
            if asked.get() > 1 { Err(PagerError::Interrupted) } else { Ok(()) }
        });
        assert!(matches!(ended, Err(PagerError::Interrupted)));
        assert_eq!(asked.get(), 2);
        // Without a rate nothing waits.
        let unlimited = Pace::new(None);
        unlimited.filled(1 << 40);
        unlimited.wait(&|| Ok(())).unwrap();
    }
}
