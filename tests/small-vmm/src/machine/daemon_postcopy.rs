//! The daemon while memory arrives: by vhost-user's PAGEFAULT it waits for the pages that it misses,
//! and serves the guest before all has come.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use anyhow::{Context, ensure};
use migration::MigrationError;
use migration::lazy::{HandlerFailed, LazyRam, SharedFaults, SharedRange};

use super::{Machine, Ring, lose};
use crate::migration::id_at;
use crate::protocol::Request;

/// The daemon of a destination, from POSTCOPY_ADVISE to POSTCOPY_END.
#[derive(Default)]
pub(super) struct Arriving {
    /// The daemon's, until it listens.
    userfaultfd: Option<OwnedFd>,
    /// What arrives, once it listens.
    memory: Option<Arc<LazyRam>>,
    /// What answers its faults.
    faults: Option<SharedFaults>,
}

impl fmt::Debug for Arriving {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Arriving").field("listens", &self.memory.is_some()).finish_non_exhaustive()
    }
}

impl Arriving {
    fn advise(&mut self, machine: &Machine) -> anyhow::Result<()> {
        let advised = machine.frontend.postcopy_advise().context("tell the daemon of postcopy")?;
        let userfaultfd = advised.context("the daemon sends no userfaultfd for postcopy")?;
        self.userfaultfd = Some(userfaultfd);
        Ok(())
    }

    fn listen(&mut self, machine: &Machine, memory: &Arc<LazyRam>) -> anyhow::Result<()> {
        let userfaultfd = self.userfaultfd.take().context("the daemon listens already")?;
        machine.frontend.postcopy_listen().context("have the daemon listen")?;
        // What answers a daemon that is gone ends first.
        self.faults = None;
        let faults = SharedFaults::start(Arc::clone(memory), userfaultfd, Arc::new(Report))?;
        machine.shared.store(true, Ordering::SeqCst);
        let mapped = machine.frontend.set_mem_table_postcopy(&machine.ram);
        let mut ranges = Vec::new();
        for mapped in mapped.context("share memory with the daemon")? {
            let block = memory.find(id_at(machine, mapped.guest_addr));
            let block = block.context("the daemon maps memory that does not arrive")?;
            let (address, len) = (mapped.user_addr, mapped.size);
            ranges.push(SharedRange { address, len, block, offset: 0 });
        }
        faults.set_ranges(ranges).context("the daemon maps what it was not sent")?;
        machine.frontend.confirm_memory(Request::SetMemTable)?;
        self.memory = Some(Arc::clone(memory));
        self.faults = Some(faults);
        Ok(())
    }
}

/// The guest can do without the daemon.
struct Report;

impl HandlerFailed for Report {
    fn handler_failed(&self, error: &MigrationError) {
        eprintln!("small-vmm: the daemon's faults are not answered any more: {error}");
    }
}

impl Machine {
    /// Tells the daemon that memory may arrive after the guest; false when it cannot take part, and has
    /// the memory table as in any migration. The ring waits for all memory then.
    pub fn advise_postcopy(&self) -> anyhow::Result<bool> {
        let mut arriving = self.arriving();
        *arriving = None;
        if !self.waits_for_pages() {
            self.share_memory()?;
            return Ok(false);
        }
        self.unshare_memory()?;
        arriving.insert(Arriving::default()).advise(self)?;
        Ok(true)
    }

    /// Shares memory that is about to arrive with the daemon, whose faults are answered from now on.
    pub fn listen(&self, memory: &Arc<LazyRam>) -> anyhow::Result<()> {
        let mut arriving = self.arriving();
        let arriving = arriving.as_mut().context("the daemon was not told of postcopy")?;
        arriving.listen(self, memory)?;
        // The daemon finds no holes there, so that the ring need not wait.
        self.expect_memory(false);
        Ok(())
    }

    /// Shares memory with a daemon that was connected to again: as memory that arrives, if it does.
    pub(super) fn share_memory_again(&self) -> anyhow::Result<()> {
        let mut arriving = self.arriving();
        let Some(arriving) = &mut *arriving else { return self.share_memory() };
        ensure!(
            self.waits_for_pages(),
            "memory still arrives, and the daemon cannot wait for it: start it with --postcopy, \
             or reconnect when all memory is here"
        );
        arriving.advise(self)?;
        match arriving.memory.clone() {
            Some(memory) => arriving.listen(self, &memory),
            None => Ok(()),
        }
    }

    /// Nothing is to arrive any more, or the guest has not come.
    pub fn end_postcopy(&self) -> anyhow::Result<()> {
        let ends = self.arriving().take();
        if ends.is_some() {
            self.frontend.postcopy_end().context("tell the daemon that postcopy is over")?;
        }
        Ok(())
    }

    /// What has not arrived never will: a daemon that waits for it finds no zeros.
    pub fn abandon_postcopy(&self) {
        *self.arriving() = None;
    }

    /// All memory has arrived: what waited for that continues. The guest can do without a daemon
    /// that is gone by now.
    pub fn memory_arrived(&self) {
        let shared = self.end_postcopy().and_then(|()| self.share_memory());
        let mut guest = self.guest();
        guest.arriving = false;
        match shared {
            Ok(()) if self.is_running() && guest.ring != Ring::Running => {
                self.start_device(&mut guest);
            }
            Ok(()) => {}
            // Which shares it, too.
            Err(_) if self.detached.load(Ordering::SeqCst) => {}
            Err(error) => lose(&mut guest, &format!("{error:#}")),
        }
    }

    fn arriving(&self) -> MutexGuard<'_, Option<Arriving>> {
        self.arriving.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
