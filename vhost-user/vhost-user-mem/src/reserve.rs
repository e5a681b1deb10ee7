//! A descriptor in reserve, to refuse connections with when there is no other.
//!
//! A connection that cannot be accepted stays in the queue of its socket, and its client waits for an
//! end that does not come. So the reserve is given up then, to accept that connection and close it.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, eventfd};
use rustix::io::Errno;

/// Before a socket is looked at again whose connection could be neither served nor refused.
pub(crate) const PAUSE: Duration = Duration::from_millis(50);

/// The reserve of this process.
pub(crate) static RESERVE: Reserve = Reserve { kept: Mutex::new(None) };

/// A descriptor that is there to be given up.
#[derive(Debug)]
pub(crate) struct Reserve {
    /// `None` while another thread has what was given up. Locked meanwhile, so that of several sockets
    /// none takes it from the other.
    kept: Mutex<Option<OwnedFd>>,
}

impl Reserve {
    /// Has it from now on, if a descriptor is left; else it is tried again with each connection. At the
    /// start it gets a low number, which stays usable when the limit is lowered.
    pub(crate) fn fill(&self) {
        Self::is_there(&mut self.kept.lock());
    }

    /// Accepts a connection of a `client`, as the log calls it; `accept` must not block. `None` when
    /// there is none any more, or it was refused since no descriptor is left beside its own.
    ///
    /// The system looks for a descriptor before it looks for a connection, so that an error about the
    /// former says nothing of the latter.
    ///
    /// # Errors
    ///
    /// When the connection waits still: look again after a [`PAUSE`]. The log has the reason.
    pub(crate) fn admit<T>(
        &self,
        client: &'static str,
        mut accept: impl FnMut() -> io::Result<T>,
    ) -> io::Result<Option<T>> {
        let mut kept = self.kept.lock();
        let refused = match accept() {
            Ok(connection) => {
                if Self::is_there(&mut kept) {
                    return Ok(Some(connection));
                }
                // The descriptor that is missing is its own.
                drop(connection);
                Ok(())
            }
            Err(error) if is_out_of_descriptors(&error) && kept.take().is_some() => {
                accept().map(drop)
            }
            Err(error) => Err(error),
        };
        Self::is_there(&mut kept);
        match refused {
            Ok(()) => tracing::warn!(
                client,
                "refused a connection: no file descriptor is left; raise the limit of open files"
            ),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => {
                tracing::warn!(client, %error, "cannot accept a connection");
                return Err(error);
            }
        }
        Ok(None)
    }

    fn is_there(kept: &mut Option<OwnedFd>) -> bool {
        if kept.is_none() {
            *kept = open().ok();
        }
        kept.is_some()
    }
}

/// An open file of its own, since the system has a limit of those as well.
fn open() -> io::Result<OwnedFd> {
    Ok(eventfd(0, EventfdFlags::CLOEXEC)?)
}

/// Whether a descriptor that is closed lets the next one be had, in this process (EMFILE) or in all
/// (ENFILE). A lack of memory passes by itself.
fn is_out_of_descriptors(error: &io::Error) -> bool {
    let errno = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(errno, Some(Errno::MFILE | Errno::NFILE))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::os::unix::net::{SocketAddr, UnixListener, UnixStream};

    use super::*;

    fn socket() -> (tempfile::TempDir, UnixListener, impl Fn() -> UnixStream) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        listener.set_nonblocking(true).unwrap();
        (dir, listener, move || UnixStream::connect(&path).unwrap())
    }

    /// Accepts, after some errors.
    fn failing<'a>(
        listener: &'a UnixListener,
        errors: &[Errno],
    ) -> impl FnMut() -> io::Result<(UnixStream, SocketAddr)> + use<'a> {
        let mut errors = errors.to_vec();
        move || errors.pop().map_or_else(|| listener.accept(), |errno| Err(errno.into()))
    }

    fn reserve() -> Reserve {
        let reserve = Reserve { kept: Mutex::new(None) };
        reserve.fill();
        reserve
    }

    #[test]
    fn a_connection_is_served_and_one_that_has_gone_is_none() {
        let (_dir, listener, connect) = socket();
        let _client = connect();
        assert!(reserve().admit("client", || listener.accept()).unwrap().is_some());
        assert!(reserve().admit("client", || listener.accept()).unwrap().is_none());
    }

    #[test]
    fn without_a_descriptor_for_it_each_connection_is_closed() {
        for errno in [Errno::MFILE, Errno::NFILE] {
            let (_dir, listener, connect) = socket();
            let reserve = reserve();
            for _ in 0..3 {
                let mut client = connect();
                let admitted = reserve.admit("client", failing(&listener, &[errno]));
                assert!(admitted.unwrap().is_none());
                assert_eq!(client.read(&mut [0]).unwrap(), 0);
                assert!(reserve.kept.lock().is_some());
            }
            // Without any that waits.
            assert!(reserve.admit("client", failing(&listener, &[errno])).unwrap().is_none());
        }
    }

    #[test]
    fn without_memory_or_where_another_thread_was_faster_a_connection_waits_and_is_served_later() {
        let (_dir, listener, connect) = socket();
        let reserve = reserve();
        let _client = connect();
        for errors in [&[Errno::NOMEM][..], &[Errno::MFILE, Errno::MFILE]] {
            assert!(reserve.admit("client", failing(&listener, errors)).is_err());
        }
        *reserve.kept.lock() = None;
        assert!(reserve.admit("client", || listener.accept()).unwrap().is_some());
        assert!(reserve.kept.lock().is_some());
    }
}
