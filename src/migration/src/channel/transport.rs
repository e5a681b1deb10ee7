//! What carries a channel: the trait that a socket, a pipe and TLS have in common.

use std::fmt;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

/// What is waited for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ready {
    /// There is something to read, the end of the stream among it.
    Read,
    /// There is room for something to be written.
    Write,
}

/// A connection as a [`Channel`](super::Channel) uses it, which a VMM may bring of its own.
///
/// No call blocks but [`wait`](Self::wait), and that for no longer than it is told: patience,
/// cancellation and deadlines are the channel's. One thread reads while another writes and a third
/// shuts it down, so all of it takes `&self`.
pub trait Transport: fmt::Debug + Send + Sync {
    /// Reads some bytes; 0 at the end of the stream.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is nothing now. Anything else ends the channel.
    fn read(&self, buf: &mut [u8]) -> io::Result<usize>;

    /// Writes some of `bytes`, at least one where there are any; how many. They may be held until they are
    /// [flushed](Self::flush), but no more than a bounded number of them.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when there is no room now. Anything else ends the channel.
    fn write(&self, bytes: &[u8]) -> io::Result<usize>;

    /// Sends what is held. By default nothing is.
    ///
    /// # Errors
    ///
    /// `WouldBlock` when some of it is held still.
    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    /// Waits until `ready`, or `most` has passed; false when it has. May return early.
    ///
    /// # Errors
    ///
    /// When it cannot be waited for.
    fn wait(&self, ready: Ready, most: Duration) -> io::Result<bool>;

    /// Ends it in both directions. A read or write of another thread returns.
    fn shutdown(&self);

    /// Ends this side's direction. What the other side still says can be read.
    fn shutdown_write(&self);

    /// Whether the other side has ended its direction. When that cannot be told, it has.
    fn is_hung_up(&self) -> bool;

    /// Whether what is written can neither be read nor changed on its way. All channels of a migration are alike in
    /// this, or it is refused.
    fn is_encrypted(&self) -> bool;

    /// The descriptor to which the stream's own bytes can be written, so that guest memory goes there
    /// without a copy. `None` where bytes are transformed on their way.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
