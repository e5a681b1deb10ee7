//! What can be changed of a migration while it runs.

use std::ops::RangeInclusive;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use thiserror::Error;

use crate::postcopy::Channels;
use crate::precopy::{Parameters, ThrottleParameters};
use crate::progress::Status;

/// The longest downtime that may be allowed (QEMU's MAX_MIGRATE_DOWNTIME).
const DOWNTIME_MAX: Duration = Duration::from_secs(2000);

/// QEMU's levels of zstd, without its 0, which it says is no compression and zstd takes for its default.
const ZSTD_LEVELS: RangeInclusive<u8> = 1..=20;

/// New values of parameters, under QEMU's names (migrate-set-parameters); what is `None` stays as it is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ParameterChange {
    /// Bytes a second of precopy; 0 is no limit.
    pub max_bandwidth: Option<u64>,
    /// Bytes a second of postcopy's pages that were not asked for; 0 is no limit.
    pub max_postcopy_bandwidth: Option<u64>,
    /// As [`Parameters::downtime_limit`].
    pub downtime_limit: Option<Duration>,
    /// How vCPUs are slowed down. Switched off, they run at full speed again.
    pub throttle: Option<ThrottleParameters>,
    /// As [`Parameters::multifd_zstd_level`]. Each channel sends one more packet as it was before.
    pub multifd_zstd_level: Option<u8>,
}

/// Why a migration is not steered so; nothing has changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum SteeringError {
    /// A parameter cannot have this value.
    #[error("parameter {name}: {value} is not {rule}")]
    Parameter {
        /// QEMU's name of it.
        name: &'static str,
        /// The value.
        value: String,
        /// What it must be.
        rule: &'static str,
    },
    /// It is not in the state for this.
    #[error("a migration that is {:?} cannot {what}", status.name())]
    State {
        /// What was asked for.
        what: &'static str,
        /// The state that it is in.
        status: Status,
    },
}

impl ParameterChange {
    /// What all of `parameters` are.
    fn of(parameters: &Parameters) -> Self {
        Self {
            max_bandwidth: Some(parameters.max_bandwidth.unwrap_or(0)),
            max_postcopy_bandwidth: Some(parameters.max_postcopy_bandwidth.unwrap_or(0)),
            downtime_limit: Some(parameters.downtime_limit),
            throttle: Some(parameters.throttle),
            multifd_zstd_level: Some(parameters.multifd_zstd_level),
        }
    }

    /// This, and where it says nothing what was before.
    fn or(self, before: Self) -> Self {
        Self {
            max_bandwidth: self.max_bandwidth.or(before.max_bandwidth),
            max_postcopy_bandwidth: self.max_postcopy_bandwidth.or(before.max_postcopy_bandwidth),
            downtime_limit: self.downtime_limit.or(before.downtime_limit),
            throttle: self.throttle.or(before.throttle),
            multifd_zstd_level: self.multifd_zstd_level.or(before.multifd_zstd_level),
        }
    }

    fn check(&self) -> Result<(), SteeringError> {
        let wrong = |name, value: &dyn ToString, rule| {
            Err(SteeringError::Parameter { name, value: value.to_string(), rule })
        };
        if let Some(limit) = self.downtime_limit.filter(|limit| *limit > DOWNTIME_MAX) {
            return wrong("downtime-limit", &limit.as_millis(), "0 to 2000000 ms");
        }
        if let Some(level) = self.multifd_zstd_level.filter(|level| !ZSTD_LEVELS.contains(level)) {
            return wrong(
                "multifd-zstd-level",
                &level,
                "1 to 20; compression is switched off by its capability",
            );
        }
        let Some(throttle) = self.throttle else { return Ok(()) };
        let ThrottleParameters { trigger_threshold, initial, increment, max, .. } = throttle;
        for (name, value, range, rule) in [
            ("throttle-trigger-threshold", trigger_threshold, 1..=100, "1 to 100 percent"),
            ("cpu-throttle-initial", initial, 1..=99, "1 to 99 percent"),
            ("cpu-throttle-increment", increment, 1..=99, "1 to 99 percent"),
            ("max-cpu-throttle", max, initial..=99, "cpu-throttle-initial to 99 percent"),
        ] {
            if !range.contains(&value) {
                return wrong(name, &value, rule);
            }
        }
        Ok(())
    }
}

/// Refuses values that no parameter can have.
pub(crate) fn check(parameters: &Parameters) -> Result<(), SteeringError> {
    ParameterChange::of(parameters).check()
}

/// What holds now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Limits {
    pub(crate) max_bandwidth: Option<u64>,
    pub(crate) max_postcopy_bandwidth: Option<u64>,
    pub(crate) downtime_limit: Duration,
    pub(crate) throttle: ThrottleParameters,
}

/// What was asked for of a migration.
#[derive(Debug, Default)]
pub(crate) struct Steering {
    wanted: Mutex<Wanted>,
    /// Counts changes of parameters.
    changes: AtomicU64,
    told: Condvar,
    /// What the migration began with.
    multifd_zstd_level: AtomicU8,
}

#[derive(Debug, Default)]
struct Wanted {
    change: ParameterChange,
    /// The switchover may go on.
    continues: bool,
    /// The channels of postcopy while they are in use.
    postcopy: Option<Channels>,
    /// They were ended on request.
    paused: bool,
}

