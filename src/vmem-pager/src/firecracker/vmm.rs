//! The VMM process: whether it is there, and its end.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use program::peer;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::sockopt::socket_peercred;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// The process that has connected. It keeps its end of the connection open as long as it lives; older releases
/// close it, so that the process itself decides, where it can be seen.
#[derive(Debug)]
pub struct Vmm {
    socket: OwnedFd,
    pid: Option<Pid>,
    pidfd: Option<OwnedFd>,
}

impl Vmm {
    /// Of a connection.
    pub fn of(socket: OwnedFd) -> Self {
        // A process outside of our pid namespace has no number here.
        let pid = socket_peercred(&socket).ok().map(|credentials| credentials.pid);
        let pid = pid.filter(|pid| pid.as_raw_nonzero().get() > 0);
        let pidfd = match peer::pidfd(&socket) {
            Ok(pidfd) => Some(pidfd),
            // A kernel without it. The number may be of a later process only if the one that connected has
            // ended, and with it its end of the connection.
            Err(error) if Errno::from_io_error(&error) == Some(Errno::NOPROTOOPT) => {
                let pidfd = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
                pidfd.filter(|_| !is_ready(&socket, PollFlags::HUP))
            }
            // It has ended, which the socket tells.
            Err(_) => None,
        };
        Self { socket, pid, pidfd }
    }

    /// Its number, where it has one here.
    pub fn pid(&self) -> Option<i32> {
        self.pid.map(|pid| pid.as_raw_nonzero().get())
    }

    /// Whether it has ended.
    pub fn has_ended(&self) -> bool {
        match &self.pidfd {
            Some(pidfd) => is_ready(pidfd, PollFlags::IN),
            None => is_ready(&self.socket, PollFlags::HUP),
        }
    }

    /// What wakes when it ends.
    pub fn end(&self) -> (BorrowedFd<'_>, PollFlags) {
        match &self.pidfd {
            Some(pidfd) => (pidfd.as_fd(), PollFlags::IN),
            None => (self.socket.as_fd(), PollFlags::HUP),
        }
    }

    /// Ends it: its vCPUs would wait for ever. Whether that was possible.
    pub fn kill(&self) -> bool {
        match &self.pidfd {
            Some(pidfd) => pidfd_send_signal(pidfd, Signal::KILL).is_ok(),
            None => false,
        }
    }

    /// The connection.
    pub fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn is_ready(fd: impl AsFd, flags: PollFlags) -> bool {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut fds = [PollFd::new(&fd, flags)];
    poll(&mut fds, Some(&now)).is_ok_and(|_| fds[0].revents().intersects(flags))
}
