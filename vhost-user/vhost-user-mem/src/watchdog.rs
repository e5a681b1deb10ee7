//! The service manager's watchdog, fed by the thread that serves the guest's queue.
//!
//! A timer is among the events of the queue's worker, so that what feeds is a worker that takes events:
//! one that is stuck is found, and the manager starts the daemon again. While no front-end is
//! connected there is no worker, and the thread that waits for front-ends feeds.
//!
//! A worker may wait for a page of a guest that arrives by postcopy, for as long as the network is
//! gone. To end the daemon would end the guest, so the worker is excused meanwhile: a thread feeds for it.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use program::service_manager::{NotifyState, ServiceManager};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};

/// How often it is fed in the time after which the manager takes the process for stuck.
const TIMES: u32 = 4;

/// The watchdog of this process.
#[derive(Debug)]
pub struct Watchdog {
    manager: Arc<ServiceManager>,
    /// Readable each period.
    timer: OwnedFd,
    period: Duration,
    begun: Instant,
    /// When it was fed last, ms after `begun`.
    fed: AtomicU64,
    excused: AtomicBool,
}

impl Watchdog {
    /// A watchdog that takes this process for stuck after `timeout` without being fed.
    ///
    /// # Errors
    ///
    /// When there is no timer or no thread to be had.
    pub fn start(manager: Arc<ServiceManager>, timeout: Duration) -> io::Result<Arc<Self>> {
        let period = (timeout / TIMES).max(Duration::from_millis(1));
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = timerfd_create(TimerfdClockId::Monotonic, flags)?;
        let every = Timespec::try_from(period).map_err(io::Error::other)?;
        let times = Itimerspec { it_interval: every, it_value: every };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &times)?;
        let (begun, fed, excused) = (Instant::now(), AtomicU64::new(0), AtomicBool::new(false));
        let watchdog = Arc::new(Self { manager, timer, period, begun, fed, excused });
        let excusing = Arc::downgrade(&watchdog);
        std::thread::Builder::new().name("watchdog".to_owned()).spawn(move || {
            while let Some(watchdog) = excusing.upgrade() {
                if watchdog.excused.load(Ordering::Relaxed) {
                    watchdog.feed();
                }
                drop(watchdog);
                std::thread::sleep(period);
            }
        })?;
        Ok(watchdog)
    }

    /// The timer has come to an end, as the thread that serves has found.
    pub fn tick(&self) {
        // Read by another thread, or read again: there is nothing, and it was fed.
        let mut expirations = [0; 8];
        if rustix::io::read(&self.timer, &mut expirations).is_ok() {
            self.feed();
        }
    }

    /// The thread that serves has begun something new, however long it has not looked at the timer.
    pub fn progress(&self) {
        let fed = Duration::from_millis(self.fed.load(Ordering::Relaxed));
        if self.begun.elapsed().saturating_sub(fed) >= self.period {
            self.feed();
        }
    }

    /// Says whether the thread that serves may wait for what only the front-end can bring.
    pub fn excuse(&self, excused: bool) {
        self.excused.store(excused, Ordering::Relaxed);
    }

    fn feed(&self) {
        let now = u64::try_from(self.begun.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.fed.store(now, Ordering::Relaxed);
        // A manager that has not read what came before is not told more.
        let _ = self.manager.tell_now(&[NotifyState::Watchdog]);
    }
}

impl AsFd for Watchdog {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.timer.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use program::service_manager::fake::FakeManager;
    use rustix::event::{PollFd, PollFlags, poll};
    use std::thread;
    use vhost_user_backend::VhostUserBackend;
    use virtio_mem::controller::{InitialState, MemController};
    use virtio_mem::device::{Geometry, VirtioMem};
    use vmm_sys_util::epoll::EventSet;

    use crate::backend::{MemBackend, WATCHDOG_EVENT};
    use crate::queue::{AtomicMemory, Memory};

    const SHORT: Duration = Duration::from_millis(40);
    const LONG: Duration = Duration::from_secs(3600);

    fn watched(timeout: Duration) -> (FakeManager, Arc<Watchdog>) {
        let manager = FakeManager::new();
        let told = Arc::new(ServiceManager::at(manager.address(), false).unwrap());
        (manager, Watchdog::start(told, timeout).unwrap())
    }

    #[test]
    fn a_worker_that_takes_its_events_feeds_and_another_does_not() {
        let geometry = Geometry::new(1 << 32, 1 << 30, 2 << 20, None).unwrap();
        let start = InitialState::volatile(VirtioMem::new(geometry, 0).unwrap());
        let (manager, watchdog) = watched(SHORT);
        let memory = AtomicMemory::new(Memory::new());
        let controller = Arc::new(MemController::new(start));
        let backend = MemBackend::new(controller, Arc::default(), Arc::default(), memory).unwrap();
        let backend = backend.watched_by(Some(Arc::clone(&watchdog)));
        for _ in 0..3 {
            poll(&mut [PollFd::new(&*watchdog, PollFlags::IN)], None).unwrap();
            backend.handle_event(WATCHDOG_EVENT, EventSet::IN, &[], 0).unwrap();
            assert_eq!(manager.next().text, "WATCHDOG=1\n");
        }
        // The timer goes on, and no event is taken.
        poll(&mut [PollFd::new(&*watchdog, PollFlags::IN)], None).unwrap();
        assert!(manager.next_within(3 * SHORT).is_none());
    }

    #[test]
    fn a_worker_that_waits_for_arriving_memory_is_excused() {
        let (manager, watchdog) = watched(SHORT);
        watchdog.excuse(true);
        for _ in 0..3 {
            assert_eq!(manager.next().text, "WATCHDOG=1\n");
        }
        watchdog.excuse(false);
        while manager.next_within(3 * SHORT).is_some() {}
    }

    #[test]
    fn requests_feed_when_it_is_time_for_it() {
        let (manager, watchdog) = watched(LONG);
        watchdog.progress();
        assert!(manager.next_within(SHORT).is_none());
        let (manager, watchdog) = watched(SHORT);
        thread::sleep(SHORT);
        watchdog.progress();
        assert_eq!(manager.next().text, "WATCHDOG=1\n");
    }

    #[test]
    fn a_manager_that_reads_nothing_holds_nothing_up() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("notify");
        let _manager = std::os::unix::net::UnixDatagram::bind(&address).unwrap();
        let told = Arc::new(ServiceManager::at(address.as_os_str(), false).unwrap());
        let watchdog = Watchdog::start(told, LONG).unwrap();
        for _ in 0..10_000 {
            watchdog.feed();
        }
    }
}
