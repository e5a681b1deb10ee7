//! So many bytes a second of what cannot be split, on a clock that the caller reads.

use std::time::{Duration, Instant};

use super::WINDOW;

/// Bytes, in units of 10^-9, so that none is lost between two looks at the clock.
const BYTE: i128 = 1_000_000_000;

/// What may be sent fills up by the rate, to what is due in a tenth of a second. What is sent beyond it
/// is owed: nothing more is due before that is paid back.
#[derive(Clone, Debug)]
pub struct TokenBucket {
    /// Bytes a second.
    rate: u64,
    /// What may be sent; what is owed where it is negative.
    level: i128,
    /// When it was looked at.
    at: Instant,
}

impl TokenBucket {
    /// Full at `now`; none for a rate of 0, which is no limit.
    pub fn new(now: Instant, rate: u64) -> Option<Self> {
        let bucket = Self { rate, level: 0, at: now };
        (rate != 0).then(|| Self { level: bucket.most(), ..bucket })
    }

    /// The same at another rate from `now` on; none for a rate of 0. What is owed stays owed.
    pub fn at_rate(mut self, now: Instant, rate: u64) -> Option<Self> {
        self.budget(now);
        let full = Self::new(now, rate)?;
        Some(Self { level: self.level.min(full.level), ..full })
    }

    /// What is due in a tenth of a second, and not less than a byte: else there would never be one.
    fn most(&self) -> i128 {
        (i128::from(self.rate) * WINDOW.as_nanos().cast_signed()).max(BYTE)
    }

    /// How many bytes may be sent at `now`. What then is sent is [charged](Self::charge), though it is
    /// more, since it could not be split.
    pub fn budget(&mut self, now: Instant) -> u64 {
        let time = now.saturating_duration_since(self.at).as_nanos();
        let due = i128::try_from(time).unwrap_or(i128::MAX).saturating_mul(self.rate.into());
        (self.level, self.at) = (self.level.saturating_add(due).min(self.most()), now);
        u64::try_from(self.level / BYTE).unwrap_or(0)
    }

    /// So much was sent.
    pub fn charge(&mut self, bytes: u64) {
        self.level -= i128::from(bytes) * BYTE;
    }

    /// How long from the last look on until a byte may be sent.
    pub fn pause(&self) -> Duration {
        let lacks = u128::try_from(BYTE - self.level).unwrap_or(0);
        let nanos = lacks.div_ceil(self.rate.into());
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MILLISECOND: Duration = Duration::from_millis(1);

    #[test]
    fn what_is_sent_beyond_the_limit_is_paid_back() {
        let begin = Instant::now();
        let mut bucket = TokenBucket::new(begin, 1 << 20).unwrap();
        assert_eq!(bucket.budget(begin), (1 << 20) / 10);
        // A page of 1 GiB at 1 MiB a second.
        bucket.charge(1 << 30);
        let (at, owed) = (begin + bucket.pause(), Duration::from_secs(1024));
        assert!(bucket.pause() > owed - WINDOW && bucket.pause() < owed);
        assert_eq!(bucket.clone().budget(at - MILLISECOND), 0);
        assert_eq!(bucket.budget(at), 1);
        assert_eq!(bucket.pause(), Duration::ZERO);
        // Not more than is due in a tenth of a second is saved up.
        assert_eq!(bucket.budget(at + Duration::from_secs(3600)), (1 << 20) / 10);
    }

    #[test]
    fn what_is_owed_stays_owed_at_another_rate() {
        let begin = Instant::now();
        let mut bucket = TokenBucket::new(begin, 100).unwrap();
        bucket.charge(1010);
        assert_eq!(bucket.pause(), Duration::from_millis(10_010));
        // Half of it is paid back by then.
        let mut faster = bucket.at_rate(begin + Duration::from_secs(5), 1000).unwrap();
        assert_eq!(faster.pause(), Duration::from_millis(501));
        assert_eq!(faster.budget(begin + Duration::from_secs(60)), 100);
        // What was saved up is no more than the new rate has in a tenth of a second.
        let mut slower = faster.clone().at_rate(begin + Duration::from_secs(60), 10).unwrap();
        assert_eq!(slower.budget(begin + Duration::from_secs(60)), 1);
        assert!(slower.at_rate(begin, 0).is_none());
    }

    #[test]
    fn a_rate_of_0_is_none_and_the_least_rate_is_a_byte_a_second() {
        let begin = Instant::now();
        assert!(TokenBucket::new(begin, 0).is_none());
        let mut bucket = TokenBucket::new(begin, 1).unwrap();
        assert_eq!(bucket.budget(begin), 1);
        bucket.charge(1);
        assert_eq!((bucket.budget(begin), bucket.pause()), (0, Duration::from_secs(1)));
        assert_eq!(bucket.budget(begin + Duration::from_secs(1)), 1);
    }

    #[test]
    fn no_rate_and_no_size_overflows() {
        let begin = Instant::now();
        let later = begin + Duration::from_secs(1 << 31);
        for rate in [1, u64::MAX] {
            let mut bucket = TokenBucket::new(begin, rate).unwrap();
            bucket.charge(u64::MAX);
            bucket.charge(u64::MAX);
            assert_eq!(bucket.budget(begin), 0);
            assert!(bucket.pause() >= Duration::from_millis(1800));
            bucket.budget(later);
            // A clock that another thread has read before.
            bucket.budget(begin);
        }
    }

    proptest! {
        /// A model that looks at the clock every millisecond, at rates of which it can count each byte.
        #[test]
        fn a_bucket_is_as_a_model_that_counts_each_millisecond(
            bytes_per_millisecond in 1u64..1000,
            steps in prop::collection::vec((0u32..400, 0u64..500_000), 1..60),
        ) {
            let begin = Instant::now();
            let mut bucket = TokenBucket::new(begin, bytes_per_millisecond * 1000).unwrap();
            let most = i64::try_from(bytes_per_millisecond * 100).unwrap();
            let (mut level, mut now) = (most, 0);
            for (milliseconds, bytes) in steps {
                for _ in 0..milliseconds {
                    level = most.min(level + most / 100);
                }
                now += milliseconds;
                let at = begin + MILLISECOND * now;
                prop_assert_eq!(bucket.budget(at), u64::try_from(level).unwrap_or(0));
                // Sent only when something may be, and then a whole of it.
                if level > 0 {
                    bucket.charge(bytes);
                    level -= i64::try_from(bytes).unwrap();
                }
                // A byte may be sent when the pause is over, and not before.
                let pause = bucket.pause();
                prop_assert_eq!(bucket.clone().budget(at + pause) > 0, true);
                if let Some(before) = pause.checked_sub(Duration::from_nanos(1)) {
                    prop_assert_eq!(bucket.clone().budget(at + before), 0);
                }
            }
        }
    }
}
