//! The service manager that has started this process, as systemd: it is told when the program is ready, and keeps
//! descriptors for the process that comes after this one (sd_notify(3), FDSTORE).
//!
//! Without one, by NOTIFY_SOCKET, nothing is told and nothing kept. It is trusted: a manager that does not read
//! what it is told holds the program up.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use sd_notify::NotifyState;

use crate::sys::inherited;

/// How long the manager may take to say that it has what it was sent.
const BARRIER: Duration = Duration::from_secs(5);

/// Whether there is one.
pub fn is_there() -> bool {
    std::env::var_os("NOTIFY_SOCKET").is_some()
}

/// How many descriptors it keeps for this program, where it says so (systemd 254).
pub fn room() -> Option<usize> {
    std::env::var("FDSTORE").ok()?.parse().ok()
}

/// The program serves.
///
/// # Errors
///
/// When the manager cannot be reached.
pub fn ready() -> io::Result<()> {
    sd_notify::notify(&[NotifyState::Ready])
}

/// Has the manager keep copies of `fds` under one name, all or none, until [`forget`]; the next process of this
/// program gets them from [`take_kept`]. They stay where they are whatever is at their other end (FDPOLL=0). On return
/// the manager has them, if it keeps any: it does not answer.
///
/// # Errors
///
/// When it cannot be reached, or has not read this within 5 s.
pub fn keep(name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let poll = NotifyState::Custom("FDPOLL=0");
    sd_notify::notify_with_fds(&[NotifyState::FdStore, NotifyState::FdName(name), poll], fds)?;
    barrier(BARRIER)
}

/// The manager discards what it keeps under a name.
///
/// # Errors
///
/// As for [`keep`].
pub fn forget(name: &str) -> io::Result<()> {
    sd_notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])?;
    barrier(BARRIER)
}

/// What the manager has kept and passed to this process, with the names. To be called once, before this process opens
/// anything; later calls get nothing.
///
/// # Errors
///
/// When what the environment says of it is wrong.
pub fn take_kept() -> io::Result<Vec<(String, OwnedFd)>> {
    inherited::take()
}

/// Waits until the manager has read what it was told: a message of a process that has ended by then may be lost.
fn barrier(within: Duration) -> io::Result<()> {
    if !is_there() {
        return Ok(());
    }
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
    // By itself in its message, as the manager demands.
    sd_notify::notify_with_fds(&[NotifyState::Custom("BARRIER=1")], &[writer.as_fd()])?;
    drop(writer);
    let end = Instant::now() + within;
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            let what = format!("the service manager has not read it within {} s", within.as_secs());
            return Err(io::Error::new(io::ErrorKind::TimedOut, what));
        }
        let wait = Timespec {
            tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: left.subsec_nanos().into(),
        };
        let mut fds = [PollFd::new(&reader, PollFlags::empty())];
        match poll(&mut fds, Some(&wait)) {
            Ok(0) | Err(Errno::INTR) => {}
            Ok(_) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}
