//! When to switch over, and when vCPUs must be slowed down for that to come.

use std::time::{Duration, Instant};

use crate::bandwidth::Bandwidth;

/// How vCPUs are slowed down, under QEMU's names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThrottleParameters {
    /// Whether they are at all (capability auto-converge).
    pub auto_converge: bool,
    /// For how long at least what is dirtied is compared with what is sent. Two such periods in a row in
    /// which too much is dirtied slow vCPUs down by a step. QEMU's is a second.
    pub period: Duration,
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
        Self {
            auto_converge: false,
            period: Duration::from_secs(1),
            trigger_threshold: 50,
            initial: 20,
            increment: 10,
            max: 99,
        }
    }
}

/// What becomes of a migration whose guest writes faster than memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AtMaxRounds {
    /// It fails, and the guest has not been stopped.
    #[default]
    Fail,
    /// The guest is stopped, for as long as it takes to send the rest.
    StopAndCopy,
}

/// Whether the guest is stopped now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Due {
    /// Another round is sent first.
    No,
    /// The rest fits.
    Yes,
    /// It does not fit, and there have been enough rounds.
    TooManyRounds,
}

/// When the guest is stopped.
///
/// QEMU stops it as soon as what is left fits the downtime limit, and so lets a guest that hardly
/// writes stand still for as long as is allowed. Here what is left is sent while the guest runs,
/// for as long as that halves it: only so often as the limit can be halved, so that a guest which
/// once fitted is not chased for ever. Dirty pages are collected once more with the guest stopped, so that
/// the time which this takes belongs to the downtime.
#[derive(Clone, Debug)]
pub(super) struct Switchover {
    limit: Duration,
    max_rounds: u64,
    /// How often dirty pages were collected.
    rounds: u64,
    /// How long that took the last time.
    sync: Duration,
    /// The least that fitted, and was sent with the guest running all the same.
    declined: Option<u64>,
    /// Whether that is still being sent: stopping the guest amid it would gain nothing.
    sending: bool,
}

impl Switchover {
    /// Stopping the guest takes longer than sending what takes no longer than this.
    const NOT_WORTH_A_ROUND: Duration = Duration::from_millis(5);

    /// At most `max_rounds` rounds.
    pub(super) fn new(limit: Duration, max_rounds: u64) -> Self {
        let sync = Duration::ZERO;
        Self { limit, max_rounds, rounds: 0, sync, declined: None, sending: false }
    }

    /// Another downtime is allowed from now on.
    pub(super) fn set_limit(&mut self, limit: Duration) {
        self.limit = limit;
    }

    /// How long it takes until the guest can run at the destination, with about `bytes` left, of a guest that
    /// writes `dirtied` bytes a second, and has done so `since` dirty pages were collected. The rounds are gone
    /// through as they would follow. `None` when that comes to no end, or nothing was measured.
    pub(super) fn time_left(
        &self,
        bytes: u64,
        dirtied: u64,
        since: Duration,
        bandwidth: &Bandwidth,
    ) -> Option<Duration> {
        /// More are not worth to be looked at.
        const ROUNDS_MAX: u32 = 100;
        let per_second = bandwidth.per_second()?;
        let (step, sync) = (bandwidth.step() as f64, self.sync.as_secs_f64());
        let mut after = self.clone();
        let (mut left, mut time) = (bytes as f64, 0.0);
        // Written, and not seen yet.
        let mut unseen = dirtied as f64 * since.as_secs_f64();
        for _ in 0..ROUNDS_MAX {
            let fits = match after.sending {
                true => 0.0,
                false => self.limit.saturating_sub(self.sync).as_secs_f64() * per_second,
            };
            let steps = ((left - fits) / step).ceil().max(0.0);
            let sent = (steps * step).min(left);
            let passes = sent / per_second + sync;
            left += unseen + dirtied as f64 * passes - sent;
            (time, unseen) = (time + passes, 0.0);
            match after.is_due(left as u64, self.sync, bandwidth) {
                Due::Yes => return Duration::try_from_secs_f64(time + left / per_second).ok(),
                Due::TooManyRounds => return None,
                Due::No => {}
            }
        }
        None
    }

    /// How often dirty pages were collected.
    pub(super) fn rounds(&self) -> u64 {
        self.rounds
    }

    /// How long the guest would be stopped for with `bytes` left, as far as that is known.
    pub(super) fn expected(&self, bytes: u64, bandwidth: &Bandwidth) -> Option<Duration> {
        Some(bandwidth.time_for(bytes)?.saturating_add(self.sync))
    }

