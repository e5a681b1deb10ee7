//! The thread that answers faults.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Instant;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::LazyRam;
use super::block::Resolution;
use crate::error::MigrationError;
use crate::sys::page_faults::Fault;

/// How often it is looked whether there is memory by now for a page of zeros.
pub(super) const MEMORY_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Is told when faults cannot be answered any more: accesses to what is outstanding wait for ever,
/// so the guest must be stopped. What has arrived of its memory is not lost.
pub trait HandlerFailed: Send + Sync {
    /// Why. Called on any thread, also while one unwinds from a panic, so it must neither panic
    /// nor wait for the guest.
    fn handler_failed(&self, error: &MigrationError);
}

/// A thread that answers the faults of a [`LazyRam`]. It touches none of the memory itself.
///
/// Whatever ends it, accesses that wait keep waiting: a missing page never becomes zeros. When the
/// value is dropped before all has arrived, [`HandlerFailed`] is told, once.
pub struct FaultHandler {
    lazy: Arc<LazyRam>,
    failure: Arc<Failure>,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// Whom to tell that faults are not answered any more, and whether that was done.
pub(super) struct Failure {
    failed: Arc<dyn HandlerFailed>,
    told: AtomicBool,
}

impl Failure {
    pub(super) fn new(failed: Arc<dyn HandlerFailed>) -> Arc<Self> {
        Arc::new(Self { failed, told: AtomicBool::new(false) })
    }

    pub(super) fn tell(&self, error: &MigrationError) {
        if !self.told.swap(true, Ordering::Relaxed) {
            tracing::error!(%error, "faults are not answered any more");
            self.failed.handler_failed(error);
        }
    }
}

/// Ends a thread that polls it.
pub(super) struct Stop {
    stopped: AtomicBool,
    wake: OwnedFd,
}

impl Stop {
    pub(super) fn new() -> Result<Arc<Self>, MigrationError> {
        let wake = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
            .map_err(|errno| MigrationError::io("make an eventfd")(errno.into()))?;
        Ok(Arc::new(Self { stopped: AtomicBool::new(false), wake }))
    }

    pub(super) fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        // Any number but 0 wakes.
        let _ = rustix::io::write(&self.wake, &1u64.to_le_bytes());
    }

    pub(super) fn is_stopped(&self) -> bool {
        self.stopped.load(Ordering::Acquire)
    }
}

impl AsFd for Stop {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.wake.as_fd()
    }
}

impl FaultHandler {
    /// Starts the thread.
    ///
    /// # Errors
    ///
    /// When it cannot be started.
    pub fn start(
        lazy: Arc<LazyRam>,
        failed: Arc<dyn HandlerFailed>,
    ) -> Result<Self, MigrationError> {
        let stop = Stop::new()?;
        let failure = Failure::new(failed);
        *lazy.failure.write() = Some(Arc::clone(&failure));
        let (seen, served, told) = (Arc::clone(&stop), Arc::clone(&lazy), Arc::clone(&failure));
        let thread = std::thread::Builder::new().name("faults".to_owned()).spawn(move || {
            if let Err(error) = serve(&served, &seen) {
                told.tell(&error);
            }
        });
        let thread = thread.map_err(MigrationError::io("start a thread"))?;
        Ok(Self { lazy, failure, stop, thread: Some(thread) })
    }

    /// Tells that what is outstanding does not arrive any more.
    pub(crate) fn fail(&self, error: &MigrationError) {
        self.failure.tell(error);
    }
}

impl Drop for FaultHandler {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
        *self.lazy.failure.write() = None;
        if self.lazy.is_awaited() {
            self.failure.tell(&MigrationError::Outstanding { pages: self.lazy.outstanding() });
        }
    }
}

fn serve(lazy: &LazyRam, stop: &Stop) -> Result<(), MigrationError> {
    let mut found = Vec::new();
    // For which there was no memory, and since when: mapping and offset, since vCPUs that are
    // interrupted fault again and again.
    let mut starved: BTreeMap<(usize, u64), (Fault, Instant)> = BTreeMap::new();
    while !stop.is_stopped() {
        let mut fds = [PollFd::new(&lazy.faults, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
        let again = !starved.is_empty() || lazy.has_failed_requests();
        match poll(&mut fds, again.then_some(&MEMORY_POLL)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(MigrationError::io("wait for faults")(errno.into())),
        }
        lazy.faults.read(&mut found).map_err(MigrationError::io("read faults"))?;
        lazy.retry_requests();
        let (since, again) = (Instant::now(), std::mem::take(&mut starved));
        let waited = !again.is_empty();
        let found = found.drain(..).map(|fault| (fault, since));
        for (fault, since) in again.into_values().chain(found) {
            if !lazy.answer(&fault, since)? {
                starved.entry((fault.mapping, fault.offset)).or_insert((fault, since));
            }
        }
        if !waited && !starved.is_empty() {
            tracing::warn!("no memory for pages of zeros; vCPUs that touch them wait");
        }
    }
    Ok(())
}

impl LazyRam {
    /// Answers a fault; false when there is no memory to do it now.
    fn answer(&self, fault: &Fault, since: Instant) -> Result<bool, MigrationError> {
        let Some(index) = self.blocks.iter().position(|block| block.mapping == fault.mapping)
        else {
            return Ok(true);
        };
        match self.blocks[index].fault(&self.faults, fault.offset, fault.thread)? {
            Resolution::Zero => self.statistics.lock().zero.add(since.elapsed()),
            Resolution::Arrived => self.statistics.lock().arrived += 1,
            Resolution::Requested => {}
            Resolution::NoMemory => return Ok(false),
            Resolution::Request(range) => self.request_or_note(index, range),
        }
        Ok(true)
    }

    /// Answers a fault of a thread at `offset` of a block, as one that the kernel tells.
    #[cfg(test)]
    pub(crate) fn answer_fault(&self, block: usize, offset: u64) -> Result<bool, MigrationError> {
        let mapping = self.blocks[block].mapping;
        let fault = Fault { mapping, offset, write_protected: false, thread: 0 };
        self.answer(&fault, Instant::now())
    }
}
