//! A front-end, a crate side that answers everything, and a journal of what happened.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread::{JoinHandle, spawn};
use std::time::Duration;

use parking_lot::Mutex;
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use super::super::link::{Link, Side};
use super::super::message::{FrontendRequest as R, Header, Message, Reply, protocol};
use super::super::{ConnectionEvents, Notifier, Relay, RelayError, RelayHandle};

pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30 | 1 << 26;
pub(super) const OFFERED: u64 = 1 << protocol::MQ
    | 1 << protocol::LOG_SHMFD
    | 1 << protocol::REPLY_ACK
    | 1 << protocol::BACKEND_REQ
    | 1 << protocol::CONFIG
    | 1 << protocol::RESET_DEVICE
    | 1 << protocol::CONFIGURE_MEM_SLOTS
    | 1 << protocol::PAGEFAULT
    | 1 << protocol::DEVICE_STATE;

/// Where the crate maps what is at 0, and what it maps nowhere.
pub(super) const MAPPED: u64 = 0x7fff_0000_0000;
/// A page that the guest may not use.
pub(super) const UNPLUGGED: u64 = 0xf000;
pub(super) const NOWHERE: u64 = 0x1000_0000;

/// What happened, in order.
pub(super) type Journal = Arc<Mutex<Vec<String>>>;

/// Writes events into the journal.
pub(super) struct Recorder(pub(super) Journal);

impl ConnectionEvents for Recorder {
    fn log_all(&self, active: bool) {
        self.0.lock().push(format!("log_all {active}"));
    }
    fn quiesce(&self, _gone: &dyn Fn() -> bool) -> bool {
        self.0.lock().push("quiesce".into());
        true
    }
    fn release(&self) {
        self.0.lock().push("release".into());
    }
    fn running(&self) {}
    fn driver(&self, _features: u64, _runs: bool) {}
    fn allows_files(&self) -> bool {
        false
    }
    fn is_usable(&self, gpa: u64, len: u64) -> bool {
        gpa + len <= UNPLUGGED || gpa >= UNPLUGGED + 0x1000
    }
    fn rings_reset(&self) {
        self.0.lock().push("rings_reset".into());
    }
    fn postcopy_advise(&self) -> io::Result<OwnedFd> {
        Ok(witness().1)
    }
    fn postcopy_listen(&self) -> io::Result<()> {
        self.0.lock().push("listen".into());
        Ok(())
    }
    fn postcopy_end(&self) -> io::Result<()> {
        self.0.lock().push("end".into());
        Ok(())
    }
    fn mapped_at(&self, gpa: u64) -> Option<u64> {
        (gpa != NOWHERE).then_some(gpa + MAPPED)
    }
}

/// A socket that speaks whole messages and never waits for ever.
pub(super) struct Peer {
    link: Link,
    pub(super) stream: UnixStream,
    _silent: UnixStream,
}

impl Peer {
    pub(super) fn new(stream: UnixStream) -> Self {
        let (silent, kept) = UnixStream::pair().unwrap();
        Self { link: Link::new(stream.try_clone().unwrap(), silent), stream, _silent: kept }
    }

    pub(super) fn receive(&self) -> Option<Message> {
        self.link.receive(Side::Front).ok()
    }

    pub(super) fn send(&self, header: Header, body: &[u8], fds: &[BorrowedFd<'_>]) -> bool {
        self.link.send(Side::Front, header, body, fds).is_ok()
    }

    /// Whether something can be read within `ms`.
    pub(super) fn readable(&self, ms: i64) -> bool {
        readable(&self.stream, ms)
    }
}

pub(super) fn readable(socket: &UnixStream, ms: i64) -> bool {
    let timeout = Timespec { tv_sec: ms / 1000, tv_nsec: ms % 1000 * 1_000_000 };
    poll(&mut [PollFd::new(socket, PollFlags::IN)], Some(&timeout)).unwrap() > 0
}

/// Answers like the crate; `sour` says at which occurrence of a request it closes instead, and
/// whether it refuses first.
fn serve_like_crate(peer: &Peer, journal: &Journal, sour: Option<(R, usize, bool)>) {
    let mut met = 0;
    while let Some(message) = peer.receive() {
        let request = R::try_from(message.header.request).unwrap();
        let header = |size| Header::reply(request as u32, size);
        journal.lock().push(format!("crate {request}"));
        if let Some((bad, at, refuses)) = sour
            && bad == request
        {
            met += 1;
            if met == at {
                if refuses {
                    peer.send(header(8), &1u64.to_le_bytes(), &[]);
                }
                return;
            }
        }
        let body = match request {
            R::GET_FEATURES => FEATURES.to_le_bytes().to_vec(),
            R::GET_PROTOCOL_FEATURES => OFFERED.to_le_bytes().to_vec(),
            _ if request.shape().reply == Reply::Always => message.body.clone(),
            _ if message.header.needs_reply() => vec![0; 8],
            _ => continue,
        };
        if !peer.send(header(body.len()), &body, &[]) {
            return;
        }
    }
}

/// A relay between a front-end and a crate side.
pub(super) struct Bench {
    pub(super) front: Peer,
    pub(super) journal: Journal,
    pub(super) notifier: Arc<Notifier>,
    pub(super) handle: RelayHandle,
    relay: Option<JoinHandle<Result<(), RelayError>>>,
}

impl Bench {
    pub(super) fn new() -> Self {
        Self::sour(None)
    }

