//! The manager in the process that has the device.

use std::ops::ControlFlow;
use std::sync::Arc;

use parking_lot::{Mutex, MutexGuard};
use smallvec::SmallVec;

use super::listeners::{Listeners, Registered};
use super::source::Combined;
use super::{
    ListenerId, PopulateRefused, RamDiscardListener, RamDiscardManager, RamDiscardSource,
    RegisterError, SourceId, Unavailable, Visit,
};
use crate::ByteRange;

/// Holds the sources and listeners of one region, in the process that has the device.
pub struct LocalRamDiscardManager {
    region_size: u64,
    inner: Mutex<Inner>,
}

struct Inner {
    region_size: u64,
    last_source_id: u64,
    sources: Vec<(SourceId, Arc<dyn RamDiscardSource>)>,
    listeners: Listeners,
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
        };
        Self { region_size, inner: Mutex::new(inner) }
    }

    /// Size of the region, bytes.
    pub fn region_size(&self) -> u64 {
        self.region_size
    }

    /// Shuts everybody else out: no registration, replay or other change happens until the
    /// transaction is dropped.
    pub fn begin(&self) -> Transaction<'_> {
        Transaction { inner: self.inner.lock() }
    }

    /// The smallest granularity of the sources, bytes.
    pub fn granularity(&self) -> u64 {
        self.inner.lock().combined(None).granularity()
    }

    /// Whether all sources call every byte of `section` populated.
    pub fn is_populated(&self, section: ByteRange) -> bool {
        self.inner.lock().combined(None).is_populated(section)
    }

    /// Calls `visit` with each maximal populated range of `section`, ascending, until it breaks.
    /// `visit` must not call back into the manager.
    pub fn replay_populated(
        &self,
        section: ByteRange,
        mut visit: impl FnMut(ByteRange) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.inner.lock().combined(None).replay(section, true, &mut visit)
    }

    /// Calls `visit` with each maximal discarded range of `section`, ascending, until it breaks.
    /// `visit` must not call back into the manager.
    pub fn replay_discarded(
        &self,
        section: ByteRange,
        mut visit: impl FnMut(ByteRange) -> ControlFlow<()>,
    ) -> ControlFlow<()> {
        self.inner.lock().combined(None).replay(section, false, &mut visit)
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
        section: ByteRange,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        let mut inner = self.inner.lock();
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
        let mut inner = self.inner.lock();
        let Registered { section, mut listener, .. } =
            inner.listeners.remove(id).ok_or(RegisterError::NotRegistered)?;
        let _ = inner.combined(None).replay(section, true, &mut |range| {
            listener.notify_discard(range);
            ControlFlow::Continue(())
        });
        Ok(listener)
    }

    /// Adds a source; listeners are told to discard what only the new source calls discarded.
    ///
    /// # Errors
    ///
    /// When the source is about a region of another size.
    pub fn add_source(&self, source: Arc<dyn RamDiscardSource>) -> Result<SourceId, RegisterError> {
        let mut inner = self.inner.lock();
        let (expected, found) = (inner.region_size, source.region_size());
        if expected != found {
            return Err(RegisterError::RegionSize { expected, found });
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
    /// When there is no such source, or a listener refuses: the source then stays, and the
    /// listeners are told to discard again.
    pub fn remove_source(&self, id: SourceId) -> Result<(), RegisterError> {
        let mut inner = self.inner.lock();
        let index = inner
            .sources
            .iter()
            .position(|(source, _)| *source == id)
            .ok_or(RegisterError::NotRegistered)?;
        let source = Arc::clone(&inner.sources[index].1);
        let ranges = inner.discarded_by_only(&*source, Some(id));
        for (done, &range) in ranges.iter().enumerate() {
            if let Err(refused) = inner.listeners.populate(range) {
                ranges[..done].iter().rev().for_each(|&range| inner.listeners.discard(range));
                return Err(refused.into());
            }
        }
        inner.sources.remove(index);
        Ok(())
    }
}

/// Exclusive use of a manager, to change the state of a source and tell the listeners.
pub struct Transaction<'a> {
    inner: MutexGuard<'a, Inner>,
}

impl Transaction<'_> {
    /// Tells the listeners that `source` is about to populate `section`, as far as all other
    /// sources have it populated. To be called before the state of `source` changes.
    ///
    /// # Errors
    ///
    /// A listener's refusal; those told before have then been told to discard, in reverse.
    pub fn notify_populate(
        &mut self,
        source: SourceId,
        section: ByteRange,
    ) -> Result<(), PopulateRefused> {
        let ranges = self.inner.populated_by_others(Some(source), section);
        for (done, &range) in ranges.iter().enumerate() {
            if let Err(refused) = self.inner.listeners.populate(range) {
                ranges[..done].iter().rev().for_each(|&range| self.inner.listeners.discard(range));
                return Err(refused);
            }
        }
        Ok(())
    }

    /// Tells the listeners, last registered first, that `source` has discarded `section` (or that
    /// a populate announced before did not come about).
    pub fn notify_discard(&mut self, source: SourceId, section: ByteRange) {
        for range in self.inner.populated_by_others(Some(source), section) {
            self.inner.listeners.discard(range);
        }
    }
}

impl Inner {
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
        section: ByteRange,
    ) -> SmallVec<[ByteRange; 1]> {
        let mut ranges = SmallVec::new();
        let _ = self.combined(except).replay(section, true, &mut |range| {
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
    ) -> Vec<ByteRange> {
        let mut ranges = Vec::new();
        if let Some(region) = ByteRange::new(0, self.region_size) {
            let others = self.combined(except);
            let _ = source.replay(region, false, &mut |discarded| {
                others.replay(discarded, true, &mut |range| {
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

    fn is_populated(&self, section: ByteRange) -> Result<bool, Unavailable> {
        Ok(self.is_populated(section))
    }

    fn replay_populated(
        &self,
        section: ByteRange,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.replay_populated(section, visit))
    }

    fn replay_discarded(
        &self,
        section: ByteRange,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.replay_discarded(section, visit))
    }

    fn register(
        &self,
        section: ByteRange,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        self.register(section, listener)
    }

    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        self.unregister(id)
    }
}

#[cfg(test)]
mod tests;
