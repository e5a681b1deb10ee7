//! Snapshots of a guest whose device plugs and unplugs memory while the image is written.

mod model;

use std::ops::{ControlFlow, Range};
use std::sync::Mutex;
use std::time::Duration;

use super::background::{save_running, save_running_while};
use super::*;
use crate::ram::BlockOptions;
use crate::test_support::Changing;
use ram_discard::{
    FreezeError, FreezeFor, FrozenBlockState, ListenerId, LocalRamDiscardManager,
    RamDiscardListener, RamDiscardManager, RamDiscardSource, RegisterError, Section, SourceId,
    Unavailable, Visit,
};
use rustix::fs::{FallocateFlags, MemfdFlags, SealFlags, fallocate, fcntl_add_seals};
use virtio_mem::device::BlockBitmap;

/// What a request of the guest is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Answer {
    Ack,
    Busy,
    Error,
}

/// A device: changes block state, tells the listeners, and discards memory.
struct Device {
    manager: LocalRamDiscardManager,
    source: SourceId,
    blocks: Arc<Changing>,
    /// For how long it waits for listeners.
    patience: Option<Duration>,
}

/// Discards the memory of a region. The first listener, and so the last to be told of a discard.
struct Memory(File);

impl RamDiscardListener for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn notify_populate(&mut self, _section: Section) -> Result<(), String> {
        Ok(())
    }

    fn notify_discard(&mut self, section: Section) {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.0, flags, section.start(), section.len()).unwrap();
    }
}

impl Device {
    /// Of a region of which the memory is `region`.
    fn new(region: &File, plugged: &[usize], patience: Option<Duration>) -> Arc<Self> {
        let size = region.metadata().unwrap().len();
        let mut bitmap = BlockBitmap::new((size / BLOCK) as usize);
        plugged.iter().for_each(|&block| bitmap.set(block..block + 1, true));
        let manager = LocalRamDiscardManager::new(size);
        let blocks = Arc::new(Changing::new(bitmap));
        let source = manager.add_source(Arc::clone(&blocks) as Arc<dyn RamDiscardSource>).unwrap();
        let memory = Memory(region.try_clone().unwrap());
        manager.register(Section::new(0, size).unwrap(), Box::new(memory)).unwrap();
        Arc::new(Self { manager, source, blocks, patience })
    }

    fn plug(&self, blocks: Range<usize>) -> Answer {
        self.change(blocks, true)
    }

    fn unplug(&self, blocks: Range<usize>) -> Answer {
        self.change(blocks, false)
    }

    fn change(&self, blocks: Range<usize>, plug: bool) -> Answer {
        let mut transaction = self.manager.begin();
        if !self.blocks.all(blocks.clone(), !plug) {
            return Answer::Error;
        }
        if transaction.is_frozen() {
            return Answer::Busy;
        }
        let section =
            Section::from_bounds(blocks.start as u64 * BLOCK, blocks.end as u64 * BLOCK).unwrap();
        if plug {
            if transaction.notify_populate(self.source, section).is_err() {
                return Answer::Busy;
            }
            self.blocks.set(blocks, true);
        } else {
            self.blocks.set(blocks, false);
            transaction.notify_discard(self.source, section);
        }
        Answer::Ack
    }

    /// What is plugged.
    fn plugged(&self) -> Vec<usize> {
        let nr_blocks = (self.region_size() / BLOCK) as usize;
        (0..nr_blocks).filter(|&block| self.blocks.all(block..block + 1, true)).collect()
    }
}

impl RamDiscardManager for Device {
    fn region_size(&self) -> u64 {
        self.manager.region_size()
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn patience(&self) -> Option<Duration> {
        self.patience
    }

    fn is_populated(&self, section: Section) -> Result<bool, Unavailable> {
        Ok(self.manager.is_populated(section))
    }

    fn replay_populated(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.manager.replay_populated(section, visit))
    }

    fn replay_discarded(
        &self,
        section: Section,
        visit: &mut Visit<'_>,
    ) -> Result<ControlFlow<()>, Unavailable> {
        Ok(self.manager.replay_discarded(section, visit))
    }

    fn register(
        &self,
        section: Section,
        listener: Box<dyn RamDiscardListener>,
    ) -> Result<ListenerId, RegisterError> {
        self.manager.register(section, listener)
    }

    fn unregister(&self, id: ListenerId) -> Result<Box<dyn RamDiscardListener>, RegisterError> {
        self.manager.unregister(id)
    }

    fn freeze(&self, purpose: FreezeFor) -> Result<FrozenBlockState, FreezeError> {
        Ok(self.manager.freeze(purpose))
    }
}

