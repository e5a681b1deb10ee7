//! Who must know which memory is populated.

use thiserror::Error;

use crate::ByteRange;

/// A listener's refusal to have memory populated; the guest is told BUSY.
#[derive(Debug, Error)]
#[error("{listener} refused to populate {section}: {reason}")]
pub struct PopulateRefused {
    /// Who refused.
    pub listener: String,
    /// What it refused, bytes from the start of the region.
    pub section: ByteRange,
    /// Why, in its own words.
    pub reason: String,
}

/// Somebody who relies on memory being there: DMA mappings, the discarder of the memory itself,
/// a migration in another process.
///
/// Sections are bytes from the start of the region, clipped to what the listener registered for.
/// Both calls are made under the manager's lock: they must not call back into the manager.
pub trait RamDiscardListener: Send {
    /// The name for logs and errors.
    fn name(&self) -> &str;

    /// `section` is about to be used; map it, or refuse. Whoever was told before a refusal is
    /// told to discard again, in reverse order; the one that refuses cleans up after itself.
    ///
    /// # Errors
    ///
    /// The reason for a refusal.
    fn notify_populate(&mut self, section: ByteRange) -> Result<(), String>;

    /// `section` is no longer used: let go of it. It may be wider than what was populated, since
    /// parts of it may never have been.
    fn notify_discard(&mut self, section: ByteRange);

    /// The process that owns block state is gone, for this `reason`: the last call. Nothing is known
    /// of the region from now on, and memory that was populated may go at any time. Only a manager
    /// of a device in another process makes this call; by default nothing is done.
    fn notify_lost(&mut self, _reason: &str) {}
}
