//! Postcopy: the guest runs on the destination, and its memory follows.
//!
//! The source first tells which pages are still to come (QEMU's discard commands); the destination
//! discards those, registers them for faults, and starts the guest. Faults ask for pages on the
//! return path; the answers overtake everything else on a channel of their own where there is one.
//! A broken channel loses nothing: both sides pause, and go on over a new one.

mod handover;
mod incoming;
mod listening;
mod outgoing;
pub(crate) mod page_placer;
mod received;
mod requests;
mod return_channel;

pub(super) use handover::Handover;
pub(super) use incoming::IncomingPages;
pub use incoming::{OnListen, PostcopyIncoming};
pub(super) use outgoing::{AnswerRequests, OutgoingPages};
pub use outgoing::{PostcopyOutgoing, SwitchWhen};
pub use received::{put as put_received, read as read_received};
pub use requests::Asked;
pub(super) use return_channel::ReturnChannel;

use super::channel::Channel;
use super::error::MigrationError;
use super::precopy::InUse;

/// Everything is loaded and the guest can run (QEMU's QEMU_VM_PING_PACKAGED_LOADED).
pub(super) const PING_PACKAGE_LOADED: u32 = 0x42;

/// The most bytes of device state in a package, sent or taken.
pub(super) const PACKAGE_MAX: u64 = 1 << 30;

/// The length of a package as it is sent.
///
/// # Errors
///
/// When the destination would refuse it.
pub(super) fn package_len(len: usize) -> Result<u32, MigrationError> {
    let fits = u32::try_from(len).ok().filter(|len| u64::from(*len) <= PACKAGE_MAX);
    fits.ok_or_else(|| {
        let limit =
            format!("{len} bytes of device state, of which at most {PACKAGE_MAX} can be sent");
        let source = std::io::Error::new(std::io::ErrorKind::FileTooLarge, limit);
        MigrationError::Io { what: "package the device state", source }
    })
}

/// The channels of a migration in postcopy.
#[derive(Debug)]
pub struct Channels {
    /// The stream, and back the return path.
    pub main: Channel,
    /// Pages that a vCPU waits for (QEMU's postcopy-preempt). Without it they go on the main
    /// channel, behind what is already under way there.
    pub urgent: Option<Channel>,
}

impl Channels {
    /// Ends both.
    pub(crate) fn shutdown(&self) {
        self.main.shutdown();
        if let Some(urgent) = &self.urgent {
            urgent.shutdown();
        }
    }

    /// Refuses them when they are not all encrypted, or none, as those before.
    fn check_encryption(&self, before: bool) -> Result<(), MigrationError> {
        let (main, urgent) = (&self.main, self.urgent.as_ref());
        InUse { main, urgent, pages: Vec::new() }.check_as_before(before)
    }

    /// Handles of the same channels.
    fn clone_handles(&self) -> Self {
        let urgent = self.urgent.as_ref().map(Channel::clone_handle);
        Self { main: self.main.clone_handle(), urgent }
    }

    /// Handles that end only with the channels.
    fn uncancellable(&self) -> Self {
        let urgent = self.urgent.as_ref().map(Channel::uncancellable);
        Self { main: self.main.uncancellable(), urgent }
    }
}

/// Makes new channels after the old ones broke.
pub trait Reconnect: Send {
    /// Waits for new channels. `None` gives up: the guest is lost, unless the other side still has
    /// all of it.
    fn reconnect(&mut self, error: &MigrationError) -> Option<Channels>;
}

/// Gives up at once.
#[derive(Clone, Copy, Debug, Default)]
pub struct GiveUp;

impl Reconnect for GiveUp {
    fn reconnect(&mut self, _error: &MigrationError) -> Option<Channels> {
        None
    }
}

#[cfg(test)]
mod tests;
