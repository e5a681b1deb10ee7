//! The guest memory of both sides, kept for all inputs: to make it costs more than most inputs do.

use std::cell::OnceCell;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex, Weak};

use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks};
use migration::stream::{CAPABILITY_IGNORE_SHARED, Configuration};
use ram_discard::memory::RamBlock;
use ram_discard::{
    ByteRange, LocalRamDiscardManager, MemoryState, RamDiscardSource, Section, SourceFollower,
    SourceId, SourceNotFollowed,
};
use virtio_mem::device::BlockBitmap;

use super::{BLOCK, BLOCKS, PAGE, memfd, plugged};

/// Blocks that follow those of a source.
struct Following {
    blocks: Arc<Changing>,
    manager: Weak<LocalRamDiscardManager>,
    id: SourceId,
}

impl SourceFollower for Following {
    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed> {
        let manager = self.manager.upgrade().expect("who asks has it");
        let mut transaction = manager.begin();
        if state == MemoryState::Populated {
            // The last block has no memory.
            if section.end() > (BLOCKS as u64 - 1) * BLOCK {
                return Err(SourceNotFollowed("no memory".to_owned()));
            }
            let told = transaction.notify_populate(self.id, section);
            told.map_err(|refused| SourceNotFollowed(refused.to_string()))?;
        }
        let blocks = (section.start() / BLOCK) as usize..(section.end() / BLOCK) as usize;
        self.blocks.0.lock().unwrap().set(blocks, state.is_populated());
        if state == MemoryState::Discarded {
            transaction.notify_discard(self.id, section);
        }
        Ok(())
    }
}

struct Changing(Mutex<BlockBitmap>);

impl RamDiscardSource for Changing {
    fn region_size(&self) -> u64 {
        BLOCKS as u64 * BLOCK
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        super::Plugged(self.0.lock().unwrap().clone()).next_range(section, state)
    }
}

/// The pages of the device's region that the source has written.
const WRITTEN: [u64; 7] = [0, 1, 2, 5, 33, 34, 64];
/// A page that it has touched, and which is zeros.
const TOUCHED: u64 = 3;
/// Length of the resizable block, and what of it the source and the destination use, bytes.
const ROM_MAX: u64 = 8 * PAGE;
const ROM_SENT: u64 = 3 * PAGE;
const ROM_HERE: u64 = 4 * PAGE;
/// Length of the block that both sides may share, bytes, and where the guest finds it.
const FIRMWARE: u64 = 2 * PAGE;
const FIRMWARE_GPA: u64 = 0xffff_e000;
/// What is in its first page, where both sides share it.
const SHARED: [u8; 64] = [0x5a; 64];

/// What both sides share.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Sharing {
    Nothing,
    /// The block `firmware`, whose pages are not sent (x-ignore-shared).
    Firmware,
}

impl Sharing {
    pub(super) fn options(self) -> ListOptions {
        ListOptions { ignore_shared: self == Self::Firmware, postcopy: false }
    }

    pub(super) fn configuration(self) -> Configuration {
        let mut configuration = Configuration::new("fuzz");
        if self == Self::Firmware {
            configuration.capabilities.push(CAPABILITY_IGNORE_SHARED.to_owned());
        }
        configuration
    }
}

/// A machine's memory: a device's region (`vmem0`), a resizable block (`rom`), and one that may be
/// shared (`firmware`).
pub(super) struct Side {
    pub(super) sharing: Sharing,
    pub(super) blocks: Arc<RamBlocks>,
    vmem: Arc<MigrationBlock>,
    rom: Arc<MigrationBlock>,
    firmware: Arc<MigrationBlock>,
    manager: Arc<LocalRamDiscardManager>,
    plugged: Arc<Changing>,
    /// What is discarded of the region before a source changes it.
    discarded: Vec<ByteRange>,
}

impl Side {
    fn new(sharing: Sharing, rom_used: u64) -> Self {
        let map = |id: &str, gpa: u64, len: u64, options| {
            let file = memfd(id);
            file.set_len(len).unwrap();
            let ram = RamBlock::new(id.into(), gpa, len, file, 0).unwrap();
            Arc::new(MigrationBlock::map(Arc::new(ram), options).unwrap())
        };
        let vmem = map("vmem0", 0, BLOCKS as u64 * BLOCK, BlockOptions::migratable());
        let manager = Arc::new(LocalRamDiscardManager::new(BLOCKS as u64 * BLOCK));
        let plugged = Arc::new(Changing(Mutex::new(plugged().0)));
        let id = manager.add_source(Arc::clone(&plugged) as Arc<_>).unwrap();
        let (blocks, weak) = (Arc::clone(&plugged), Arc::downgrade(&manager));
        manager.set_source_follower(Box::new(Following { blocks, manager: weak, id }));
        vmem.set_discard_manager(0, Arc::clone(&manager) as Arc<_>).unwrap();
        let resizable = BlockOptions { resizable: Some(rom_used), ..BlockOptions::migratable() };
        let rom = map("rom", 1 << 30, ROM_MAX, resizable);
        let shared = BlockOptions { shared: true, ..BlockOptions::migratable() };
        let firmware = map("firmware", FIRMWARE_GPA, FIRMWARE, shared);
        let mut blocks = RamBlocks::new();
        for block in [&vmem, &rom, &firmware] {
            blocks.register(Arc::clone(block)).unwrap();
        }
        let discarded = vmem.discarded().unwrap();
        let blocks = Arc::new(blocks);
        let side = Self { sharing, blocks, vmem, rom, firmware, manager, plugged, discarded };
        if sharing == Sharing::Firmware {
            side.firmware.mapping().write(0, &SHARED);
        }
        side
    }

