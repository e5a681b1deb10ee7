//! Eventfds, which never block.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;

use super::Result;

/// One that was not signalled.
pub(super) fn event() -> Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?)
}

/// How often it was signalled since the last look.
pub(super) fn take(event: &OwnedFd) -> Result<u64> {
    let mut count = [0; 8];
    match rustix::io::read(event, &mut count) {
        Ok(_) => Ok(counter(count)),
        Err(Errno::AGAIN) => Ok(0),
        Err(error) => Err(error.into()),
    }
}

/// Whether it is signalled within the time; it stays so.
pub(super) fn wait_readable(event: &OwnedFd, timeout: Duration) -> Result<bool> {
    let timeout = Timespec {
        tv_sec: timeout.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: timeout.subsec_nanos().into(),
    };
    match poll(&mut [PollFd::new(event, PollFlags::IN)], Some(&timeout)) {
        Ok(ready) => Ok(ready != 0),
        Err(Errno::INTR) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

#[expect(clippy::host_endian_bytes, reason = "eventfds count in the byte order of the host")]
fn counter(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

/// Counts one up.
#[expect(clippy::host_endian_bytes, reason = "eventfds count in the byte order of the host")]
pub(super) fn signal(event: BorrowedFd<'_>) -> Result<()> {
    rustix::io::write(event, &1u64.to_ne_bytes())?;
    Ok(())
}
