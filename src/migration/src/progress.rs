//! What can be seen of a migration while it runs: states and figures under QEMU's names.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use parking_lot::Mutex;

use super::events::{Event, Events, Publisher};
use super::lazy::FaultStatistics;
use super::steering::{ParameterChange, Steering, SteeringError};

/// The state of a migration (QEMU's MigrationStatus).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Status {
    /// Not begun.
    #[default]
    None,
    /// Handlers are being set up; block state is frozen from here on.
    Setup,
    /// Memory is sent while the guest runs.
    Active,
    /// The guest is stopped, and waits for [`Progress::continue_switchover`].
    PreSwitchover,
    /// The guest is stopped; the rest is sent.
    Device,
    /// The guest runs on the destination; memory follows.
    PostcopyActive,
    /// The channel is broken while the guest runs on the destination.
    PostcopyPaused,
    /// A new channel is being taken into use.
    PostcopyRecover,
    /// Being cancelled.
    Cancelling,
    /// Cancelled; the guest runs where it ran before.
    Cancelled,
    /// Failed. Where the guest is, the error tells.
    Failed,
    /// Done; the guest runs on the destination.
    Completed,
}

impl Status {
    /// Whether a migration in this state is one that a cancel ends.
    fn is_cancellable(self) -> bool {
        matches!(self, Self::Setup | Self::Active | Self::PreSwitchover | Self::Device)
    }

    /// QEMU's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Setup => "setup",
            Self::Active => "active",
            Self::PreSwitchover => "pre-switchover",
            Self::Device => "device",
            Self::PostcopyActive => "postcopy-active",
            Self::PostcopyPaused => "postcopy-paused",
            Self::PostcopyRecover => "postcopy-recover",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Failed => "failed",
            Self::Completed => "completed",
        }
    }
}

/// Counters that the engine adds to and any thread may read. Pages are target pages; sizes are bytes.
#[derive(Debug, Default)]
pub struct Counters {
    /// Pages sent (or loaded) with their bytes.
    pub normal: AtomicU64,
    /// Pages sent (or loaded) as zeros (QEMU's "duplicate").
    pub duplicate: AtomicU64,
    /// Bytes written to the channel, or read from it.
    pub transferred: AtomicU64,
    /// Bytes that may still have to be sent, by what is known.
    pub remaining: AtomicU64,
    /// Bytes that can really be sent: what the host held when migration began.
    pub total: AtomicU64,
    /// Pages that are discarded, and so are not sent.
    pub discarded: AtomicU64,
    /// Pages that were never touched, and so are not sent.
    pub holes: AtomicU64,
    /// Pages that the destination asked for (QEMU's postcopy-requests).
    pub postcopy_requests: AtomicU64,
    /// How often postcopy went on over a new channel.
    pub postcopy_recoveries: AtomicU64,
    /// Writes that waited for their page to be in a background snapshot.
    pub write_faults: AtomicU64,
    /// Pages that were saved to a background snapshot before their turn, since they were about to be
    /// discarded.
    pub saved_before_discard: AtomicU64,
    /// Pages that were written although they are discarded: a fault of the guest. Not sent.
    pub dirty_while_discarded: AtomicU64,
    /// How often dirty pages were collected.
    pub dirty_sync_count: AtomicU64,
    /// Pages that were found dirty by that, all together.
    pub dirtied: AtomicU64,
    /// Pages written by the guest per second, at the last count.
    pub dirty_pages_rate: AtomicU64,
    /// Percentage of time that vCPUs are kept from running.
    pub throttle: AtomicU64,
}

impl Counters {
    pub(crate) fn add(counter: &AtomicU64, value: u64) {
        counter.fetch_add(value, Ordering::Relaxed);
    }

    pub(crate) fn subtract(counter: &AtomicU64, value: u64) {
        counter.fetch_sub(value, Ordering::Relaxed);
    }

    pub(crate) fn set(counter: &AtomicU64, value: u64) {
        counter.store(value, Ordering::Relaxed);
    }

    pub(crate) fn get(counter: &AtomicU64) -> u64 {
        counter.load(Ordering::Relaxed)
    }
}