    /// With a guest in it.
    fn source(sharing: Sharing) -> Self {
        let side = Self::new(sharing, ROM_SENT);
        for page in WRITTEN {
            side.vmem.mapping().write(page * PAGE, &[page as u8 + 1; 64]);
        }
        side.vmem.mapping().write(TOUCHED * PAGE, &[0; 8]);
        side.rom.mapping().write(PAGE, &[0xaa; 64]);
        side.firmware.mapping().write(0, &SHARED);
        side
    }

    /// Waiting for a guest, with what another one has left where it must not stay.
    fn destination(sharing: Sharing) -> Self {
        let side = Self::new(sharing, ROM_HERE);
        side.leave_behind();
        side
    }

    /// Writes a page of discarded memory, and one past the end of what is used: a load discards
    /// both before anything comes.
    fn leave_behind(&self) {
        for (block, at) in [(&self.vmem, self.discarded[0].start()), (&self.rom, ROM_MAX - PAGE)] {
            block.ram().backing().file().write_all_at(&[0xee], at).unwrap();
        }
    }

    /// What holds of a destination whatever came, and becomes as it was before.
    fn check_and_reset(&self) {
        self.check_ended();
        let found = data(&self.vmem);
        let discarded = self.vmem.discarded().unwrap();
        let leaked = |data: &&ByteRange| discarded.iter().any(|range| range.overlaps(**data));
        assert_eq!(found.iter().find(leaked), None, "data in discarded memory");
        let used = self.rom.used_length();
        assert!(used <= ROM_MAX && used.is_multiple_of(PAGE), "{used:#x} bytes of rom are used");
        let rom = data(&self.rom);
        assert!(rom.iter().all(|data| data.end() <= used), "{rom:?}, and {used:#x} are used");
        let firmware = data(&self.firmware);
        if self.sharing == Sharing::Firmware {
            let mut shared = SHARED;
            self.firmware.mapping().read(0, &mut shared);
            assert_eq!(shared, SHARED, "what both sides share was written");
            assert_eq!(firmware, [ByteRange::new(0, PAGE).unwrap()], "what both sides share");
        } else {
            firmware.into_iter().for_each(|data| self.firmware.discard(data).unwrap());
        }
        found.into_iter().for_each(|data| self.vmem.discard(data).unwrap());
        *self.plugged.0.lock().unwrap() = plugged().0;
        rom.into_iter().for_each(|data| self.rom.discard(data).unwrap());
        self.rom.resize(ROM_HERE).expect("the migration has ended");
        self.leave_behind();
    }

    /// A migration that has ended holds nothing.
    fn check_ended(&self) {
        assert!(!self.manager.is_frozen(), "block state stays frozen");
        for block in self.blocks.iter() {
            block.unset_discard_manager().expect("no migration has the block any more");
        }
        self.vmem.set_discard_manager(0, Arc::clone(&self.manager) as Arc<_>).unwrap();
    }
}

fn pages((first, nr): (u64, u64)) -> ByteRange {
    ByteRange::new(first * PAGE, nr * PAGE).unwrap()
}

/// Where the host holds anything for the block, past the end of what is used as well.
fn data(block: &MigrationBlock) -> Vec<ByteRange> {
    let mut found = Vec::new();
    let all = ByteRange::new(0, block.ram().range().len()).unwrap();
    block.for_each_data(all, |data| found.push(data)).unwrap();
    found
}

/// Does something with a machine that waits for a guest, and checks it.
pub(super) fn with_destination<T>(sharing: Sharing, action: impl FnOnce(&Side) -> T) -> T {
    thread_local!(static SIDES: [OnceCell<Side>; 2] = const { [OnceCell::new(), OnceCell::new()] });
    SIDES.with(|sides| {
        let side = sides[sharing as usize].get_or_init(|| Side::destination(sharing));
        let done = action(side);
        side.check_and_reset();
        done
    })
}

/// Does something with a machine that has a guest, which stays as it is.
pub(super) fn with_source<T>(sharing: Sharing, action: impl FnOnce(&Side) -> T) -> T {
    thread_local!(static SIDES: [OnceCell<Side>; 2] = const { [OnceCell::new(), OnceCell::new()] });
    SIDES.with(|sides| {
        let side = sides[sharing as usize].get_or_init(|| Side::source(sharing));
        let done = action(side);
        side.check_ended();
        let written: Vec<_> = [(0, 4), (5, 1), (33, 2), (64, 1)].map(pages).into();
        assert_eq!(data(&side.vmem), written, "a source holds no more for having sent it");
        done
    })
}
