//! The channel between source and destination: a connected socket, or one way a pipe or a file.

use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use patience::Patience;

use crate::progress::Progress;
pub use crate::sys::GatherWrite;

use crate::sys::WritePolicy;

mod patience;

/// How often a wait asks whether it is cancelled.
const POLL: Duration = Duration::from_millis(50);

/// How long writes wait by default: nothing but the migration waits with them, and a destination may
/// well be busy for minutes before it reads on, with allocating what is plugged for instance.
const WRITE_PATIENCE: Duration = Duration::from_secs(5 * 60);

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

/// A connected channel. Reads and writes wait until they are cancelled with their migration; writes also
/// end when the other side reads nothing, or next to nothing, for too long
/// ([`set_write_patience`](Self::set_write_patience)).
#[derive(Debug)]
pub struct Channel {
    fd: Arc<OwnedFd>,
    /// By which it is cancelled.
    progress: Option<Arc<Progress>>,
    /// Once true, it is too late for that.
    committed: Option<Arc<AtomicBool>>,
    written: u64,
    /// No read waits longer; for the end of a migration, where the other side must answer.
    read_patience: Option<Duration>,
    /// How long writes wait for the other side to read.
    write_patience: Patience,
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
            read_patience: None,
            write_patience: Patience::new(WRITE_PATIENCE),
        })
    }

    /// Another handle of the same channel. Its reads wait without a bound; its writes are as patient as
    /// those of this handle, and begin with all of that patience.
    pub fn clone_handle(&self) -> Self {
        Self {
            fd: Arc::clone(&self.fd),
            progress: self.progress.clone(),
            committed: self.committed.clone(),
            written: 0,
            read_patience: None,
            write_patience: self.write_patience.unused(),
        }
    }

    /// Another handle of the same channel, which is not cancelled with its migration: reads end only with
    /// the channel, and writes also when patience ends.
    pub fn uncancellable(&self) -> Self {
        Self { progress: None, ..self.clone_handle() }
    }

    /// Another handle of the same channel, which is not cancelled any more once `committed` is true.
    /// Nor are the handles that are cloned from it.
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
    pub fn set_read_patience(&mut self, patience: Option<Duration>) {
        self.read_patience = patience;
    }

    /// Bounds how long writes of this handle, and of handles that are cloned from it later, wait for the
    /// other side to read; 5 minutes unless set. Waiting uses patience up, and each 64 KiB that the
    /// other side takes give a second of it back. So one that reads nothing ends a write after
    /// `patience`, one that reads slower than that ends it later, and no write of `n` bytes waits for
    /// longer than `patience` and a second for each 64 KiB. The error is of the kind `TimedOut`;
    /// an unknown part is written then, and the channel is of no use any more.
    pub fn set_write_patience(&mut self, patience: Duration) {
        self.write_patience = Patience::new(patience);
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

    /// Waits for something to read.
    fn wait_readable(&self, deadline: Option<Instant>) -> io::Result<()> {
        loop {
            let left = deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()));
            if left == Some(Duration::ZERO) {
                return Err(Errno::TIMEDOUT.into());
            }
            if self.wait(PollFlags::IN, left.unwrap_or(POLL))? {
                return Ok(());
            }
        }
    }

    /// Waits for a moment; whether it is ready.
    fn wait(&self, flags: PollFlags, most: Duration) -> io::Result<bool> {
        if self.is_cancelled() {
            return Err(Errno::CANCELED.into());
        }
        let wait = Timespec { tv_sec: 0, tv_nsec: most.min(POLL).subsec_nanos().into() };
        let mut fds = [PollFd::new(&self.fd, flags)];
        match poll(&mut fds, Some(&wait)) {
            Ok(0) | Err(Errno::INTR) => Ok(false),
            Ok(_) => Ok(true),
            Err(errno) => Err(errno.into()),
        }
    }
}

impl WritePolicy for Channel {
    fn wrote(&mut self, bytes: u64) {
        self.written += bytes;
        self.write_patience.wrote(bytes);
    }

    /// For a moment, after which it is tried again: a socket is called writable only when a good part of
    /// its buffer is free, which says nothing of a peer that reads slowly.
    fn wait_writable(&mut self) -> io::Result<()> {
        let left = self.write_patience.left();
        if left.is_zero() {
            return Err(self.write_patience.ended());
        }
        let begin = Instant::now();
        let waited = self.wait(PollFlags::OUT, left).map(drop);
        self.write_patience.waited(begin.elapsed());
        waited
    }

