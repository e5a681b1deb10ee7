//! Records of TLS on a socket that does not block.

use std::fmt;
use std::io::{self, IoSlice, Read, Write};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::net::{SendAncillaryBuffer, SendFlags};
use rustls::Connection;

use super::error::{Role, TlsError};
use crate::channel::descriptor::Descriptor;
use crate::channel::patience::deadline;
use crate::channel::transport::{Ready, Transport};
use crate::channel::{POLL, is_broken};
use crate::progress::Progress;

/// The most bytes that are held encrypted, and that one call takes or gives.
const AT_ONCE: usize = 256 << 10;

/// TLS over a socket. The lock is held while records are made and read, and never while anything is waited for.
pub(super) struct TlsTransport {
    socket: Descriptor,
    role: Role,
    state: Mutex<State>,
}

struct State {
    connection: Connection,
    inbox: Inbox,
    /// What was wrong with what the peer said.
    failed: Option<String>,
}

/// What was read of the socket, and not by the connection, which takes 4 KiB at a time.
#[derive(Default)]
struct Inbox {
    bytes: Vec<u8>,
    taken: usize,
}

impl Inbox {
    fn is_empty(&self) -> bool {
        self.taken == self.bytes.len()
    }
}

/// What the connection reads.
struct From<'a>(&'a Descriptor, &'a mut Inbox);

impl Read for From<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let Self(socket, inbox) = self;
        if inbox.is_empty() {
            inbox.bytes.resize(AT_ONCE, 0);
            inbox.taken = AT_ONCE;
            let read = socket.read(&mut inbox.bytes)?;
            inbox.bytes.truncate(read);
            inbox.taken = 0;
        }
        let rest = &inbox.bytes[inbox.taken..];
        let len = rest.len().min(buf.len());
        buf[..len].copy_from_slice(&rest[..len]);
        inbox.taken += len;
        Ok(len)
    }
}

/// Where the connection writes to, without SIGPIPE.
struct To<'a>(&'a Descriptor);

