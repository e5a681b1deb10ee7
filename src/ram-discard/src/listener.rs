//! A listener: it is told before memory is populated, which it may refuse, and before it is discarded.

use thiserror::Error;

use crate::{Section, try_all};

/// A listener's veto: it refuses to have memory populated, and the guest is told BUSY.
#[derive(Debug, Error)]
#[error("{listener} refused to populate {section}: {reason}")]
pub struct PopulateRefused {
    /// Who refused.
    pub listener: String,
    /// What it refused, bytes from the start of the region.
    pub section: Section,
    /// Why, in its own words.
    pub reason: String,
}

/// A party that relies on memory being there: DMA mappings, the discarder of the memory itself,
/// a migration in another process.
///
/// Sections are bytes from the start of the region, clipped to what the listener registered for.
/// They are made of whole granules (the manager's granularity) as far as that section is.
///
/// A discard need not match a populate: it may be narrower, wider, cover parts of several, and come
/// twice. A listener whose mappings go only as a whole, as those of VFIO do, maps a populated range
/// granule by granule, and on a discard unmaps the granules in it that are mapped. When there are more
/// granules than it can map, it refuses. Memory is not discarded before all listeners have returned.
/// Both calls are made under the manager's lock: they must not call back into the manager.
pub trait RamDiscardListener: Send {
    /// The name for logs and errors.
    fn name(&self) -> &str;

    /// `section`, of which nothing is populated, is about to be used; map it, or refuse. A listener
    /// told before a refusal is told to discard again, in reverse order; the one that refuses cleans
    /// up after itself.
    ///
    /// # Errors
    ///
    /// The reason for a refusal.
    fn notify_populate(&mut self, section: Section) -> Result<(), String>;

    /// `section` is no longer used: let go of it. Parts of it may never have been populated, or have
    /// been discarded before, and what is populated around it stays.
    fn notify_discard(&mut self, section: Section);

    /// As [`notify_populate`](Self::notify_populate) of several sections of one change, in this
    /// order: all of them, or in the end none.
    ///
    /// # Errors
    ///
    /// The section that is refused, and the reason. What was accepted before it has been discarded
    /// again, in reverse.
    fn notify_populate_all(&mut self, sections: &[Section]) -> Result<(), (Section, String)> {
        try_all(
            self,
            sections,
            |listener, &section| {
                listener.notify_populate(section).map_err(|reason| (section, reason))
            },
            |listener, &section| listener.notify_discard(section),
        )
    }

    /// As [`notify_discard`](Self::notify_discard) of several sections of one change, in this order.
    fn notify_discard_all(&mut self, sections: &[Section]) {
        sections.iter().for_each(|&section| self.notify_discard(section));
    }

    /// The change of which the calls before told has ended, one way or the other. By default
    /// nothing is done. Only a [`Transaction`](super::Transaction) makes this call.
    fn notify_change_ended(&mut self) {}

    /// The process that owns block state is gone, for this `reason`: the last call. Nothing is known
    /// of the region from now on, and memory that was populated may go at any time. Only a manager
    /// of a device in another process makes this call; by default nothing is done.
    fn notify_lost(&mut self, _reason: &str) {}
}
