//! The process at the other end of a Unix socket.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// The process that connected, as it was when it did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PeerCred {
    /// Its number; 0 for a process outside this one's PID namespace.
    pub(crate) pid: i32,
    /// Its user.
    pub(crate) uid: u32,
}

/// Which process is at the other end. rustix has this call, too, but takes a PID of 0 for
/// impossible.
///
/// # Errors
///
/// When the kernel does not tell.
pub(crate) fn peer_cred(stream: &impl AsFd) -> io::Result<PeerCred> {
    let mut cred = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of::<libc::ucred>() as libc::socklen_t;
    // SAFETY: getsockopt needs an open descriptor, which `stream` holds, and writes at most `len`
    // bytes to the value, which is as large and takes any bytes, and the length to `len`.
    let done = unsafe {
        libc::getsockopt(
            stream.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut cred).cast(),
            &raw mut len,
        )
    };
    if done != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(PeerCred { pid: cred.pid, uid: cred.uid })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::UnixStream;

    #[test]
    fn a_pair_of_sockets_belongs_to_this_process() {
        let (stream, _other) = UnixStream::pair().unwrap();
        let cred = peer_cred(&stream).unwrap();
        assert_eq!(u32::try_from(cred.pid).unwrap(), std::process::id());
        assert_eq!(cred.uid, rustix::process::getuid().as_raw());
    }
}
