//! The descriptors that rings are signalled by.

use std::os::fd::{AsRawFd, OwnedFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl, readlink};

use super::error::RelayError;
use super::message::FrontendRequest;

/// What the link of an eventfd reads; that of a file is a path, so that no other can.
const EVENTFD: &[u8] = b"anon_inode:[eventfd]";

/// Refuses what is no eventfd: a pipe is readable with a byte in it, and reading eight would wait.
/// Eventfds are made not to block, as those of QEMU and Cloud Hypervisor are anyway.
pub(super) fn check(request: FrontendRequest, fds: &[OwnedFd]) -> Result<(), RelayError> {
    let failed = |error| RelayError::io("cannot look at a descriptor of the front-end", error);
    for fd in fds {
        let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
        let link = readlink(path, Vec::new()).map_err(failed)?;
        if link.as_bytes() != EVENTFD {
            // The name of a file may be anything.
            let link = link.to_string_lossy();
            let reason = format!("a descriptor that is not an eventfd: {}", link.escape_debug());
            return Err(RelayError::Value { request, reason });
        }
        let flags = fcntl_getfl(fd).map_err(failed)?;
        fcntl_setfl(fd, flags | OFlags::NONBLOCK).map_err(failed)?;
    }
    Ok(())
}
