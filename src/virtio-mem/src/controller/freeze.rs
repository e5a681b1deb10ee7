//! Freezes of block state that outlive a call: who holds them, and what follows when they end.

use std::collections::btree_map::Entry;
use std::io;
use std::sync::{Arc, Weak};

use ram_discard::{FreezeFor, FreezeObserver, LocalRamDiscardManager, SourceId, Transaction};

use super::MemController;
use super::served::{DeviceSource, Sweep};
use crate::device::Geometry;
use crate::region_memory::RegionMemory;

/// Who holds block state frozen while memory migrates.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum FreezeHolder {
    /// The front-end logs writes to guest memory (VHOST_F_LOG_ALL).
    Log,
    /// The management API says so.
    Api,
    /// Another party, such as a client of the discard channel.
    Client(u64),
    /// Memory arrives here while the guest runs (postcopy, a lazy restore). The state that belongs
    /// to it may still be loaded: it comes by the same migration. No huge page is taken for what is
    /// plugged meanwhile, or what is outstanding would not be missed: see
    /// [`reserve_memory`](MemController::reserve_memory).
    Incoming,
}

impl FreezeHolder {
    fn purpose(self) -> FreezeFor {
        match self {
            Self::Incoming => FreezeFor::Destination,
            Self::Log | Self::Api | Self::Client(_) => FreezeFor::Source,
        }
    }
}

impl MemController {
    /// Freezes block state: PLUG, UNPLUG and UNPLUG_ALL are answered with BUSY until every holder
    /// has thawed, and all that froze it [at the manager](LocalRamDiscardManager::freeze). When this
    /// returns, no change is under way.
    ///
    /// # Errors
    ///
    /// When the state could not be saved; nothing was changed.
    pub fn freeze(&self, holder: FreezeHolder) -> io::Result<()> {
        self.begin_freeze(&mut self.manager.begin(), holder)
    }

    fn begin_freeze(
        &self,
        transaction: &mut Transaction<'_>,
        holder: FreezeHolder,
    ) -> io::Result<()> {
        let was_frozen = transaction.is_frozen();
        let mut state = self.state();
        if let Entry::Vacant(vacant) = state.holders.entry(holder) {
            let id = *vacant.insert(transaction.freeze(holder.purpose()));
            if let Err(error) = state.save_holders() {
                state.holders.remove(&holder);
                transaction.thaw(id);
                return Err(error);
            }
            state.observers.iter().for_each(|observer| observer.frozen_by(holder, true));
        }
        drop(state);
        if holder == FreezeHolder::Incoming {
            self.memory.begin_incoming();
        }
        if !was_frozen {
            self.frozen();
        }
        Ok(())
    }

    /// Ends the freeze of one holder. With the last one, the guest is told to try again, and a
    /// system reset that was put off is done.
    ///
    /// # Errors
    ///
    /// When the state could not be saved; the freeze then still ends. Called again, it is tried
    /// again to save that.
    pub fn thaw(&self, holder: FreezeHolder) -> io::Result<()> {
        let mut transaction = self.manager.begin();
        if holder == FreezeHolder::Incoming && self.memory.is_incoming() {
            self.memory.end_incoming();
            self.memory_arrived();
        }
        self.end_freeze(&mut transaction, holder)
    }

    /// The guest runs here while its memory still arrives, and what brings it follows block state
    /// ([`FrozenBlockState::follow`](ram_discard::FrozenBlockState::follow)): ends the freeze of
    /// [`FreezeHolder::Incoming`]. Until that is [thawed](Self::thaw), no huge page is taken for what is outstanding;
    /// blocks that are plugged get theirs.
    ///
    /// # Errors
    ///
    /// As [`thaw`](Self::thaw).
    pub fn serve_while_incoming(&self) -> io::Result<()> {
        self.end_freeze(&mut self.manager.begin(), FreezeHolder::Incoming)
    }

