//! The channel between source and destination: a connected socket, or one way a pipe or a file.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::progress::Progress;
use crate::sys::GatherWrite;

/// How often a wait asks whether it is cancelled.
const POLL: Duration = Duration::from_millis(50);

/// Where a stream goes.
pub trait Sink {
    /// Writes everything.
    ///
    /// # Errors
    ///
    /// When it cannot be written; `ECANCELED` when cancelled.
    fn write(&mut self, bytes: &[u8]) -> io::Result<()>;

    /// Writes everything, guest memory without a copy where that is possible, and forgets it.
    ///
    /// # Errors
    ///
    /// When it cannot be written; `ECANCELED` when cancelled.
    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()>;

    /// Bytes written so far.
    fn written(&self) -> u64;
}

/// A stream that is kept, to be sent as a whole.
#[derive(Debug, Default)]
pub struct BufferSink {
    /// What was written.
    pub bytes: Vec<u8>,
}

impl Sink for BufferSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.bytes.extend_from_slice(bytes);
        Ok(())
    }

    /// Guest memory is not for keeping.
    fn write_gathered(&mut self, _gathered: &mut GatherWrite) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    fn written(&self) -> u64 {
        self.bytes.len() as u64
    }
}

/// A connected channel. Reads and writes wait until they are cancelled with their migration.
#[derive(Debug)]
pub struct Channel {
    fd: Arc<OwnedFd>,
    /// By which it is cancelled.
    progress: Option<Arc<Progress>>,
    /// Once true, it is too late for that.
    committed: Option<Arc<AtomicBool>>,
    written: u64,
    /// No read waits longer; for the end of a migration, where the other side must answer.
    patience: Option<Duration>,
    /// No write waits longer for the other side to read anything.
    write_patience: Option<Duration>,
}

impl Channel {
    /// Takes over a connected socket, which becomes non-blocking; for a stream that goes one way
    /// ([`Parameters::one_way`](super::precopy::Parameters::one_way)) also a pipe or a file.
    ///
    /// # Errors
    ///
    /// When it cannot be made non-blocking.
    pub fn new(fd: impl Into<OwnedFd>, progress: Arc<Progress>) -> io::Result<Self> {
        let fd = fd.into();
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self {
            fd: Arc::new(fd),
            progress: Some(progress),
            committed: None,
            written: 0,
            patience: None,
            write_patience: None,
        })
    }

    /// Another handle of the same channel, whose reads and writes wait without a bound.
    pub fn clone_handle(&self) -> Self {
        Self {
            fd: Arc::clone(&self.fd),
            progress: self.progress.clone(),
            committed: self.committed.clone(),
            written: 0,
            patience: None,
            write_patience: None,
        }
    }

    /// Another handle of the same channel, whose reads and writes end only with the channel.
    pub fn uncancellable(&self) -> Self {
        Self { progress: None, ..self.clone_handle() }
    }

    /// Another handle of the same channel, which ends only with the channel once `committed` is
    /// true. So do the handles that are cloned from it.
    pub(super) fn cancellable_until(&self, committed: Arc<AtomicBool>) -> Self {
        Self { committed: Some(committed), ..self.clone_handle() }
    }

    /// Writes some of `bytes`, to a socket without SIGPIPE when its peer has closed it.
    fn write_some(&self, bytes: &[u8]) -> Result<usize, Errno> {
        match rustix::net::send(&self.fd, bytes, rustix::net::SendFlags::NOSIGNAL) {
            Err(Errno::NOTSOCK) => rustix::io::write(&self.fd, bytes),
            sent => sent,
        }
    }

    fn is_cancelled(&self) -> bool {
        let committed = self.committed.as_ref().is_some_and(|it| it.load(Ordering::Acquire));
        !committed && self.progress.as_ref().is_some_and(|progress| progress.is_cancelled())
    }

    /// Lets a read wait for at most so long.
    pub fn set_patience(&mut self, patience: Option<Duration>) {
        self.patience = patience;
    }

    /// Lets a write of this handle wait for at most so long for the other side to read, each time that
    /// nothing can be written. What is gathered has no such bound.
    pub(super) fn set_write_patience(&mut self, patience: Option<Duration>) {
        self.write_patience = patience;
    }

    /// Ends the channel for both sides, and all handles of it.
    pub fn shutdown(&self) {
        // Pipes cannot be shut down; they end when their last handle goes.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Both);
    }

    /// Ends this side's direction of a socket; what the other side still says can be read.
    pub fn shutdown_write(&self) {
        // It fails on a channel that has ended already, which readers learn by themselves.
        let _ = rustix::net::shutdown(&self.fd, rustix::net::Shutdown::Write);
    }

    /// Whether the other side has closed the channel, or ended its direction of it. What it had
    /// written before may still be to be read.
    pub fn is_hung_up(&self) -> bool {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            let mut fds = [PollFd::new(&self.fd, PollFlags::RDHUP)];
            match poll(&mut fds, Some(&now)) {
                Err(Errno::INTR) => {}
                // What cannot be asked is not to be relied on.
                other => return other != Ok(0),
            }
        }
    }

    fn wait(&self, flags: PollFlags, deadline: Option<Instant>) -> io::Result<()> {
        loop {
            if self.is_cancelled() {
                return Err(Errno::CANCELED.into());
            }
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(Errno::TIMEDOUT.into());
            }
            let wait = left.map_or(POLL, |left| left.min(POLL));
            let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
            let mut fds = [PollFd::new(&self.fd, flags)];
            match poll(&mut fds, Some(&wait)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Read for Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let deadline = self.patience.map(|patience| Instant::now() + patience);
        loop {
            match rustix::io::read(&self.fd, &mut *buf) {
                Ok(read) => return Ok(read),
                Err(Errno::AGAIN) => self.wait(PollFlags::IN, deadline)?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
}

impl Sink for Channel {
    fn write(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            match self.write_some(bytes) {
                Ok(written) => {
                    self.written += written as u64;
                    bytes = &bytes[written..];
                }
                Err(Errno::AGAIN) => {
                    let deadline = self.write_patience.map(|patience| Instant::now() + patience);
                    self.wait(PollFlags::OUT, deadline)?;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        gathered.write_to(&self.fd, &|| self.is_cancelled())?;
        self.written += gathered.len_bytes();
        gathered.clear();
        Ok(())
    }

    fn written(&self) -> u64 {
        self.written
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::gather::testing::raises_sigpipe;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_peer_that_has_gone_is_an_error_and_no_signal() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        let mut channel = Channel::new(near, Arc::new(Progress::new())).unwrap();
        assert!(!raises_sigpipe(|| {
            let error = channel.write(b"page").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::BrokenPipe);
        }));
    }
}
