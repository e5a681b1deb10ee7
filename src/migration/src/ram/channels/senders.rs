//! The source's side: a thread a channel, which makes packets of the pages it is given.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};

use super::threads::{self, FirstFailure, MOMENT, Watch};
use super::zstd::Compressor;
use super::{Agreed, PageChannels, of_channel};
use crate::channel::{Channel, GatherWrite, Interrupt, Sink};
use crate::error::MigrationError;
use crate::progress::{Counters, Progress};
use crate::ram::MigrationBlock;
use crate::ram::changes::Changes;
use crate::stream::{
    Encoding, Greeting, PACKET_PAGES, PacketHead, TARGET_PAGE_SIZE, put_multifd_flush,
};

/// Packets that wait for a channel: one while another is written.
const WAITING: usize = 2;

/// Pages of a block, whose dirty bits are cleared already: what is written later is sent again.
pub(crate) struct Pages {
    pub block: Arc<MigrationBlock>,
    /// [`PACKET_PAGES`] at most.
    pub runs: Vec<Range<u64>>,
    /// Where block state may change: what knows of it, and the block's index there.
    pub(in crate::ram) changes: Option<(Arc<Changes>, usize)>,
}

enum Job {
    Pages(Pages),
    Sync,
}

/// The threads, and what they are to do.
pub(crate) struct Senders {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
    /// To end them by.
    channels: Vec<Channel>,
    interrupt: Interrupt,
    /// Whose queue is looked at first.
    next: usize,
    /// Pages were sent since the last barrier, and may be dirty again.
    unsynced: bool,
    /// The next page may be one that was sent since.
    must_sync: bool,
    /// Bytes that were counted already.
    counted: u64,
}

struct Shared {
    state: Mutex<State>,
    /// There is work, or none will come: one a channel, so that a packet wakes the thread that sends it alone.
    work: Vec<Condvar>,
    /// Work was taken or done, or one has failed.
    done: Condvar,
    written: Arc<AtomicU64>,
    packets: AtomicU64,
    progress: Arc<Progress>,
}

struct State {
    queues: Vec<VecDeque<Job>>,
    /// Whether a channel has taken a job and has not finished it.
    working: Vec<bool>,
    /// Jobs that are waiting or in work.
    unfinished: usize,
    ended: bool,
    failure: FirstFailure,
}

impl Senders {
    /// Starts the threads, each of which introduces its channel.
    pub(crate) fn start(
        channels: PageChannels,
        agreed: Agreed,
        progress: &Arc<Progress>,
    ) -> Result<Self, MigrationError> {
        let PageChannels { channels } = channels;
        let count = channels.len();
        let interrupt = Interrupt::default();
        let state = State {
            queues: (0..count).map(|_| VecDeque::new()).collect(),
            working: vec![false; count],
            unfinished: 0,
            ended: false,
            failure: FirstFailure::default(),
        };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            work: (0..count).map(|_| Condvar::new()).collect(),
            done: Condvar::new(),
            written: Arc::default(),
            packets: AtomicU64::new(1),
            progress: Arc::clone(progress),
        });
        let mut senders = Self {
            shared,
            threads: Vec::with_capacity(count),
            channels,
            interrupt,
            next: 0,
            unsynced: false,
            must_sync: false,
            counted: 0,
        };
        for number in 0..count {
            let short = |number: usize| u8::try_from(number).unwrap_or(u8::MAX);
            let Agreed { uuid, zstd } = agreed;
            let greeting = Greeting { uuid, id: short(number), channels: short(count) };
            let channel = senders.channels[number].interruptible(&senders.interrupt);
            let channel = channel.counted_by(&senders.shared.written);
            let shared = Arc::clone(&senders.shared);
            let failing = Arc::clone(&shared);
            let serve = move || Sender::new(&shared, number, channel, zstd)?.serve(&greeting);
            let ended = move |served: Result<(), MigrationError>| {
                if let Err(error) = served {
                    failing.fail(number, error);
                }
            };
            senders.threads.push(threads::start(number, serve, ended)?);
        }
        Ok(senders)
    }

    /// Patience with [`send`](Self::send), which lasts while bytes go out by any channel.
    pub(crate) fn watch(&self, patience: Duration) -> Watch {
        Watch::new(patience, &self.shared.written)
    }

    /// Has a channel send pages, when one has room for them, which is waited for as long as `watch` has it. Never
    /// two of a page between two barriers.
    pub(crate) fn send(
        &mut self,
        pages: Pages,
        watch: &mut Option<Watch>,
    ) -> Result<(), MigrationError> {
        self.unsynced = true;
        let mut state = self.shared.state.lock();
        loop {
            state.check()?;
            let count = state.queues.len();
            let order = (0..count).map(|step| (self.next + step) % count);
            let shortest = order.min_by_key(|&queue| state.queues[queue].len()).unwrap_or(0);
            if state.queues[shortest].len() < WAITING {
                self.next = (shortest + 1) % count;
                state.push(shortest, Job::Pages(pages));
                self.shared.work[shortest].notify_one();
                return Ok(());
            }
            self.shared.wait(&mut state, watch)?;
        }
    }

    /// Dirty pages were collected: what is sent from here on may have been sent before.
    pub(crate) fn round_ended(&mut self) {
        self.must_sync |= self.unsynced;
    }

    /// Whether a barrier is to stand before the next pages, which may have been sent before.
    pub(crate) fn needs_barrier(&self) -> bool {
        self.must_sync
    }

    /// A barrier: all pages so far are in their places before anything that follows is.
    pub(crate) fn barrier(&mut self, out: &mut dyn Sink) -> Result<(), MigrationError> {
        (self.unsynced, self.must_sync) = (false, false);
        let mut state = self.shared.state.lock();
        state.check()?;
        for queue in 0..state.queues.len() {
            state.push(queue, Job::Sync);
        }
        drop(state);
        self.shared.wake_all();
        let mut flush = Vec::new();
        put_multifd_flush(&mut flush);
        out.write(&flush).map_err(MigrationError::io("send pages"))
    }

    /// Bytes written since this was asked.
    pub(crate) fn newly_written(&mut self) -> u64 {
        let written = self.shared.written.load(Ordering::Relaxed);
        written - std::mem::replace(&mut self.counted, written)
    }

    /// Waits until all is written, for as long as `patience` has it.
    pub(crate) fn drain(&self, patience: Option<Duration>) -> Result<(), MigrationError> {
        let mut watch = patience.map(|patience| self.watch(patience));
        let mut state = self.shared.state.lock();
        while state.unfinished != 0 {
            state.check()?;
            self.shared.wait(&mut state, &mut watch)?;
        }
        state.check()
    }

    /// As [`drain`](Self::drain), and ends the threads.
    pub(crate) fn finish(&mut self, patience: Option<Duration>) -> Result<(), MigrationError> {
        self.drain(patience)?;
        let mut state = self.shared.state.lock();
        state.check()?;
        state.ended = true;
        drop(state);
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        Ok(())
    }
}

