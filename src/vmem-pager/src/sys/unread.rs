//! What the other side of a socket has not read.

use std::ffi::c_int;
use std::io;
use std::os::fd::AsFd;

use rustix::ioctl::{Getter, Opcode, ioctl};

/// `SIOCOUTQ`, the same as `TIOCOUTQ` (asm-generic/ioctls.h).
const OUTQ: Opcode = 0x5411;

/// How much the kernel holds of what was written to a Unix stream socket, until the other side has read it: 0 when it has
/// read all of it, and otherwise more than the bytes themselves. Also 0 once the other side has closed the connection,
/// with or without having read; that it is closed can be seen before that.
///
/// # Errors
///
/// When the descriptor is not a socket's.
pub fn bytes(socket: impl AsFd) -> io::Result<usize> {
    // SAFETY: SIOCOUTQ writes one int to where its argument points, which is what a getter of an int has there; it
    // reads and changes nothing else.
    let unread = unsafe { ioctl(socket, Getter::<OUTQ, c_int>::new()) }?;
    Ok(usize::try_from(unread).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Write};
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn what_is_not_read_counts_until_it_is_also_where_nothing_was_accepted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let listener = UnixListener::bind(&path).unwrap();
        let mut near = UnixStream::connect(&path).unwrap();
        assert_eq!(bytes(&near).unwrap(), 0);
        near.write_all(&[1; 30]).unwrap();
        assert!(bytes(&near).unwrap() >= 30);
        let mut far = listener.accept().unwrap().0;
        far.read_exact(&mut [0; 20]).unwrap();
        assert!(bytes(&near).unwrap() >= 10);
        far.read_exact(&mut [0; 10]).unwrap();
        assert_eq!(bytes(&near).unwrap(), 0);
        assert!(bytes(File::open("/dev/null").unwrap()).is_err());
    }
}