/// A migration as it is seen from outside, and the means to cancel it.
#[derive(Debug, Default)]
pub struct Progress {
    /// The figures.
    pub counters: Counters,
    cancelled: AtomicBool,
    /// The source hears nothing more of the destination.
    deaf: AtomicBool,
    postcopy: AtomicBool,
    pub(crate) steering: Steering,
    events: Publisher,
    times: Mutex<Times>,
    /// Of the memory that arrives while the guest runs here.
    faults: Mutex<Option<Arc<Mutex<FaultStatistics>>>>,
}

#[derive(Debug, Default)]
struct Times {
    status: Status,
    begin: Option<Instant>,
    setup: Option<Duration>,
    stopped: Option<Instant>,
    downtime: Option<Duration>,
    expected_downtime: Option<Duration>,
    time_left: Option<Duration>,
    total: Option<Duration>,
    /// Since when block state is frozen.
    busy_since: Option<Instant>,
    busy: Option<Duration>,
    error: Option<String>,
}

impl Times {
    fn end_busy(&mut self) {
        if let Some(since) = self.busy_since.take() {
            self.busy = Some(since.elapsed());
        }
    }
}

impl Progress {
    /// Of a migration that has not begun.
    pub fn new() -> Self {
        Self::default()
    }

    /// Has the migration end as soon as it can; the guest goes on unharmed. Once the destination
    /// has the guest, it is too late.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
        let mut times = self.times.lock();
        if times.status.is_cancellable() {
            times.status = Status::Cancelling;
            self.events.tell(Event::Status(Status::Cancelling));
        }
    }

    /// Subscribes to what happens from now on; the first event is the state now. Up to `capacity` events wait to
    /// be taken: a subscriber that is slow is told that it lost some, and holds up nothing.
    pub fn subscribe(&self, capacity: usize) -> Events {
        // No change of the state comes between.
        let times = self.times.lock();
        self.events.subscribe(capacity, times.status)
    }

    /// Changes parameters of the migration, at once where it runs, else of the one that begins. They hold to its
    /// end, over what it was begun with.
    ///
    /// # Errors
    ///
    /// When a value is impossible; nothing changes then.
    pub fn set_parameters(&self, change: ParameterChange) -> Result<(), SteeringError> {
        self.steering.change(change)
    }

    /// Has a migration go on that waits before its switchover ([`Parameters::pause_before_switchover`]), or will
    /// wait (QEMU's migrate-continue).
    ///
    /// [`Parameters::pause_before_switchover`]: crate::Parameters::pause_before_switchover
    pub fn continue_switchover(&self) {
        self.steering.continue_switchover();
    }

    /// Ends the channels of postcopy, on either side, as if they had broken: both sides pause, until new ones come
    /// from [`Reconnect`](crate::postcopy::Reconnect), which is told [`MigrationError::Paused`] on the side that
    /// was asked (QEMU's migrate-pause). That also ends a recovery in which the other side says nothing. The guest runs on at the destination, and waits for pages that it misses.
    /// A destination whose `Reconnect` gives up, as [`GiveUp`](crate::postcopy::GiveUp) does, loses it.
    ///
    /// [`MigrationError::Paused`]: crate::MigrationError::Paused
    ///
    /// # Errors
    ///
    /// When no pages of postcopy are being sent from here, or arrive at a guest that has been taken here.
    pub fn pause_postcopy(&self) -> Result<(), SteeringError> {
        if self.steering.pause_postcopy() {
            return Ok(());
        }
        Err(SteeringError::State { what: "be paused", status: self.status() })
    }

    /// Has the source switch to postcopy as soon as it can, if that was provided for.
    pub fn start_postcopy(&self) {
        self.postcopy.store(true, Ordering::Relaxed);
    }

    pub(crate) fn wants_postcopy(&self) -> bool {
        self.postcopy.load(Ordering::Relaxed)
    }

    /// What the destination says is heard from now on.
    pub(crate) fn destination_heard(&self) {
        self.deaf.store(false, Ordering::Release);
    }

    /// The destination has said its last word, or left: pages that it does not read are not waited for.
    pub(crate) fn destination_ended(&self) {
        self.deaf.store(true, Ordering::Release);
    }

    pub(crate) fn has_destination_ended(&self) -> bool {
        self.deaf.load(Ordering::Acquire)
    }

    /// Whether it was cancelled.
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.load(Ordering::Relaxed)
    }

    /// How faults were resolved so far, where memory arrives (or has arrived) while the guest runs.
    pub fn faults(&self) -> Option<FaultStatistics> {
        self.faults.lock().as_ref().map(|faults| faults.lock().clone())
    }

    pub(crate) fn watch_faults(&self, faults: Arc<Mutex<FaultStatistics>>) {
        *self.faults.lock() = Some(faults);
    }

    /// Its state.
    pub fn status(&self) -> Status {
        self.times.lock().status
    }

    /// All that is known now.
    pub fn snapshot(&self) -> MigrationInfo {
        let times = self.times.lock();
        let counters = &self.counters;
        let get = Counters::get;
        let total_time = times.total.or(times.begin.map(|begin| begin.elapsed()));
        MigrationInfo {
            status: times.status,
            transferred: get(&counters.transferred),
            remaining: get(&counters.remaining),
            total: get(&counters.total),
            normal: get(&counters.normal),
            duplicate: get(&counters.duplicate),
            discarded: get(&counters.discarded),
            holes: get(&counters.holes),
            dirty_while_discarded: get(&counters.dirty_while_discarded),
            postcopy_requests: get(&counters.postcopy_requests),
            postcopy_recoveries: get(&counters.postcopy_recoveries),
            write_faults: get(&counters.write_faults),
            saved_before_discard: get(&counters.saved_before_discard),
            dirty_sync_count: get(&counters.dirty_sync_count),
            dirty_pages_rate: get(&counters.dirty_pages_rate),
            cpu_throttle_percentage: get(&counters.throttle),
            total_time: total_time.unwrap_or_default(),
            setup_time: times.setup.unwrap_or_default(),
            downtime: times.downtime,
            expected_downtime: times.expected_downtime,
            busy_time: times.busy_since.map(|since| since.elapsed()).or(times.busy),
            expected_time_left: times.time_left.filter(|_| times.status == Status::Active),
            error_desc: times.error.clone(),
        }
    }

    /// Tells what state it is in now.
    pub fn set_status(&self, status: Status) {
        let mut times = self.times.lock();
        let now = Instant::now();
        let begin = *times.begin.get_or_insert(now);
        match status {
            Status::Active => {
                times.setup.get_or_insert(now - begin);
            }
            Status::Completed | Status::Failed | Status::Cancelled => {
                times.total.get_or_insert(now - begin);
            }
            _ => {}
        }
        // A cancel shows until it is done, or comes too late: the guest has left.
        if times.status != status
            && (times.status != Status::Cancelling || !status.is_cancellable())
        {
            times.status = status;
            self.events.tell(Event::Status(status));
        }
    }

    /// Ends it. Once the guest runs at the destination while memory follows, nothing is cancelled any
    /// more: what fails then is a guest that is lost.
    pub fn fail(&self, error: &dyn std::fmt::Display) {
        let late = matches!(
            self.status(),
            Status::PostcopyActive | Status::PostcopyPaused | Status::PostcopyRecover
        );
        let cancelled = self.is_cancelled() && !late;
        self.fail_as(if cancelled { Status::Cancelled } else { Status::Failed }, error);
    }

    pub(crate) fn fail_as(&self, status: Status, error: &dyn std::fmt::Display) {
        self.times.lock().error = Some(error.to_string());
        self.set_status(status);
    }

    pub(crate) fn guest_stopped(&self) {
        self.times.lock().stopped = Some(Instant::now());
    }

    pub(crate) fn guest_runs_elsewhere(&self) {
        let mut times = self.times.lock();
        times.downtime = times.stopped.map(|stopped| stopped.elapsed());
        // What stays frozen here while memory follows keeps no guest waiting.
        times.end_busy();
        self.events.tell(Event::Switchover(times.downtime.unwrap_or_default()));
    }

    /// Dirty pages were collected so many times.
    pub(crate) fn passed(&self, passes: u64) {
        self.events.tell(Event::Pass(passes));
    }

    /// vCPUs are kept from running for so many percent of the time.
    pub(crate) fn throttled(&self, percent: u8) {
        Counters::set(&self.counters.throttle, percent.into());
        self.events.tell(Event::Throttle(percent));
    }

    /// So long, it is expected, until the guest can run at the destination.
    pub(crate) fn expect_end(&self, expected: Option<Duration>) {
        self.times.lock().time_left = expected;
    }

    /// Block state is frozen from now on, or not any more.
    pub(crate) fn busy(&self, frozen: bool) {
        let mut times = self.times.lock();
        if frozen {
            times.busy_since.get_or_insert_with(Instant::now);
        } else {
            times.end_busy();
        }
    }

    pub(crate) fn expect_downtime(&self, expected: Duration) {
        self.times.lock().expected_downtime = Some(expected);
    }
}

