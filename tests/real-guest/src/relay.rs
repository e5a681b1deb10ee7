//! Reconnects to a restarted daemon on behalf of QEMU.
//!
//! QEMU's generic front-end cannot do that itself: once its back-end went, it cleans up its vhost
//! state, never sets it up again, and aborts when the socket comes back (QEMU 11.1: the assertion
//! `hdev->vhost_ops` in `vhost_dev_start`). So this stands between the two. To the daemon it is a
//! front-end that reconnects; QEMU and the guest see a back-end that is slow for a moment.

use std::io;
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, poll};

use crate::vhost_message::Message;
use crate::vhost_message::request::*;

/// How long QEMU is kept waiting for a daemon that is gone.
const RESTART: Duration = Duration::from_secs(20);

/// In which order a front-end sets up a back-end.
const ORDER: [u32; 12] = [
    SET_OWNER,
    SET_PROTOCOL_FEATURES,
    SET_BACKEND_REQ_FD,
    SET_FEATURES,
    SET_MEM_TABLE,
    ADD_MEM_REG,
    SET_VRING_NUM,
    SET_VRING_ADDR,
    SET_VRING_CALL,
    SET_VRING_ERR,
    SET_VRING_KICK,
    SET_VRING_ENABLE,
];

/// Listens at `front` and relays its one connection to `back`, until the front-end goes.
pub fn start(front: &Path, back: &Path) -> Result<()> {
    let listener = UnixListener::bind(front)
        .with_context(|| format!("cannot listen at {}", front.display()))?;
    let back = back.to_owned();
    thread::Builder::new().name("relay".to_owned()).spawn(move || {
        let relayed = listener.accept().and_then(|(front, _)| Relay::run(front, back));
        if let Err(error) = relayed {
            eprintln!("real-guest: relay: {error}");
        }
    })?;
    Ok(())
}

struct Relay {
    path: PathBuf,
    back: UnixStream,
    session: Session,
}

impl Relay {
    fn run(mut front: UnixStream, path: PathBuf) -> io::Result<()> {
        let session = Session::default();
        let mut relay = Self { back: connect(&path, &session)?, path, session };
        loop {
            let mut fds =
                [PollFd::new(&front, PollFlags::IN), PollFd::new(&relay.back, PollFlags::IN)];
            poll(&mut fds, None)?;
            let [from_front, from_back] = fds.map(|fd| !fd.revents().is_empty());
            if from_back {
                // No question is open, so this can only be the end of the daemon.
                relay.reconnect()?;
            }
            if from_front {
                let Ok(message) = Message::receive(&mut front) else { return Ok(()) };
                if let Some(reply) = relay.pass(&message)? {
                    reply.send(&mut front)?;
                }
                relay.session.record(message);
            }
        }
    }

    /// Sends a message, again to the next daemon if this one dies over it.
    fn pass(&mut self, message: &Message) -> io::Result<Option<Message>> {
        loop {
            match exchange(&mut self.back, message) {
                Ok(reply) => return Ok(reply),
                Err(_) => self.reconnect()?,
            }
        }
    }

    fn reconnect(&mut self) -> io::Result<()> {
        self.back = connect(&self.path, &self.session)?;
        Ok(())
    }
}

/// Connects and tells what has been said. Both are tried again: the socket of a daemon that is
/// just dying takes connections that lead nowhere.
fn connect(path: &Path, session: &Session) -> io::Result<UnixStream> {
    let deadline = Instant::now() + RESTART;
    loop {
        let attempt =
            UnixStream::connect(path).and_then(|mut back| session.replay(&mut back).map(|()| back));
        match attempt {
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            outcome => return outcome,
        }
    }
}

fn exchange(back: &mut UnixStream, message: &Message) -> io::Result<Option<Message>> {
    message.send(back)?;
    if message.wants_reply() { Message::receive(back).map(Some) } else { Ok(None) }
}

/// What a new daemon has to be told of what QEMU said before.
#[derive(Default)]
struct Session {
    said: Vec<Message>,
}

impl Session {
    fn record(&mut self, message: Message) {
        match message.request {
            // Stopped: the next start says where.
            GET_VRING_BASE => self.said.retain(|said| said.request != SET_VRING_KICK),
            SET_MEM_TABLE => {
                self.said.retain(|said| ![SET_MEM_TABLE, ADD_MEM_REG].contains(&said.request));
                self.said.push(message);
            }
            // After a word of padding: guest address, size, address in QEMU.
            REM_MEM_REG => self.said.retain(|said| {
                said.request != ADD_MEM_REG || said.payload.get(8..32) != message.payload.get(8..32)
            }),
            ADD_MEM_REG => self.said.push(message),
            request if ORDER.contains(&request) => {
                self.said.retain(|said| said.request != request);
                self.said.push(message);
            }
            _ => {}
        }
    }

    fn replay(&self, back: &mut UnixStream) -> io::Result<()> {
        if self.said.is_empty() {
            return Ok(());
        }
        for question in [GET_FEATURES, GET_PROTOCOL_FEATURES] {
            exchange(back, &Message::new(question, Vec::new()))?;
        }
        for request in ORDER {
            if request == SET_VRING_KICK {
                self.send_base(back)?;
            }
            for message in self.said.iter().filter(|said| said.request == request) {
                exchange(back, message)?;
            }
        }
        // The kick for a request that the last daemon took may be gone with it.
        for message in self.said.iter().filter(|said| said.request == SET_VRING_KICK) {
            if let Some(kick) = message.fds.first() {
                rustix::io::write(kick, &1_u64.to_le_bytes())?;
            }
        }
        Ok(())
    }

    /// Without in-flight tracking, the ring goes on behind the last answer that the guest can see.
    fn send_base(&self, back: &mut UnixStream) -> io::Result<()> {
        let ring = self.said.iter().find(|said| said.request == SET_VRING_ADDR);
        // After index and flags: descriptors, used ring, available ring, log.
        let Some(used) = ring.and_then(|ring| ring.number(2)) else { return Ok(()) };
        let index = self.read_u16(used + 2)?;
        let mut payload = 0_u32.to_le_bytes().to_vec();
        payload.extend_from_slice(&u32::from(index).to_le_bytes());
        exchange(back, &Message::new(SET_VRING_BASE, payload)).map(drop)
    }

    /// Reads the guest's memory at an address of QEMU's, through the descriptors that share it.
    fn read_u16(&self, address: u64) -> io::Result<u16> {
        for message in &self.said {
            // Both kinds have a word of something else before their regions of four words each.
            let memory = [SET_MEM_TABLE, ADD_MEM_REG].contains(&message.request);
            for (region, fd) in message.fds.iter().enumerate().filter(|_| memory) {
                let [size, start, offset] =
                    [1, 2, 3].map(|field| message.number(1 + region * 4 + field).unwrap_or(0));
                if (start..start + size).contains(&address) {
                    let mut bytes = [0; 2];
                    let file = std::fs::File::from(fd.try_clone()?);
                    file.read_exact_at(&mut bytes, address - start + offset)?;
                    return Ok(u16::from_le_bytes(bytes));
                }
            }
        }
        Err(io::Error::other("the used ring is in no memory region"))
    }
}
