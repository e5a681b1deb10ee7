//! The relay of one connection.

use std::io;
use std::net::Shutdown;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use tracing::debug;

use super::error::RelayError;
use super::link::Link;
use super::notifier::Notifier;
use super::session::Session;
use crate::sys::lost_memory;

/// What the relay tells the device about the connection. Called from the relay's thread only.
pub trait ConnectionEvents: Send + Sync + 'static {
    /// VHOST_F_LOG_ALL was acknowledged, or no longer is: cleared by SET_FEATURES, by a reset, or
    /// with the connection. Called on changes only.
    fn log_all(&self, active: bool);

    /// Waits until no guest request is being executed, and lets none start. False, without
    /// effect, when one goes on and on while `gone` says that the front-end has left.
    fn quiesce(&self, gone: &dyn Fn() -> bool) -> bool;

    /// Ends [`quiesce`](Self::quiesce). Called exactly once for each that was true.
    fn release(&self);

    /// A ring runs. Called again with every change of the rings, as long as one does.
    fn running(&self);

    /// What the driver has accepted (0: nothing, as after a reset), and whether the first queue is
    /// served. Called when that may have changed, before the front-end is answered.
    fn driver(&self, features: u64, runs: bool);

    /// Whether files of any file system are taken for memory, logs and device state.
    fn allows_files(&self) -> bool;

    /// Whether the guest may use `len` bytes at `gpa` now: what lies in the device's region is
    /// plugged.
    fn is_usable(&self, gpa: u64, len: u64) -> bool;

    /// RESET_DEVICE or RESET_OWNER has disabled all rings. Called while quiesced.
    fn rings_reset(&self);

    /// POSTCOPY_ADVISE: a userfaultfd for the front-end.
    ///
    /// # Errors
    ///
    /// When there is none to be had.
    fn postcopy_advise(&self) -> io::Result<OwnedFd>;

    /// POSTCOPY_LISTEN: pages of memory that is mapped from now on may be missing.
    ///
    /// # Errors
    ///
    /// When it comes out of order, or cannot be done.
    fn postcopy_listen(&self) -> io::Result<()>;

    /// POSTCOPY_END: nothing is missing any more. Must not wait for a guest request.
    ///
    /// # Errors
    ///
    /// When it comes out of order, or cannot be done.
    fn postcopy_end(&self) -> io::Result<()>;

    /// Where the region of the memory table that starts at `gpa` is mapped; `None` when there is
    /// none, or nothing is missing.
    fn mapped_at(&self, gpa: u64) -> Option<u64>;
}

/// Ends a running relay from another thread.
#[derive(Debug)]
pub struct RelayHandle {
    front: UnixStream,
    crate_side: UnixStream,
}

impl RelayHandle {
    /// Closes both connections. The relay ends as soon as the device has finished what it does.
    pub fn shutdown(&self) {
        for stream in [&self.front, &self.crate_side] {
            // Fails only when the connection has ended already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// Passes messages between a front-end and the vhost-user crate.
#[derive(Debug)]
pub struct Relay;

impl Relay {
    /// A handle to end [`run`](Self::run) with the same streams.
    pub fn handle(front: &UnixStream, crate_side: &UnixStream) -> io::Result<RelayHandle> {
        Ok(RelayHandle { front: front.try_clone()?, crate_side: crate_side.try_clone()? })
    }

    /// Serves one connection until either side closes it, then closes both.
    ///
    /// Returns an error when the connection ended because of a message; the device is unharmed
    /// and can serve another connection.
    pub fn run(
        front: UnixStream,
        crate_side: UnixStream,
        events: Arc<dyn ConnectionEvents>,
        notifier: Arc<Notifier>,
    ) -> Result<(), RelayError> {
        // The memory of an earlier front-end is no longer used.
        lost_memory::forget();
        let link = Link::new(front, crate_side);
        let mut session = Session::new(&link, &*events, &notifier);
        let outcome = session.serve();
        // No message may go to a front-end that comes later but has not sent its channel yet.
        notifier.suspend();
        notifier.detach();
        link.shutdown();
        session.finish();
        match outcome {
            Ok(side) => {
                debug!(?side, "the connection was closed");
                Ok(())
            }
            Err(error) => Err(error),
        }
    }
}
