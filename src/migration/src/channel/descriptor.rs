//! A socket as it is, or one way a pipe or a file.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::transport::{Ready, Transport};
use crate::stream::is_tls;

/// A descriptor that does not block.
#[derive(Debug)]
pub(super) struct Descriptor(OwnedFd);

impl Descriptor {
    /// Makes `fd` non-blocking.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&fd, true)?;
        Ok(Self(fd))
    }
}

/// Waits for `flags` on `fd`; whether they came.
pub(super) fn wait_for(fd: BorrowedFd<'_>, flags: PollFlags, most: Duration) -> io::Result<bool> {
    let seconds = i64::try_from(most.as_secs()).unwrap_or(i64::MAX);
    let wait = Timespec { tv_sec: seconds, tv_nsec: most.subsec_nanos().into() };
    match poll(&mut [PollFd::from_borrowed_fd(fd, flags)], Some(&wait)) {
        Ok(ready) => Ok(ready != 0),
        Err(Errno::INTR) => Ok(false),
        Err(errno) => Err(errno.into()),
    }
}

/// Whether the peer of `fd` has ended its direction.
pub(super) fn is_hung_up(fd: BorrowedFd<'_>) -> bool {
    loop {
        match poll(
            &mut [PollFd::from_borrowed_fd(fd, PollFlags::RDHUP)],
            Some(&Timespec { tv_sec: 0, tv_nsec: 0 }),
        ) {
            Err(Errno::INTR) => {}
            // What cannot be asked is not to be relied on.
            other => return other != Ok(0),
        }
    }
}

/// Whether the peer of `fd` has said something of TLS, which is not read.
pub(super) fn speaks_tls(fd: BorrowedFd<'_>) -> bool {
    let (mut start, flags) = ([0; 2], RecvFlags::PEEK | RecvFlags::DONTWAIT);
    let heard = rustix::net::recv(fd, &mut start[..], flags);
    heard.is_ok_and(|(heard, _)| heard == start.len()) && is_tls(start)
}

impl Transport for Descriptor {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(rustix::io::read(&self.0, buf)?)
    }

    /// To a socket without SIGPIPE when its peer has closed it.
    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        match rustix::net::send(&self.0, bytes, rustix::net::SendFlags::NOSIGNAL) {
            Err(Errno::NOTSOCK) => Ok(rustix::io::write(&self.0, bytes)?),
            sent => Ok(sent?),
        }
    }

    fn wait(&self, ready: Ready, most: Duration) -> io::Result<bool> {
        let flags = match ready {
            Ready::Read => PollFlags::IN,
            Ready::Write => PollFlags::OUT,
        };
        wait_for(self.0.as_fd(), flags, most)
    }

    fn shutdown(&self) {
        // Pipes cannot be shut down; they end when their last handle goes.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Both);
    }

    fn shutdown_write(&self) {
        // It fails on a channel that has ended already, which readers learn by themselves.
        let _ = rustix::net::shutdown(&self.0, rustix::net::Shutdown::Write);
    }

    fn is_hung_up(&self) -> bool {
        is_hung_up(self.0.as_fd())
    }

    fn is_encrypted(&self) -> bool {
        false
    }

    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        Some(self.0.as_fd())
    }
}
