//! The destination's side: a thread a channel, which takes packets of pages.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex};
use vmstate::wire::{WireRead, WireReader};

use super::threads::{self, FirstFailure, MOMENT, Watch};
use super::zstd::Decompressor;
use super::{Agreed, PageChannels, of_channel};
use crate::channel::{Channel, Interrupt, Sink};
use crate::error::MigrationError;
use crate::progress::{Counters, Progress};
use crate::ram::load::ChannelBlocks;
use crate::stream::{Encoding, Greeting, PACKET_PAGES, PacketHead, Packets, TARGET_PAGE_SIZE};

/// What is read at once besides the pages of a packet, which are read to where they are used.
const READ_AHEAD: usize = 64 << 10;

/// The threads, and where they are.
pub(crate) struct Receivers {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// To end them by.
    channels: Vec<Channel>,
    patience: Duration,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    /// Bytes that came on all of them.
    heard: Arc<AtomicU64>,
    agreed: Agreed,
    /// Ends the reads of all of them.
    interrupt: Interrupt,
    progress: Arc<Progress>,
}

#[derive(Default)]
struct State {
    blocks: Option<Arc<ChannelBlocks>>,
    channels: Vec<At>,
    /// Which numbers are taken.
    numbers: u64,
    barriers: u64,
    finished: bool,
    failure: FirstFailure,
    /// What else is to end when one fails.
    main: Option<Interrupt>,
}

/// Where a channel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum At {
    Reading,
    Barrier,
    End,
}

impl Receivers {
    /// Starts the threads. Pages wait for the list of blocks.
    pub(crate) fn start(
        channels: PageChannels,
        agreed: Agreed,
        progress: &Arc<Progress>,
    ) -> Result<Self, MigrationError> {
        let PageChannels { channels } = channels;
        let patience =
            channels.iter().filter_map(Channel::write_patience).min().unwrap_or_default();
        let state = State { channels: vec![At::Reading; channels.len()], ..State::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            heard: Arc::default(),
            agreed,
            interrupt: Interrupt::default(),
            progress: Arc::clone(progress),
        });
        let threads = Vec::with_capacity(channels.len());
        let mut receivers = Self { shared, threads, channels, patience };
        for index in 0..receivers.channels.len() {
            let channel = receivers.channels[index].interruptible(&receivers.shared.interrupt);
            let shared = Arc::clone(&receivers.shared);
            let ending = Arc::clone(&shared);
            let serve = move || {
                let heard = Heard { channel, bytes: &shared.heard };
                let reader = WireReader::with_capacity(heard, READ_AHEAD);
                Receiver::new(&shared, index, reader)?.serve()
            };
            let ended = move |served| ending.ended(index, served);
            receivers.threads.push(threads::start(index, serve, ended)?);
        }
        Ok(receivers)
    }

    /// Has `main` raised when a channel fails.
    pub(crate) fn interrupt_on_failure(&self, main: &Interrupt) {
        let mut state = self.shared.state.lock();
        if state.failure.has_failed() {
            main.raise();
        }
        state.main = Some(main.clone());
    }

    /// Why one failed, once.
    pub(crate) fn failure(&self) -> Option<MigrationError> {
        self.shared.state.lock().failure.take()
    }

    /// The list of blocks has come.
    pub(crate) fn blocks_known(&self, blocks: Arc<ChannelBlocks>) {
        self.shared.state.lock().blocks = Some(blocks);
        self.shared.changed.notify_all();
    }

    /// Waits until all channels have come to their next barrier, and has them continue behind it.
    pub(crate) fn barrier(&self) -> Result<(), MigrationError> {
        let mut watch = Watch::new(self.patience, &self.shared.heard);
        let mut state = self.shared.state.lock();
        loop {
            state.check()?;
            if state.channels.iter().all(|at| *at == At::Barrier) {
                break;
            }
            if let Some(number) = state.channels.iter().position(|at| *at == At::End) {
                let closed = MigrationError::ChannelClosed("pages were outstanding on it");
                return Err(of_channel(number, closed));
            }
            if self.shared.progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            let begin = Instant::now();
            self.shared.changed.wait_for(&mut state, MOMENT);
            watch.waited(begin);
            let late = state.channels.iter().position(|at| *at == At::Reading);
            if let (true, Some(number)) = (watch.patience().left().is_zero(), late) {
                let silent = io::Error::new(io::ErrorKind::TimedOut, "nothing comes on it");
                let what = "wait for the pages that the main channel says were sent";
                return Err(of_channel(number, MigrationError::io(what)(silent)));
            }
        }
        state.barriers += 1;
        state.channels.fill(At::Reading);
        self.shared.changed.notify_all();
        Ok(())
    }

    /// No pages come any more after the last barrier: ends the threads, and waits for them.
    pub(crate) fn finish(&mut self) -> Result<(), MigrationError> {
        self.end();
        self.shared.state.lock().check()
    }

    fn end(&mut self) {
        self.shared.state.lock().finished = true;
        self.shared.interrupt.raise();
        self.channels.iter().for_each(Channel::shutdown);
        self.shared.changed.notify_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Drop for Receivers {
    fn drop(&mut self) {
        self.end();
    }
}

impl State {
    fn check(&mut self) -> Result<(), MigrationError> {
        self.failure.check("pages were being taken")
    }
}

impl Shared {
    fn ended(&self, index: usize, served: Result<(), MigrationError>) {
        let mut state = self.state.lock();
        state.channels[index] = At::End;
        if let Err(error) = served {
            state.failure.set(index, error);
            if let Some(main) = &state.main {
                main.raise();
            }
        }
        self.changed.notify_all();
    }

    /// Waits until `ready` gives something, or the others have ended.
    fn wait_for<T>(
        &self,
        mut ready: impl FnMut(&mut State) -> Option<T>,
    ) -> Result<T, MigrationError> {
        let mut state = self.state.lock();
        loop {
            if let Some(found) = ready(&mut state) {
                return Ok(found);
            }
            if state.finished || state.failure.has_failed() || self.progress.is_cancelled() {
                return Err(MigrationError::Cancelled);
            }
            self.changed.wait_for(&mut state, MOMENT);
        }
    }
}

/// Counts what is read.
struct Heard<'a> {
    channel: Channel,
    bytes: &'a AtomicU64,
}

