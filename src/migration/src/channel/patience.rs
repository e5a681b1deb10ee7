//! How long writes wait for a peer that reads slowly, or nothing.

use std::io;
use std::time::{Duration, Instant};

/// When a wait of so long ends that begins now. The longest that can be asked for ends after all of us.
pub(crate) fn deadline(patience: Duration) -> Instant {
    const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 60 * 60);
    Instant::now() + patience.min(LONGEST)
}

/// What a peer must read for patience not to end, bytes a second. At a tenth of it, memory of 1 GiB would
/// be under way for two days.
const SLOWEST: u64 = 64 << 10;

/// Waiting uses it up, and what the peer takes gives it back: a peer that takes a byte now and then ends
/// it as well as one that takes nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Patience {
    limit: Duration,
    used: Duration,
}

impl Patience {
    /// Waits for `limit`, all in all, for a peer that reads nothing.
    pub(crate) fn new(limit: Duration) -> Self {
        Self { limit, used: Duration::ZERO }
    }

    /// How long, all in all.
    pub(crate) fn limit(self) -> Duration {
        self.limit
    }

    /// As long, of which nothing is used up.
    pub(crate) fn unused(self) -> Self {
        Self::new(self.limit)
    }

    /// How long may be waited now.
    pub(crate) fn left(self) -> Duration {
        self.limit.saturating_sub(self.used)
    }

    /// It was waited for so long.
    pub(crate) fn waited(&mut self, time: Duration) {
        self.used = self.used.saturating_add(time);
    }

    /// The peer has room for so much, and so has read before.
    pub(crate) fn wrote(&mut self, bytes: u64) {
        let nanos = bytes.saturating_mul(1_000_000_000) / SLOWEST;
        self.used = self.used.saturating_sub(Duration::from_nanos(nanos));
    }

    /// Why it is not waited any longer.
    pub(crate) fn ended(self) -> io::Error {
        let (limit, slowest) = (self.limit, SLOWEST >> 10);
        let what = format!(
            "the other side has read nothing for {limit:?}, or for longer and less than {slowest} KiB a \
             second, so it is taken for gone; see what holds it up, and connect it anew"
        );
        io::Error::new(io::ErrorKind::TimedOut, what)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const SECOND: Duration = Duration::from_secs(1);

    #[test]
    fn what_is_read_gives_back_what_waiting_used_up_and_no_more() {
        let mut patience = Patience::new(30 * SECOND);
        patience.waited(10 * SECOND);
        patience.wrote(4 * SLOWEST);
        assert_eq!(patience.left(), 24 * SECOND);
        patience.wrote(u64::MAX);
        assert_eq!(patience.left(), 30 * SECOND);
        patience.waited(Duration::MAX);
        assert_eq!(patience.left(), Duration::ZERO);
        assert_eq!(patience.unused().left(), 30 * SECOND);
    }

    proptest! {
        /// However a peer reads: one that takes less than the slowest in every second is waited for no
        /// longer than is promised for what it took, and one that takes more is always waited for.
        #[test]
        fn a_slow_peer_is_waited_for_as_long_as_is_promised(
            limit in 0u64..100,
            reads in prop::collection::vec(0..3 * SLOWEST, 1..200),
        ) {
            let mut patience = Patience::new(SECOND * u32::try_from(limit).unwrap());
            let (mut waited, mut taken, mut least) = (0, 0, u64::MAX);
            for bytes in reads {
                if patience.left().is_zero() {
                    break;
                }
                patience.waited(SECOND.min(patience.left()));
                patience.wrote(bytes);
                (waited, taken, least) = (waited + 1, taken + bytes, least.min(bytes));
            }
            prop_assert!(waited <= limit + taken / SLOWEST + 1, "{} s for {} bytes", waited, taken);
            if least >= SLOWEST && limit > 0 {
                prop_assert!(!patience.left().is_zero());
            }
        }
    }
}
