//! The service manager that started the process, if one did: systemd, or another that speaks
//! sd_notify(3) and sd_listen_fds(3).
//!
//! - [`ServiceManager`] is told what the process does, is fed while it lives, and keeps descriptors for
//!   the process that comes after it.
//! - [`Passed`] are the descriptors that came with the start: sockets that are listened on already
//!   (socket activation), and what an earlier process had [stored](ServiceManager::store).
//!
//! - [`ready`], [`keep`], [`forget`] and [`take_kept`] are the same for a program that tells little: they
//!   connect for each message.
//!
//! The messages and the environment are those of the `sd-notify` crate. The socket is kept here: it is
//! opened once, at the start, so that neither a changed root nor a filter of system calls is in its way
//! later, and no message blocks the thread that sends it for longer than the thread allows.

#[cfg(any(test, feature = "test-utils"))]
pub mod fake;
mod kept;
mod passed;

use std::ffi::OsStr;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use rustix::pipe::{PipeFlags, pipe_with};

pub use kept::{forget, is_there, keep, ready, room, take_kept};
pub use passed::Passed;
pub use sd_notify::NotifyState;

/// Where messages go.
const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";

/// Variables that tell what was [`Passed`], for a process that has taken it and replaces itself.
pub const PASSED_VARIABLES: [&str; 3] = ["LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PID"];

/// Descriptors in one message, at most (SCM_MAX_FD).
const FDS_MAX: usize = 253;

/// How long a message that must not be lost waits for the manager to read those before it.
const PATIENCE: Duration = Duration::from_secs(5);

/// The service manager of this process.
#[derive(Debug)]
pub struct ServiceManager {
    socket: UnixDatagram,
    stores: bool,
}

impl ServiceManager {
    /// The manager that the environment names (`NOTIFY_SOCKET`); `None` without one. To be called
    /// before the process gives up the right to connect to it.
    ///
    /// # Errors
    ///
    /// When the address is of no kind that there is, or nothing answers there.
    pub fn from_env() -> io::Result<Option<Self>> {
        let Some(address) = std::env::var_os(NOTIFY_SOCKET).filter(|address| !address.is_empty())
        else {
            return Ok(None);
        };
        let failed = |error: io::Error| {
            let reason = format!("{NOTIFY_SOCKET}={}: {error}", address.display());
            io::Error::new(error.kind(), reason)
        };
        let stores = room().is_some_and(|room| room > 0);
        Self::at(&address, stores).map_err(failed).map(Some)
    }

    /// The manager that listens at `address`: an absolute path, or `@` and the name of an abstract
    /// socket. `stores` says whether it keeps descriptors.
    ///
    /// # Errors
    ///
    /// As [`Self::from_env`].
    pub fn at(address: &OsStr, stores: bool) -> io::Result<Self> {
        let to = match address.as_bytes() {
            [b'@', name @ ..] => SocketAddr::from_abstract_name(name)?,
            [b'/', ..] => SocketAddr::from_pathname(address)?,
            _ => {
                let reason = "neither an absolute path nor @ and the name of an abstract socket";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
            }
        };
        let socket = UnixDatagram::unbound()?;
        socket.connect_addr(&to)?;
        socket.set_nonblocking(true)?;
        Ok(Self { socket, stores })
    }

    /// Whether descriptors that are stored now are passed to the next process of this service.
    pub fn stores(&self) -> bool {
        self.stores
    }

    /// Tells the manager something that it has to know, and waits some seconds until it can be told.
    ///
    /// # Errors
    ///
    /// When the manager has gone, or reads nothing.
    pub fn tell(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        self.send(text_of(states).as_bytes(), &[], PATIENCE)
    }

