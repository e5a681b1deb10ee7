//! The connections of a save: the main one, multifd channels, and that of postcopy-preempt.
//!
//! Each has a thread. Pages of a round may come by any channel, and those of the next round by another: at
//! the marks between rounds all channels wait until the main one has come there, too, so that the last record of a page
//! is the last that is written.

use std::io::{self, Read};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;
use std::time::{Duration, Instant};

use migration::Channel;
use migration::stream::{Greeting, MULTIFD_MAGIC};
use parking_lot::{Condvar, Mutex};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vmstate::wire::{WireRead, WireReader};

use super::multifd::{Packet, Packets};
use super::records::{Mark, Records};
use crate::error::PagerError;
use crate::image::pages::Pages;
use crate::run::{POLL, Run};
use crate::socket::Listener;

/// What is read at once.
const BUFFER: usize = 1 << 20;
/// How QEMU's stream begins.
const MAIN_MAGIC: u32 = 0x5145_564d;
/// How a command in it begins.
const COMMAND: u8 = 0x08;
/// Bytes that come at least within a bound of silence, on all channels together: less is a source that only keeps a save
/// alive. QEMU's rounds are larger, however slow it is made.
const PROGRESS: usize = 4096;
/// Connections at a time: all multifd channels that QEMU can have, and two more.
const CONNECTIONS_MAX: usize = 257;
/// For a connection to say which it is; that of postcopy-preempt says nothing until it is needed.
const INTRODUCTION: Duration = Duration::from_secs(5);

/// A channel, with a bound for silence that others break, too.
#[derive(Debug)]
pub(super) struct Timed {
    channel: Channel,
    session: Arc<Session>,
    /// Silence ends it; else it only ends with the session.
    bounded: bool,
}

impl Timed {
    /// Another handle of the channel.
    pub fn channel(&self) -> &Channel {
        &self.channel
    }
}

impl Read for Timed {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            match self.channel.read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    // One that is silent for good is not waited for once all is done.
                    if self.session.has_ended() {
                        return Err(rustix::io::Errno::CANCELED.into());
                    }
                    if self.bounded && self.session.silent_for() >= self.session.run.silence() {
                        return Err(error);
                    }
                }
                read => {
                    if let Ok(len) = read {
                        let mut state = self.session.state.lock();
                        state.hear(len);
                        // However often next to nothing comes.
                        let silent_for = state.heard.elapsed();
                        if self.bounded && len != 0 && silent_for >= self.session.run.silence() {
                            return Err(io::ErrorKind::TimedOut.into());
                        }
                    }
                    return read;
                }
            }
        }
    }
}

/// What the threads of a save share.
#[derive(Debug)]
pub(super) struct Session {
    run: Arc<Run>,
    /// A save that broke off is continued: the main channel starts with a command.
    recovers: bool,
    state: Mutex<State>,
    changed: Condvar,
    /// The save has ended, well or not.
    ended: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// When enough had come to be called progress, on all channels together, and what has come since.
    heard: Instant,
    since: usize,
    /// The first thing that went wrong.
    failure: Option<PagerError>,
    pages: Option<Arc<Pages>>,
    advised: bool,
    has_main: bool,
    has_preempt: bool,
    /// Connections so far, and those that are served.
    accepted: usize,
    served: usize,
    /// When those came that have not said which they are.
    unknown: Vec<(usize, Instant)>,
    /// multifd channels, by their numbers, which have introduced themselves.
    multifd: Vec<Greeting>,
    /// How many of them wait at a mark, and how many marks are passed.
    waiting: usize,
    passed: u64,
    /// One has ended, which none does before the last mark.
    left: bool,
}

impl State {
    fn hear(&mut self, len: usize) {
        self.since += len;
        if self.since >= PROGRESS {
            self.heard = Instant::now();
            self.since = 0;
        }
    }
}

impl Session {
    pub fn new(run: &Arc<Run>, recovers: bool) -> Arc<Self> {
        Arc::new(Self {
            run: Arc::clone(run),
            recovers,
            state: Mutex::new(State {
                heard: Instant::now(),
                since: 0,
                failure: None,
                pages: None,
                advised: false,
                has_main: false,
                has_preempt: false,
                accepted: 0,
                served: 0,
                unknown: Vec::new(),
                multifd: Vec::new(),
                waiting: 0,
                passed: 0,
                left: false,
            }),
            changed: Condvar::new(),
            ended: AtomicBool::new(false),
        })
    }

    fn silent_for(&self) -> Duration {
        self.state.lock().heard.elapsed()
    }

    /// Ends all threads.
    pub fn end(&self) {
        self.ended.store(true, Ordering::Relaxed);
        self.changed.notify_all();
    }

    /// Whether something went wrong.
    pub fn has_failed(&self) -> bool {
        self.state.lock().failure.is_some()
    }

    /// Whether something went wrong on another channel.
    ///
    /// # Errors
    ///
    /// What.
    pub fn check_failure(&self) -> Result<(), PagerError> {
        self.state.lock().failure.take().map_or(Ok(()), Err)
    }