impl Drop for Senders {
    /// Ends what has not finished, at once.
    fn drop(&mut self) {
        if self.threads.is_empty() {
            return;
        }
        self.shared.state.lock().ended = true;
        self.interrupt.raise();
        self.channels.iter().for_each(Channel::shutdown);
        self.shared.wake_all();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl State {
    fn push(&mut self, queue: usize, job: Job) {
        self.queues[queue].push_back(job);
        self.unfinished += 1;
    }

    /// A channel that is waited for.
    fn stuck(&self) -> usize {
        let mut busy = self.queues.iter().zip(&self.working);
        busy.position(|(queue, working)| *working || !queue.is_empty()).unwrap_or(0)
    }

    fn check(&mut self) -> Result<(), MigrationError> {
        self.failure.check("pages were being sent")
    }
}

impl Shared {
    /// Waits for a moment for jobs to be taken or done, while there is patience.
    fn wait(
        &self,
        state: &mut MutexGuard<'_, State>,
        watch: &mut Option<Watch>,
    ) -> Result<(), MigrationError> {
        self.check_wanted()?;
        if let Some(watch) = watch.as_ref().filter(|watch| watch.patience().left().is_zero()) {
            let ended = watch.patience().ended();
            return Err(of_channel(state.stuck(), MigrationError::io("send pages")(ended)));
        }
        let begin = Instant::now();
        self.done.wait_for(state, MOMENT);
        if let Some(watch) = watch {
            watch.waited(begin);
        }
        Ok(())
    }

    fn wake_all(&self) {
        self.work.iter().for_each(|work| {
            work.notify_one();
        });
    }

    /// Fails when what waits to be written is wanted no more. A channel that its peer has not even taken up is written to
    /// in vain until patience ends, though the destination has said why it left.
    fn check_wanted(&self) -> Result<(), MigrationError> {
        match (self.progress.is_cancelled(), self.progress.has_destination_ended()) {
            (true, _) => Err(MigrationError::Cancelled),
            (false, true) => Err(MigrationError::ChannelClosed("pages were being sent")),
            (false, false) => Ok(()),
        }
    }

    fn fail(&self, number: usize, error: MigrationError) {
        self.state.lock().failure.set(number, error);
        self.done.notify_all();
    }

    /// The next job of a channel, until there is none any more.
    fn next(&self, number: usize) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if state.failure.has_failed() {
                return None;
            }
            if let Some(job) = state.queues[number].pop_front() {
                state.working[number] = true;
                self.done.notify_all();
                return Some(job);
            }
            if state.ended {
                return None;
            }
            self.work[number].wait(&mut state);
        }
    }
}

