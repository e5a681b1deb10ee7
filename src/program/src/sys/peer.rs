//! The process at the other end of a Unix socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

/// A pidfd of the process that has connected (SO_PEERPIDFD, Linux 6.5). Unlike a number it cannot
/// have become another process's.
///
/// # Errors
///
/// `ENOPROTOOPT` on older kernels; of those that have it, `EINVAL` or `ESRCH` when the process has
/// ended, and `ENODATA` when there is no other end.
pub fn pidfd(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut fd: libc::c_int = -1;
    let mut len = size_of_val(&fd) as libc::socklen_t;
    let socket = socket.as_fd().as_raw_fd();
    // SAFETY: the kernel writes at most `len` bytes, which `fd` has, and the length itself.
    let result = unsafe {
        libc::getsockopt(
            socket,
            libc::SOL_SOCKET,
            libc::SO_PEERPIDFD,
            (&raw mut fd).cast(),
            &raw mut len,
        )
    };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call has just made this descriptor, closed on exec, and nothing else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::process::{WaitId, WaitIdOptions, waitid};
    use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

    #[test]
    fn the_process_that_connected_is_known() {
        let dir = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(dir.path().join("s")).unwrap();
        let _client = UnixStream::connect(dir.path().join("s")).unwrap();
        let (server, _) = listener.accept().unwrap();
        match pidfd(&server) {
            // It is this process, which is not its own child.
            Ok(fd) => {
                let waited = waitid(WaitId::PidFd(fd.as_fd()), WaitIdOptions::EXITED);
                assert_eq!(waited.unwrap_err(), rustix::io::Errno::CHILD);
            }
            Err(error) => assert_eq!(error.raw_os_error(), Some(libc::ENOPROTOOPT)),
        }
        assert!(pidfd(UnixDatagram::unbound().unwrap()).is_err());
    }
}
