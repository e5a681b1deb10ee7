//! The manager of a device whose block state a test changes.

use std::fs::File;
use std::ops::{ControlFlow, Range};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use ram_discard::{
    Follow, FollowError, FollowedBlockState, Freeze, FreezeError, FreezeFor, FreezeLost,
    FrozenBlockState, ListenerId, LocalRamDiscardManager, MemoryState, RamDiscardListener,
    RamDiscardManager, RamDiscardSource, RegisterError, Section, SourceId, SourceNotFollowed,
    Unavailable, Visit,
};
use rustix::fs::FallocateFlags;
use virtio_mem::device::BlockBitmap;

use super::BLOCK;

/// A source whose state a test may change.
pub(crate) struct Changing(Mutex<BlockBitmap>);

impl Changing {
    pub(crate) fn new(plugged: BlockBitmap) -> Self {
        Self(Mutex::new(plugged))
    }

    /// Plugs blocks, or unplugs them, without a word to a manager.
    pub(crate) fn set(&self, blocks: Range<usize>, plugged: bool) {
        self.0.lock().unwrap().set(blocks, plugged);
    }

    /// Whether all of the blocks are plugged, or unplugged.
    pub(crate) fn all(&self, blocks: Range<usize>, plugged: bool) -> bool {
        self.0.lock().unwrap().all(blocks, plugged)
    }
}

impl RamDiscardSource for Changing {
    fn region_size(&self) -> u64 {
        self.0.lock().unwrap().nr_blocks() as u64 * BLOCK
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        let blocks = (section.start() / BLOCK) as usize..section.end().div_ceil(BLOCK) as usize;
        let run = self.0.lock().unwrap().next_run(blocks, state.is_populated())?;
        let range = Section::from_bounds(run.start as u64 * BLOCK, run.end as u64 * BLOCK)?;
        range.intersection(section)
    }
}

/// A manager that notes its freezes, and can lose them as one of another process can.
pub(crate) struct TestManager {
    local: LocalRamDiscardManager,
    source: Arc<Changing>,
    id: SourceId,
    log: Mutex<Log>,
    losses: Arc<AtomicU32>,
    /// Whether it can be followed, and follows, as the manager of a device does.
    pub(crate) elastic: AtomicBool,
    /// A block that it does not populate for a source that it follows.
    pub(crate) refuses: Mutex<Option<u64>>,
    /// Held while a source is followed.
    pub(crate) busy: Mutex<()>,
}

/// What happened, in order.
pub(crate) type Log = Arc<Mutex<Vec<&'static str>>>;

struct TestFreeze {
    inner: Option<FrozenBlockState>,
    elastic: bool,
    region: Section,
    log: Log,
    losses: Arc<AtomicU32>,
    /// As many as there were at the beginning.
    lost_before: u32,
}

impl Freeze for TestFreeze {
    fn check(&self) -> Result<(), FreezeLost> {
        if self.losses.load(Ordering::SeqCst) == self.lost_before {
            return self.inner.as_ref().unwrap().check();
        }
        Err(FreezeLost("the device was restarted".to_owned()))
    }

    fn thaw(&mut self) -> Result<(), FreezeLost> {
        self.log.lock().unwrap().push("thaw");
        self.check()
    }

    fn can_follow(&self) -> bool {
        self.elastic
    }

    fn follow(
        &mut self,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<Box<dyn Follow>, FollowError> {
        if !self.elastic {
            return Err(FollowError::NotPossible);
        }
        let inner = self.inner.take().unwrap().follow(listener).map_err(|not| not.reason)?;
        // Told once it is so: tests wait for it to plug.
        self.log.lock().unwrap().push("follow");
        let (log, losses) = (Arc::clone(&self.log), Arc::clone(&self.losses));
        let (inner, region, lost_before) = (Some(inner), self.region, self.lost_before);
        Ok(Box::new(TestFollow { inner, region, log, losses, lost_before }))
    }
}

struct TestFollow {
    inner: Option<FollowedBlockState>,
    region: Section,
    log: Log,
    losses: Arc<AtomicU32>,
    lost_before: u32,
}

impl Follow for TestFollow {
    fn check(&self) -> Result<(), FreezeLost> {
        if self.losses.load(Ordering::SeqCst) != self.lost_before {
            return Err(FreezeLost("the device was restarted".to_owned()));
        }
        self.inner.as_ref().unwrap().check()
    }

    fn freeze(&mut self) -> Result<(Vec<Section>, Box<dyn Freeze>), FreezeLost> {
        self.check()?;
        let inner = self.inner.take().unwrap().freeze()?;
        self.log.lock().unwrap().push("freeze");
        let discarded = inner.discarded(self.region).collect();
        let (log, losses) = (Arc::clone(&self.log), Arc::clone(&self.losses));
        let (inner, elastic, region) = (Some(inner), true, self.region);
        let lost_before = self.lost_before;
        Ok((discarded, Box::new(TestFreeze { inner, elastic, region, log, losses, lost_before })))
    }