    pub(super) fn sour(sour: Option<(R, usize, bool)>) -> Self {
        let (crate_side, other) = UnixStream::pair().unwrap();
        let journal = Journal::default();
        let theirs = Arc::clone(&journal);
        spawn(move || serve_like_crate(&Peer::new(other), &theirs, sour));
        Self::over(crate_side, journal)
    }

    /// Over a crate side that is served elsewhere.
    pub(super) fn over(crate_side: UnixStream, journal: Journal) -> Self {
        let (front, theirs) = UnixStream::pair().unwrap();
        let notifier = Arc::new(Notifier::new().unwrap());
        let handle = Relay::handle(&theirs, &crate_side).unwrap();
        let events = Arc::new(Recorder(Arc::clone(&journal)));
        let sender = Arc::clone(&notifier);
        let relay = spawn(move || Relay::run(theirs, crate_side, events, sender));
        Self { front: Peer::new(front), journal, notifier, handle, relay: Some(relay) }
    }

    /// Negotiated with acknowledgements; the journal is empty afterwards.
    pub(super) fn negotiated() -> Self {
        let bench = Self::new();
        bench.negotiate(OFFERED);
        bench
    }

    pub(super) fn negotiate(&self, protocol: u64) {
        self.send(R::SET_PROTOCOL_FEATURES, &protocol.to_le_bytes());
        self.send(R::SET_FEATURES, &(1u64 << 30).to_le_bytes());
        assert_eq!(self.get(R::GET_FEATURES, &[]).len(), 8);
        self.journal.lock().clear();
    }

    pub(super) fn send(&self, request: R, body: &[u8]) {
        assert!(self.front.send(Header::request(request as u32, body.len()), body, &[]));
    }

    /// Sends a request that is always answered.
    pub(super) fn get(&self, request: R, body: &[u8]) -> Vec<u8> {
        self.send(request, body);
        self.reply(request)
    }

    pub(super) fn reply(&self, request: R) -> Vec<u8> {
        assert!(self.front.readable(5000), "no answer to {request}");
        let message = self.front.receive().unwrap_or_else(|| panic!("{request}: closed"));
        assert_eq!(message.header, Header::reply(request as u32, message.body.len()));
        message.body
    }

    /// Sends a request that asks for an acknowledgement, and returns that.
    pub(super) fn ask(&self, request: R, body: &[u8], fds: &[BorrowedFd<'_>]) -> u64 {
        let header = Header::request(request as u32, body.len()).asking();
        assert!(self.front.send(header, body, fds));
        u64::from_le_bytes(self.reply(request).try_into().unwrap())
    }

    /// A ring with a kick descriptor, enabled.
    pub(super) fn start_ring(&self) {
        assert_eq!(self.ask(R::SET_VRING_KICK, &[0; 8], &[event().as_fd()]), 0);
        assert_eq!(self.ask(R::SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    }

    pub(super) fn take_journal(&self) -> Vec<String> {
        std::mem::take(&mut *self.journal.lock())
    }

    /// What the relay returned, within a bound.
    pub(super) fn outcome(&mut self) -> Result<(), RelayError> {
        let relay = self.relay.take().unwrap();
        for _ in 0..500 {
            if relay.is_finished() {
                return relay.join().unwrap();
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("the relay does not end");
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.handle.shutdown();
        self.notifier.shutdown();
    }
}

/// The payload of vring messages with a state.
pub(super) fn state(index: u32, num: u32) -> [u8; 8] {
    let mut body = [0; 8];
    body[..4].copy_from_slice(&index.to_le_bytes());
    body[4..].copy_from_slice(&num.to_le_bytes());
    body
}

/// The payload of ADD_MEM_REG.
pub(super) fn region(gpa: u64, size: u64) -> Vec<u8> {
    [0, gpa, size, 0x7000_0000 + gpa, 0].iter().flat_map(|n: &u64| n.to_le_bytes()).collect()
}

/// The payload of SET_LOG_BASE.
pub(super) fn log_body(size: u64) -> Vec<u8> {
    [size, 0].iter().flat_map(|n: &u64| n.to_le_bytes()).collect()
}

pub(super) fn memfd(size: u64) -> File {
    let fd = rustix::fs::memfd_create("test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let file = File::from(fd);
    file.set_len(size).unwrap();
    file
}

/// An eventfd that blocks.
pub(super) fn event() -> OwnedFd {
    eventfd(0, EventfdFlags::CLOEXEC).unwrap()
}

/// Both ends of a pipe; the reading one ends when all copies of the other are closed.
pub(super) fn witness() -> (File, OwnedFd) {
    let (read, write) = io::pipe().unwrap();
    (File::from(OwnedFd::from(read)), write.into())
}

/// Waits until no process holds the writing end any more.
pub(super) fn assert_closed(mut witness: File) {
    let mut polled = [PollFd::new(&witness, PollFlags::IN)];
    let timeout = Timespec { tv_sec: 5, tv_nsec: 0 };
    assert!(poll(&mut polled, Some(&timeout)).unwrap() > 0, "a descriptor is still open");
    assert_eq!(witness.read(&mut [0]).unwrap(), 0);
}
