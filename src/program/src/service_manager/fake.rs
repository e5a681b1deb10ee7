//! A service manager for tests: hears what it is told, and starts programs with descriptors.

#![allow(missing_docs, reason = "for tests")]

use std::ffi::{OsStr, OsString};
use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::net::Shutdown;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::process::Command;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread;
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use tempfile::TempDir;

/// How long a message is waited for.
const PATIENCE: Duration = Duration::from_secs(20);

/// Descriptors are given to children from here on, to be moved down by them.
const ABOVE: i32 = 100;

/// One child at a time inherits anything.
static SPAWNING: Mutex<()> = Mutex::new(());

/// A message.
#[derive(Debug)]
pub struct Told {
    pub text: String,
    pub fds: Vec<OwnedFd>,
}

impl Told {
    /// What stands behind `key=` in one of its lines.
    pub fn value(&self, key: &str) -> Option<&str> {
        self.text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='))
    }
}

/// The manager. Reads what it is told at once, and answers barriers.
#[derive(Debug)]
pub struct FakeManager {
    told: Receiver<Told>,
    address: OsString,
    socket: UnixDatagram,
    _dir: TempDir,
}

impl Default for FakeManager {
    fn default() -> Self {
        Self::new()
    }
}

impl FakeManager {
    pub fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("notify");
        Self::on(UnixDatagram::bind(&path).unwrap(), path.into(), dir)
    }

    /// At an abstract address, which begins with `@`.
    pub fn named(address: &str) -> Self {
        let name = SocketAddr::from_abstract_name(&address[1..]).unwrap();
        let socket = UnixDatagram::bind_addr(&name).unwrap();
        Self::on(socket, address.into(), tempfile::tempdir().unwrap())
    }

    fn on(socket: UnixDatagram, address: OsString, dir: TempDir) -> Self {
        let (tell, told) = channel();
        let reading = socket.try_clone().unwrap();
        thread::spawn(move || read(&reading, &tell));
        Self { told, address, socket, _dir: dir }
    }

    pub fn address(&self) -> &OsStr {
        &self.address
    }

    /// The next message.
    pub fn next(&self) -> Told {
        self.next_within(PATIENCE).expect("a message")
    }

    /// The next message, if one comes in time.
    pub fn next_within(&self, time: Duration) -> Option<Told> {
        self.told.recv_timeout(time).ok()
    }

    /// Reads messages until one has a line that is `line`, and returns it with those before it.
    pub fn until(&self, line: &str) -> Vec<Told> {
        let deadline = Instant::now() + PATIENCE;
        let mut told = Vec::new();
        while told.last().is_none_or(|last: &Told| !last.text.lines().any(|found| found == line)) {
            let left = deadline.saturating_duration_since(Instant::now());
            let next = self.next_within(left);
            told.push(next.unwrap_or_else(|| panic!("waiting for {line}, after {told:?}")));
        }
        told
    }

    /// Has `program` started by this manager, with named descriptors from number 3 on. What is
    /// returned with the command is held until it was spawned.
    pub fn command<'a>(
        &self,
        program: &OsStr,
        passed: &[(&str, &OwnedFd)],
    ) -> (Command, Inheriting<'a>) {
        let guard = SPAWNING.lock();
        let mut script = String::from("export LISTEN_PID=$$; exec");
        let mut names = Vec::new();
        let mut inherited = Vec::new();
        for (number, (name, fd)) in (3..).zip(passed) {
            let copy = fcntl_dupfd_cloexec(fd.as_fd(), ABOVE).unwrap();
            fcntl_setfd(&copy, FdFlags::empty()).unwrap();
            let from = copy.as_raw_fd();
            script.push_str(&format!(" {number}<&{from} {from}<&-"));
            names.push(*name);
            inherited.push(copy);
        }
        script.push_str(" && exec \"$@\"");
        let mut command = Command::new("bash");
        command.arg("-c").arg(script).arg("bash").arg(program);
        command.env("NOTIFY_SOCKET", &self.address);
        if !passed.is_empty() {
            command.env("LISTEN_FDS", passed.len().to_string());
            command.env("LISTEN_FDNAMES", names.join(":"));
        }
        (command, Inheriting { _fds: inherited, _guard: guard })
    }
}

/// Descriptors that the next child inherits.
pub struct Inheriting<'a> {
    _fds: Vec<OwnedFd>,
    _guard: MutexGuard<'a, ()>,
}

impl Drop for FakeManager {
    fn drop(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
    }
}

fn read(socket: &UnixDatagram, tell: &Sender<Told>) {
    loop {
        let mut bytes = [0; 4096];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let flags = RecvFlags::CMSG_CLOEXEC;
        let received =
            recvmsg(socket, &mut [IoSliceMut::new(&mut bytes)], &mut control, flags).unwrap();
        let mut fds = Vec::new();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(rights) = message {
                fds.extend(rights);
            }
        }
        let text = String::from_utf8(bytes[..received.bytes].to_vec()).unwrap();
        // Nothing is what the end of the test looks like; a barrier is answered by closing it.
        if text.is_empty() || (text != "BARRIER=1" && tell.send(Told { text, fds }).is_err()) {
            return;
        }
    }
}
