//! The client: the manager of a region whose device is in another process.

mod events;
mod follow;
mod freeze;
mod requests;

use std::io;
use std::net::Shutdown;
use std::ops::{ControlFlow, Range};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use parking_lot::{Mutex, MutexGuard};
use ram_discard::{
    FreezeError, FreezeFor, FrozenBlockState, ListenerId, MemoryState, RamDiscardListener,
    RamDiscardManager, RegisterError, Registered, Section, SourceNotFollowed, Unavailable, Visit,
    try_all,
};
use thiserror::Error;
use vmstate::printable;

use events::View;
use freeze::{Freezes, RemoteFreeze};
use requests::{Answer, Requests};

use super::bitmap::{BitmapCopy, BitmapError, BitmapReader};
use super::wire::{
    ClientMessage, Farewell, MIN_VERSION, SECTIONS_MAX, Sections, ServerMessage, VERSION,
    VERSION_FOLLOW,
};
use super::{FrameReader, ReceiveError, send};
use crate::device::{BlockBitmap, Geometry};

/// Why there is no manager.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum AttachError {
    /// The connection failed, or what came is no message.
    #[error("no discard channel: {0}")]
    Receive(#[from] ReceiveError),
    /// Something of the system failed.
    #[error("no discard channel: {0}")]
    Io(#[from] io::Error),
    /// The server does not want this client.
    #[error(
        "the server refuses ({cause:?}, it speaks versions {min_version} to {max_version}): {reason}"
    )]
    Refused {
        /// Why.
        cause: Farewell,
        /// The oldest version that the server speaks.
        min_version: u16,
        /// The newest.
        max_version: u16,
        /// Why, in the server's words.
        reason: String,
    },
    /// The server does not do what the protocol says.
    #[error("the server broke the protocol: {0}")]
    Protocol(&'static str),
    /// The bitmap cannot be used.
    #[error(transparent)]
    Bitmap(#[from] BitmapError),
}

/// The device's sizes that change, bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceSizes {
    /// Size of the part of the region that requests may name.
    pub usable_region_size: u64,
    /// Sum of the plugged blocks.
    pub plugged_size: u64,
    /// What the guest is asked to plug.
    pub requested_size: u64,
}

/// The RamDiscardManager of a device in another process, over a discard channel.
///
/// Listeners are called on a thread of this value, with its lock held, while the device's process
/// and the guest wait. They must not call back. A listener, a registration or a visit that lasts
/// longer than [`patience`](Self::patience) while a change comes costs the connection; a user
/// that needs longer freezes block state first.
///
/// What is replayed is the state after the last event that the listeners were told: the bitmap in
/// shared memory, with what of those events it does not show yet.
///
/// When the connection is lost, every method fails with [`Unavailable`], a freeze has ended, and the
/// listeners are told so ([`notify_lost`](RamDiscardListener::notify_lost)): nothing is known then of
/// the region, and memory that was populated may go at any time. They are not told when this value
/// is dropped.
pub struct RemoteRamDiscardManager {
    shared: Arc<Shared>,
    reader: Option<JoinHandle<()>>,
}

struct Shared {
    stream: UnixStream,
    geometry: Geometry,
    /// The one that both speak.
    version: u16,
    bitmap: BitmapReader,
    patience: Duration,
    /// For answers of the server.
    timeout: Duration,
    view: Mutex<View>,
    requests: Requests,
    freezes: Freezes,
    /// Of this connection, and of no other.
    generation: u64,
    /// This value is being dropped.
    closing: AtomicBool,
}