    pub fn has_ended(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// Something went wrong: all ends. Once all has ended, reads that are cut off do not count.
    pub fn fail(&self, error: PagerError) {
        if self.has_ended() {
            return;
        }
        self.state.lock().failure.get_or_insert(error);
        self.run.progress.cancel();
        self.changed.notify_all();
    }

    /// Why it ended, given what the main thread says: what happened first, in words that say more than that a
    /// read was ended.
    pub fn explain(&self, error: PagerError) -> PagerError {
        if let Err(ended) = self.run.check("the guest is not saved yet") {
            return ended;
        }
        if let Some(first) = self.state.lock().failure.take() {
            return first;
        }
        explain(error, self.run.silence())
    }

    /// Whether the save continues.
    fn check(&self, what: &str) -> Result<(), PagerError> {
        self.run.check(what)?;
        if self.state.lock().failure.is_some() || self.has_ended() {
            return Err(PagerError::Peer("the save has ended".to_owned()));
        }
        Ok(())
    }

    /// A connection that waits, if there may be more.
    pub fn accept(
        self: &Arc<Self>,
        listener: &Listener,
    ) -> Result<Option<(usize, Timed)>, PagerError> {
        // Under the lock, so that none is between waiting and being known to wait.
        let mut state = self.state.lock();
        let Some(fd) = listener.try_accept()? else { return Ok(None) };
        if state.served == CONNECTIONS_MAX {
            return Ok(None);
        }
        let number = state.accepted;
        state.accepted += 1;
        state.served += 1;
        state.unknown.push((number, Instant::now()));
        drop(state);
        let channel = Channel::new(fd, Arc::clone(&self.run.progress));
        let mut channel = channel.map_err(PagerError::system("set up a socket"))?;
        channel.set_read_patience(Some(POLL));
        channel.set_write_patience(self.run.silence());
        Ok(Some((number, Timed { channel, session: Arc::clone(self), bounded: true })))
    }

    /// Serves a connection until it ends; hands it over when it is the main one. What is wrong with a
    /// connection that says nothing of a migration is returned.
    pub fn serve(
        &self,
        number: usize,
        channel: Timed,
        main: &Sender<WireReader<Timed>>,
    ) -> Option<PagerError> {
        let wrong = self.serve_one(number, channel, main);
        self.state.lock().served -= 1;
        wrong
    }

    fn serve_one(
        &self,
        number: usize,
        mut channel: Timed,
        main: &Sender<WireReader<Timed>>,
    ) -> Option<PagerError> {
        // The one of postcopy-preempt may be silent for good.
        channel.bounded = false;
        let mut reader = WireReader::with_capacity(channel, BUFFER);
        let magic = reader
            .peek(4, "the start of a connection")
            .map(|bytes| u32::from_be_bytes(*bytes.first_chunk().expect("four bytes were peeked")));
        if matches!(magic, Ok(MULTIFD_MAGIC)) {
            reader.get_mut().bounded = true;
            let served = self.multifd(number, &mut reader);
            self.is_known(&mut self.state.lock(), number);
            if let Err(error) = served {
                self.fail(explain(error, self.run.silence()));
            }
            return None;
        }
        let mut state = self.state.lock();
        self.is_known(&mut state, number);
        match magic {
            // A program that only looked whether this listens, or the end of all.
            Err(_) => None,
            Ok(magic) if self.is_main(magic) && !state.has_main => {
                state.has_main = true;
                // Whatever came before it, it has its time from here on.
                state.heard = Instant::now();
                drop(state);
                reader.get_mut().bounded = true;
                // It is gone only when the save has ended.
                let _ = main.send(reader);
                None
            }
            Ok(MAIN_MAGIC) => {
                Some(PagerError::Protocol("a migration beside the one that is saved".to_owned()))
            }
            Ok(_) if state.advised && !state.has_preempt => {
                state.has_preempt = true;
                // Not while the pages are taken, which may fail and say so.
                drop(state);
                if let Err(error) = self.preempt(&mut reader) {
                    self.fail(explain(error, self.run.silence()));
                }
                None
            }
            Ok(found) => {
                let what =
                    format!("a connection that is not a migration: it starts with {found:#010x}");
                Some(PagerError::Protocol(what))
            }
        }
    }

    /// Whether a main channel starts so.
    fn is_main(&self, magic: u32) -> bool {
        match self.recovers {
            true => magic.to_be_bytes()[0] == COMMAND,
            false => magic == MAIN_MAGIC,
        }
    }

    /// A connection has said what it is.
    fn is_known(&self, state: &mut State, number: usize) {
        state.unknown.retain(|(other, _)| *other != number);
        self.changed.notify_all();
    }

    fn multifd(&self, number: usize, reader: &mut WireReader<Timed>) -> Result<(), PagerError> {
        let greeting = Greeting::read(reader)?;
        {
            let mut state = self.state.lock();
            if state.multifd.iter().any(|other| other.id == greeting.id) {
                let what = format!("two multifd channels with the number {}", greeting.id);
                return Err(PagerError::Protocol(what));
            }
            if state.multifd.iter().any(|other| other.uuid != greeting.uuid) {
                return Err(PagerError::Protocol("multifd channels of two VMs".to_owned()));
            }
            state.multifd.push(greeting);
            // In one step: it is waited for as one or as the other.
            self.is_known(&mut state, number);
        }
        let mut packets = Packets::default();
        loop {
            if reader.is_at_end().map_err(io_error)? {
                self.state.lock().left = true;
                self.changed.notify_all();
                return Ok(());
            }
            match packets.next(reader, &mut || self.wait_for_pages())? {
                Packet::Pages => {}
                Packet::Sync => {
                    let mut state = self.state.lock();
                    let passed = state.passed;
                    state.waiting += 1;
                    self.changed.notify_all();
                    while state.passed == passed {
                        drop(state);
                        self.check("multifd channels wait for the main one")?;
                        state = self.state.lock();
                        if state.passed == passed {
                            self.changed.wait_for(&mut state, POLL);
                        }
                    }
                }
            }
        }
    }

    fn preempt(&self, reader: &mut WireReader<Timed>) -> Result<(), PagerError> {
        let pages = self.wait_for_pages()?;
        let mut records = Records::default();
        loop {
            if reader.is_at_end().map_err(io_error)? {
                return Ok(());
            }
            if records.take(reader, &pages)? == Mark::End {
                return Ok(());
            }
        }
    }

    fn wait_for_pages(&self) -> Result<Arc<Pages>, PagerError> {
        loop {
            let mut state = self.state.lock();
            if let Some(pages) = &state.pages {
                return Ok(Arc::clone(pages));
            }
            self.changed.wait_for(&mut state, POLL);
            drop(state);
            self.check("the list of RAM blocks has not come")?;
        }
    }

    pub fn blocks_known(&self, pages: &Arc<Pages>) {
        self.state.lock().pages = Some(Arc::clone(pages));
        self.changed.notify_all();
    }

    /// The guest is given away: it is lost to a run that ends now.
    pub fn guest_taken(&self) {
        self.run.hold();
    }

    pub fn postcopy_advised(&self) {
        self.state.lock().advised = true;
    }

    /// How many multifd channels there are. QEMU has connected all of them before it sends anything on any.
    pub fn channels(&self, listener: &Listener) -> Result<usize, PagerError> {
        loop {
            let mut state = self.state.lock();
            let introducing = |(_, since): &(usize, Instant)| since.elapsed() < INTRODUCTION;
            if !is_readable(listener, Duration::ZERO) && !state.unknown.iter().any(introducing) {
                return Ok(state.multifd.len());
            }
            self.changed.wait_for(&mut state, POLL);
            drop(state);
            self.check("a connection has not said what it is")?;
        }
    }

    /// Waits until all multifd channels have come to their next mark, and has them continue from there.
    pub fn sync(&self, listener: &Listener) -> Result<(), PagerError> {
        let channels = self.channels(listener)?;
        let mut state = self.state.lock();
        loop {
            if state.waiting == channels {
                state.waiting = 0;
                state.passed += 1;
                self.changed.notify_all();
                return Ok(());
            }
            if state.left {
                let what = "a multifd channel was closed before all of its pages came";
                return Err(PagerError::Peer(what.to_owned()));
            }
            if state.heard.elapsed() >= self.run.silence() {
                let what = "multifd channels have not come to where the main one is".to_owned();
                return Err(PagerError::TimedOut { what, after: self.run.silence() });
            }
            self.changed.wait_for(&mut state, POLL);
            drop(state);
            self.check("multifd channels have not come to where the main one is")?;
            state = self.state.lock();
        }
    }
}

/// Whether there is something to read, or will be within `wait`.
pub(super) fn is_readable(fd: &impl AsFd, wait: Duration) -> bool {
    let wait = Timespec { tv_sec: 0, tv_nsec: wait.subsec_nanos().into() };
    // What cannot be asked has something to say: an error.
    poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&wait)) != Ok(0)
}

fn io_error(source: io::Error) -> PagerError {
    let (offset, what) = (0, "a channel");
    vmstate::wire::WireError::Io { offset, what, source }.into()
}

/// What a failed read means.
fn explain(error: PagerError, silence: Duration) -> PagerError {
    use migration::stream::FormatError::Wire;
    use vmstate::wire::WireError::{Io, Truncated};
    match &error {
        PagerError::Format(Wire(Io { source, what, .. }))
            if source.kind() == io::ErrorKind::TimedOut =>
        {
            let what =
                format!("QEMU has sent nothing, or next to nothing, where {what} was expected");
            PagerError::TimedOut { what, after: silence }
        }
        PagerError::Format(Wire(Io { source, offset, .. })) => PagerError::Peer(format!(
            "the connection with QEMU broke at byte {offset:#x} of the stream: {source}"
        )),
        PagerError::Format(Wire(Truncated { offset, what })) => PagerError::Peer(format!(
            "QEMU closed the connection at byte {offset:#x} of the stream, where {what} was expected"
        )),
        _ => error,
    }
}
