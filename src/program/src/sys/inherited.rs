//! Descriptors that were there when the process started, known by number.

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::{Errno, FdFlags, fcntl_dupfd_cloexec, fcntl_getfd, fcntl_setfd};

fn borrow(fd: i32) -> io::Result<BorrowedFd<'static>> {
    if fd < 0 {
        return Err(Errno::BADF.into());
    }
    // SAFETY: it is not -1. Whether it is open is for the kernel to say, in the calls below, which
    // do nothing with it that another owner could notice.
    Ok(unsafe { BorrowedFd::borrow_raw(fd) })
}

/// A duplicate of an inherited descriptor, which itself stays open.
///
/// # Errors
///
/// When there is none of this number.
pub fn duplicate(fd: i32) -> io::Result<OwnedFd> {
    Ok(fcntl_dupfd_cloexec(borrow(fd)?, 3)?)
}

/// Takes a descriptor that the process before this one has left open for it, so that no later one
/// inherits it by accident. To be called once for each, before others are opened.
///
/// # Errors
///
/// When there is none of this number.
pub fn take(fd: i32) -> io::Result<OwnedFd> {
    let borrowed = borrow(fd)?;
    fcntl_setfd(borrowed, fcntl_getfd(borrowed)? | FdFlags::CLOEXEC)?;
    // SAFETY: it is open, as the calls above have found, and was left for the caller alone: the
    // process before named it in the hand-over, and no other part of this one knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