impl Write for To<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }

    fn write_vectored(&mut self, pieces: &[IoSlice<'_>]) -> io::Result<usize> {
        let Some(socket) = self.0.descriptor() else { return Ok(0) };
        let mut control = SendAncillaryBuffer::default();
        Ok(rustix::net::sendmsg(socket.as_fd(), pieces, &mut control, SendFlags::NOSIGNAL)?)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl State {
    /// Sends what is encrypted; `WouldBlock` when not all of it goes.
    fn send(&mut self, socket: &Descriptor) -> io::Result<()> {
        while self.connection.wants_write() {
            match self.connection.write_tls(&mut To(socket)) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    /// Reads and decrypts some records; false at the end of the socket.
    fn receive(&mut self, socket: &Descriptor, role: &Role) -> io::Result<bool> {
        if let Some(what) = &self.failed {
            return Err(io::Error::other(TlsError::Peer(what.clone())));
        }
        let read = self.connection.read_tls(&mut From(socket, &mut self.inbox))?;
        if let Err(error) = self.connection.process_new_packets() {
            // The peer is told why, if it still reads.
            let _ = self.send(socket);
            let explained = role.explain(&error);
            self.failed = Some(explained.to_string());
            return Err(io::Error::other(explained));
        }
        // An answer of the protocol's own, to a change of keys for instance; what does not go now goes later.
        if self.connection.wants_write() {
            let _ = self.send(socket);
        }
        Ok(read != 0)
    }

    /// What an error of the library means, after what the peer said was wrong.
    fn known(&self, role: &Role, error: io::Error) -> io::Error {
        if let Some(what) = &self.failed {
            return io::Error::other(TlsError::Peer(what.clone()));
        }
        match error.downcast::<rustls::Error>() {
            Ok(error) => io::Error::other(role.explain(&error)),
            Err(error) => error,
        }
    }

    /// Why a write failed: what the peer said before it closed, if it said anything.
    fn why(&mut self, socket: &Descriptor, role: &Role, error: io::Error) -> io::Error {
        if !is_broken(&error) {
            return error;
        }
        // What it sent as data is in the way of nothing: records are read until one is an alert.
        let mut sink = [0; 4096];
        for _ in 0..AT_ONCE {
            match self.connection.reader().read(&mut sink) {
                Ok(1..) => continue,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                _ => return error,
            }
            match self.receive(socket, role) {
                Ok(true) => {}
                Err(said) if said.kind() == io::ErrorKind::Other => return said,
                _ => return error,
            }
        }
        error
    }
}

impl TlsTransport {
    /// Does the handshake, which ends `within` so long.
    pub(super) fn begin(
        mut connection: Connection,
        socket: Descriptor,
        role: Role,
        progress: &Arc<Progress>,
        within: Duration,
    ) -> Result<Self, TlsError> {
        connection.set_buffer_limit(Some(AT_ONCE));
        let mut state = State { connection, inbox: Inbox::default(), failed: None };
        let deadline = deadline(within);
        loop {
            let wants = match (state.connection.wants_write(), state.connection.is_handshaking()) {
                (true, _) => Ready::Write,
                (false, true) => Ready::Read,
                (false, false) => break,
            };
            if progress.is_cancelled() {
                return Err(TlsError::Cancelled);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(TlsError::Stalled { peer: role.peer(), after: within });
            }
            let done = match wants {
                Ready::Write => {
                    let sent = state.send(&socket);
                    sent.map_err(|error| state.why(&socket, &role, error)).map(|()| true)
                }
                Ready::Read => state.receive(&socket, &role),
            };
            match done {
                Ok(true) => {}
                Ok(false) => return Err(role.closed()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let waited = socket.wait(wants, left.min(POLL));
                    waited.map_err(|source| TlsError::Io { what: "wait for a socket", source })?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if is_broken(&error) => return Err(role.closed()),
                Err(source) => {
                    return Err(match source.downcast::<TlsError>() {
                        Ok(error) => error,
                        Err(source) => TlsError::Io { what: "do the TLS handshake", source },
                    });
                }
            }
        }
        Ok(Self { socket, role, state: Mutex::new(state) })
    }

    /// Says that nothing more comes, as far as that can be said now.
    fn say_end(&self, state: &mut MutexGuard<'_, State>) {
        state.connection.send_close_notify();
        let _ = state.send(&self.socket);
    }
}

impl Transport for TlsTransport {
    fn read(&self, buf: &mut [u8]) -> io::Result<usize> {
        let mut state = self.state.lock();
        let most = buf.len().min(AT_ONCE);
        let mut done = 0;
        while done < most {
            match state.connection.reader().read(&mut buf[done..most]) {
                // It has said that it ends.
                Ok(0) => break,
                Ok(read) => {
                    done += read;
                    continue;
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) if done != 0 => break,
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                    let what = "the connection ended without the end of TLS: it was cut";
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
                }
                Err(error) => return Err(error),
            }
            match state.receive(&self.socket, &self.role) {
                Ok(_) => {}
                // What came before it is taken first; what is wrong is found again after that.
                Err(_) if done != 0 => break,
                Err(error) => match state.connection.reader().read(&mut buf[..most]) {
                    Ok(read @ 1..) => return Ok(read),
                    _ => return Err(error),
                },
            }
        }
        Ok(done)
    }

    fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let sent = state.send(&self.socket);
        sent.map_err(|error| state.why(&self.socket, &self.role, error))?;
        let taken = state.connection.writer().write(&bytes[..bytes.len().min(AT_ONCE)]);
        // It takes nothing more once another thread has read why.
        let taken = taken.map_err(|error| state.known(&self.role, error))?;
        match state.send(&self.socket) {
            Err(error) if error.kind() != io::ErrorKind::WouldBlock => {
                Err(state.why(&self.socket, &self.role, error))
            }
            _ => Ok(taken),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let mut guard = self.state.lock();
        let state = &mut *guard;
        let sent = state.send(&self.socket);
        sent.map_err(|error| state.why(&self.socket, &self.role, error))
    }

    fn wait(&self, ready: Ready, most: Duration) -> io::Result<bool> {
        if ready == Ready::Read {
            let mut state = self.state.lock();
            let has_more = !state.inbox.is_empty();
            let known = state.connection.process_new_packets();
            if has_more || known.is_ok_and(|known| known.plaintext_bytes_to_read() != 0) {
                return Ok(true);
            }
        }
        self.socket.wait(ready, most)
    }

    fn shutdown(&self) {
        self.say_end(&mut self.state.lock());
        self.socket.shutdown();
    }

    fn shutdown_write(&self) {
        self.say_end(&mut self.state.lock());
        self.socket.shutdown_write();
    }

    fn is_hung_up(&self) -> bool {
        self.socket.is_hung_up()
    }

    fn is_encrypted(&self) -> bool {
        true
    }
}

impl Drop for TlsTransport {
    fn drop(&mut self) {
        self.say_end(&mut self.state.lock());
    }
}

impl fmt::Debug for TlsTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { socket, role, .. } = self;
        f.debug_struct("TlsTransport").field("socket", socket).field("role", role).finish()
    }
}