impl Steering {
    pub(crate) fn change(&self, change: ParameterChange) -> Result<(), SteeringError> {
        let mut wanted = self.wanted.lock();
        let change = change.or(wanted.change);
        change.check()?;
        wanted.change = change;
        self.changes.fetch_add(1, Ordering::Release);
        Ok(())
    }

    /// Of two equal numbers, nothing has changed between them.
    pub(crate) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// What holds of a migration that began with `parameters`.
    pub(crate) fn limits(&self, parameters: &Parameters) -> Limits {
        let change = self.wanted.lock().change;
        Limits {
            max_bandwidth: change.max_bandwidth.or(parameters.max_bandwidth),
            max_postcopy_bandwidth: change
                .max_postcopy_bandwidth
                .or(parameters.max_postcopy_bandwidth),
            downtime_limit: change.downtime_limit.unwrap_or(parameters.downtime_limit),
            throttle: change.throttle.unwrap_or(parameters.throttle),
        }
    }

    /// A migration begins with `parameters`.
    pub(crate) fn begin(&self, parameters: &Parameters) {
        self.multifd_zstd_level.store(parameters.multifd_zstd_level, Ordering::Relaxed);
    }

    /// The level of compression now.
    pub(crate) fn multifd_zstd_level(&self) -> u8 {
        let changed = self.wanted.lock().change.multifd_zstd_level;
        changed.unwrap_or_else(|| self.multifd_zstd_level.load(Ordering::Relaxed))
    }

    /// What postcopy may send a second now, if that was changed.
    pub(crate) fn max_postcopy_bandwidth(&self) -> Option<u64> {
        self.wanted.lock().change.max_postcopy_bandwidth
    }

    pub(crate) fn continue_switchover(&self) {
        self.wanted.lock().continues = true;
        self.told.notify_all();
    }

    /// Waits for a moment for the switchover to be continued; whether it was.
    pub(crate) fn wait_to_continue(&self, moment: Duration) -> bool {
        let mut wanted = self.wanted.lock();
        if !wanted.continues {
            self.told.wait_for(&mut wanted, moment);
        }
        std::mem::take(&mut wanted.continues)
    }

    /// These are in use for postcopy, or none.
    pub(crate) fn postcopy_over(&self, channels: Option<Channels>) {
        self.wanted.lock().postcopy = channels;
    }

    /// Ends the channels of postcopy; whether there are any.
    pub(crate) fn pause_postcopy(&self) -> bool {
        let mut wanted = self.wanted.lock();
        let Some(channels) = wanted.postcopy.take() else { return false };
        wanted.paused = true;
        channels.shutdown();
        true
    }

    /// Whether the channels ended because that was asked for, told once.
    pub(crate) fn take_paused(&self) -> bool {
        std::mem::take(&mut self.wanted.lock().paused)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::stream::Configuration;

    #[test]
    fn what_was_changed_holds_until_it_is_changed_again_and_all_else_is_as_it_began() {
        let steering = Steering::default();
        let parameters = Parameters {
            max_bandwidth: Some(1 << 20),
            ..Parameters::new(Configuration::new("test"))
        };
        let before = steering.limits(&parameters);
        assert_eq!((before.max_bandwidth, before.max_postcopy_bandwidth), (Some(1 << 20), None));
        assert_eq!(before.downtime_limit, Duration::from_millis(300));
        let second = Duration::from_secs(1);
        let change = |change| steering.change(change).unwrap();
        change(ParameterChange { downtime_limit: Some(second), ..ParameterChange::default() });
        change(ParameterChange { max_bandwidth: Some(0), ..ParameterChange::default() });
        let after = steering.limits(&parameters);
        assert_eq!(after, Limits { max_bandwidth: Some(0), downtime_limit: second, ..before });
        assert_eq!(steering.changes(), 2);
    }

    #[test]
    fn values_that_no_parameter_can_have_are_refused_by_name_and_nothing_changes() {
        let steering = Steering::default();
        let throttle = |throttle| ParameterChange {
            max_bandwidth: Some(7),
            throttle: Some(throttle),
            ..ParameterChange::default()
        };
        let usual = ThrottleParameters::default();
        let long = Some(Duration::from_millis(2_000_001));
        for (change, message) in [
            (
                ParameterChange { downtime_limit: long, ..ParameterChange::default() },
                "parameter downtime-limit: 2000001 is not 0 to 2000000 ms",
            ),
            (
                throttle(ThrottleParameters { trigger_threshold: 0, ..usual }),
                "parameter throttle-trigger-threshold: 0 is not 1 to 100 percent",
            ),
            (
                throttle(ThrottleParameters { initial: 100, ..usual }),
                "parameter cpu-throttle-initial: 100 is not 1 to 99 percent",
            ),
            (
                throttle(ThrottleParameters { increment: 0, ..usual }),
                "parameter cpu-throttle-increment: 0 is not 1 to 99 percent",
            ),
            (
                throttle(ThrottleParameters { max: 19, ..usual }),
                "parameter max-cpu-throttle: 19 is not cpu-throttle-initial to 99 percent",
            ),
        ] {
            assert_eq!(steering.change(change).unwrap_err().to_string(), message);
        }
        assert_eq!((steering.changes(), steering.wanted.lock().change.max_bandwidth), (0, None));
    }

    #[test]
    fn a_switchover_is_continued_once() {
        let steering = Steering::default();
        assert!(!steering.wait_to_continue(Duration::ZERO));
        // Also before it is waited for.
        steering.continue_switchover();
        assert!(steering.wait_to_continue(Duration::ZERO));
        assert!(!steering.wait_to_continue(Duration::ZERO));
    }
}