impl RemoteRamDiscardManager {
    /// Becomes a client over a connected stream. `timeout` bounds the wait for the server's first
    /// message, and later for the answer to a request.
    ///
    /// # Errors
    ///
    /// When the server refuses, is silent, or is none.
    pub fn attach(stream: UnixStream, timeout: Duration) -> Result<Self, AttachError> {
        stream.set_nonblocking(false)?;
        let hello = ClientMessage::Hello { min_version: MIN_VERSION, max_version: VERSION };
        // A server that turned this client away may not be there any more, but has said why.
        let sent = send(&stream, &hello);
        let mut frames = FrameReader::default();
        let received = frames.next_with_fd(&stream, Instant::now() + timeout);
        let (message, file) = match (received, sent) {
            (Err(ReceiveError::Closed), Err(error)) => return Err(error.into()),
            (received, _) => received?,
        };
        let welcome = match message {
            ServerMessage::Welcome(welcome) => welcome,
            ServerMessage::Goodbye { cause, min_version, max_version, reason } => {
                let reason = printable(&reason);
                return Err(AttachError::Refused { cause, min_version, max_version, reason });
            }
            _ => return Err(AttachError::Protocol("its first message is no welcome")),
        };
        if !(MIN_VERSION..=VERSION).contains(&welcome.version) {
            return Err(AttachError::Protocol("it took a version that was not offered"));
        }
        let file = file.ok_or(AttachError::Protocol("the welcome has no descriptor"))?;
        let bitmap = BitmapReader::open(file, &welcome.geometry)?;
        let shared = Arc::new(Shared {
            stream,
            geometry: welcome.geometry,
            version: welcome.version,
            bitmap,
            patience: Duration::from_millis(welcome.patience_ms.into()),
            timeout,
            view: Mutex::new(View::new(welcome.event)),
            requests: Requests::default(),
            freezes: Freezes::default(),
            generation: welcome.generation,
            closing: AtomicBool::new(false),
        });
        let events = Arc::clone(&shared);
        let reader = thread::Builder::new()
            .name("ram-discard".to_owned())
            .spawn(move || events.run(frames))?;
        shared.requests.set_reader(reader.thread().id());
        Ok(Self { shared, reader: Some(reader) })
    }

    /// What never changes of the device: address and size of its region, block size, node.
    pub fn geometry(&self) -> &Geometry {
        &self.shared.geometry
    }

    /// A number that no other connection has: what was known of another is not known of this one.
    pub fn generation(&self) -> u64 {
        self.shared.generation
    }

    /// For how long the server lets all clients together keep a change waiting.
    pub fn patience(&self) -> Duration {
        self.shared.patience
    }

    /// The sizes that change, asked from the server.
    ///
    /// # Errors
    ///
    /// When the connection is lost, or the server does not answer in time, which ends it.
    pub fn sizes(&self) -> Result<DeviceSizes, Unavailable> {
        match self.shared.ask(|id| ClientMessage::GetSizes { id })? {
            Answer::Sizes(sizes) => Ok(sizes),
            _ => Err(self.shared.lose("the server broke the protocol: a wrong answer")),
        }
    }

    /// The whole block bitmap as words, block 0 in the lowest bit of the first; the last word is
    /// filled up with zeroes.
    ///
    /// # Errors
    ///
    /// When the connection is lost.
    pub fn words(&self) -> Result<Vec<u64>, Unavailable> {
        let view = self.shared.view.lock();
        let nr_blocks = self.shared.geometry.nr_blocks();
        Ok(self.shared.blocks(&view, 0..nr_blocks)?.blocks.words().to_vec())
    }

    /// As [`follow_source`](RamDiscardManager::follow_source) of several sections, apart from each other: all of them,
    /// or in the end none. The daemon refuses while the guest's queue runs there. Other listeners of this manager are
    /// told as of any change.
    ///
    /// # Errors
    ///
    /// As [`follow_source`](RamDiscardManager::follow_source), and when the connection is lost: nothing is known
    /// then of what was done.
    pub fn follow_source_all(
        &self,
        sections: &[Section],
        state: MemoryState,
    ) -> Result<(), SourceNotFollowed> {
        try_all(
            &mut (),
            sections.chunks(SECTIONS_MAX),
            |(), sections| self.shared.follow_source(sections, state),
            |(), sections| {
                if let Err(error) = self.shared.follow_source(sections, state.opposite()) {
                    tracing::warn!(%error, "cannot take back a change of block state");
                }
            },
        )
    }

    /// Why the connection is lost; `None` while it is not known to be.
    pub fn lost(&self) -> Option<String> {
        self.shared.requests.lost()
    }

    fn replay(
        &self,
        section: Section,
        state: MemoryState,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        let view = self.shared.view.lock();
        let blocks = self.shared.blocks(&view, self.shared.blocks_of(section))?;
        Ok(blocks.ranges(&self.shared.geometry, section, state).try_for_each(visit))
    }
}

