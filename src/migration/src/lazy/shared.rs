//! Faults of another process that shares the guest's memory: a vhost-user back-end in postcopy.
//!
//! It tells its faults by its own addresses. They are looked up once, by the ranges that it said
//! it mapped, and from then on a page is its block and its offset, as for everybody else: what is
//! asked for, and what is placed, never depends on an address of the client. A page that arrives is
//! placed in the VMM's own mapping, which puts it into the file that both share, so the client
//! only has to be woken. What will never arrive, discarded memory above all, is filled with
//! zeros where the client misses it, on the spot.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ram_discard::ByteRange;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use super::LazyRam;
use super::block::{self, Resolution};
use super::handler::{HandlerFailed, MEMORY_POLL, Stop};
use crate::error::MigrationError;
use crate::sys::page_faults::Placed;
use crate::sys::shared_faults::{ClientFault, ClientFaults};

/// Where a client has mapped a part of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SharedRange {
    /// First address in the client; in vhost-user, what it answered to SET_MEM_TABLE.
    pub address: u64,
    /// Bytes.
    pub len: u64,
    /// Number of the block in the [`LazyRam`].
    pub block: usize,
    /// Where the range starts in the block, bytes.
    pub offset: u64,
}

/// A thread that answers the faults of one client, for as long as the value lives.
///
/// What the client waits for when this ends, it waits for until its userfaultfd is closed in all
/// processes, or it gives up by itself.
pub struct SharedFaults {
    lazy: Arc<LazyRam>,
    client: Arc<Client>,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

impl SharedFaults {
    /// Starts the thread; `userfaultfd` is what the client sent (in vhost-user, the answer to
    /// POSTCOPY_ADVISE). `failed` is told when its faults cannot be answered any more, which is
    /// no reason to stop a guest that can do without the client.
    ///
    /// # Errors
    ///
    /// When the descriptor cannot be used, or the thread not be started.
    pub fn start(
        lazy: Arc<LazyRam>,
        userfaultfd: OwnedFd,
        failed: Arc<dyn HandlerFailed>,
    ) -> Result<Self, MigrationError> {
        let faults = ClientFaults::new(userfaultfd);
        let faults = faults.map_err(MigrationError::io("take a client's userfaultfd"))?;
        let client = Arc::new(Client { faults, state: Mutex::default() });
        let stop = Stop::new()?;
        // Before anything is read, so that nothing arrives unseen.
        lazy.clients.write().push(Arc::clone(&client));
        let shared = (Arc::clone(&lazy), Arc::clone(&client), Arc::clone(&stop));
        let thread = std::thread::Builder::new().name("shared faults".to_owned());
        let thread = thread.spawn(move || {
            let (lazy, client, stop) = shared;
            let served = client.serve(&lazy, &stop);
            client.log_repeated();
            if let Err(error) = served {
                tracing::error!(%error, "faults of a client are not answered any more");
                failed.handler_failed(&error);
            }
        });
        let mut started = Self { lazy, client, stop, thread: None };
        started.thread = Some(thread.map_err(MigrationError::io("start a thread"))?);
        Ok(started)
    }

    /// What the client has mapped from now on, all of it. To be called before the client may touch
    /// the memory; in vhost-user, before its answer is acknowledged.
    ///
    /// # Errors
    ///
    /// `EINVAL` when a range is not inside its block; the ranges before stay.
    pub fn set_ranges(&self, ranges: Vec<SharedRange>) -> io::Result<()> {
        let inside = |range: &SharedRange| {
            let end = range.offset.checked_add(range.len);
            range.block < self.lazy.nr_blocks()
                && range.address.checked_add(range.len).is_some()
                && end.is_some_and(|end| end <= self.lazy.block(range.block).mapping().len())
        };
        if !ranges.iter().all(inside) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.client.state.lock().ranges = ranges;
        Ok(())
    }
}

/// How long the end of a client's thread is waited for. It does nothing that takes longer, unless the
/// client lets a read wait that it was told not to.
const END: Duration = Duration::from_secs(2);

impl Drop for SharedFaults {
    fn drop(&mut self) {
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let deadline = Instant::now() + END;
            while !thread.is_finished() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(1));
            }
            match thread.is_finished() {
                true => drop(thread.join()),
                false => {
                    tracing::warn!("a client holds up the thread of its faults, which is left")
                }
            }
        }
        self.lazy.clients.write().retain(|client| !Arc::ptr_eq(client, &self.client));
    }
}

/// What is known of a client.
pub(super) struct Client {
    faults: ClientFaults,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    ranges: Vec<SharedRange>,
    /// Block and start of each page that the client waits for.
    waiting: BTreeSet<(usize, u64)>,
    unnamed: Repeated,
    not_woken: Repeated,
}

/// How often a client had something go wrong that it can repeat at will: the first time is logged,
/// and at the end how often it was.
#[derive(Default)]
struct Repeated(u64);

impl Repeated {
    /// Counts one more; true for the one that is logged.
    fn count(&mut self) -> bool {
        self.0 = self.0.saturating_add(1);
        self.0 == 1
    }

    /// How often it was, if more often than was logged.
    fn unlogged(&self) -> Option<u64> {
        (self.0 > 1).then_some(self.0)
    }
}