impl io::Read for Heard<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let read = self.channel.read(buf)?;
        self.bytes.fetch_add(read as u64, Ordering::Relaxed);
        Ok(read)
    }
}

/// What a thread has.
struct Receiver<'a> {
    shared: &'a Shared,
    index: usize,
    reader: WireReader<Heard<'a>>,
    packets: Packets,
    /// Number of the packet before.
    last: Option<u64>,
    /// Some of a packet has come, and not all.
    in_packet: bool,
    /// The pages of a packet, and room for one more byte, which none has.
    bytes: Vec<u8>,
    /// Where it was agreed that pages may be compressed.
    decompressor: Option<Decompressor>,
}

impl<'a> Receiver<'a> {
    fn new(
        shared: &'a Shared,
        index: usize,
        reader: WireReader<Heard<'a>>,
    ) -> Result<Self, MigrationError> {
        let bytes = Vec::with_capacity(PACKET_PAGES * TARGET_PAGE_SIZE as usize + 1);
        let decompressor = shared.agreed.zstd.then(Decompressor::new).transpose()?;
        Ok(Self {
            shared,
            index,
            reader,
            packets: Packets::default(),
            last: None,
            in_packet: false,
            bytes,
            decompressor,
        })
    }

    fn serve(&mut self) -> Result<(), MigrationError> {
        let served = self.greeting().and_then(|()| {
            while !self.is_at_end()? {
                self.in_packet = true;
                self.packet()?;
            }
            Ok(())
        });
        let finished = self.shared.state.lock().finished;
        match served {
            Err(_) if finished && self.in_packet => refuse("pages come after the last barrier"),
            // What ends because all has ended is not a failure.
            Err(MigrationError::Cancelled) => Ok(()),
            Err(_) if finished => Ok(()),
            served => served,
        }
    }

