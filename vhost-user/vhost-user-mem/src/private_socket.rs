//! A connection of the process to itself, for a crate that can only listen.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io;
use std::os::unix::net::{UnixListener, UnixStream};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, bind, connect, listen, socket_with,
};

/// How often another process may connect first before that is an error.
const TRIES: usize = 16;

/// A listening socket, and the one connection that waits there: both are this process's own.
///
/// Abstract names are listed for every process of the network namespace, and have no permissions:
/// any of them may connect as soon as the socket listens. So it listens for a single connection.
/// The second to connect is refused; if that is this process, it takes another name.
///
/// # Errors
///
/// When there is no descriptor to be had, or others are always first.
pub fn pair() -> io::Result<(UnixListener, UnixStream)> {
    pair_against(|_| ())
}

/// Calls `others` with each name, before this process connects to it.
fn pair_against(mut others: impl FnMut(&SocketAddrUnix)) -> io::Result<(UnixListener, UnixStream)> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = || socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None);
    for _ in 0..TRIES {
        let random = || RandomState::new().build_hasher().finish();
        let name = format!("vhost-user-mem-{:016x}{:016x}", random(), random());
        let address = SocketAddrUnix::new_abstract_name(name.as_bytes())?;
        let (listener, stream) = (socket()?, socket()?);
        bind(&listener, &address)?;
        // Room for one more than this.
        listen(&listener, 0)?;
        others(&address);
        match connect(&stream, &address) {
            Ok(()) => {
                let (listener, stream) = (UnixListener::from(listener), UnixStream::from(stream));
                listener.set_nonblocking(false)?;
                stream.set_nonblocking(false)?;
                return Ok((listener, stream));
            }
            Err(Errno::AGAIN) => {
                tracing::warn!("another process has connected to a socket of this one's own");
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(io::Error::other("other processes connect to each socket of this one's own"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};

    fn stranger(address: &SocketAddrUnix) -> Result<UnixStream, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        connect(&socket, address).map(|()| UnixStream::from(socket))
    }

    fn assert_connected(listener: &UnixListener, mut ours: UnixStream) {
        let (mut accepted, _) = listener.accept().unwrap();
        ours.write_all(b"ours").unwrap();
        let mut bytes = [0; 4];
        accepted.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ours");
    }

    #[test]
    fn no_other_process_can_connect_once_this_one_has() {
        let mut name = None;
        let (listener, ours) = pair_against(|address| name = Some(address.clone())).unwrap();
        assert_eq!(stranger(&name.unwrap()).unwrap_err(), Errno::AGAIN);
        assert_connected(&listener, ours);
    }

    #[test]
    fn a_socket_that_another_process_was_first_at_is_not_used() {
        let mut strangers = Vec::new();
        let (listener, ours) = pair_against(|address| {
            if strangers.len() < 3 {
                strangers.push(stranger(address).unwrap());
            }
        })
        .unwrap();
        assert_connected(&listener, ours);
        // Theirs were closed unaccepted.
        for mut stranger in strangers {
            stranger.set_nonblocking(false).unwrap();
            assert!(!matches!(stranger.read(&mut [0]), Ok(1..)));
        }
    }

    #[test]
    fn another_process_that_is_always_first_is_an_error() {
        let mut strangers = Vec::new();
        assert!(pair_against(|address| strangers.push(stranger(address))).is_err());
        assert_eq!(strangers.len(), TRIES);
    }
}