/// What a thread has.
struct Sender<'a> {
    shared: &'a Shared,
    number: usize,
    channel: Channel,
    gathered: GatherWrite,
    offsets: Vec<u64>,
    zeros: Vec<u64>,
    head: Vec<u8>,
    /// Where it was agreed that pages may be compressed.
    compressor: Option<Compressor>,
}

impl<'a> Sender<'a> {
    fn new(
        shared: &'a Shared,
        number: usize,
        channel: Channel,
        zstd: bool,
    ) -> Result<Self, MigrationError> {
        Ok(Self {
            shared,
            number,
            channel,
            gathered: GatherWrite::new(),
            offsets: Vec::with_capacity(PACKET_PAGES),
            zeros: Vec::with_capacity(PACKET_PAGES),
            head: Vec::new(),
            compressor: zstd.then(Compressor::new).transpose()?,
        })
    }

    fn serve(&mut self, greeting: &Greeting) -> Result<(), MigrationError> {
        greeting.put(&mut self.head);
        self.gathered.push_bytes(&self.head);
        self.write()?;
        while let Some(job) = self.shared.next(self.number) {
            match job {
                Job::Pages(pages) => self.pages(&pages)?,
                Job::Sync => self.packet("", true, 0, 0, None),
            }
            self.write()?;
            let mut state = self.shared.state.lock();
            (state.unfinished, state.working[self.number]) = (state.unfinished - 1, false);
            drop(state);
            self.shared.done.notify_all();
        }
        Ok(())
    }

    fn pages(&mut self, pages: &Pages) -> Result<(), MigrationError> {
        let Pages { block, runs, changes } = pages;
        match changes {
            Some((changes, index)) => changes.read(*index, runs, |runs| self.gather(block, runs)),
            None => self.gather(block, runs),
        }
    }

    /// Gathers a packet, unless there is nothing left for one.
    fn gather(
        &mut self,
        block: &MigrationBlock,
        runs: &[Range<u64>],
    ) -> Result<(), MigrationError> {
        self.offsets.clear();
        self.zeros.clear();
        for page in runs.iter().cloned().flatten() {
            let offset = page * TARGET_PAGE_SIZE;
            let is_zero = block.is_sent_as_zeros(offset);
            if is_zero { &mut self.zeros } else { &mut self.offsets }.push(offset);
        }
        if self.offsets.is_empty() && self.zeros.is_empty() {
            return Ok(());
        }
        let (normal, zero) = (self.offsets.len(), self.zeros.len());
        self.offsets.append(&mut self.zeros);
        let compressed = match &mut self.compressor {
            Some(compressor) if normal != 0 => {
                let level = self.shared.progress.steering.multifd_zstd_level();
                let mapping = block.mapping();
                let offsets = &self.offsets[..normal];
                // Copied before they are looked at: vCPUs may write them meanwhile.
                compressor.compress(level, normal * TARGET_PAGE_SIZE as usize, |bytes| {
                    for (page, &offset) in
                        bytes.chunks_exact_mut(TARGET_PAGE_SIZE as usize).zip(offsets)
                    {
                        mapping.read(offset, page);
                    }
                })?
            }
            _ => None,
        };
        self.packet(block.id(), false, normal, zero, compressed);
        match (&self.compressor, compressed) {
            (Some(compressor), Some(len)) => self.gathered.push_bytes(compressor.compressed(len)),
            _ => {
                for &offset in &self.offsets[..normal] {
                    self.gathered.push_memory(block.mapping(), offset, TARGET_PAGE_SIZE);
                }
            }
        }
        let counters = &self.shared.progress.counters;
        Counters::add(&counters.normal, normal as u64);
        Counters::add(&counters.duplicate, zero as u64);
        Ok(())
    }

    /// Gathers the head of a packet, whose pages take so many bytes where they are compressed.
    fn packet(
        &mut self,
        block: &str,
        sync: bool,
        normal: usize,
        zero: usize,
        compressed: Option<usize>,
    ) {
        let head = PacketHead {
            at: 0,
            number: self.shared.packets.fetch_add(1, Ordering::Relaxed),
            sync,
            encoding: compressed.map_or(Encoding::Plain, |_| Encoding::Zstd),
            block: block.to_owned(),
            normal,
            zero,
            payload: compressed.unwrap_or(normal * TARGET_PAGE_SIZE as usize),
        };
        self.head.clear();
        head.put(&self.offsets[..normal + zero], &mut self.head);
        self.gathered.push_bytes(&self.head);
    }

    fn write(&mut self) -> Result<(), MigrationError> {
        if self.gathered.len_bytes() == 0 {
            return Ok(());
        }
        self.channel.write_gathered(&mut self.gathered).map_err(MigrationError::io("send pages"))
    }
}
