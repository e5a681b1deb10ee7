//! The manager in the process that has the device.

mod follow;
mod freezes;
mod transaction;

use std::ops::ControlFlow;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

use follow::LocalFollow;
pub use freezes::FreezeId;
use freezes::Freezes;
pub use transaction::Transaction;

use super::listeners::{Listeners, Registered};
use super::source::Combined;
use super::{
    Follow, FollowError, Freeze, FreezeError, FreezeFor, FreezeLost, FrozenBlockState, ListenerId,
    MemoryState, RamDiscardListener, RamDiscardManager, RamDiscardSource, RegisterError, SourceId,
    Unavailable, Visit,
};
use crate::{Section, SourceNotFollowed};

/// Holds the sources and listeners of one region, in the process that has the device.
pub struct LocalRamDiscardManager {
    shared: Arc<Shared>,
}

/// What outlives the manager while block state is frozen.
struct Shared {
    region_size: u64,
    inner: Mutex<Inner>,
    /// Whether `inner` has any freeze, to be read without its lock.
    frozen: AtomicBool,
    /// What is told of the first freeze and of the end of the last.
    observer: OnceLock<Box<dyn FreezeObserver>>,
    /// What has block state follow that of another device.
    follower: OnceLock<Box<dyn SourceFollower>>,
}

struct Inner {
    region_size: u64,
    last_source_id: u64,
    sources: Vec<(SourceId, Arc<dyn RamDiscardSource>)>,
    listeners: Listeners,
    freezes: Freezes,
}

/// Is told of freezes that begin and end at the manager, within a transaction.
pub trait FreezeObserver: Send + Sync {
    /// Block state is frozen, which it was not before.
    fn frozen(&self);
    /// Block state is no longer frozen.
    fn thawed(&self, transaction: &mut Transaction<'_>);
}

/// Has block state follow that of another device: see [`RamDiscardManager::follow_source`]. Called without a
/// transaction.
pub trait SourceFollower: Send + Sync {
    /// Populates `section`, or discards it, within a transaction of its own.
    ///
    /// # Errors
    ///
    /// As [`RamDiscardManager::follow_source`]; nothing was changed then.
    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed>;
}

impl LocalRamDiscardManager {
    /// A manager without sources (all is populated) and listeners, of a region of `region_size`
    /// bytes.
    pub fn new(region_size: u64) -> Self {
        let inner = Inner {
            region_size,
            last_source_id: 0,
            sources: Vec::new(),
            listeners: Listeners::default(),
            freezes: Freezes::default(),
        };
        let inner = Mutex::new(inner);
        let frozen = AtomicBool::new(false);
        let (observer, follower) = (OnceLock::new(), OnceLock::new());
        Self { shared: Arc::new(Shared { region_size, inner, frozen, observer, follower }) }
    }

    /// Size of the region, bytes.
    pub fn region_size(&self) -> u64 {
        self.shared.region_size
    }

    /// Shuts everybody else out: no registration, replay or other change happens until the
    /// transaction is dropped.
    pub fn begin(&self) -> Transaction<'_> {
        self.shared.begin()
    }

    /// Whether block state is frozen. It may be otherwise right after, unless a [`Transaction`] is
    /// asked.
    pub fn is_frozen(&self) -> bool {
        self.shared.frozen.load(Ordering::Acquire)
    }

    /// Has `observer` told of freezes; there is one at most, which stays.
    pub fn observe_freezes(&self, observer: Box<dyn FreezeObserver>) {
        let _ = self.shared.observer.set(observer);
    }

    /// Has `follower` do what [`RamDiscardManager::follow_source`] asks for; there is one at most, which stays.
    pub fn set_source_follower(&self, follower: Box<dyn SourceFollower>) {
        let _ = self.shared.follower.set(follower);
    }

    /// Freezes block state; see [`RamDiscardManager::freeze`]. Must not be called, nor what it
    /// returns be dropped, within a transaction or a listener.
    pub fn freeze(&self, purpose: FreezeFor) -> FrozenBlockState {
        let begun = LocalFreeze::begin(&self.shared, &mut self.begin(), purpose);
        FrozenBlockState::new(begun.0, Box::new(begun.1))
    }

    /// The smallest granularity of the sources, bytes.
    pub fn granularity(&self) -> u64 {
        self.inner().combined(None).granularity()
    }

    /// Whether all sources call every byte of `section` populated.
    pub fn is_populated(&self, section: Section) -> bool {
        self.inner().combined(None).is_populated(section)
    }

    /// Calls `visit` with each maximal populated range of `section`, ascending, until it breaks.
    /// `visit` must not call back into the manager.
    pub fn replay_populated(
        &self,
        section: Section,
        mut visit: impl FnMut(Section) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.inner().combined(None).replay(section, MemoryState::Populated, &mut visit)
    }