/// A side of a device that resizes, with blocks 1, 4 and 5 plugged: 32 pages of block 1 hold sevens, 10 at the
/// end of block 4 hold eights, and then 4 hold zeros.
fn resizable(patience: Option<Duration>) -> (Side, Arc<Device>) {
    let region = memfd(16 * BLOCK);
    let device = Device::new(&region, &[1, 4, 5], patience);
    fill(&region, 64..96, 7);
    fill(&region, 300..310, 8);
    fill(&region, 310..314, 0);
    (side_of(region, &device), device)
}

/// The side of a device, with boot memory of which nothing was touched.
fn side_of(region: File, device: &Arc<Device>) -> Side {
    let boot = memfd(BLOCK);
    let mut blocks = RamBlocks::new();
    let vmem = migration_block("vmem0", &region, 16 * BLOCK, BlockOptions::migratable());
    vmem.set_discard_manager(0, Arc::clone(device) as Arc<dyn RamDiscardManager>).unwrap();
    blocks.register(Arc::new(vmem)).unwrap();
    let ram = migration_block("ram", &boot, BLOCK, BlockOptions::migratable());
    blocks.register(Arc::new(ram)).unwrap();
    Side { region, boot, blocks: Arc::new(blocks), manager: None }
}

/// Another side with the memory that the image of one like [`resizable`] has, which it checks.
fn assert_instant(file: &File) {
    let to = Side::new(&[1, 4, 5]);
    restore_from(&to, file).unwrap();
    for page in 0..1024 {
        let byte = match page {
            64..96 => 7,
            300..310 => 8,
            _ => 0,
        };
        assert_eq!(to.page(page), [byte; PAGE as usize], "page {page}");
    }
    assert_eq!(to.resident().0, 42);
}

/// Pages that the host holds for blocks that are not plugged.
fn leaked(side: &Side) -> u64 {
    let block = side.blocks.get("vmem0").unwrap();
    let mut leaked = 0;
    for range in block.discarded().unwrap() {
        block.for_each_data(range, |data| leaked += data.len() / PAGE).unwrap();
    }
    leaked
}

/// A guest that is not there: what it does is done by `stops` and `runs`.
struct Does<S, R>(S, R);

impl<S: Fn() + Send + Sync, R: Fn() + Send + Sync> Guest for Does<S, R> {
    fn stop(&self) -> Result<(), String> {
        (self.0)();
        Ok(())
    }

    fn run(&self) -> Result<(), String> {
        (self.1)();
        Ok(())
    }
}

fn save_while(
    side: &Side,
    file: &File,
    guest: &dyn Guest,
) -> (Result<(), MigrationError>, progress::MigrationInfo) {
    let progress = Arc::new(Progress::new());
    let running = RunningGuest {
        configuration: Configuration::new("test"),
        blocks: &side.blocks,
        devices: &mut NoDevices,
        guest,
        progress: Arc::clone(&progress),
    };
    (save_in_background(running, file), progress.snapshot())
}

#[test]
fn what_is_unplugged_while_the_image_is_written_is_in_it_and_what_is_plugged_is_not() {
    let (from, device) = resizable(None);
    let mapping = Arc::clone(from.blocks.get("vmem0").unwrap().mapping());
    let resizes = || {
        assert_eq!(device.unplug(1..2), Answer::Ack);
        assert_eq!(device.plug(2..4), Answer::Ack);
        mapping.write(2 * BLOCK, &[0xaa; 100]);
        // Comes again as zeros, and is written.
        assert_eq!(device.unplug(4..6), Answer::Ack);
        assert_eq!(device.plug(4..5), Answer::Ack);
        let mut byte = [1];
        mapping.read(300 * PAGE, &mut byte);
        assert_eq!(byte, [0]);
        mapping.write(300 * PAGE, &[0xcc; 5 * PAGE as usize]);
    };
    let file = tempfile::tempfile().unwrap();
    let (saved, seen) = save_while(&from, &file, &Does(|| {}, resizes));
    saved.unwrap();
    assert_eq!(device.plugged(), [2, 3, 4]);
    assert_eq!((seen.normal, seen.duplicate, seen.remaining), (42, 4, 0));
    assert_eq!(seen.saved_before_discard, 46);
    assert_instant(&file);
    assert_eq!((leaked(&from), from.resident().0), (0, 6));
}

#[test]
fn requests_are_busy_while_the_guest_is_stopped_and_served_while_the_image_is_written() {
    let (from, device) = resizable(None);
    let refused = || {
        assert_eq!(device.plug(2..3), Answer::Busy);
        assert_eq!(device.unplug(1..2), Answer::Busy);
    };
    let served = || {
        assert_eq!(device.plug(2..3), Answer::Ack);
        assert_eq!(device.unplug(2..3), Answer::Ack);
    };
    let file = tempfile::tempfile().unwrap();
    save_while(&from, &file, &Does(refused, served)).0.unwrap();
    served();
    assert_instant(&file);
}