    /// Whether it is time to find out exactly how much is left, when about `bytes` are.
    pub(super) fn may_be_due(&self, bytes: u64, bandwidth: &Bandwidth) -> bool {
        bytes == 0 || (!self.sending && self.fits(bytes, bandwidth))
    }

    /// Whether the guest is stopped now, with exactly `bytes` left, which took `sync` to find out.
    pub(super) fn is_due(&mut self, bytes: u64, sync: Duration, bandwidth: &Bandwidth) -> Due {
        (self.rounds, self.sync) = (self.rounds + 1, sync);
        if bytes == 0 {
            return Due::Yes;
        }
        if !self.fits(bytes, bandwidth) {
            self.sending = false;
            return if self.rounds < self.max_rounds { Due::No } else { Due::TooManyRounds };
        }
        let short = bandwidth.time_for(bytes).is_some_and(|time| time <= Self::NOT_WORTH_A_ROUND);
        let gains_little = self.declined.is_some_and(|least| bytes > least / 2);
        if short || gains_little || self.rounds >= self.max_rounds {
            return Due::Yes;
        }
        (self.declined, self.sending) = (Some(bytes), true);
        Due::No
    }

    fn fits(&self, bytes: u64, bandwidth: &Bandwidth) -> bool {
        self.expected(bytes, bandwidth).is_some_and(|time| time <= self.limit)
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

    /// vCPUs are slowed down otherwise from now on. The new percentage when it changes.
    pub(super) fn set_parameters(&mut self, parameters: ThrottleParameters) -> Option<u8> {
        self.parameters = parameters;
        let most = if parameters.auto_converge { parameters.max } else { 0 };
        let lowered = self.percent > most;
        self.percent = self.percent.min(most);
        lowered.then_some(self.percent)
    }

    /// After dirty pages were collected: all bytes dirtied and sent so far, both as whole pages. The
    /// new percentage when it changes.
    pub(super) fn after_sync(&mut self, dirtied: u64, sent: u64) -> Option<u8> {
        self.after_sync_at(Instant::now(), dirtied, sent)
    }

    fn after_sync_at(&mut self, now: Instant, dirtied: u64, sent: u64) -> Option<u8> {
        if !self.parameters.auto_converge || now - self.period_start < self.parameters.period {
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

    const NO_TIME: Duration = Duration::ZERO;

    fn switchover(limit_ms: u64) -> Switchover {
        Switchover::new(Duration::from_millis(limit_ms), 1000)
    }

    #[test]
    fn an_idle_guest_is_stopped_when_nothing_is_left() {
        let mut switchover = switchover(300);
        let bandwidth = measured();
        assert!(!switchover.may_be_due(301 << 20, &bandwidth));
        assert!(switchover.may_be_due(300 << 20, &bandwidth));
        assert_eq!(switchover.is_due(300 << 20, NO_TIME, &bandwidth), Due::No);
        // Until all of that is sent it is not asked again.
        assert!(!switchover.may_be_due(1, &bandwidth));
        assert!(switchover.may_be_due(0, &bandwidth));
        assert_eq!(switchover.is_due(0, NO_TIME, &bandwidth), Due::Yes);
    }

    #[test]
    fn a_guest_that_writes_is_stopped_when_another_round_gains_little() {
        let mut switchover = switchover(300);
        let bandwidth = measured();
        let left = [300, 100, 50, 30].map(|mib| mib << 20);
        let due = left.map(|bytes| switchover.is_due(bytes, NO_TIME, &bandwidth));
        assert_eq!(due, [Due::No, Due::No, Due::No, Due::Yes]);
    }

    #[test]
    fn a_guest_that_fits_now_and_then_is_not_chased_for_ever() {
        let mut first = switchover(300);
        let bandwidth = measured();
        let left = [200, 400, 200].map(|mib| mib << 20);
        let due = left.map(|bytes| first.is_due(bytes, NO_TIME, &bandwidth));
        assert_eq!(due, [Due::No, Due::No, Due::Yes]);
        // What does not fit ends a round that was to be the last.
        let mut second = switchover(300);
        assert_eq!(second.is_due(200 << 20, NO_TIME, &bandwidth), Due::No);
        assert_eq!(second.is_due(400 << 20, NO_TIME, &bandwidth), Due::No);
        assert!(second.may_be_due(90 << 20, &bandwidth));
    }

    #[test]
    fn what_takes_no_time_is_not_worth_a_round() {
        assert_eq!(switchover(300).is_due(5 << 20, NO_TIME, &measured()), Due::Yes);
        let mut never = switchover(0);
        assert_eq!(never.is_due(1, NO_TIME, &measured()), Due::No);
        assert_eq!(never.is_due(0, NO_TIME, &measured()), Due::Yes);
    }

    #[test]
    fn the_time_to_collect_dirty_pages_belongs_to_the_downtime() {
        let (bandwidth, sync) = (measured(), Duration::from_millis(250));
        let mut switchover = switchover(300);
        assert_eq!(switchover.is_due(60 << 20, sync, &bandwidth), Due::No);
        let expected = Duration::from_millis(250 + 60);
        assert_eq!(switchover.expected(60 << 20, &bandwidth), Some(expected));
        assert!(!switchover.may_be_due(60 << 20, &bandwidth));
        assert!(switchover.may_be_due(50 << 20, &bandwidth));
    }

    /// Migrates 200 MB of a guest that has `dirty` MB more to send whenever dirty pages are collected,
    /// which takes `sync`, over a channel of 10 MB in 12 ms, on a clock of its own.
    fn simulate(dirty: u64, sync_ms: u64, limit_ms: u64) -> (Due, u64) {
        simulate_zeros(dirty, sync_ms, limit_ms, 0)
    }

    /// Of each 100 pages, `zeros` are pages of zeros.
    fn simulate_zeros(dirty: u64, sync_ms: u64, limit_ms: u64, zeros: u64) -> (Due, u64) {
        const MB: u64 = 1_000_000;
        let mut clock = Instant::now();
        let mut bandwidth = Bandwidth::new_at(clock, None, 0);
        let mut switchover = Switchover::new(Duration::from_millis(limit_ms), 200);
        let (mut left, mut written) = (200 * MB, 0);
        let sync = Duration::from_millis(sync_ms);
        loop {
            if switchover.may_be_due(left, &bandwidth) {
                clock += sync;
                bandwidth.leave_out(sync);
                left = left.max(dirty * MB);
                match switchover.is_due(left, sync, &bandwidth) {
                    Due::No => {}
                    due => return (due, switchover.rounds()),
                }
            }
            let sent = left.min(64 << 20);
            clock += Duration::from_nanos(sent * 12 / 10);
            let on_the_wire = sent / 100 * (100 - zeros) + sent / 100 * zeros / 4096 * 9;
            (left, written) = (left - sent, written + on_the_wire);
            bandwidth.handled(sent);
            bandwidth.spent_at(clock, written);
        }
    }

    #[test]
    fn how_long_dirty_pages_are_collected_for_does_not_keep_a_guest_that_fits_from_going() {
        for (dirty, sync_ms, limit_ms) in
            [(10, 5, 50), (10, 100, 50 + 100), (80, 400, 300 + 400), (10, 400, 450)]
        {
            let (due, rounds) = simulate(dirty, sync_ms, limit_ms);
            assert_eq!(due, Due::Yes, "{dirty} MB, {sync_ms} ms");
            assert!(rounds <= 4, "{dirty} MB, {sync_ms} ms: {rounds} rounds");
        }
    }

    /// 38 huge pages are written all the time; that takes 96 ms to send, of which 4 MB reach the wire.
    #[test]
    fn a_guest_on_huge_pages_that_are_mostly_zeros_is_handed_over() {
        let (due, rounds) = simulate_zeros(80, 5, 300, 95);
        assert_eq!(due, Due::Yes);
        assert!(rounds <= 4, "{rounds} rounds");
        // Not for nothing: what takes too long to look at still does not fit.
        assert_eq!(simulate_zeros(400, 5, 300, 95), (Due::TooManyRounds, 200));
    }

    /// A guest that writes steadily, over a channel that is paced, on a clock of their own.
    struct Steady {
        /// MB a second that are sent, and written anew.
        sent: u64,
        dirtied: u64,
        limit: Option<u64>,
        sync_ms: u64,
        downtime_ms: u64,
        total: u64,
    }

    impl Steady {
        /// Migrates it as the engine does. At each look at what is left, once dirty pages were collected: when,
        /// and what time is expected to be left. And when the guest runs at the destination.
        fn run(&self) -> (Vec<(Duration, Option<Duration>)>, Option<Duration>) {
            const MB: u64 = 1_000_000;
            let sync = Duration::from_millis(self.sync_ms);
            let begin = Instant::now();
            let mut clock = begin;
            let mut bandwidth = Bandwidth::new_at(clock, self.limit, 0);
            let mut switchover = Switchover::new(Duration::from_millis(self.downtime_ms), 100);
            let (mut left, mut written, mut rate) = (self.total * MB, 0, 0);
            let (mut collected, mut looks) = (clock, Vec::new());
            loop {
                if switchover.rounds() != 0 {
                    let since = clock - collected;
                    let expected = switchover.time_left(left, rate, since, &bandwidth);
                    looks.push((clock - begin, expected));
                }
                if switchover.may_be_due(left, &bandwidth) {
                    clock += sync;
                    bandwidth.leave_out(sync);
                    let since = (clock - collected).as_secs_f64();
                    let dirtied = (since * (self.dirtied * MB) as f64) as u64;
                    (rate, collected) = ((dirtied as f64 / since) as u64, clock);
                    left += dirtied;
                    match switchover.is_due(left, sync, &bandwidth) {
                        Due::No => {}
                        Due::TooManyRounds => return (looks, None),
                        Due::Yes => {
                            let rest = Duration::from_micros(left / self.sent);
                            return (looks, Some(clock + rest - begin));
                        }
                    }
                }
                let sent = left.min(bandwidth.budget(written));
                clock += Duration::from_nanos(sent * 1000 / self.sent);
                (left, written) = (left - sent, written + sent);
                bandwidth.handled(sent);
                clock += bandwidth.spent_at(clock, written);
                let again = bandwidth.spent_at(clock, written);
                assert_eq!(again, Duration::ZERO);
            }
        }
    }

    #[test]
    fn the_time_that_is_expected_to_be_left_is_right_within_a_factor_of_two_of_a_steady_guest() {
        let mut looks_all = 0;
        for sent in [100, 1200] {
            // At 50 it hangs by a byte whether another round halves what is left.
            for percent in [0, 1, 10, 30, 45, 60, 80] {
                for (downtime_ms, sync_ms) in [(300, 5), (300, 100), (50, 1), (2000, 20)] {
                    for limited in [false, true] {
                        let limit = limited.then_some(sent * 1_000_000);
                        let (dirtied, total) = (sent * percent / 100, sent * 20);
                        // A limit is what paces it then, up to the switchover.
                        let sent = if limited { sent * 5 / 4 } else { sent };
                        let guest = Steady { sent, dirtied, limit, sync_ms, downtime_ms, total };
                        let what = format!(
                            "{sent} MB/s, {dirtied} dirty, {downtime_ms} {sync_ms} {limit:?}"
                        );
                        let (looks, end) = guest.run();
                        let Some(end) = end else {
                            // Of one that comes to no end no time is told.
                            assert!(looks.iter().all(|(_, expected)| expected.is_none()), "{what}");
                            continue;
                        };
                        looks_all += looks.len();
                        // Within a window of a limit the channel is faster than that.
                        let window = Duration::from_millis(if limited { 100 } else { 0 });
                        for (at, expected) in looks {
                            let (follows, expected) = (end - at, expected.expect(&what));
                            assert!(
                                expected <= follows * 2 + window
                                    && follows <= expected * 2 + window,
                                "{what}: {expected:?} at {at:?}, and it took {follows:?}"
                            );
                        }
                    }
                }
            }
        }
        assert!(looks_all > 500, "{looks_all}");
    }

    #[test]
    fn rounds_end_when_nothing_will_fit() {
        for (dirty, sync_ms, limit_ms) in [(10, 100, 50), (80, 400, 300), (80, 5, 50)] {
            assert_eq!(simulate(dirty, sync_ms, limit_ms), (Due::TooManyRounds, 200));
        }
    }

    #[test]
    fn vcpus_are_slowed_down_step_by_step_when_they_win() {
        let on = ThrottleParameters { auto_converge: true, ..ThrottleParameters::default() };
        let mut throttle = Throttle::new(on);
        let begin = throttle.period_start;
        let mut steps = Vec::new();
        for second in 1..30u64 {
            let now = begin + on.period * u32::try_from(second).unwrap();
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
            let now = begin + on.period * u32::try_from(second).unwrap();
            assert_eq!(throttle.after_sync_at(now, second << 20, second << 28), None);
        }
        let mut off = Throttle::new(ThrottleParameters::default());
        assert_eq!(off.after_sync_at(begin + 100 * on.period, 1 << 40, 1), None);
    }
}
