//! A count that takes long, shared by those who ask at the same time or shortly after.

use std::time::{Duration, Instant};

use parking_lot::Mutex;

/// A count is told again for so many times what it took, so that it takes a tenth of a processor at most,
/// however often it is asked for.
const FRESH_TIMES: u32 = 10;

/// What was counted last, and of what.
#[derive(Debug)]
pub(super) struct Recent<K> {
    last: Mutex<Option<Counted<K>>>,
    /// Held while it is counted.
    counting: Mutex<()>,
    /// For how long a count is told again, at least.
    fresh: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Counted<K> {
    of: K,
    count: u64,
    until: Instant,
}

impl<K: Copy + PartialEq> Recent<K> {
    /// Nothing was counted. What is, is told again for `fresh` at least.
    pub(super) fn new(fresh: Duration) -> Self {
        Self { last: Mutex::new(None), counting: Mutex::default(), fresh }
    }

    /// The last count of `of`, when it is recent or counted at this moment; else what `count` says, which
    /// is kept when it is at least `large`: what is small is counted at once.
    pub(super) fn get(
        &self,
        of: K,
        large: u64,
        count: impl FnOnce() -> Option<u64>,
    ) -> Option<u64> {
        let last = |recent: bool| {
            let last = self.last.lock().filter(|last| last.of == of);
            last.filter(|last| !recent || Instant::now() < last.until).map(|last| last.count)
        };
        if let Some(count) = last(true) {
            return Some(count);
        }
        let _counting = match self.counting.try_lock() {
            Some(counting) => counting,
            None => match last(false) {
                Some(count) => return Some(count),
                None => self.counting.lock(),
            },
        };
        // A count that another thread made meanwhile serves here, too.
        if let Some(count) = last(true) {
            return Some(count);
        }
        let began = Instant::now();
        let counted = count();
        let until = began.elapsed() * FRESH_TIMES + self.fresh;
        let kept = counted.filter(|count| *count >= large);
        *self.last.lock() = kept.and_then(|count| {
            Some(Counted { of, count, until: Instant::now().checked_add(until)? })
        });
        counted
    }

    /// Forgets it: it would be of something else.
    pub(super) fn forget(&self) {
        *self.last.lock() = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    #[test]
    fn a_large_count_is_told_again_and_a_small_one_is_made_again() {
        let recent = Recent::new(Duration::from_secs(3600));
        let counts = Cell::new(0);
        let get = |of: u32, result| {
            let count = || {
                counts.set(counts.get() + 1);
                result
            };
            (recent.get(of, 10, count), counts.get())
        };
        assert_eq!(get(1, Some(9)), (Some(9), 1));
        assert_eq!(get(1, Some(10)), (Some(10), 2));
        assert_eq!(get(1, Some(11)), (Some(10), 2));
        assert_eq!(get(2, Some(12)), (Some(12), 3), "of something else");
        recent.forget();
        assert_eq!(get(2, None), (None, 4));
        assert_eq!(get(2, Some(13)), (Some(13), 5));
    }

    #[test]
    fn a_count_that_is_not_recent_is_told_while_it_is_made_anew() {
        let recent = Recent::new(Duration::from_secs(3600));
        assert_eq!(recent.get(1, 0, || Some(5)), Some(5));
        recent.last.lock().as_mut().unwrap().until = Instant::now();
        let inner = || recent.get(1, 0, || unreachable!("it is counted already"));
        assert_eq!(recent.get(1, 0, || inner().map(|old| old + 1)), Some(6));
    }
}
