//! One set of descriptors that is kept for the process that comes after this one, by a manager that is
//! connected to for each message.
//!
//! Without a manager, nothing is told and nothing kept.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use super::{NotifyState, Passed, ServiceManager};

/// How many descriptors are kept, at most. systemd sets it since version 254; before that, the unit
/// does (`Environment=FDSTORE=8` beside `FileDescriptorStoreMax=8`).
const FDSTORE: &str = "FDSTORE";

/// Whether there is a service manager.
pub fn is_there() -> bool {
    std::env::var_os(super::NOTIFY_SOCKET).is_some_and(|address| !address.is_empty())
}

/// How many descriptors it keeps for this program, where it says so.
pub fn room() -> Option<usize> {
    std::env::var(FDSTORE).ok()?.parse().ok()
}

/// The program serves.
///
/// # Errors
///
/// When the manager cannot be told.
pub fn ready() -> io::Result<()> {
    tell(|manager| manager.tell(&[NotifyState::Ready]))
}

/// Has the manager keep copies of `fds` under one name, all or none, until [`forget`]; the next process of this
/// program gets them from [`take_kept`]. They stay where they are whatever is at their other end. On return the
/// manager has them, if it keeps any: it does not answer.
///
/// # Errors
///
/// When it cannot be reached, or has not read this within some seconds.
pub fn keep(name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    tell(|manager| manager.store(name, fds))
}

/// The manager discards what it keeps under a name.
///
/// # Errors
///
/// As for [`keep`].
pub fn forget(name: &str) -> io::Result<()> {
    tell(|manager| manager.forget(name))
}

/// What the manager has kept and passed to this process, with the names. Later calls get nothing.
///
/// # Errors
///
/// When what the environment says of it is wrong.
pub fn take_kept() -> io::Result<Vec<(String, OwnedFd)>> {
    Passed::from_env()?.take_all()
}

fn tell(what: impl FnOnce(&ServiceManager) -> io::Result<()>) -> io::Result<()> {
    ServiceManager::from_env()?.map_or(Ok(()), |manager| what(&manager))
}
