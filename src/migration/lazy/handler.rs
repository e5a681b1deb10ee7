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
use crate::migration::error::MigrationError;
use crate::sys::page_faults::Fault;

/// How often it is looked whether there is memory by now for a page of zeros.
pub(super) const MEMORY_POLL: Timespec = Timespec { tv_sec: 0, tv_nsec: 50_000_000 };

/// Is told when faults cannot be answered any more: whoever needs a page waits for ever, so the
/// guest must be stopped. Its memory is not lost.
pub trait HandlerFailed: Send + Sync {
    /// Why.
    fn handler_failed(&self, error: &MigrationError);
}

/// A thread that answers the faults of a [`LazyRam`]. It touches none of the memory itself.
///
/// Whatever ends it, those who wait keep waiting as long as the [`LazyRam`] lives: a missing page
/// never becomes zeros.
pub struct FaultHandler {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
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
        let seen = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("faults".to_owned()).spawn(move || {
            if let Err(error) = serve(&lazy, &seen) {
                tracing::error!(%error, "faults are not answered any more");
                failed.handler_failed(&error);
            }
        });
        let thread = thread.map_err(MigrationError::io("start a thread"))?;
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for FaultHandler {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
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
        match poll(&mut fds, (!starved.is_empty()).then_some(&MEMORY_POLL)) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(MigrationError::io("wait for faults")(errno.into())),
        }
        lazy.faults.read(&mut found).map_err(MigrationError::io("read faults"))?;
        let (since, again) = (Instant::now(), std::mem::take(&mut starved));
        let waited = !again.is_empty();
        let found = found.drain(..).map(|fault| (fault, since));
        for (fault, since) in again.into_values().chain(found) {
            if !lazy.answer(&fault, since)? {
                starved.entry((fault.mapping, fault.offset)).or_insert((fault, since));
            }
        }
        if !waited && !starved.is_empty() {
            tracing::warn!("no memory for pages of zeros; who touches them waits");
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
            Resolution::Request(range) => {
                if let Err(error) = self.request(index, range) {
                    // It is asked for again once there is somebody to ask.
                    tracing::debug!(%error, %range, "cannot ask for a page now");
                }
            }
        }
        Ok(true)
    }
}
