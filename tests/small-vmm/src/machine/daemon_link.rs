//! What the daemon is told of memory and ring, also one that was started again.

use std::sync::atomic::Ordering;

use anyhow::{Context, ensure};

use super::{GuestState, Machine, PROTOCOL_FEATURES, Ring, lose};
use crate::frontend::USUAL_FEATURES;
use crate::protocol::{feature, protocol_feature};

impl Machine {
    /// Whether the daemon can wait for the pages that it misses, in postcopy.
    pub fn waits_for_pages(&self) -> bool {
        self.pagefault.load(Ordering::SeqCst)
    }

    /// Sends the daemon the memory table, if it does not have it.
    pub fn share_memory(&self) -> anyhow::Result<()> {
        if !self.shared.load(Ordering::SeqCst) {
            self.frontend.set_mem_table(&self.ram).context("share memory with the daemon")?;
            self.shared.store(true, Ordering::SeqCst);
        }
        Ok(())
    }

    /// Connects anew when the daemon has memory already, which it must not before it listens.
    pub(super) fn unshare_memory(&self) -> anyhow::Result<()> {
        if self.shared.load(Ordering::SeqCst) {
            self.connect_again()?;
        }
        Ok(())
    }

    /// A daemon that is connected to anew has no memory.
    fn connect_again(&self) -> anyhow::Result<()> {
        self.channel.close();
        self.shared.store(false, Ordering::SeqCst);
        self.frontend.connection().shutdown();
        self.frontend.reconnect(&self.options.socket)?;
        let agreed = self.frontend.negotiate(USUAL_FEATURES, PROTOCOL_FEATURES)?;
        let pagefault = agreed.protocol & protocol_feature::PAGEFAULT != 0;
        self.pagefault.store(pagefault, Ordering::SeqCst);
        Ok(self.channel.reopen(&self.frontend)?)
    }

    /// Says whether memory may be outstanding when the guest runs.
    pub fn expect_memory(&self, outstanding: bool) {
        self.guest().memory_outstanding = outstanding;
    }

    /// Tells the daemon where the ring is, so that it only has to be enabled.
    pub fn set_up_ring(&self) -> anyhow::Result<()> {
        let mut guest = self.guest();
        if guest.ring == Ring::Stopped {
            self.frontend.setup_ring(0, guest.driver.driver().ring())?;
            guest.ring = Ring::SetUp;
        }
        Ok(())
    }

    /// Takes back a ring that was only set up.
    pub fn tear_down_ring(&self) -> anyhow::Result<()> {
        let mut guest = self.guest();
        ensure!(!self.is_running(), "the guest runs");
        if guest.ring == Ring::SetUp {
            self.frontend.get_vring_base(0)?;
            guest.ring = Ring::Stopped;
        }
        Ok(())
    }

    /// Has the daemon log what it writes to guest memory (`log_all`), or no more. While it does,
    /// block state is frozen.
    pub fn log_writes(&self, log_all: bool) -> anyhow::Result<()> {
        let guest = self.guest();
        let features = self.frontend.features() & !feature::LOG_ALL;
        let features = features | if log_all { feature::LOG_ALL } else { 0 };
        self.frontend.set_features(features)?;
        if guest.ring == Ring::Running {
            // The used ring is logged by an address of its own.
            let ring = guest.driver.driver().ring();
            self.frontend.set_vring_addr(0, ring, log_all.then(|| ring.used_addr()))?;
        }
        Ok(())
    }

    /// Says that the daemon may go at any moment, and comes again: see [`reconnect`](Self::reconnect).
    pub fn detach(&self) {
        self.detached.store(true, Ordering::SeqCst);
    }

    /// Connects the guest to a daemon that was started again or has dropped the connection, also
    /// while memory arrives. A request that was not answered is there for it; the driver waits
    /// meanwhile. The ring of a guest that does not run starts with it, and one that waits for memory
    /// when that has arrived.
    pub fn reconnect(&self) -> anyhow::Result<()> {
        self.detach();
        self.connect_again()?;
        self.share_memory_again()?;
        if !self.driver_works() {
            let mut guest = self.guest();
            if !self.is_running() || guest.memory_outstanding {
                guest.ring = Ring::Stopped;
                self.attached(&mut guest);
                return Ok(());
            }
        }
        self.frontend.setup_ring_from(0, &self.ring, self.ring.used_idx()?)?;
        self.frontend.enable(0, true)?;
        self.ring.force_kick()?;
        // The last daemon may have died between an answer and its interrupt.
        self.ring.force_call()?;
        let mut guest = self.guest();
        guest.ring = Ring::Running;
        self.attached(&mut guest);
        Ok(())
    }

    /// Whether the guest runs and its ring does not wait for memory. A driver that holds the lock makes a
    /// request.
    fn driver_works(&self) -> bool {
        let outstanding = self.guest.try_lock().is_ok_and(|guest| guest.memory_outstanding);
        self.is_running() && !outstanding
    }

    fn attached(&self, guest: &mut GuestState) {
        guest.lost = None;
        self.detached.store(false, Ordering::SeqCst);
    }

    pub(super) fn start_device(&self, guest: &mut GuestState) {
        if let Err(error) = self.start_ring(guest) {
            lose(guest, &error.to_string());
        }
    }

    fn start_ring(&self, guest: &mut GuestState) -> anyhow::Result<()> {
        let ring = guest.driver.driver().ring();
        if guest.ring == Ring::Stopped {
            // A ring that was stopped is still enabled, and would start with its kick.
            self.frontend.enable(0, false).context("disable the ring")?;
            self.frontend.setup_ring(0, ring).context("set the ring up")?;
        }
        // Else the daemon would answer what the driver did not ask.
        ring.check_idle()?;
        self.frontend.enable(0, true).context("enable the ring")?;
        ring.force_kick()?;
        guest.ring = Ring::Running;
        Ok(())
    }
}