    /// Between packets, where the channel may end.
    fn is_at_end(&mut self) -> Result<bool, MigrationError> {
        match self.reader.is_at_end() {
            Err(_) if self.shared.state.lock().finished => Ok(true),
            ended => ended.map_err(MigrationError::io("read pages")),
        }
    }

    fn greeting(&mut self) -> Result<(), MigrationError> {
        let greeting = Greeting::read(&mut self.reader)?;
        if greeting.uuid != self.shared.agreed.uuid {
            return refuse("it is of another VM: its UUID differs");
        }
        let mut state = self.shared.state.lock();
        let count = state.channels.len();
        let (id, theirs) = (usize::from(greeting.id), usize::from(greeting.channels));
        if theirs != 0 && theirs != count {
            return refuse(format!(
                "the source has {theirs} channels, and {count} are connected here"
            ));
        }
        if id >= count {
            return refuse(format!("its number is {id}, and {count} channels are connected here"));
        }
        if state.numbers & 1 << id != 0 {
            return refuse(format!("its number is {id}, as that of another"));
        }
        state.numbers |= 1 << id;
        Ok(())
    }

    fn packet(&mut self) -> Result<(), MigrationError> {
        let head = self.packets.read_head(&mut self.reader)?;
        if self.last.is_some_and(|last| head.number <= last) {
            let last = self.last.unwrap_or_default();
            return refuse(format!(
                "byte {:#x}: packet {} after packet {last}: they are out of order",
                head.at, head.number
            ));
        }
        self.last = Some(head.number);
        if head.has_pages() {
            self.pages(&head)?;
        }
        self.in_packet = false;
        if head.sync {
            let index = self.index;
            let mut passed = None;
            self.shared.wait_for(|state| match passed {
                None => {
                    passed = Some(state.barriers);
                    state.channels[index] = At::Barrier;
                    self.shared.changed.notify_all();
                    None
                }
                Some(passed) => (state.barriers != passed).then_some(()),
            })?;
        }
        Ok(())
    }

    fn pages(&mut self, head: &PacketHead) -> Result<(), MigrationError> {
        let blocks = self.shared.wait_for(|state| state.blocks.clone())?;
        let block = self.packets.block(head, &*blocks)?;
        self.bytes(head)?;
        let mut rest = &self.bytes[..];
        for run in self.packets.normal_runs() {
            let (bytes, after) = rest.split_at(run.len() as usize);
            blocks.write(block, run, bytes, head.at)?;
            rest = after;
        }
        for run in self.packets.zero_runs() {
            blocks.zero(block, run, head.at)?;
        }
        let counters = &self.shared.progress.counters;
        Counters::add(&counters.normal, head.normal as u64);
        Counters::add(&counters.duplicate, head.zero as u64);
        Ok(())
    }
}

impl Receiver<'_> {
    /// Reads the bytes of a packet's normal pages, of which its head says how many there are.
    fn bytes(&mut self, head: &PacketHead) -> Result<(), MigrationError> {
        let (len, what) = (head.plain_len(), "the pages of a packet");
        match (head.encoding, &mut self.decompressor) {
            (Encoding::Zstd, None) => refuse("its pages are compressed, which was not agreed on"),
            (Encoding::Zstd, Some(_)) if len == 0 => {
                self.bytes.clear();
                Ok(())
            }
            (Encoding::Zstd, Some(decompressor)) => {
                self.reader.read_exact(decompressor.payload(head.payload), what)?;
                decompressor.decompress(&mut self.bytes, len).map_err(|wrong| {
                    let what = format!("the pages of packet {}: {wrong}", head.number);
                    MigrationError::Page { at: head.at, what }
                })
            }
            (Encoding::Plain, decompressor) => {
                if let Some(decompressor) = decompressor.as_mut().filter(|_| len != 0) {
                    decompressor.restart();
                }
                self.bytes.resize(len, 0);
                Ok(self.reader.read_exact(&mut self.bytes, what)?)
            }
        }
    }
}

fn refuse<T>(what: impl Into<String>) -> Result<T, MigrationError> {
    Err(MigrationError::OnChannel(what.into()))
}