    /// Tells the manager something if it can be told at once; else it is not told.
    ///
    /// # Errors
    ///
    /// When the manager has gone, or has not read what came before.
    pub fn tell_now(&self, states: &[NotifyState<'_>]) -> io::Result<()> {
        // As a write, which every thread may do whatever the filter of its system calls.
        let text = text_of(states);
        rustix::io::retry_on_intr(|| rustix::io::write(&self.socket, text.as_bytes()))?;
        Ok(())
    }

    /// Has the manager keep copies of descriptors, all or none, and pass them, as `name`, to the next
    /// process of this service: after a restart, an upgrade or a crash, but not after a stop. What is
    /// kept already is kept once. Names are ASCII without control characters and `:`, up to 255.
    ///
    /// # Errors
    ///
    /// When it cannot be told, or has not read this within some seconds. Whether there is room is not
    /// told.
    pub fn store(&self, name: &str, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
        // Without FDPOLL=0, the manager lets go of what it finds hung up.
        let text = format!("FDSTORE=1\nFDNAME={name}\nFDPOLL=0\n");
        self.send(text.as_bytes(), fds, PATIENCE)?;
        self.barrier(PATIENCE)
    }

    /// Has the manager forget the descriptors that are stored as `name`.
    ///
    /// # Errors
    ///
    /// As [`Self::store`].
    pub fn forget(&self, name: &str) -> io::Result<()> {
        let text = format!("FDSTOREREMOVE=1\nFDNAME={name}\n");
        self.send(text.as_bytes(), &[], PATIENCE)?;
        self.barrier(PATIENCE)
    }

    /// Waits until the manager has read what it was told: a message of a process that has ended by
    /// then may be lost.
    fn barrier(&self, patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
        // By itself in its message, as the manager demands. It answers by closing what it got.
        self.send(b"BARRIER=1", &[writer.as_fd()], patience)?;
        drop(writer);
        loop {
            let left = left_until(deadline)?;
            match poll(&mut [PollFd::new(&reader, PollFlags::empty())], Some(&left)) {
                Ok(0) | Err(Errno::INTR) => {}
                Ok(_) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    fn send(&self, text: &[u8], fds: &[BorrowedFd<'_>], patience: Duration) -> io::Result<()> {
        let deadline = Instant::now() + patience;
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
        loop {
            let mut control = SendAncillaryBuffer::new(&mut space);
            if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many descriptors"));
            }
            let sent =
                sendmsg(&self.socket, &[IoSlice::new(text)], &mut control, SendFlags::NOSIGNAL);
            match sent {
                Ok(_) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => {
                    let left = left_until(deadline)?;
                    let _ = poll(&mut [PollFd::new(&self.socket, PollFlags::OUT)], Some(&left));
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// What is left for waiting; an error when that is nothing.
fn left_until(deadline: Instant) -> io::Result<Timespec> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() {
        let reason = "the service manager does not read what it is told";
        return Err(io::Error::new(io::ErrorKind::TimedOut, reason));
    }
    Ok(Timespec::try_from(left).unwrap_or_default())
}

fn text_of(states: &[NotifyState<'_>]) -> String {
    states.iter().map(|state| format!("{state}\n")).collect()
}

/// How long the process may be silent before its manager takes it for stuck and ends it; `None` when
/// it is not watched. It should be fed at least twice as often (`WATCHDOG=1`).
pub fn watchdog() -> Option<Duration> {
    sd_notify::watchdog_enabled().filter(|period| !period.is_zero())
}

/// Now on the clock that `RELOADING=1` is sent with.
///
/// # Errors
///
/// When there is no such clock.
pub fn reloading() -> io::Result<[NotifyState<'static>; 2]> {
    Ok([NotifyState::Reloading, NotifyState::monotonic_usec_now()?])
}

#[cfg(test)]
mod tests {
    use super::fake::FakeManager;
    use super::*;
    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    #[test]
    fn what_is_told_arrives_in_order_by_path_and_by_abstract_name() {
        let abstract_name = format!("@vmem-manager-{}", std::process::id());
        for manager in [FakeManager::new(), FakeManager::named(&abstract_name)] {
            let told = ServiceManager::at(manager.address(), false).unwrap();
            told.tell(&[NotifyState::Ready, NotifyState::MainPid(7)]).unwrap();
            told.tell_now(&[NotifyState::Watchdog]).unwrap();
            told.tell(&reloading().unwrap()).unwrap();
            assert_eq!(manager.next().text, "READY=1\nMAINPID=7\n");
            assert_eq!(manager.next().text, "WATCHDOG=1\n");
            let reloading = manager.next().text;
            let usec = reloading.strip_prefix("RELOADING=1\nMONOTONIC_USEC=").unwrap();
            assert_ne!(usec.trim_end().parse::<u64>().unwrap(), 0);
        }
    }

    #[test]
    fn stored_descriptors_are_the_same_files() {
        let manager = FakeManager::new();
        let told = ServiceManager::at(manager.address(), true).unwrap();
        let mut file: File = tempfile::tempfile().unwrap();
        file.write_all(b"kept").unwrap();
        let other = File::open("/dev/null").unwrap();
        told.store("state", &[file.as_fd(), other.as_fd()]).unwrap();
        told.forget("other").unwrap();
        let mut stored = manager.next();
        assert_eq!(stored.text, "FDSTORE=1\nFDNAME=state\nFDPOLL=0\n");
        let mut kept = File::from(stored.fds.remove(0));
        kept.rewind().unwrap();
        let mut text = String::new();
        kept.read_to_string(&mut text).unwrap();
        assert_eq!((text.as_str(), stored.fds.len()), ("kept", 1));
        assert_eq!(manager.next().text, "FDSTOREREMOVE=1\nFDNAME=other\n");
    }

    #[test]
    fn a_manager_that_reads_nothing_or_has_gone_blocks_no_thread() {
        let dir = tempfile::tempdir().unwrap();
        let address = dir.path().join("notify");
        let manager = UnixDatagram::bind(&address).unwrap();
        let told = ServiceManager::at(address.as_os_str(), false).unwrap();
        let short = Duration::from_millis(20);
        assert_eq!(told.barrier(short).unwrap_err().kind(), io::ErrorKind::TimedOut);
        let mut sent = 0;
        let error = loop {
            match told.tell_now(&[NotifyState::Watchdog]) {
                Ok(()) => sent += 1,
                Err(error) => break error,
            }
            assert!(sent < 1_000_000, "all of it is taken");
        };
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let error = told.send(b"READY=1\n", &[], short).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        manager.recv(&mut [0; 64]).unwrap();
        told.tell(&[NotifyState::Ready]).unwrap();
        drop(manager);
        assert!(told.tell(&[NotifyState::Ready]).is_err());
    }

    #[test]
    fn an_address_of_no_kind_is_refused() {
        for address in ["relative", "vsock:2:1234", "/no/such/socket"] {
            assert!(ServiceManager::at(OsStr::new(address), false).is_err(), "{address}");
        }
    }
}
