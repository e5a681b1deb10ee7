//! Precopy: memory is sent while the guest runs, the rest while it is stopped.
//!
//! Who owns the guest at each point, and what each failure leads to, is drawn in
//! `spec-notes/migration.md`. In short: the source keeps the guest until the destination has said
//! that it has everything, and gets it back on anything else; the destination starts it only after
//! it could tell the source so.

mod convergence;
mod handlers;
mod incoming;
mod outgoing;
mod return_path;

pub use convergence::ThrottleParameters;
pub use incoming::Incoming;
pub use outgoing::{Outgoing, Parameters};

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
    /// # Errors
    ///
    /// Why it cannot run.
    fn run(&self) -> Result<(), String>;

    /// Keeps vCPUs from running for `percent` of the time, 0 to 99, so that memory is written
    /// more slowly than it is sent.
    fn throttle(&self, _percent: u8) {}
}

#[cfg(test)]
mod tests;
