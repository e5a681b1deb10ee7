//! A change of block state, which nothing else comes between.

use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::MutexGuard;

use super::{FreezeId, Inner};
use crate::{FreezeFor, PopulateRefused, Section, SourceId, try_all};

/// Sections that listeners are told of at once, at most.
pub(super) const BATCH: usize = 4096;

/// Exclusive use of a manager, to change the state of a source and tell the listeners.
///
/// While block state [is frozen](Self::is_frozen), a source changes nothing that a guest asks for.
pub struct Transaction<'a> {
    pub(super) inner: MutexGuard<'a, Inner>,
    frozen: &'a AtomicBool,
    /// A listener was told something, and so is told of the end.
    told: bool,
}

impl Drop for Transaction<'_> {
    fn drop(&mut self) {
        if self.told {
            self.inner.listeners.change_ended();
        }
    }
}

impl<'a> Transaction<'a> {
    pub(super) fn new(inner: MutexGuard<'a, Inner>, frozen: &'a AtomicBool) -> Self {
        Self { inner, frozen, told: false }
    }

    /// Whether block state is frozen.
    pub fn is_frozen(&self) -> bool {
        self.inner.freezes.any()
    }

    /// Whether block state is frozen so that not even saved state may be loaded.
    pub fn is_frozen_for_source(&self) -> bool {
        self.inner.freezes.any_for_source()
    }

    /// Begins a freeze; the caller tells of it.
    pub fn freeze(&mut self, purpose: FreezeFor) -> FreezeId {
        let id = self.inner.freezes.begin(purpose);
        self.frozen.store(true, Ordering::Release);
        id
    }

    /// Ends a freeze; the caller tells of it.
    pub fn thaw(&mut self, id: FreezeId) {
        self.inner.freezes.end(id);
        self.frozen.store(self.inner.freezes.any(), Ordering::Release);
    }

    /// Tells the listeners that `source` is about to populate `section`, as far as all other
    /// sources have it populated. To be called before the state of `source` changes.
    ///
    /// # Errors
    ///
    /// A listener's refusal; those told before have then been told to discard, in reverse. While
    /// block state is frozen for a source of migration, all is refused.
    pub fn notify_populate(
        &mut self,
        source: SourceId,
        section: Section,
    ) -> Result<(), PopulateRefused> {
        self.check_thawed(section)?;
        self.told = true;
        let ranges = self.inner.populated_by_others(Some(source), section);
        self.inner.listeners.populate_each(&ranges)
    }

    /// Tells the listeners, last registered first, that `source` has discarded `section` (or that
    /// a populate announced before did not come about). Freezes for a source of migration are lost
    /// then.
    pub fn notify_discard(&mut self, source: SourceId, section: Section) {
        self.inner.freezes.lose(format_args!("{section} was discarded"));
        self.told = true;
        for range in self.inner.populated_by_others(Some(source), section) {
            self.inner.listeners.discard(range);
        }
    }

    /// As [`notify_populate`](Self::notify_populate) of several sections, in this order. A listener
    /// is told of many of them at once, so that the cost of asking it hardly grows with their number.
    ///
    /// # Errors
    ///
    /// As [`notify_populate`](Self::notify_populate).
    pub fn notify_populate_all(
        &mut self,
        source: SourceId,
        sections: &[Section],
    ) -> Result<(), PopulateRefused> {
        if let Some(&first) = sections.first() {
            self.check_thawed(first)?;
        }
        try_all(
            self,
            sections.chunks(BATCH),
            |transaction, part| transaction.populate_batch(source, part),
            |transaction, part| transaction.discard_batch(source, part.iter().rev()),
        )
    }

    /// As [`notify_discard`](Self::notify_discard) of several sections, last one first. A listener is
    /// told of many of them at once.
    pub fn notify_discard_all(&mut self, source: SourceId, sections: &[Section]) {
        if let Some(section) = sections.first() {
            self.inner.freezes.lose(format_args!("{section} was discarded"));
        }
        for part in sections.rchunks(BATCH) {
            self.discard_batch(source, part.iter().rev());
        }
    }

    /// Refuses to populate what a source of migration relies on.
    fn check_thawed(&self, section: Section) -> Result<(), PopulateRefused> {
        if self.is_frozen_for_source() {
            let (listener, reason) = ("migration".to_owned(), "block state is frozen".to_owned());
            return Err(PopulateRefused { listener, section, reason });
        }
        Ok(())
    }

    fn populate_batch(
        &mut self,
        source: SourceId,
        sections: &[Section],
    ) -> Result<(), PopulateRefused> {
        let ranges = self.parts(source, sections.iter());
        if ranges.is_empty() {
            return Ok(());
        }
        self.told = true;
        self.inner.listeners.populate_all(&ranges)
    }

    fn discard_batch<'b>(&mut self, source: SourceId, sections: impl Iterator<Item = &'b Section>) {
        let ranges = self.parts(source, sections);
        if !ranges.is_empty() {
            self.told = true;
            self.inner.listeners.discard_all(&ranges);
        }
    }

    /// What every other source has populated of the sections.
    fn parts<'b>(
        &self,
        source: SourceId,
        sections: impl Iterator<Item = &'b Section>,
    ) -> Vec<Section> {
        // Without another source, the usual case, nothing need be asked for each of many.
        if self.inner.sources.iter().all(|(id, _)| *id == source) {
            return sections.copied().collect();
        }
        sections
            .flat_map(|&section| self.inner.populated_by_others(Some(source), section))
            .collect()
    }
}
