//! Where VMMs are met: a Unix or a TCP socket, listened on or connected to.

use std::fmt;
use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::str::FromStr;
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use program::listener::{self, SocketFile};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use crate::cli::report::Report;
use crate::error::PagerError;
use crate::run::{POLL, Run};

/// How long nothing listens before it is told that this is waited for.
const TELL_AFTER: Duration = Duration::from_secs(1);

/// A socket as it is named on the command line: a path, `unix:PATH`, or `tcp:HOST:PORT`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Address {
    /// A Unix stream socket.
    Unix(PathBuf),
    /// Host and port.
    Tcp(String),
}

impl FromStr for Address {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(address) = text.strip_prefix("tcp:") {
            let port = address.rsplit_once(':').filter(|(host, _)| !host.is_empty());
            return match port.map(|(_, port)| port.parse::<u16>()) {
                Some(Ok(_)) => Ok(Self::Tcp(address.to_owned())),
                _ => Err("expected tcp:HOST:PORT".to_owned()),
            };
        }
        let path = text.strip_prefix("unix:").unwrap_or(text);
        if path.is_empty() {
            return Err("expected a path, unix:PATH or tcp:HOST:PORT".to_owned());
        }
        Ok(Self::Unix(path.into()))
    }
}

/// As QEMU names it.
impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
            Self::Tcp(address) => write!(f, "tcp:{address}"),
        }
    }
}

/// A socket that a VMM connects to. Its file is removed with it.
#[derive(Debug)]
pub struct Listener {
    address: Address,
    inner: Inner,
    _file: Option<SocketFile>,
}

#[derive(Debug)]
enum Inner {
    Unix(UnixListener),
    Tcp(TcpListener),
}

impl Listener {
    /// Listens. A Unix socket can be connected to by its owner only; a file that a killed pager left is
    /// replaced.
    ///
    /// # Errors
    ///
    /// When the address is in use or cannot be had.
    pub fn bind(address: &Address) -> Result<Self, PagerError> {
        let (inner, file) = match address {
            Address::Unix(path) => {
                let bound = listener::bind(path);
                let (listener, file) = bound.map_err(failed("cannot listen on", address))?;
                (Inner::Unix(listener), Some(file))
            }
            Address::Tcp(text) => {
                let listener = resolve(text).and_then(|all| TcpListener::bind(&all[..]));
                let listener = listener.map_err(failed("cannot listen on", address))?;
                (Inner::Tcp(listener), None)
            }
        };
        match &inner {
            Inner::Unix(listener) => listener.set_nonblocking(true),
            Inner::Tcp(listener) => listener.set_nonblocking(true),
        }
        .map_err(failed("cannot listen on", address))?;
        Ok(Self { address: address.clone(), inner, _file: file })
    }