#[test]
fn a_vcpu_that_writes_memory_that_came_again_does_not_wait_for_what_was_there() {
    let (from, device) = resizable(None);
    let file = tempfile::tempfile().unwrap();
    let resizes = {
        let device = Arc::clone(&device);
        move || {
            assert_eq!(device.unplug(4..6), Answer::Ack);
            assert_eq!(device.plug(4..6), Answer::Ack);
        }
    };
    // The vCPUs write all of the region afterwards, discarded memory, too.
    let (saved, seen, _) =
        save_running_while(&from, &file, Some(Box::new(resizes)), Arc::default());
    saved.unwrap();
    assert_eq!(seen.saved_before_discard, 14);
    assert!((0..1024).all(|page| from.page(page) == [0xbb; 4096]));
    assert_instant(&file);
}

#[test]
fn an_image_that_takes_no_more_fails_and_the_memory_goes_all_the_same() {
    let (from, device) = resizable(None);
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let file = File::from(rustix::fs::memfd_create("image", flags).unwrap());
    let resizes = || {
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        assert_eq!(device.unplug(1..2), Answer::Ack);
        assert_eq!(leaked(&from), 0);
        assert_eq!(device.plug(1..2), Answer::Ack);
    };
    let (saved, seen) = save_while(&from, &file, &Does(|| {}, resizes));
    let error = saved.unwrap_err().to_string();
    assert!(error.starts_with("cannot write pages: "), "{error}");
    assert_eq!(seen.status, Status::Failed);
    assert_eq!((device.unplug(4..5), leaked(&from), from.resident().0), (Answer::Ack, 0, 0));
    // The next one works.
    fill(&from.region, 64..96, 7);
    save_running(&from, &tempfile::tempfile().unwrap()).0.unwrap();
}

#[test]
fn memory_that_cannot_be_saved_while_its_device_waits_goes_and_the_image_fails() {
    let (from, device) = resizable(Some(Duration::ZERO));
    let resizes = || {
        // Nothing of it is outstanding.
        assert_eq!(device.unplug(5..6), Answer::Ack);
        assert_eq!(device.unplug(1..2), Answer::Ack);
        assert_eq!(leaked(&from), 0);
    };
    let (saved, _) = save_while(&from, &tempfile::tempfile().unwrap(), &Does(|| {}, resizes));
    let error = saved.unwrap_err();
    assert!(matches!(&error, MigrationError::DiscardedTooSoon { block } if block == "vmem0"));
    assert!(error.to_string().contains("on faster storage"), "{error}");
    assert_eq!((leaked(&from), from.resident().0), (0, 14));
}

#[test]
fn a_change_without_a_word_leaves_no_image() {
    let (from, device) = resizable(None);
    let changes = || device.blocks.set(1..2, false);
    let (saved, _) = save_while(&from, &tempfile::tempfile().unwrap(), &Does(|| {}, changes));
    let error = saved.unwrap_err();
    assert!(matches!(error, MigrationError::FreezeLost(_)), "{error}");
}

#[test]
fn a_vmm_that_panics_when_it_runs_the_guest_is_not_held_up() {
    let (from, device) = resizable(None);
    let file = tempfile::tempfile().unwrap();
    let panics = || panic!("the VMM has a bug");
    let saving = || save_while(&from, &file, &Does(|| {}, panics));
    std::panic::catch_unwind(std::panic::AssertUnwindSafe(saving)).unwrap_err();
    assert_eq!(device.unplug(1..2), Answer::Ack);
    from.blocks.get("vmem0").unwrap().mapping().write(300 * PAGE, &[0xcc]);
}

#[test]
fn all_that_is_unplugged_at_once_is_in_the_image() {
    let (from, device) = resizable(None);
    let resizes = || {
        let mut transaction = device.manager.begin();
        let plugged = [(1, 2), (4, 6)];
        let plugged = plugged.map(|(start, end)| {
            Section::from_bounds(start as u64 * BLOCK, end as u64 * BLOCK).unwrap()
        });
        device.blocks.set(0..16, false);
        transaction.notify_discard_all(device.source, &plugged);
    };
    let file = tempfile::tempfile().unwrap();
    let (saved, seen) = save_while(&from, &file, &Does(|| {}, resizes));
    saved.unwrap();
    assert_eq!((seen.saved_before_discard, from.resident().0), (46, 0));
    assert_instant(&file);
}
