//! The daemon as a client of memory that arrives: by vhost-user's PAGEFAULT it waits for the pages
//! that it misses, and serves the guest before all has come.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use anyhow::Context;
use migration::MigrationError;
use migration::lazy::{HandlerFailed, LazyRam, SharedFaults, SharedRange};

use super::blocks;
use crate::machine::Machine;
use crate::protocol::Request;

/// The daemon of a destination, from POSTCOPY_ADVISE to POSTCOPY_END.
pub(super) struct Client {
    machine: Arc<Machine>,
    /// The daemon's, until it listens.
    userfaultfd: Option<OwnedFd>,
    shared: Option<SharedFaults>,
}

impl Client {
    /// Tells the daemon that memory may arrive after the guest; `None` when it cannot take part.
    pub(super) fn advise(machine: &Arc<Machine>) -> anyhow::Result<Option<Self>> {
        if !machine.waits_for_pages() {
            return Ok(None);
        }
        let advised =
            machine.frontend().postcopy_advise().context("tell the daemon of postcopy")?;
        let userfaultfd = advised.context("the daemon sends no userfaultfd for postcopy")?;
        let (machine, userfaultfd) = (Arc::clone(machine), Some(userfaultfd));
        Ok(Some(Self { machine, userfaultfd, shared: None }))
    }

    /// Shares memory that is about to arrive with the daemon, whose faults are answered from now on.
    pub(super) fn listen(&mut self, lazy: &Arc<LazyRam>) -> anyhow::Result<()> {
        let userfaultfd = self.userfaultfd.take().context("the daemon listens already")?;
        let frontend = self.machine.frontend();
        frontend.postcopy_listen().context("have the daemon listen")?;
        let failed = Arc::new(Report);
        let shared =
            self.shared.insert(SharedFaults::start(Arc::clone(lazy), userfaultfd, failed)?);
        let mut ranges = Vec::new();
        for mapped in self.machine.map_arriving_memory()? {
            let id = blocks::id_at(&self.machine, mapped.guest_addr);
            let block = lazy.find(id).context("the daemon maps memory that does not arrive")?;
            let (address, len) = (mapped.user_addr, mapped.size);
            ranges.push(SharedRange { address, len, block, offset: 0 });
        }
        shared.set_ranges(ranges).context("the daemon maps what it was not sent")?;
        frontend.confirm_memory(Request::SetMemTable)?;
        // The daemon finds no holes there, so that the ring need not wait.
        self.machine.expect_memory(false);
        Ok(())
    }

    /// Nothing is to arrive any more.
    pub(super) fn end(self) -> anyhow::Result<()> {
        let frontend = self.machine.frontend();
        frontend.postcopy_end().context("tell the daemon that postcopy is over")?;
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