    /// The address, with the port that was chosen for a TCP port of 0.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub fn address(&self) -> Result<Address, PagerError> {
        match &self.inner {
            Inner::Unix(_) => Ok(self.address.clone()),
            Inner::Tcp(listener) => {
                let own = listener.local_addr();
                let own = own.map_err(failed("cannot find the address of", &self.address))?;
                Ok(Address::Tcp(own.to_string()))
            }
        }
    }

    /// Waits until a connection can be accepted, or another process has accepted it.
    ///
    /// # Errors
    ///
    /// When the run ends.
    pub fn wait(&self, run: &Run) -> Result<(), PagerError> {
        while !self.poll()? {
            run.check(&format!("no VMM has connected to {}", self.address))?;
        }
        Ok(())
    }

    /// Waits a little; whether there is a connection.
    fn poll(&self) -> Result<bool, PagerError> {
        let wait = Timespec { tv_sec: 0, tv_nsec: POLL.subsec_nanos().into() };
        match poll(&mut [PollFd::new(self, PollFlags::IN)], Some(&wait)) {
            Ok(ready) => Ok(ready != 0),
            Err(Errno::INTR) => Ok(false),
            Err(errno) => Err(failed("cannot wait at", &self.address)(errno.into())),
        }
    }

    /// The next connection.
    ///
    /// # Errors
    ///
    /// When the run ends, or when nothing connects within `patience`.
    pub fn accept(&self, run: &Run, patience: Option<Duration>) -> Result<OwnedFd, PagerError> {
        let begun = Instant::now();
        loop {
            if let Some(fd) = self.try_accept()? {
                return Ok(fd);
            }
            let waited_for = || format!("no VMM has connected to {}", self.address);
            run.check(&waited_for())?;
            if let Some(after) = patience.filter(|patience| begun.elapsed() >= *patience) {
                return Err(PagerError::TimedOut { what: waited_for(), after });
            }
            self.poll()?;
        }
    }

    /// A connection, if one waits.
    ///
    /// # Errors
    ///
    /// When the socket fails.
    pub fn try_accept(&self) -> Result<Option<OwnedFd>, PagerError> {
        let accepted = match &self.inner {
            Inner::Unix(listener) => listener.accept().map(|(stream, _)| OwnedFd::from(stream)),
            Inner::Tcp(listener) => listener.accept().map(|(stream, _)| {
                // Answers are small, and waited for.
                let _ = stream.set_nodelay(true);
                OwnedFd::from(stream)
            }),
        };
        match accepted {
            Ok(fd) => Ok(Some(fd)),
            Err(error) => match error.kind() {
                // It has gone between connecting and being accepted, or there is none.
                io::ErrorKind::WouldBlock
                | io::ErrorKind::Interrupted
                | io::ErrorKind::ConnectionAborted => Ok(None),
                _ => Err(failed("cannot accept at", &self.address)(error)),
            },
        }
    }
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match &self.inner {
            Inner::Unix(listener) => listener.as_fd(),
            Inner::Tcp(listener) => listener.as_fd(),
        }
    }
}

/// Connects to where a VMM listens, waiting until it does. Once that has taken a while, it is told what is waited
/// for.
///
/// # Errors
///
/// When the run ends first, when nothing listens within `patience`, or when it can never succeed.
pub fn connect(
    address: &Address,
    run: &Run,
    report: &Report,
    patience: Option<Duration>,
) -> Result<OwnedFd, PagerError> {
    let begun = Instant::now();
    let mut told = false;
    loop {
        let error = match try_connect(address, run) {
            Ok(fd) => return Ok(fd),
            Err(error) => error,
        };
        match error.kind() {
            io::ErrorKind::NotFound
            | io::ErrorKind::ConnectionRefused
            | io::ErrorKind::WouldBlock
            | io::ErrorKind::TimedOut
            | io::ErrorKind::Interrupted => {}
            _ => return Err(failed("cannot connect to", address)(error)),
        }
        let waited_for = || format!("no VMM listens on {address} ({error})");
        run.check(&waited_for())?;
        if let Some(after) = patience.filter(|patience| begun.elapsed() >= *patience) {
            return Err(PagerError::TimedOut { what: waited_for(), after });
        }
        if !told && begun.elapsed() >= TELL_AFTER {
            told = true;
            report.warn(&format!("waiting for a VMM: {}{}", waited_for(), advice(address, &error)));
        }
        thread::sleep(POLL);
    }
}

/// What to do about an address where nothing listens.
fn advice(address: &Address, error: &io::Error) -> &'static str {
    match (address, error.kind()) {
        (Address::Unix(_), io::ErrorKind::ConnectionRefused) => {
            "; the socket's file may be one that a process left that has ended: remove it, and have the VMM listen"
        }
        _ => "; have the VMM listen there, or end this and give the address at which it listens",
    }
}

/// Connects to where a VMM listens, if it does.
///
/// # Errors
///
/// Why it cannot.
pub fn try_connect(address: &Address, run: &Run) -> io::Result<OwnedFd> {
    match address {
        Address::Unix(path) => UnixStream::connect(path).map(OwnedFd::from),
        Address::Tcp(text) => {
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for address in resolve(text)? {
                let bound = run.left().unwrap_or(run.silence()).clamp(POLL, run.silence());
                match TcpStream::connect_timeout(&address, bound) {
                    Ok(stream) => {
                        stream.set_nodelay(true)?;
                        return Ok(stream.into());
                    }
                    Err(error) => last = error,
                }
            }
            Err(last)
        }
    }
}

