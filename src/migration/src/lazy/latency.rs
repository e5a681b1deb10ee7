//! How long faults took, and who waited.

use std::collections::BTreeMap;
use std::time::Duration;

/// How many faults took how long: bucket `n` counts those of 2^n to 2^(n+1) microseconds, the
/// first also shorter ones, the last also longer ones (QEMU's postcopy-latency-dist).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Histogram {
    /// The buckets.
    pub buckets: [u64; 24],
    /// All of them.
    pub count: u64,
    /// All times together.
    pub total: Duration,
}

impl Histogram {
    /// Adds a fault.
    pub fn add(&mut self, took: Duration) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = (micros.max(1).ilog2() as usize).min(self.buckets.len() - 1);
        self.buckets[bucket] += 1;
        self.count += 1;
        self.total += took;
    }

    /// The time that `share` (0 to 1) of the faults took at most, to the next power of two.
    pub fn quantile(&self, share: f64) -> Option<Duration> {
        let wanted = (self.count as f64 * share).ceil() as u64;
        let mut seen = 0;
        for (bucket, &count) in self.buckets.iter().enumerate() {
            seen += count;
            if seen >= wanted && seen != 0 {
                return Some(Duration::from_micros(2 << bucket));
            }
        }
        None
    }
}

/// How faults were resolved.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FaultStatistics {
    /// Filled with zeros here: nothing comes from elsewhere.
    pub zero: Histogram,
    /// Asked for, and arrived.
    pub remote: Histogram,
    /// Faults on pages that had arrived by the time that the fault was looked at.
    pub arrived: u64,
    /// Discarded ranges whose memory could not be discarded again at the end.
    pub unswept: u64,
    /// How long each thread waited for pages it was the first to ask for (QEMU's blocktime).
    pub blocktime: BTreeMap<u32, Duration>,
}

impl FaultStatistics {
    /// A page was asked for and arrived.
    pub(super) fn remote(&mut self, (waited, thread): (Duration, u32)) {
        self.remote.add(waited);
        *self.blocktime.entry(thread).or_default() += waited;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_powers_of_two_of_microseconds() {
        let mut histogram = Histogram::default();
        for micros in [0, 1, 2, 3, 4, 1000, 1 << 40] {
            histogram.add(Duration::from_micros(micros));
        }
        assert_eq!(histogram.buckets[..3], [2, 2, 1]);
        assert_eq!((histogram.buckets[9], histogram.buckets[23]), (1, 1));
        assert_eq!(histogram.quantile(0.5), Some(Duration::from_micros(4)));
        assert_eq!(Histogram::default().quantile(0.5), None);
    }
}
