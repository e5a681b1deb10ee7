//! For how long clients may keep the guest waiting.

use std::time::{Duration, Instant};

/// The shortest round, as a part of the whole. With rounds of a half, a quarter and so on, all rounds
/// of a change together are little more than twice the first.
const SHORTEST: u32 = 64;

/// What is left of the time that all clients together may keep changes waiting.
///
/// It is used while a change waits for any client, and regained as time passes in which no change is
/// under way. When it is used up, the clients that used it are dropped, and the others get a round
/// half as long: so a change waits for a bounded time whatever clients and ranges it has, and a
/// client that answers at once is not dropped for the slowness of another.
#[derive(Debug)]
pub(super) struct Budget {
    /// The first round of a change, when all is regained.
    whole: Duration,
    round: Duration,
    left: Duration,
    /// Since when no change is under way; `None` while one is.
    idle_since: Option<Instant>,
}

impl Budget {
    pub(super) fn new(whole: Duration, now: Instant) -> Self {
        Self { whole, round: whole, left: whole, idle_since: Some(now) }
    }

    /// A change is under way and is about to wait. For how long there was none, when it has just
    /// begun.
    pub(super) fn begin(&mut self, now: Instant) -> Duration {
        let Some(since) = self.idle_since.take() else { return Duration::ZERO };
        let idle = now.saturating_duration_since(since);
        self.round = self.round.saturating_add(idle).min(self.whole);
        self.left = self.left.saturating_add(idle).min(self.round);
        idle
    }

    /// For how long the change may wait.
    pub(super) fn left(&self) -> Duration {
        self.left
    }

    /// Whether there is so little left that a client could not answer in it.
    pub(super) fn is_nearly_spent(&self) -> bool {
        self.left < self.whole / (2 * SHORTEST)
    }

    /// The change has waited.
    pub(super) fn spend(&mut self, took: Duration) {
        self.left = self.left.saturating_sub(took);
    }

    /// The round is over: the part of it that makes a client one of those that used it up.
    pub(super) fn next_round(&mut self) -> Duration {
        let share = self.round / 2;
        self.round = share.max(self.whole / SHORTEST);
        self.left = self.round;
        share
    }

    /// No change is under way any more.
    pub(super) fn end(&mut self, now: Instant) {
        self.idle_since.get_or_insert(now);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn a_change_uses_one_budget_and_only_idle_time_gives_it_back() {
        let start = Instant::now();
        let mut budget = Budget::new(ms(1000), start);
        assert_eq!(budget.begin(start + ms(5000)), ms(5000));
        assert_eq!(budget.left(), ms(1000), "never more than the whole");
        budget.spend(ms(700));
        assert_eq!(budget.begin(start + ms(8000)), ms(0), "the same change");
        assert_eq!(budget.left(), ms(300), "the pauses of a change give nothing back");
        budget.spend(ms(200));
        budget.end(start + ms(8000));
        budget.end(start + ms(8300));
        assert_eq!(budget.begin(start + ms(8400)), ms(400));
        assert_eq!(budget.left(), ms(500));
    }

    #[test]
    fn all_rounds_of_a_change_are_bounded_and_idle_time_gives_them_back() {
        let start = Instant::now();
        let mut budget = Budget::new(ms(1000), start);
        budget.begin(start);
        let mut waited = Duration::ZERO;
        for _ in 0..16 {
            waited += budget.left();
            budget.spend(budget.left());
            assert!(budget.is_nearly_spent());
            budget.next_round();
            assert!(!budget.is_nearly_spent());
            assert!(budget.left() >= ms(15), "a client that answers at once can");
        }
        assert!(waited < ms(2200), "{waited:?}");
        budget.end(start + ms(3000));
        budget.begin(start + ms(9000));
        assert_eq!(budget.left(), ms(1000));
    }
}