/// What names of hosts stand for, found before the process was confined.
static RESOLVED: Mutex<Vec<(String, Vec<SocketAddr>)>> = Mutex::new(Vec::new());

fn resolve(text: &str) -> io::Result<Vec<SocketAddr>> {
    let resolved = RESOLVED.lock();
    match resolved.iter().find(|(name, _)| name == text) {
        Some((_, addresses)) => Ok(addresses.clone()),
        None => Ok(text.to_socket_addrs()?.collect()),
    }
}

/// Looks up the name of a host now, for later: a confined process cannot.
///
/// # Errors
///
/// When the name is not known.
pub fn resolve_ahead(address: &Address) -> Result<(), PagerError> {
    let Address::Tcp(text) = address else { return Ok(()) };
    let found = text.to_socket_addrs().map_err(failed("cannot look up", address))?;
    RESOLVED.lock().push((text.clone(), found.collect()));
    Ok(())
}

/// The TCP ports of an address.
///
/// # Errors
///
/// When its name is not known.
pub fn ports(address: &Address) -> Result<Vec<u16>, PagerError> {
    let Address::Tcp(text) = address else { return Ok(Vec::new()) };
    let found = resolve(text).map_err(failed("cannot look up", address))?;
    Ok(found.iter().map(SocketAddr::port).collect())
}

/// Makes an error of a socket.
pub(crate) fn failed(
    action: &'static str,
    address: &Address,
) -> impl FnOnce(io::Error) -> PagerError {
    let socket = address.to_string();
    move |source| PagerError::Socket { action, socket, source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_named_as_qemu_names_them() {
        let unix = Address::Unix("/run/vm.sock".into());
        for text in ["/run/vm.sock", "unix:/run/vm.sock"] {
            assert_eq!(text.parse(), Ok(unix.clone()), "{text}");
        }
        assert_eq!(unix.to_string(), "unix:/run/vm.sock");
        let tcp: Address = "tcp:[::1]:4444".parse().unwrap();
        assert_eq!(tcp, Address::Tcp("[::1]:4444".into()));
        assert_eq!(tcp.to_string(), "tcp:[::1]:4444");
        for text in
            ["", "unix:", "tcp:", "tcp:host", "tcp::4444", "tcp:host:port", "tcp:host:70000"]
        {
            assert!(text.parse::<Address>().is_err(), "{text}");
        }
    }

    #[test]
    fn a_connection_that_never_comes_is_a_timeout() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("vm.sock");
        let listener = Listener::bind(&Address::Unix(path.clone())).unwrap();
        let run = Run::new(None);
        let error = listener.accept(&run, Some(Duration::ZERO)).unwrap_err();
        assert_eq!(error.exit_status(), 3);
        assert!(error.to_string().contains(&format!("unix:{}", path.display())), "{error}");
        run.interrupt();
        assert!(matches!(listener.accept(&run, None), Err(PagerError::Interrupted)));
        drop(listener);
        assert!(!path.exists());
        let connected =
            connect(&Address::Unix(path), &Run::new(None), &Report::silent(), Some(Duration::ZERO));
        assert_eq!(connected.unwrap_err().exit_status(), 3);
    }

    #[test]
    fn both_kinds_of_sockets_connect() {
        let dir = tempfile::tempdir().unwrap();
        for text in [dir.path().join("s").display().to_string(), "tcp:127.0.0.1:0".to_owned()] {
            let listener = Listener::bind(&text.parse().unwrap()).unwrap();
            let run = Run::new(None);
            let near =
                connect(&listener.address().unwrap(), &run, &Report::silent(), None).unwrap();
            let far = listener.accept(&run, None).unwrap();
            rustix::io::write(&near, b"x").unwrap();
            let mut byte = [0];
            rustix::io::ioctl_fionbio(&far, false).unwrap();
            assert_eq!(rustix::io::read(&far, &mut byte).unwrap(), 1);
        }
    }
}