    /// What brings the memory does not follow block state any more, which is frozen again until all has arrived:
    /// takes back [`serve_while_incoming`](Self::serve_while_incoming). Does nothing where no memory arrives.
    ///
    /// # Errors
    ///
    /// When the state could not be saved; block state is not frozen then.
    pub fn freeze_while_incoming(&self) -> io::Result<()> {
        let mut transaction = self.manager.begin();
        if !self.memory.is_incoming() {
            return Ok(());
        }
        self.begin_freeze(&mut transaction, FreezeHolder::Incoming)
    }

    /// Whether memory arrives here: since a [freeze](Self::freeze) of [`FreezeHolder::Incoming`] that has not been
    /// [thawed](Self::thaw), also while the guest is [served](Self::serve_while_incoming).
    pub fn memory_arrives(&self) -> bool {
        self.memory.is_incoming()
    }

    /// Discards what has arrived in unplugged blocks: what brought it may have missed that they were unplugged.
    fn memory_arrived(&self) {
        // Else the state that belongs to the memory may still come.
        if self.state().sweep == Sweep::Done {
            self.sweep_or(Sweep::WhenMapped);
        }
        self.state().observers.iter().for_each(|observer| observer.memory_arrived());
    }

    fn end_freeze(
        &self,
        transaction: &mut Transaction<'_>,
        holder: FreezeHolder,
    ) -> io::Result<()> {
        let mut state = self.state();
        let Some(id) = state.holders.remove(&holder) else {
            return if state.thaw_unsaved { state.save_holders() } else { Ok(()) };
        };
        let saved = state.save_holders();
        state.thaw_unsaved = saved.is_err();
        state.observers.iter().for_each(|observer| observer.frozen_by(holder, false));
        drop(state);
        transaction.thaw(id);
        if !transaction.is_frozen() {
            self.thawed(transaction);
        }
        saved
    }

    /// Block state is frozen from now on.
    fn frozen(&self) {
        self.state().tell(|observer| observer.migration(true));
    }

    /// Block state is no longer frozen.
    fn thawed(&self, transaction: &mut Transaction<'_>) {
        let reset = std::mem::take(&mut self.state().reset_pending);
        if reset && let Err(error) = self.reset_now(transaction) {
            tracing::error!(%error, "cannot do the system reset that migration put off");
        }
        // Linux would otherwise wait 50 s before it tries again.
        self.state().tell(|observer| {
            observer.migration(false);
            observer.config_changed();
        });
    }

    /// Has the manager tell of the freezes that begin and end there, and of another device that is to be followed.
    pub(super) fn attach_to_manager(&self) {
        let parts = || {
            let Self { geometry, served, manager, source, memory } = self;
            let (served, memory) = (Arc::clone(served), Arc::clone(memory));
            let manager = Arc::downgrade(manager);
            Box::new(Parts { geometry: *geometry, served, manager, source: *source, memory })
        };
        self.manager.observe_freezes(parts());
        self.manager.set_source_follower(parts());
    }
}

/// A controller as its manager knows it, which it must not keep alive.
pub(super) struct Parts {
    geometry: Geometry,
    served: Arc<DeviceSource>,
    manager: Weak<LocalRamDiscardManager>,
    source: SourceId,
    memory: Arc<RegionMemory>,
}

impl Parts {
    /// The controller; `None` when it is gone, and its guest with it.
    pub(super) fn controller(&self) -> Option<MemController> {
        let (served, memory) = (Arc::clone(&self.served), Arc::clone(&self.memory));
        let manager = self.manager.upgrade()?;
        let (geometry, source) = (self.geometry, self.source);
        Some(MemController { geometry, served, manager, source, memory })
    }
}

impl FreezeObserver for Parts {
    fn frozen(&self) {
        if let Some(controller) = self.controller() {
            controller.frozen();
        }
    }

    fn thawed(&self, transaction: &mut Transaction<'_>) {
        if let Some(controller) = self.controller() {
            controller.thawed(transaction);
        }
    }
}
