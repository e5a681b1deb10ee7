//! Descriptors that this process was started with.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

static TAKEN: AtomicBool = AtomicBool::new(false);

/// Owns what the service manager has passed (sd_listen_fds(3)), with the names; the first call alone, which
/// comes before this process has opened anything itself that could have one of these numbers. They are closed
/// on exec from then on.
///
/// # Errors
///
/// When LISTEN_FDS, LISTEN_FDNAMES or LISTEN_PID are not what they should be, or a descriptor is not open.
pub(crate) fn take() -> io::Result<Vec<(String, OwnedFd)>> {
    if TAKEN.swap(true, Ordering::SeqCst) {
        return Ok(Vec::new());
    }
    let passed = sd_notify::listen_fds_with_names()?;
    let own = |(fd, name): (RawFd, String)| {
        // SAFETY: the descriptor is open, which the call has checked, and by LISTEN_PID it was passed to this
        // process. Nothing else has taken it: this code runs once.
        (name, unsafe { OwnedFd::from_raw_fd(fd) })
    };
    Ok(passed.map(own).collect())
}
