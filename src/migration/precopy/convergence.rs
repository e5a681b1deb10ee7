//! When to switch over, and when vCPUs must be slowed down for that to come.

use std::time::{Duration, Instant};

use crate::migration::bandwidth::Bandwidth;

/// How long dirtying is compared with sending before vCPUs are slowed down.
const PERIOD: Duration = Duration::from_secs(1);

/// How vCPUs are slowed down, under QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleParameters {
    /// Whether they are at all (capability auto-converge).
    pub auto_converge: bool,
    /// What is dirtied must exceed so much of what is sent, percent.
    pub trigger_threshold: u8,
    /// The first percentage of time that vCPUs do not run.
    pub initial: u8,
    /// How much is added each time, percent.
    pub increment: u8,
    /// The most, percent.
    pub max: u8,
}

impl Default for ThrottleParameters {
    fn default() -> Self {
        Self { auto_converge: false, trigger_threshold: 50, initial: 20, increment: 10, max: 99 }
    }
}

/// When the guest is stopped.
///
/// QEMU stops it as soon as what is left fits the downtime limit, and so lets a guest that hardly
/// writes stand still for as long as is allowed. Here what is left is sent while the guest runs,
/// for as long as that halves it: only so often as the limit can be halved, so that a guest which
/// once fitted is not chased for ever.
#[derive(Debug)]
pub(super) struct Switchover {
    limit: Duration,
    /// The least that fitted, and was sent with the guest running all the same.
    declined: Option<u64>,
    /// Whether that is still being sent: stopping the guest amid it would gain nothing.
    sending: bool,
}

impl Switchover {
    /// Stopping the guest takes longer than sending what takes no longer than this.
    const NOT_WORTH_A_ROUND: Duration = Duration::from_millis(5);

    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, declined: None, sending: false }
    }

    /// Whether it is time to find out exactly how much is left, when about `bytes` are.
    pub(super) fn may_be_due(&self, bytes: u64, bandwidth: &Bandwidth) -> bool {
        bytes == 0 || (!self.sending && self.fits(bytes, bandwidth))
    }

    /// Whether the guest is stopped now, with exactly `bytes` left.
    pub(super) fn is_due(&mut self, bytes: u64, bandwidth: &Bandwidth) -> bool {
        if bytes == 0 {
            return true;
        }
        if !self.fits(bytes, bandwidth) {
            self.sending = false;
            return false;
        }
        let short = bandwidth.time_for(bytes).is_some_and(|time| time <= Self::NOT_WORTH_A_ROUND);
        if short || self.declined.is_some_and(|least| bytes > least / 2) {
            return true;
        }
        (self.declined, self.sending) = (Some(bytes), true);
        false
    }

    fn fits(&self, bytes: u64, bandwidth: &Bandwidth) -> bool {
        bandwidth.time_for(bytes).is_some_and(|time| time <= self.limit)
    }
}

/// Compares what the guest writes with what is sent (QEMU's migration_trigger_throttle).
#[derive(Debug)]
pub(super) struct Throttle {
    parameters: ThrottleParameters,
    period_start: Instant,
    dirtied: u64,
    sent: u64,
    /// In how many periods in a row too much was written.
    losing: u32,
    percent: u8,
}

impl Throttle {
    pub(super) fn new(parameters: ThrottleParameters) -> Self {
        let period_start = Instant::now();
        Self { parameters, period_start, dirtied: 0, sent: 0, losing: 0, percent: 0 }
    }

    /// After dirty pages were collected: all bytes dirtied and sent so far. The new percentage
    /// when it changes.
    pub(super) fn after_sync(&mut self, dirtied: u64, sent: u64) -> Option<u8> {
        self.after_sync_at(Instant::now(), dirtied, sent)
    }