impl State {
    /// Block and offset of an address.
    fn find(&self, address: u64) -> Option<(usize, u64)> {
        self.ranges.iter().find_map(|range| {
            let within = address.checked_sub(range.address)?;
            (within < range.len).then_some((range.block, range.offset + within))
        })
    }

    /// Where the client has mapped a page of a block.
    fn addresses(&self, block: usize, page: ByteRange) -> Vec<u64> {
        let mapped = |range: &&SharedRange| {
            range.block == block
                && range.offset <= page.start()
                && page.end() <= range.offset + range.len
        };
        let address = |range: &SharedRange| range.address + (page.start() - range.offset);
        self.ranges.iter().filter(mapped).map(address).collect()
    }
}

impl Client {
    fn serve(&self, lazy: &LazyRam, stop: &Stop) -> Result<(), MigrationError> {
        let mut found = Vec::new();
        // Which could not be answered for now, by address.
        let mut starved = BTreeMap::new();
        while !stop.is_stopped() {
            let mut fds =
                [PollFd::new(&self.faults, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
            let again = !starved.is_empty() || lazy.has_failed_requests();
            match poll(&mut fds, again.then_some(&MEMORY_POLL)) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(MigrationError::io("wait for faults")(errno.into())),
            }
            let bad = PollFlags::ERR | PollFlags::HUP | PollFlags::NVAL;
            if fds[0].revents().intersects(bad) {
                let source = io::ErrorKind::InvalidInput.into();
                return Err(MigrationError::Io { what: "wait for faults of a client", source });
            }
            // Which also takes the events that its address space changes, until which it takes no page.
            let read = self.faults.read(&mut found);
            read.map_err(MigrationError::io("read faults of a client"))?;
            lazy.retry_requests();
            let again = std::mem::take(&mut starved);
            for fault in again.into_values().chain(found.drain(..)) {
                match self.answer(lazy, fault) {
                    Ok(()) => {}
                    Err(error) if is_for_now(&error) => {
                        starved.insert(fault.address, fault);
                    }
                    // The client has ended.
                    Err(error) if error.raw_os_error() == Some(libc::ESRCH) => return Ok(()),
                    Err(error) => {
                        return Err(MigrationError::io("answer a fault of a client")(error));
                    }
                }
            }
        }
        Ok(())
    }

    /// Logs how often happened what is logged the first time only.
    fn log_repeated(&self) {
        let state = self.state.lock();
        if let Some(faults) = state.unnamed.unlogged() {
            tracing::warn!(faults, "a client waited for memory that it did not say it mapped");
        }
        if let Some(wakes) = state.not_woken.unlogged() {
            tracing::warn!(wakes, "a client could not be woken");
        }
    }

    fn answer(&self, lazy: &LazyRam, fault: ClientFault) -> io::Result<()> {
        let since = Instant::now();
        let mut state = self.state.lock();
        let found = state.find(fault.address).and_then(|(block, offset)| {
            let page = lazy.blocks[block].page_of(offset)?;
            Some((block, page, state.addresses(block, page)))
        });
        let Some((block, page, addresses)) = found else {
            // Only the client can know what it meant.
            if state.unnamed.count() {
                tracing::warn!(?fault, "a client waits for memory that it did not say it mapped");
            }
            return Ok(());
        };
        // Before it is looked whether the page is there, so that its arrival is not missed.
        state.waiting.insert((block, page.start()));
        drop(state);
        match lazy.blocks[block].ask(page, fault.thread) {
            Some(Resolution::Request(range)) => lazy.request_or_note(block, range),
            Some(_) => {}
            None => {
                self.state.lock().waiting.remove(&(block, page.start()));
                for address in addresses {
                    self.fill(lazy, address, (block, page), since)?;
                }
            }
        }
        Ok(())
    }

    /// Nothing comes for a page: zeros, unless there is something.
    fn fill(
        &self,
        lazy: &LazyRam,
        address: u64,
        (block, page): (usize, ByteRange),
        since: Instant,
    ) -> io::Result<()> {
        match self.faults.place_zeros(address, page.len()) {
            Ok(Placed::Exists(_)) if lazy.blocks[block].lacks(page.start()) => {
                return Err(block::no_memory());
            }
            Ok(Placed::Done) => lazy.statistics.lock().zero.add(since.elapsed()),
            Ok(Placed::Exists(_)) => {
                lazy.statistics.lock().arrived += 1;
                self.faults.wake(address, page.len())?;
            }
            // No longer registered, so no thread waits there.
            Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Pages have arrived: lets the client go on where it waits for one of them.
    pub(super) fn arrived(&self, lazy: &LazyRam, block: usize, range: ByteRange) {
        let mut state = self.state.lock();
        let waited: Vec<_> =
            state.waiting.range((block, range.start())..(block, range.end())).copied().collect();
        for (block, start) in waited {
            state.waiting.remove(&(block, start));
            let Some(page) = lazy.blocks[block].page_of(start) else { continue };
            for address in state.addresses(block, page) {
                if let Err(error) = self.faults.wake(address, page.len()) {
                    // Its own loss: the guest's memory is complete without it.
                    if state.not_woken.count() {
                        tracing::warn!(%error, "cannot wake a client");
                    }
                }
            }
        }
    }
}

/// Whether a fault of a client can be answered later.
fn is_for_now(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ENOMEM | libc::ENOSPC | libc::EAGAIN))
}

#[cfg(test)]
mod tests;
