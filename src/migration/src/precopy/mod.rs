//! Precopy: memory is sent while the guest runs, the rest while it is stopped.
//!
//! Who owns the guest at each point, and what each failure leads to, is drawn in
//! `spec-notes/migration.md`. In short: the source keeps the guest until the destination has said
//! that it has everything, and gets it back on anything else; the destination starts it only after
//! it could tell the source so.

mod capabilities;
mod convergence;
mod elastic;
mod handlers;
mod incoming;
mod outcome;
mod outgoing;
mod parameters;
mod return_path;

pub(crate) use capabilities::InUse;
pub use convergence::{AtMaxRounds, ThrottleParameters};
pub use incoming::Incoming;
pub use outcome::{GuestAfter, OutgoingError};
pub use outgoing::Outgoing;
pub use parameters::Parameters;

/// The ping whose answer is the destination's verdict: everything before it was loaded.
const PING_LOADED: u32 = 5;

/// The guest, as the VMM runs it.
pub trait Guest: Send + Sync {
    /// Stops the guest; when this returns, no vCPU and no device writes its memory.
    ///
    /// # Errors
    ///
    /// Why it cannot be stopped; it runs on then.
    fn stop(&self) -> Result<(), String>;

    /// Lets the guest run, for the first time on the destination, or again on the source.
    ///
    /// In postcopy most of its memory is still outstanding. It arrives beside this call, on threads
    /// of the engine, so what is done here may touch all of it, and may wait for others that do
    /// (kernel vhost, a vhost-user back-end that takes part in the faults). It must not wait for the
    /// migration to end, which waits for this.
    ///
    /// # Errors
    ///
    /// Why it cannot run. A source that had the guest reports it; on the destination of postcopy the
    /// guest has left its source by then, so memory is taken to its end before the error is
    /// returned, and the VMM may try again.
    fn run(&self) -> Result<(), String>;

    /// Keeps vCPUs from running for `percent` of the time, 0 to 99, so that memory is written
    /// more slowly than it is sent.
    fn throttle(&self, _percent: u8) {}
}

#[cfg(test)]
mod tests;
