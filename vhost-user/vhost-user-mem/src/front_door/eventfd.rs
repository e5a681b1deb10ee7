//! The descriptors that rings are signalled by.

use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};

use super::error::RelayError;
use super::message::FrontendRequest;

/// What the link of an eventfd reads; that of a file is a path, so that no other can.
const EVENTFD: &[u8] = b"anon_inode:[eventfd]";

/// Whether each read of an eventfd takes one from its count. With a large count, its reader would not
/// rest. Kernels before 6.4 do not tell.
fn is_semaphore(fd: &OwnedFd) -> io::Result<bool> {
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let value = info.lines().find_map(|line| line.strip_prefix("eventfd-semaphore:"));
    Ok(value.is_some_and(|value| value.trim() != "0"))
}

/// Refuses what is no eventfd: a pipe is readable with a byte in it, and reading eight would wait.
/// Eventfds are made not to block, as those of QEMU and Cloud Hypervisor are anyway.
pub(super) fn check(request: FrontendRequest, fds: &[OwnedFd]) -> Result<(), RelayError> {
    let what = "cannot look at a descriptor of the front-end";
    let io = |source| RelayError::Io { what, source };
    let failed = |error| RelayError::io(what, error);
    for fd in fds {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let link = readlink(path, Vec::new()).map_err(failed)?;
        if link.as_bytes() != EVENTFD {
            // The name of a file may be anything.
            let link = link.to_string_lossy();
            let reason = format!("a descriptor that is not an eventfd: {}", link.escape_debug());
            return Err(RelayError::Value { request, reason });
        }
        if request == FrontendRequest::SET_VRING_KICK && is_semaphore(fd).map_err(io)? {
            let reason = "an eventfd in semaphore mode, which is signalled as often as it counts";
            return Err(RelayError::Value { request, reason: reason.into() });
        }
        let flags = fcntl_getfl(fd).map_err(failed)?;
        fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(failed)?;
    }
    Ok(())
}