impl Drop for RemoteRamDiscardManager {
    fn drop(&mut self) {
        self.shared.closing.store(true, Ordering::Release);
        self.shared.lose("closed by this side");
        if let Some(reader) = self.reader.take()
            // A listener may have been the last owner.
            && reader.thread().id() != thread::current().id()
        {
            let _ = reader.join();
        }
    }
}

impl RamDiscardManager for RemoteRamDiscardManager {
    fn patience(&self) -> Option<Duration> {
        Some(self.shared.patience)
    }

    fn region_size(&self) -> u64 {
        self.shared.geometry.region_size()
    }

    fn granularity(&self) -> u64 {
        self.shared.geometry.block_size()
    }

    fn is_populated(&self, section: Section) -> Result<bool, Unavailable> {
        if section.end() > self.shared.geometry.region_size() {
            return Ok(false);
        }
        let view = self.shared.view.lock();
        let blocks = self.shared.blocks(&view, self.shared.blocks_of(section))?;
        Ok(blocks.ranges(&self.shared.geometry, section, MemoryState::Populated).next()
            == Some(section))
    }

    fn replay_populated(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        self.replay(section, MemoryState::Populated, visit)
    }

    fn replay_discarded(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        self.replay(section, MemoryState::Discarded, visit)
    }

    fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        let region_size = self.shared.geometry.region_size();
        if section.end() > region_size {
            return Err(RegisterError::OutsideRegion { section, region_size });
        }
        let mut view = self.shared.view.lock();
        let blocks = self.shared.blocks(&view, self.shared.blocks_of(section))?;
        let populated: Vec<_> =
            blocks.ranges(&self.shared.geometry, section, MemoryState::Populated).collect();
        let id = view.listeners.add(section, listener, &populated)?;
        view.told(id, section, blocks);
        Ok(id)
    }

    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        let mut view = self.shared.view.lock();
        self.shared.requests.check()?;
        let Registered { mut listener, .. } =
            view.listeners.remove(id).ok_or(RegisterError::NotRegistered)?;
        if let Some(told) = view.take_told(id) {
            let populated = told.populated(&self.shared.geometry);
            populated.for_each(|range| listener.notify_discard(range));
        }
        Ok(listener)
    }

    /// The freeze is renewed by a thread of its own. It is lost with the connection, when it was not
    /// renewed in time, and when the daemon ends; a client that connects again has other freezes. For
    /// a destination nothing is frozen: what comes with the memory may be loaded into the daemon,
    /// which has no freeze of a client that permits that, and freezes block state itself while memory
    /// arrives, until a listener follows for that destination. Whether the connection is lost is told all the same.
    fn freeze(&self, purpose: FreezeFor) -> Result<FrozenBlockState, FreezeError> {
        let shared = &self.shared;
        let freeze = RemoteFreeze::begin(shared, purpose)?;
        let map = freeze.map(&shared.view.lock());
        // Ends the freeze when the map cannot be had.
        let mut frozen = FrozenBlockState::new(Vec::new(), Box::new(freeze));
        frozen.set_discarded(shared.discarded(&map?));
        Ok(frozen)
    }

    fn follows_source(&self) -> bool {
        self.shared.version >= VERSION_FOLLOW
    }

    /// Must not be called by a listener of this manager, either.
    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed> {
        self.follow_source_all(&[section], state)
    }
}

/// Blocks as the listeners were told of them.
struct Blocks {
    first_block: usize,
    blocks: BlockBitmap,
    /// The last event that the copied bitmap shows, and its count.
    event: u64,
    sequence: u64,
}

impl From<BitmapCopy> for Blocks {
    fn from(snapshot: BitmapCopy) -> Self {
        let BitmapCopy { first_block, blocks, event, sequence } = snapshot;
        Self { first_block, blocks, event, sequence }
    }
}

impl Blocks {
    /// Whether all of `blocks`, which were copied, are in the asked state.
    fn all(&self, blocks: Range<usize>, state: MemoryState) -> bool {
        let blocks = blocks.start - self.first_block..blocks.end - self.first_block;
        self.blocks.all(blocks, state.is_populated())
    }