    /// Calls `visit` with each maximal discarded range of `section`, ascending, until it breaks.
    /// `visit` must not call back into the manager.
    pub fn replay_discarded(
        &self,
        section: Section,
        mut visit: impl FnMut(Section) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.inner().combined(None).replay(section, MemoryState::Discarded, &mut visit)
    }

    /// Adds a listener for `section` and tells it what is populated there now, each maximal range
    /// once.
    ///
    /// # Errors
    ///
    /// When the section is not inside the region or the listener refuses; it is then told to
    /// discard what it had accepted.
    pub fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        let mut inner = self.inner();
        let region_size = inner.region_size;
        if section.end() > region_size {
            return Err(RegisterError::OutsideRegion { section, region_size });
        }
        let populated = inner.populated_by_others(None, section);
        Ok(inner.listeners.add(section, listener, &populated)?)
    }

    /// Removes a listener, after it was told to discard what is populated, each maximal range
    /// once.
    ///
    /// # Errors
    ///
    /// When it is not registered.
    pub fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        let mut inner = self.inner();
        let Registered { section, mut listener, .. } =
            inner.listeners.remove(id).ok_or(RegisterError::NotRegistered)?;
        let _ = inner.combined(None).replay(section, MemoryState::Populated, &mut |range| {
            listener.notify_discard(range);
            ControlFlow::Continue(())
        });
        Ok(listener)
    }

    /// Adds a source; listeners are told to discard what only the new source calls discarded.
    ///
    /// # Errors
    ///
    /// When the source is about a region of another size or there already, or block state is frozen.
    pub fn add_source(&self, source: Arc<dyn RamDiscardSource>) -> Result<SourceId, RegisterError> {
        let mut inner = self.inner();
        let (expected, found) = (inner.region_size, source.region_size());
        if expected != found {
            return Err(RegisterError::RegionSize { expected, found });
        }
        if inner.sources.iter().any(|(_, other)| Arc::ptr_eq(other, &source)) {
            return Err(RegisterError::SourceTwice);
        }
        if inner.freezes.any() {
            return Err(RegisterError::Frozen);
        }
        for range in inner.discarded_by_only(&*source, None) {
            inner.listeners.discard(range);
        }
        inner.last_source_id += 1;
        let id = SourceId(inner.last_source_id);
        inner.sources.push((id, source));
        Ok(id)
    }

    /// Removes a source; listeners are told to populate what only it called discarded.
    ///
    /// # Errors
    ///
    /// When there is no such source, block state is frozen, or a listener refuses: the source then
    /// stays, and the listeners are told to discard again.
    pub fn remove_source(&self, id: SourceId) -> Result<(), RegisterError> {
        let mut inner = self.inner();
        let index = inner
            .sources
            .iter()
            .position(|(source, _)| *source == id)
            .ok_or(RegisterError::NotRegistered)?;
        if inner.freezes.any() {
            return Err(RegisterError::Frozen);
        }
        let source = Arc::clone(&inner.sources[index].1);
        let ranges = inner.discarded_by_only(&*source, Some(id));
        inner.listeners.populate_each(&ranges)?;
        inner.sources.remove(index);
        Ok(())
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.shared.inner.lock()
    }
}

impl Shared {
    fn begin(&self) -> Transaction<'_> {
        Transaction::new(self.inner.lock(), &self.frozen)
    }
}

/// A freeze that counts until it ends.
struct LocalFreeze {
    shared: Arc<Shared>,
    id: FreezeId,
    purpose: FreezeFor,
    /// What must still be discarded, where nothing may change.
    map: Option<Vec<Section>>,
}

impl LocalFreeze {
    /// Freezes block state, and finds what is discarded.
    fn begin(
        shared: &Arc<Shared>,
        transaction: &mut Transaction<'_>,
        purpose: FreezeFor,
    ) -> (Vec<Section>, Self) {
        let first = !transaction.is_frozen();
        let id = transaction.freeze(purpose);
        let discarded = transaction.inner.discarded();
        if let Some(observer) = shared.observer.get().filter(|_| first) {
            observer.frozen();
        }
        let map = (purpose == FreezeFor::Source).then(|| discarded.clone());
        (discarded, Self { shared: Arc::clone(shared), id, purpose, map })
    }

    /// Ends the freeze, with the last of them also for the observer.
    fn end(&self, transaction: &mut Transaction<'_>) {
        transaction.thaw(self.id);
        if let Some(observer) = self.shared.observer.get()
            && !transaction.is_frozen()
        {
            observer.thawed(transaction);
        }
    }

