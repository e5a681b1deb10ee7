//! RamDiscardManager: who may rely on which guest memory being there.
//!
//! Memory of a region is populated or discarded ([`MemoryState`]): its users may rely on it, or may not.
//! As in QEMU there are three parts: a [`RamDiscardSource`] knows what is populated, the
//! [`RamDiscardManager`] holds the listeners, and a [`RamDiscardListener`] is told. Listeners are
//! told to populate in the order in which they registered and to discard in reverse, so that one
//! which registers later may rely on one that registered earlier (mappings on memory).
//!
//! ```text
//!  sources                       manager                            listeners
//!  -------                       -------                            ---------
//!  virtio-mem: block bitmap --+                                +--> memory: discards its file
//!                             +--> notify_populate(section) ---+--> DMA: maps, may refuse
//!  another device ------------+    notify_discard(section)     +--> log, metrics
//!                                  replay_populated, replay_discarded <-- migration, dumps
//!                                  freeze <-------------------------------- migration
//! ```
//!
//! One lock orders everything: a registration, a replay and a change of the source each see all
//! of the others or nothing of them.
//!
//! The manager is a trait, since those who ask need not be where the device is:
//! [`LocalRamDiscardManager`] is the one in the device's own process, and
//! `virtio_mem::discard_channel` reaches it from another.
//!
//! [`memory`] is what it is all about: guest RAM as the host has it, and how it is discarded.
//!
//! ```
//! use ram_discard::{FreezeFor, LocalRamDiscardManager, Section};
//!
//! let manager = LocalRamDiscardManager::new(1 << 30);
//! let all = Section::new(0, 1 << 30).unwrap();
//! // A migration learns what is discarded, and has it stay so, in one step.
//! let frozen = manager.freeze(FreezeFor::Source);
//! assert_eq!(frozen.discarded(all).count(), 0);
//! assert!(manager.is_frozen());
//! // At its end it learns whether that held without a gap.
//! assert!(frozen.check().is_ok());
//! drop(frozen);
//! assert!(!manager.is_frozen());
//! ```
//!
//! Or it has a listener [follow](FrozenBlockState::follow) from there on, and freezes block state
//! [again](FollowedBlockState::freeze) at its end.

#[cfg(test)]
#[path = "../../../tests/common/huge_page_pool.rs"]
mod huge_page_pool;

mod all_or_none;
mod byte_range;
mod extent_set;
mod follow;
mod freeze;
mod listener;
mod listeners;
mod local;
pub mod memory;
mod memory_state;
mod source;
mod sys;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;

use std::ops::ControlFlow;
use std::time::Duration;

use thiserror::Error;

pub use all_or_none::try_all;
pub use byte_range::{
    ByteRange, Extent, FileRange, GpaRange, OfBlock, OfFile, OfGuest, OfRegion, Origin, Section,
};
pub use extent_set::ExtentSet;
pub use follow::{Follow, FollowError, FollowedBlockState, NotFollowed};
pub use freeze::{Freeze, FreezeError, FreezeFor, FreezeLost, FrozenBlockState};
pub use listener::{PopulateRefused, RamDiscardListener};
pub use listeners::{Listeners, Registered};
pub use local::{FreezeId, FreezeObserver, LocalRamDiscardManager, SourceFollower, Transaction};
pub use memory_state::MemoryState;
pub use source::RamDiscardSource;

/// What a replay calls with each range; it must not call back into the manager.
pub type Visit<'a> = dyn FnMut(Section) -> ControlFlow<()> + 'a;

/// The manager of a region, in this process or another.
///
/// All ranges are sections: bytes from the start of the region.
pub trait RamDiscardManager: Send + Sync {
    /// Size of the region, bytes.
    fn region_size(&self) -> u64;

    /// The unit in which memory is populated and discarded, bytes; a power of two.
    fn granularity(&self) -> u64;

    /// Whether every byte of `section` is populated.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    fn is_populated(&self, section: Section) -> Result<bool, Unavailable>;

    /// For how long all listeners together may keep a change waiting before this manager is without a
    /// device; `None` when a change waits for as long as it takes.
    fn patience(&self) -> Option<Duration> {
        None
    }

    /// Calls `visit` with each maximal populated range of `section`, ascending, until it breaks.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    fn replay_populated(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable>;

    /// Calls `visit` with each maximal discarded range of `section`, ascending, until it breaks.
    ///
    /// # Errors
    ///
    /// When the manager's process is gone.
    fn replay_discarded(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable>;

    /// Adds a listener for `section` and tells it what is populated there now, each maximal range
    /// once.
    ///
    /// # Errors
    ///
    /// When the section is not inside the region or the listener refuses; it is then told to
    /// discard what it had accepted.
    fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError>;

    /// Removes a listener, after it was told to discard what is populated, each maximal range
    /// once.
    ///
    /// # Errors
    ///
    /// When it is not registered.
    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError>;

    /// Freezes block state, and tells in the same step what is discarded: PLUG, UNPLUG and
    /// UNPLUG_ALL are answered with BUSY until all that froze it have thawed, and when this returns, no
    /// change is under way. Then the guest is told to try again what was refused.
    ///
    /// # Errors
    ///
    /// When it cannot be frozen; nothing was changed.
    fn freeze(&self, purpose: FreezeFor) -> Result<FrozenBlockState, FreezeError>;

    /// Whether block state can be made to follow that of another device, by
    /// [`follow_source`](Self::follow_source). By default it cannot.
    fn follows_source(&self) -> bool {
        false
    }

    /// Populates `section`, or discards it, because the device did from which the guest comes: it is here that
    /// listeners and memory are told, and may refuse to populate. The guest does not run here yet; block state may be
    /// frozen for a destination. Must not be called within a transaction or a listener.
    ///
    /// # Errors
    ///
    /// When a part of the section is in that state already, it is not made of whole granules of the region, a
    /// listener refuses, or the device cannot do it; nothing was changed then.
    fn follow_source(
        &self,
        _section: Section,
        _state: MemoryState,
    ) -> Result<(), SourceNotFollowed> {
        Err(SourceNotFollowed("block state here cannot follow that of another device".to_owned()))
    }
}

/// Block state does not follow that of another device; nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[error("{0}")]
pub struct SourceNotFollowed(pub String);

/// The manager cannot be asked any more.
#[derive(Debug, Error)]
#[error("the RamDiscardManager is gone: {0}")]
pub struct Unavailable(pub String);

/// Names a registered listener.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ListenerId(pub(crate) u64);

/// Names a source of the manager.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceId(u64);

/// Why a listener or source could not be added or removed; nothing was changed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum RegisterError {
    /// The section reaches beyond the region.
    #[error("section {section} is not inside the region of {region_size:#x} bytes")]
    OutsideRegion {
        /// What was asked for.
        section: Section,
        /// Size of the region, bytes.
        region_size: u64,
    },
    /// The source is about a region of another size.
    #[error("source of a region of {found:#x} bytes for a region of {expected:#x} bytes")]
    RegionSize {
        /// Size the manager was made for, bytes.
        expected: u64,
        /// Size the source has, bytes.
        found: u64,
    },
    /// The source is one of the manager's already.
    #[error("this source is one of the manager's already")]
    SourceTwice,
    /// Block state is frozen, and a source that comes or goes would change it.
    #[error("block state is frozen: try again when migration has ended")]
    Frozen,
    /// A listener refused what is populated now.
    #[error(transparent)]
    Refused(#[from] PopulateRefused),
    /// The manager's process is gone.
    #[error(transparent)]
    Unavailable(#[from] Unavailable),
    /// No such listener or source.
    #[error("not registered")]
    NotRegistered,
}
