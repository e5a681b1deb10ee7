//! The signals of the process.
//!
//! SIGTERM, SIGINT and SIGHUP are blocked in all threads, whatever the mask that was inherited, and
//! read from a descriptor. One that comes at any moment then waits until it is read, also while
//! the process replaces itself: exec keeps what is pending.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use libc::c_int;
use vmm_sys_util::signal::{block_signal, create_sigset, unblock_signal};

pub use libc::{SIGHUP, SIGINT, SIGTERM};

/// What was sent to the process.
pub struct Signals(OwnedFd);

impl Signals {
    /// Watches from now on. To be called before there is a second thread, since threads inherit
    /// what is blocked.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub fn watch() -> io::Result<Self> {
        use vmm_sys_util::signal::Error;
        let watched = [SIGTERM, SIGINT, SIGHUP];
        for signal in watched {
            match block_signal(signal) {
                Ok(()) | Err(Error::SignalAlreadyBlocked(_)) => {}
                Err(error) => return Err(io::Error::other(error.to_string())),
            }
        }
        // Blocked, an access to memory that was taken away would end the process.
        unblock_signal(libc::SIGBUS).map_err(|error| io::Error::other(error.to_string()))?;
        let set = create_sigset(&watched).map_err(io::Error::from)?;
        // SAFETY: the set is a valid one, initialised by the call above; -1 asks for a new
        // descriptor.
        let fd =
            unsafe { libc::signalfd(-1, &raw const set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call has just made this descriptor, and nothing else knows of it.
        Ok(Self(unsafe { OwnedFd::from_raw_fd(fd) }))
    }

    /// The number of a signal that has come, if any.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    #[allow(clippy::host_endian_bytes, reason = "the kernel writes numbers as this host has them")]
    pub fn next(&self) -> io::Result<Option<c_int>> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        match rustix::io::retry_on_intr(|| rustix::io::read(&self.0, &mut info)) {
            // The number is the first field.
            Ok(_) => Ok(Some(c_int::from_ne_bytes([info[0], info[1], info[2], info[3]]))),
            Err(rustix::io::Errno::AGAIN) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}