    fn end(&mut self) {
        self.inner = None;
    }
}

impl TestManager {
    pub(crate) fn new(plugged: &[usize], nr_blocks: usize) -> Arc<Self> {
        let mut bitmap = BlockBitmap::new(nr_blocks);
        plugged.iter().for_each(|&block| bitmap.set(block..block + 1, true));
        let local = LocalRamDiscardManager::new(nr_blocks as u64 * BLOCK);
        let source = Arc::new(Changing::new(bitmap));
        let id = local.add_source(Arc::clone(&source) as Arc<dyn RamDiscardSource>).unwrap();
        let (log, losses, elastic) = (Mutex::default(), Arc::default(), AtomicBool::new(false));
        let (refuses, busy) = (Mutex::default(), Mutex::default());
        Arc::new(Self { local, source, id, log, losses, elastic, refuses, busy })
    }

    /// Plugs a block, as a device does for its guest.
    pub(crate) fn plug(&self, block: usize) -> Result<(), String> {
        let mut transaction = self.local.begin();
        if transaction.is_frozen() {
            return Err("block state is frozen".to_owned());
        }
        let told = transaction.notify_populate(self.id, section_of(block));
        told.map_err(|refused| refused.to_string())?;
        self.set(block, true);
        Ok(())
    }

    /// Unplugs a block, as a device does for its guest, and then discards its memory.
    pub(crate) fn unplug(&self, block: usize, memory: &File) -> Result<(), String> {
        let mut transaction = self.local.begin();
        if transaction.is_frozen() {
            return Err("block state is frozen".to_owned());
        }
        self.set(block, false);
        transaction.notify_discard(self.id, section_of(block));
        punch(memory, block);
        Ok(())
    }

    /// Whether a block is plugged.
    pub(crate) fn is_plugged(&self, block: usize) -> bool {
        self.source.all(block..block + 1, true)
    }

    /// Has freezes noted in `log` from now on.
    pub(crate) fn watch(&self, log: &Log) {
        *self.log.lock().unwrap() = Arc::clone(log);
    }

    /// Loses all freezes, as when the device's process is restarted.
    pub(crate) fn lose_freezes(&self) {
        self.losses.fetch_add(1, Ordering::SeqCst);
    }

    /// Plugs a block, frozen or not, or unplugs it, without a word to the manager.
    pub(crate) fn set(&self, block: usize, plugged: bool) {
        self.source.set(block..block + 1, plugged);
    }
}

impl RamDiscardManager for TestManager {
    fn region_size(&self) -> u64 {
        self.local.region_size()
    }

    fn granularity(&self) -> u64 {
        self.local.granularity()
    }

    fn is_populated(&self, section: Section) -> Result<bool, Unavailable> {
        Ok(self.local.is_populated(section))
    }

    fn replay_populated(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.local.replay_populated(section, visit))
    }

    fn replay_discarded(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.local.replay_discarded(section, visit))
    }

    fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        self.local.register(section, listener)
    }

    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        self.local.unregister(id)
    }

    fn freeze(&self, purpose: FreezeFor) -> Result<FrozenBlockState, FreezeError> {
        let inner = self.local.freeze(purpose);
        let region = Section::new(0, self.region_size()).unwrap();
        let discarded = inner.discarded(region).collect();
        let log = Arc::clone(&self.log.lock().unwrap());
        log.lock().unwrap().push("freeze");
        let losses = Arc::clone(&self.losses);
        let lost_before = losses.load(Ordering::SeqCst);
        let (inner, elastic) = (Some(inner), self.elastic.load(Ordering::SeqCst));
        let freeze = TestFreeze { inner, elastic, region, log, losses, lost_before };
        Ok(FrozenBlockState::new(discarded, Box::new(freeze)))
    }

    fn follows_source(&self) -> bool {
        self.elastic.load(Ordering::SeqCst)
    }

    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed> {
        let _busy = self.busy.lock().unwrap();
        let blocks = (section.start() / BLOCK) as usize..(section.end() / BLOCK) as usize;
        let refuses = *self.refuses.lock().unwrap();
        if state == MemoryState::Populated
            && refuses.is_some_and(|block| blocks.contains(&(block as usize)))
        {
            return Err(SourceNotFollowed("no huge page is left".to_owned()));
        }
        let mut transaction = self.local.begin();
        if state == MemoryState::Populated {
            let told = transaction.notify_populate(self.id, section);
            told.map_err(|refused| SourceNotFollowed(refused.to_string()))?;
        }
        self.source.0.lock().unwrap().set(blocks, state.is_populated());
        if state == MemoryState::Discarded {
            transaction.notify_discard(self.id, section);
        }
        Ok(())
    }
}

fn section_of(block: usize) -> Section {
    Section::new(block as u64 * BLOCK, BLOCK).unwrap()
}

/// Discards the memory of a block.
fn punch(memory: &File, block: usize) {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::fs::fallocate(memory, flags, block as u64 * BLOCK, BLOCK).unwrap();
}
