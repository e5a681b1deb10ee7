//! A time in which no guest request is executed.

use super::link::{Link, Side, Stop};
use super::relay::ConnectionEvents;

/// Ends the time when dropped, on every way out.
pub(super) struct Quiesced<'a>(&'a dyn ConnectionEvents);

impl<'a> Quiesced<'a> {
    /// Waits until no guest request is being executed, or until the front-end has left: a request
    /// may wait for memory that only the front-end can bring.
    pub(super) fn new(events: &'a dyn ConnectionEvents, link: &Link) -> Result<Self, Stop> {
        if events.quiesce(&|| link.has_gone(Side::Front)) {
            Ok(Self(events))
        } else {
            Err(Stop::Closed(Side::Front))
        }
    }
}

impl Drop for Quiesced<'_> {
    fn drop(&mut self) {
        self.0.release();
    }
}