    fn check_in(&self, inner: &Inner) -> Result<(), FreezeLost> {
        inner.freezes.check(self.id)?;
        match &self.map {
            // A source that changed its state without a word.
            Some(map) if !inner.is_discarded_exactly(map.iter().copied()) => {
                Err(FreezeLost("a source changed what is discarded".to_owned()))
            }
            _ => Ok(()),
        }
    }
}

impl Freeze for LocalFreeze {
    fn check(&self) -> Result<(), FreezeLost> {
        self.check_in(&self.shared.inner.lock())
    }

    fn thaw(&mut self) -> Result<(), FreezeLost> {
        let mut transaction = self.shared.begin();
        let checked = self.check_in(&transaction.inner);
        self.end(&mut transaction);
        checked
    }

    fn can_follow(&self) -> bool {
        true
    }

    fn follow(
        &mut self,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<Box<dyn Follow>, FollowError> {
        let mut transaction = self.shared.begin();
        self.check_in(&transaction.inner)?;
        let discarded = transaction.inner.discarded();
        let listeners = &mut transaction.inner.listeners;
        let follow =
            LocalFollow::register(&self.shared, listeners, self.purpose, discarded, listener);
        // What was put off until now is done here, and the listener told of it.
        self.end(&mut transaction);
        Ok(Box::new(follow))
    }
}

impl Inner {
    /// All maximal discarded ranges, ascending.
    fn discarded(&self) -> Vec<Section> {
        let mut ranges = Vec::new();
        if let Some(region) = Section::new(0, self.region_size) {
            let _ = self.combined(None).replay(region, MemoryState::Discarded, &mut |range| {
                ranges.push(range);
                ControlFlow::Continue(())
            });
        }
        ranges
    }

    /// Whether the maximal discarded ranges are these, ascending.
    fn is_discarded_exactly(&self, mut expected: impl Iterator<Item = Section>) -> bool {
        let Some(region) = Section::new(0, self.region_size) else {
            return expected.next().is_none();
        };
        let mut is_next = |range| match expected.next() {
            Some(other) if other == range => ControlFlow::Continue(()),
            _ => ControlFlow::Break(()),
        };
        let replayed = self.combined(None).replay(region, MemoryState::Discarded, &mut is_next);
        replayed.is_continue() && expected.next().is_none()
    }

    /// All sources but `except` as one.
    fn combined(&self, except: Option<SourceId>) -> Combined<'_> {
        let sources = self.sources.iter().filter(|(id, _)| Some(*id) != except);
        Combined {
            sources: sources.map(|(_, source)| &**source).collect(),
            region_size: self.region_size,
        }
    }

    /// The ranges of `section` that every source but `except` calls populated.
    ///
    /// Where there are no others, which is usual, that is the section.
    fn populated_by_others(
        &self,
        except: Option<SourceId>,
        section: Section,
    ) -> SmallVec<[Section; 1]> {
        let mut ranges = SmallVec::new();
        let _ = self.combined(except).replay(section, MemoryState::Populated, &mut |range| {
            ranges.push(range);
            ControlFlow::Continue(())
        });
        ranges
    }

    /// What `source` calls discarded and every source but `except` calls populated.
    fn discarded_by_only(
        &self,
        source: &dyn RamDiscardSource,
        except: Option<SourceId>,
    ) -> Vec<Section> {
        let mut ranges = Vec::new();
        if let Some(region) = Section::new(0, self.region_size) {
            let others = self.combined(except);
            let _ = source.replay(region, MemoryState::Discarded, &mut |discarded| {
                others.replay(discarded, MemoryState::Populated, &mut |range| {
                    ranges.push(range);
                    ControlFlow::Continue(())
                })
            });
        }
        ranges
    }
}

impl RamDiscardManager for LocalRamDiscardManager {
    fn region_size(&self) -> u64 {
        self.region_size()
    }

    fn granularity(&self) -> u64 {
        self.granularity()
    }

    fn is_populated(&self, section: Section) -> Result<bool, Unavailable> {
        Ok(self.is_populated(section))
    }

    fn replay_populated(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.replay_populated(section, visit))
    }

    fn replay_discarded(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.replay_discarded(section, visit))
    }

    fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        self.register(section, listener)
    }

    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        self.unregister(id)
    }

    fn freeze(&self, purpose: FreezeFor) -> Result<FrozenBlockState, FreezeError> {
        Ok(self.freeze(purpose))
    }

    fn follows_source(&self) -> bool {
        self.shared.follower.get().is_some()
    }

    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed> {
        let nothing = || SourceNotFollowed("nothing here follows another device".to_owned());
        self.shared.follower.get().ok_or_else(nothing)?.follow_source(section, state)
    }
}

#[cfg(test)]
mod tests;
