//! A time in which no guest request is executed.

use super::relay::ConnectionEvents;

/// Ends the time when dropped, on every way out.
pub(super) struct Quiesced<'a>(&'a dyn ConnectionEvents);

impl<'a> Quiesced<'a> {
    /// Waits until no guest request is being executed.
    pub(super) fn new(events: &'a dyn ConnectionEvents) -> Self {
        events.quiesce();
        Self(events)
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}