    /// The maximal ranges of `section` in the asked state, ascending.
    fn ranges<'a>(
        &'a self,
        geometry: &'a Geometry,
        section: Section,
        state: MemoryState,
    ) -> impl Iterator<Item = Section> + 'a {
        self.blocks.runs(0..self.blocks.nr_blocks(), state.is_populated()).filter_map(move |run| {
            let run = run.start + self.first_block..run.end + self.first_block;
            geometry.section_of(&run)?.intersection(section)
        })
    }
}

impl Shared {
    /// The blocks that a section touches, clipped to the region.
    fn blocks_of(&self, section: Section) -> Range<usize> {
        let nr_blocks = self.geometry.nr_blocks();
        let block_size = self.geometry.block_size();
        let index = |block: u64| usize::try_from(block).unwrap_or(usize::MAX).min(nr_blocks);
        index(section.start() / block_size)..index(section.end().div_ceil(block_size))
    }

    /// At least the asked blocks, as after the last event that this client dealt with.
    ///
    /// The server waits for this client before it begins the next change, and the view is
    /// locked, so the writer can come in between only while it finishes the last one.
    fn blocks(
        &self,
        view: &MutexGuard<'_, View>,
        blocks: Range<usize>,
    ) -> Result<Blocks, Unavailable> {
        let mut since = None;
        loop {
            self.requests.check()?;
            if let Some(snapshot) = self.bitmap.try_copy(blocks.clone()) {
                let mut copy = Blocks::from(snapshot);
                view.overlay(copy.event, |section, state| {
                    self.mark(&mut copy, section, state);
                });
                return Ok(copy);
            }
            let since = *since.get_or_insert_with(Instant::now);
            if since.elapsed() > self.timeout {
                return Err(self.lose("the server does not finish a change of the bitmap"));
            }
            thread::yield_now();
        }
    }

    /// All maximal discarded ranges of all blocks, ascending.
    fn discarded(&self, blocks: &Blocks) -> Vec<Section> {
        let region = self.geometry.section();
        let of = |region| blocks.ranges(&self.geometry, region, MemoryState::Discarded).collect();
        region.map(of).unwrap_or_default()
    }

    fn mark(&self, copy: &mut Blocks, section: Section, state: MemoryState) {
        let blocks = self.blocks_of(section);
        let end = copy.first_block + copy.blocks.nr_blocks();
        let (start, end) = (blocks.start.max(copy.first_block), blocks.end.min(end));
        if start < end {
            let blocks = start - copy.first_block..end - copy.first_block;
            copy.blocks.set(blocks, state.is_populated());
        }
    }

    fn send(&self, message: &ClientMessage) -> Result<(), Unavailable> {
        self.requests.send(&self.stream, message).map_err(|error| self.lose(&error.to_string()))
    }

    fn ask(&self, message: impl FnOnce(u64) -> ClientMessage) -> Result<Answer, Unavailable> {
        self.ask_within(message, self.timeout)
    }

    fn ask_within(
        &self,
        message: impl FnOnce(u64) -> ClientMessage,
        timeout: Duration,
    ) -> Result<Answer, Unavailable> {
        let id = self.requests.begin()?;
        self.send(&message(id))?;
        match self.requests.wait(id, timeout)? {
            Some(answer) => Ok(answer),
            // Whether it was done is not known; without a connection it is.
            None => Err(self.lose("the server does not answer")),
        }
    }

    fn follow_source(
        &self,
        sections: &[Section],
        state: MemoryState,
    ) -> Result<(), SourceNotFollowed> {
        if self.version < VERSION_FOLLOW {
            let what = "the daemon is of a release whose block state cannot follow that of another";
            return Err(SourceNotFollowed(what.to_owned()));
        }
        let sections = Sections::from_slice(sections);
        let answer = self.ask(|id| ClientMessage::Follow { id, state, sections });
        match answer.map_err(|lost| SourceNotFollowed(lost.to_string()))? {
            Answer::Done => Ok(()),
            Answer::Failed(reason) => Err(SourceNotFollowed(reason)),
            _ => Err(SourceNotFollowed(self.wrong_answer().to_string())),
        }
    }

    /// Ends the connection, for the first reason that is given.
    fn lose(&self, reason: &str) -> Unavailable {
        let lost = self.requests.lose(reason);
        let _ = self.stream.shutdown(Shutdown::Both);
        self.freezes.lose(&lost.to_string());
        lost
    }
}

#[cfg(test)]
mod tests;