    fn after_sync_at(&mut self, now: Instant, dirtied: u64, sent: u64) -> Option<u8> {
        if !self.parameters.auto_converge || now - self.period_start < PERIOD {
            return None;
        }
        let threshold = u64::from(self.parameters.trigger_threshold);
        let too_much = (dirtied - self.dirtied) > (sent - self.sent) / 100 * threshold;
        (self.period_start, self.dirtied, self.sent) = (now, dirtied, sent);
        if !too_much {
            return None;
        }
        self.losing += 1;
        if self.losing < 2 {
            return None;
        }
        self.losing = 0;
        let raised = match self.percent {
            0 => self.parameters.initial,
            percent => percent.saturating_add(self.parameters.increment),
        };
        let raised = raised.min(self.parameters.max).min(99);
        let changed = raised != self.percent;
        self.percent = raised;
        changed.then_some(raised)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// One MiB takes one millisecond.
    fn measured() -> Bandwidth {
        Bandwidth::measured((1u64 << 20) as f64 * 1e3)
    }

    #[test]
    fn an_idle_guest_is_stopped_when_nothing_is_left() {
        let mut switchover = Switchover::new(Duration::from_millis(300));
        let bandwidth = measured();
        assert!(!switchover.may_be_due(301 << 20, &bandwidth));
        assert!(switchover.may_be_due(300 << 20, &bandwidth));
        assert!(!switchover.is_due(300 << 20, &bandwidth));
        // Until all of that is sent nobody asks again.
        assert!(!switchover.may_be_due(1, &bandwidth));
        assert!(switchover.may_be_due(0, &bandwidth));
        assert!(switchover.is_due(0, &bandwidth));
    }

    #[test]
    fn a_guest_that_writes_is_stopped_when_another_round_gains_little() {
        let mut switchover = Switchover::new(Duration::from_millis(300));
        let bandwidth = measured();
        let left = [300, 100, 50, 30].map(|mib| mib << 20);
        let due = left.map(|bytes| switchover.is_due(bytes, &bandwidth));
        assert_eq!(due, [false, false, false, true]);
    }

    #[test]
    fn a_guest_that_fits_now_and_then_is_not_chased_for_ever() {
        let mut switchover = Switchover::new(Duration::from_millis(300));
        let bandwidth = measured();
        let left = [200, 400, 200].map(|mib| mib << 20);
        let due = left.map(|bytes| switchover.is_due(bytes, &bandwidth));
        assert_eq!(due, [false, false, true]);
        // What does not fit ends a round that was to be the last.
        let mut switchover = Switchover::new(Duration::from_millis(300));
        assert!(!switchover.is_due(200 << 20, &bandwidth));
        assert!(!switchover.is_due(400 << 20, &bandwidth));
        assert!(switchover.may_be_due(90 << 20, &bandwidth));
    }

    #[test]
    fn what_takes_no_time_is_not_worth_a_round() {
        let mut switchover = Switchover::new(Duration::from_millis(300));
        assert!(switchover.is_due(5 << 20, &measured()));
        let mut never = Switchover::new(Duration::ZERO);
        assert!(!never.is_due(1, &measured()));
        assert!(never.is_due(0, &measured()));
    }

    #[test]
    fn vcpus_are_slowed_down_step_by_step_when_they_win() {
        let on = ThrottleParameters { auto_converge: true, ..ThrottleParameters::default() };
        let mut throttle = Throttle::new(on);
        let begin = throttle.period_start;
        let mut steps = Vec::new();
        for second in 1..30u64 {
            let now = begin + PERIOD * u32::try_from(second).unwrap();
            steps.extend(throttle.after_sync_at(now, second << 30, second << 28));
        }
        assert_eq!(steps, [20, 30, 40, 50, 60, 70, 80, 90, 99]);
    }

    #[test]
    fn a_guest_that_writes_little_is_left_alone() {
        let on = ThrottleParameters { auto_converge: true, ..ThrottleParameters::default() };
        let mut throttle = Throttle::new(on);
        let begin = throttle.period_start;
        for second in 1..30u64 {
            let now = begin + PERIOD * u32::try_from(second).unwrap();
            assert_eq!(throttle.after_sync_at(now, second << 20, second << 28), None);
        }
        let mut off = Throttle::new(ThrottleParameters::default());
        assert_eq!(off.after_sync_at(begin + 100 * PERIOD, 1 << 40, 1), None);
    }
}