    fn check(&self) -> io::Result<()> {
        if self.is_cancelled() { Err(Errno::CANCELED.into()) } else { Ok(()) }
    }
}

impl AsFd for Channel {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

impl Read for Channel {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let deadline = self.read_patience.map(|patience| Instant::now() + patience);
        loop {
            match rustix::io::read(&self.fd, &mut *buf) {
                Ok(read) => return Ok(read),
                Err(Errno::AGAIN) => self.wait_readable(deadline)?,
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
                    self.wrote(written as u64);
                    bytes = &bytes[written..];
                }
                Err(Errno::AGAIN) => self.wait_writable()?,
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    fn write_gathered(&mut self, gathered: &mut GatherWrite) -> io::Result<()> {
        let fd = Arc::clone(&self.fd);
        gathered.write_to(&*fd, self)?;
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
    use crate::test_support::{Slow, SlowReader};
    use ram_discard::memory::HostMapping;
    use std::os::unix::net::UnixStream;

    const MOMENT: Duration = Duration::from_millis(20);
    /// Longer than any thread is kept from running.
    const LONG: Duration = Duration::from_secs(60);

    /// A channel to a peer that may be so slow.
    fn pair(patience: Duration) -> (Channel, UnixStream) {
        let (near, far) = UnixStream::pair().unwrap();
        rustix::net::sockopt::set_socket_send_buffer_size(&near, 4096).unwrap();
        let mut channel = Channel::new(near, Arc::new(Progress::new())).unwrap();
        channel.set_write_patience(patience);
        (channel, far)
    }

    /// Writes without an end, by either way of writing.
    fn write_on(channel: &mut Channel, gathers: bool) -> io::Error {
        let file = crate::test_support::memfd(1 << 20);
        let memory = Arc::new(HostMapping::map(&file, 0, 1 << 20).unwrap());
        loop {
            let written = if gathers {
                let mut gathered = GatherWrite::new();
                gathered.push_bytes(b"header");
                gathered.push_memory(&memory, 0, 1 << 20);
                channel.write_gathered(&mut gathered)
            } else {
                channel.write(b"message")
            };
            if let Err(error) = written {
                return error;
            }
        }
    }

    #[test]
    fn a_peer_that_reads_nothing_or_next_to_nothing_ends_any_write_of_any_handle() {
        for (slow, gathers) in [
            (Slow::Nothing, false),
            (Slow::Nothing, true),
            (Slow::Trickle, false),
            (Slow::Trickle, true),
        ] {
            let (channel, far) = pair(MOMENT);
            let _reader = SlowReader::start(far, slow);
            let clone = channel.clone_handle();
            let committed = Arc::new(AtomicBool::new(true));
            for mut handle in
                [clone.clone_handle(), clone.uncancellable(), clone.cancellable_until(committed)]
            {
                let error = write_on(&mut handle, gathers);
                assert_eq!(error.kind(), io::ErrorKind::TimedOut, "{slow:?} {gathers}: {error}");
            }
        }
    }

    #[test]
    fn a_peer_that_reads_is_waited_for_however_often() {
        let (mut channel, mut far) = pair(LONG);
        let reader = std::thread::spawn(move || io::copy(&mut far, &mut io::sink()).unwrap());
        let file = crate::test_support::memfd(1 << 20);
        let memory = Arc::new(HostMapping::map(&file, 0, 1 << 20).unwrap());
        for _ in 0..50 {
            let mut gathered = GatherWrite::new();
            gathered.push_memory(&memory, 0, 1 << 20);
            channel.write_gathered(&mut gathered).unwrap();
            assert!(gathered.is_empty());
            channel.write(b"message").unwrap();
        }
        let written = channel.written();
        drop(channel);
        assert_eq!((written, reader.join().unwrap()), (50 * ((1 << 20) + 7), written));
    }

    #[test]
    fn a_wait_for_a_slow_peer_can_be_cancelled() {
        for gathers in [false, true] {
            let (near, _far) = UnixStream::pair().unwrap();
            let progress = Arc::new(Progress::new());
            let mut channel = Channel::new(near, Arc::clone(&progress)).unwrap();
            let cancelling = std::thread::spawn(move || progress.cancel());
            let error = write_on(&mut channel, gathers);
            assert_eq!(error.raw_os_error(), Some(libc::ECANCELED), "{error}");
            cancelling.join().unwrap();
        }
    }

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
