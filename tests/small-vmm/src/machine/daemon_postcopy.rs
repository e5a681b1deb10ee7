//! Postcopy for the daemon: by vhost-user's PAGEFAULT it waits for outstanding pages that it touches, and serves
//! the guest before all memory has arrived.

use std::fmt;
use std::os::fd::OwnedFd;
use std::sync::atomic::Ordering;
use std::sync::{Arc, MutexGuard, PoisonError};

use anyhow::{Context, ensure};
use migration::MigrationError;
use migration::lazy::{HandlerFailed, LazyRam, SharedFaults, SharedRange};
use ram_discard::LocalRamDiscardManager;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use super::serves::Serves;
use super::{Machine, Ring, lose};
use crate::migration::id_at;
use crate::protocol::Request;

/// Postcopy for the daemon of a destination, from POSTCOPY_ADVISE to POSTCOPY_END.
#[derive(Default)]
pub(super) struct DaemonPostcopy {
    /// The daemon's userfaultfd, until it listens.
    userfaultfd: Option<OwnedFd>,
    /// Memory that arrives, once it listens.
    memory: Option<Arc<LazyRam>>,
    /// Answers its page faults.
    faults: Option<SharedFaults>,
    /// Has it serve the guest once that runs.
    serves: Serves,
}

impl fmt::Debug for DaemonPostcopy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DaemonPostcopy")
            .field("listens", &self.memory.is_some())
            .finish_non_exhaustive()
    }
}

impl DaemonPostcopy {
    fn advise(&mut self, machine: &Machine) -> anyhow::Result<()> {
        let advised = machine.frontend.postcopy_advise().context("tell the daemon of postcopy")?;
        let userfaultfd = advised.context("the daemon sends no userfaultfd for postcopy")?;
        self.userfaultfd = Some(userfaultfd);
        Ok(())
    }

    fn listen(&mut self, machine: &Machine, memory: &Arc<LazyRam>) -> anyhow::Result<()> {
        let userfaultfd = self.userfaultfd.take().context("the daemon listens already")?;
        machine.frontend.postcopy_listen().context("have the daemon listen")?;
        // The thread for the faults of a daemon that is gone ends first.
        self.faults = None;
        let faults = SharedFaults::start(Arc::clone(memory), userfaultfd, Arc::new(Report))?;
        machine.shared.store(true, Ordering::SeqCst);
        let mapped = machine.frontend.set_mem_table_postcopy(&machine.ram);
        let mut ranges = Vec::new();
        for mapped in mapped.context("share memory with the daemon")? {
            let block = memory.find(id_at(machine, mapped.guest_addr));
            let block =
                block.context("the daemon maps memory that no RAM block of the migration has")?;
            let (address, len) = (mapped.user_addr, mapped.size);
            ranges.push(SharedRange { address, len, block, offset: 0 });
        }
        faults.set_ranges(ranges).context("the daemon maps other memory than it was sent")?;
        machine.frontend.confirm_memory(Request::SetMemTable)?;
        self.memory = Some(Arc::clone(memory));
        self.faults = Some(faults);
        Ok(())
    }
}

/// Says that the daemon's faults are not answered: the guest can do without the daemon.
struct Report;

impl HandlerFailed for Report {
    fn handler_failed(&self, error: &MigrationError) {
        eprintln!("small-vmm: the daemon's faults are not answered any more: {error}");
    }
}

impl Machine {
    /// Tells the daemon that memory may arrive after the guest. False when the daemon cannot wait for pages: it has
    /// the memory table then, as in any migration, and the ring is started when all memory has arrived.
    pub fn advise_postcopy(&self) -> anyhow::Result<bool> {
        let mut postcopy = self.daemon_postcopy();
        *postcopy = None;
        if !self.waits_for_pages() {
            self.share_memory()?;
            return Ok(false);
        }
        self.unshare_memory()?;
        postcopy.insert(DaemonPostcopy::default()).advise(self)?;
        Ok(true)
    }

    /// Shares outstanding memory with the daemon, whose page faults are answered from now on.
    pub fn listen(&self, memory: &Arc<LazyRam>) -> anyhow::Result<()> {
        let mut postcopy = self.daemon_postcopy();
        let postcopy = postcopy.as_mut().context("the daemon was not told of postcopy")?;
        postcopy.listen(self, memory)?;
        // The daemon finds no holes there, so that the ring need not wait.
        self.expect_memory(false);
        Ok(())
    }

    /// Has the daemon serve the guest once it runs, while its memory arrives: `copy` does what the daemon does.
    pub fn serve_when_running(
        &self,
        daemon: Arc<RemoteRamDiscardManager>,
        copy: Arc<LocalRamDiscardManager>,
    ) {
        // One without postcopy serves it when all memory has arrived.
        if let Some(postcopy) = &mut *self.daemon_postcopy() {
            postcopy.serves = Serves::when_running(daemon, copy);
        }
    }

    /// The guest is about to run. What it asks of a daemon that cannot be followed is answered with BUSY until all
    /// memory has arrived.
    pub(super) fn serve_while_memory_arrives(&self) {
        let mut postcopy = self.daemon_postcopy();
        let Some(postcopy) = postcopy.as_mut().filter(|postcopy| postcopy.memory.is_some()) else {
            return;
        };
        postcopy.serves.begin();
    }

    /// Why the guest's blocks stay as they are until its memory has arrived, where they do.
    pub fn blocks_stay(&self) -> Option<String> {
        self.daemon_postcopy().as_ref()?.serves.reason()
    }

    /// Shares memory with a daemon that was connected to again: as outstanding memory, while it is.
    pub(super) fn share_memory_again(&self) -> anyhow::Result<()> {
        let mut postcopy = self.daemon_postcopy();
        let Some(postcopy) = &mut *postcopy else { return self.share_memory() };
        ensure!(
            self.waits_for_pages(),
            "memory is outstanding, and the daemon cannot wait for it: start it with --postcopy, \
             or reconnect when all memory has arrived"
        );
        postcopy.advise(self)?;
        match postcopy.memory.clone() {
            Some(memory) => postcopy.listen(self, &memory)?,
            None => return Ok(()),
        }
        // Block state is frozen until then: it listens, and the ring is not started yet.
        postcopy.serves.continue_with(|| crate::migration::attach(self));
        Ok(())
    }

    /// Ends postcopy: all memory has arrived, or the guest continues at the source.
    pub fn end_postcopy(&self) -> anyhow::Result<()> {
        let ends = self.daemon_postcopy().take();
        if ends.is_some() {
            self.frontend.postcopy_end().context("tell the daemon that postcopy is over")?;
        }
        Ok(())
    }

    /// Gives up what is outstanding: a daemon that waits for a page of it never finds zeros there.
    pub fn abandon_postcopy(&self) {
        *self.daemon_postcopy() = None;
    }

    /// All memory has arrived: a ring that waited for it is started. The guest can do without a daemon that is
    /// gone by now.
    pub fn memory_arrived(&self) {
        let shared = self.end_postcopy().and_then(|()| self.share_memory());
        let mut guest = self.guest();
        guest.memory_outstanding = false;
        match shared {
            Ok(()) if self.is_running() && guest.ring != Ring::Running => {
                self.start_device(&mut guest);
            }
            Ok(()) => {}
            // The daemon that is connected to next gets the memory table then.
            Err(_) if self.detached.load(Ordering::SeqCst) => {}
            Err(error) => lose(&mut guest, &format!("{error:#}")),
        }
    }

    fn daemon_postcopy(&self) -> MutexGuard<'_, Option<DaemonPostcopy>> {
        self.daemon_postcopy.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