/// What is known of a migration at one moment. Pages are target pages; sizes are bytes.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MigrationInfo {
    /// Its state.
    pub status: Status,
    /// Bytes written to the channel.
    pub transferred: u64,
    /// Bytes that may still have to be sent.
    pub remaining: u64,
    /// Bytes that can really be sent.
    pub total: u64,
    /// Pages sent with their bytes.
    pub normal: u64,
    /// Pages sent as zeros.
    pub duplicate: u64,
    /// Pages discarded, not sent.
    pub discarded: u64,
    /// Pages never touched, not sent.
    pub holes: u64,
    /// Pages written although discarded, not sent.
    pub dirty_while_discarded: u64,
    /// Pages that the destination asked for.
    pub postcopy_requests: u64,
    /// How often postcopy went on over a new channel.
    pub postcopy_recoveries: u64,
    /// Writes that waited for their page to be in a background snapshot.
    pub write_faults: u64,
    /// Pages saved to a background snapshot before their turn, since they were about to be discarded.
    pub saved_before_discard: u64,
    /// How often dirty pages were collected.
    pub dirty_sync_count: u64,
    /// Pages written by the guest per second.
    pub dirty_pages_rate: u64,
    /// Percentage of time that vCPUs are kept from running.
    pub cpu_throttle_percentage: u64,
    /// Since it began, or until it ended.
    pub total_time: Duration,
    /// Until the guest's memory began to be sent.
    pub setup_time: Duration,
    /// From the guest's stop until it could run on the destination.
    pub downtime: Option<Duration>,
    /// What the downtime would be if the guest were stopped now.
    pub expected_downtime: Option<Duration>,
    /// For how long block state was frozen, or is, the last time: the guest's requests are answered with BUSY
    /// meanwhile. Where both ends know that it may change, that is the switchover. It ends when the guest leaves.
    pub busy_time: Option<Duration>,
    /// How long it takes until the guest can run at the destination, if it goes on to write as it did when
    /// dirty pages were collected last. In the first pass, before it is known how it writes, as if it wrote
    /// nothing. `None` when it is not known, or comes to no end: the guest writes too much.
    pub expected_time_left: Option<Duration>,
    /// Why it failed.
    pub error_desc: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_state_that_stays_frozen_where_the_guest_has_left_counts_no_longer() {
        let progress = Progress::new();
        assert_eq!(progress.snapshot().busy_time, None);
        progress.busy(true);
        progress.guest_stopped();
        progress.guest_runs_elsewhere();
        let known = progress.snapshot();
        std::thread::sleep(Duration::from_millis(2));
        assert_eq!(progress.snapshot().busy_time, known.busy_time);
        progress.busy(false);
        assert_eq!(progress.snapshot().busy_time, known.busy_time);
        assert!(known.busy_time >= known.downtime && known.downtime.is_some());
    }

    #[test]
    fn a_guest_that_was_lost_after_it_left_was_not_cancelled() {
        for last in [Status::PostcopyActive, Status::PostcopyPaused, Status::PostcopyRecover] {
            for cancelled_before in [true, false] {
                let progress = Progress::new();
                progress.set_status(Status::Device);
                if cancelled_before {
                    progress.cancel();
                    assert_eq!(progress.status(), Status::Cancelling);
                }
                progress.set_status(last);
                progress.cancel();
                assert_eq!(progress.status(), last);
                progress.fail(&"the channel is broken");
                assert_eq!(progress.status(), Status::Failed);
            }
        }
        let progress = Progress::new();
        progress.set_status(Status::Active);
        progress.cancel();
        progress.set_status(Status::Device);
        assert_eq!(progress.status(), Status::Cancelling);
        progress.fail(&"cancelled");
        assert_eq!(progress.status(), Status::Cancelled);
    }
}
