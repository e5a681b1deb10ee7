//! A DMA user that behaves as VFIO does, at the manager of a device in its own process and at a
//! daemon's: it maps by granularity, and what it has mapped is never discarded.

mod common;

use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ram_discard::{
    LocalRamDiscardManager, MemoryState, RamDiscardManager, RamDiscardSource, Section, SourceId,
};
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::dma::DmaMappings;
use small_vmm::machine::{Machine, MachineOptions};
use small_vmm::memory::{GuestRam, Layout};
use virtio_mem::device::BlockBitmap;
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use common::{ADDR, BLOCK, PATIENCE, REGION, daemon_binary};

const NO_LIMIT: usize = usize::MAX;

fn section(first: u64, end: u64) -> Section {
    Section::from_bounds(first * BLOCK, end * BLOCK).unwrap()
}

fn offsets(blocks: impl IntoIterator<Item = u64>) -> Vec<u64> {
    blocks.into_iter().map(|block| block * BLOCK).collect()
}

/// A region whose blocks are populated by a test.
struct Blocks(Mutex<BlockBitmap>);

impl Blocks {
    fn set(&self, blocks: std::ops::Range<usize>, plugged: bool) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).set(blocks, plugged);
    }
}

impl RamDiscardSource for Blocks {
    fn region_size(&self) -> u64 {
        REGION
    }

    fn granularity(&self) -> u64 {
        BLOCK
    }

    fn next_range(&self, section: Section, state: MemoryState) -> Option<Section> {
        let blocks = (section.start() / BLOCK) as usize..section.end().div_ceil(BLOCK) as usize;
        let run = self
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .next_run(blocks, state.is_populated())?;
        Section::from_bounds(run.start as u64 * BLOCK, run.end as u64 * BLOCK)?
            .intersection(section)
    }
}

/// A device in this process, whose memory a DMA user maps.
struct InProcess {
    ram: Arc<GuestRam>,
    blocks: Arc<Blocks>,
    manager: LocalRamDiscardManager,
    source: SourceId,
}

impl InProcess {
    fn new() -> Self {
        let layout = Layout::new().memfd("region", ADDR, REGION).unwrap();
        let blocks = Arc::new(Blocks(Mutex::new(BlockBitmap::new((REGION / BLOCK) as usize))));
        let manager = LocalRamDiscardManager::new(REGION);
        let source = manager.add_source(blocks.clone()).unwrap();
        Self { ram: Arc::new(GuestRam::new(layout).unwrap()), blocks, manager, source }
    }

    /// As PLUG: false when a listener refuses.
    fn populate(&self, first: u64, end: u64) -> bool {
        let mut transaction = self.manager.begin();
        let accepted = transaction.notify_populate(self.source, section(first, end)).is_ok();
        if accepted {
            self.blocks.set(first as usize..end as usize, true);
        }
        accepted
    }

    /// As UNPLUG: the memory goes after the listeners have let go of it.
    fn discard(&self, first: u64, end: u64) {
        let mut transaction = self.manager.begin();
        self.blocks.set(first as usize..end as usize, false);
        transaction.notify_discard(self.source, section(first, end));
        self.ram.punch(ADDR + first * BLOCK..ADDR + end * BLOCK).unwrap();
    }

    fn dma(&self, limit: usize) -> DmaMappings {
        DmaMappings::new(self.ram.clone(), ADDR, self.manager.granularity(), limit)
    }
}

#[test]
fn a_discard_narrower_than_the_populate_before_unmaps_its_granules_only() {
    let device = InProcess::new();
    assert!(device.populate(0, 4));
    let dma = device.dma(NO_LIMIT);
    device.manager.register(section(0, REGION / BLOCK), dma.listener()).unwrap();
    assert!(device.populate(8, 12));
    assert_eq!(dma.mapped(), offsets([0, 1, 2, 3, 8, 9, 10, 11]));
    device.discard(1, 3);
    assert_eq!(dma.mapped(), offsets([0, 3, 8, 9, 10, 11]));
    // A second time, and wider than what was populated.
    device.discard(1, 3);
    device.discard(9, 20);
    assert_eq!(dma.mapped(), offsets([0, 3, 8]));
    assert!(device.populate(1, 2));
    assert_eq!(dma.mapped(), offsets([0, 1, 3, 8]));
    assert_eq!(dma.faults(), Vec::<String>::new());
}

#[test]
fn beyond_its_limit_of_mappings_a_dma_user_refuses_and_keeps_what_it_had() {
    let device = InProcess::new();
    let dma = device.dma(4);
    let id = device.manager.register(section(0, REGION / BLOCK), dma.listener()).unwrap();
    assert!(device.populate(0, 2));
    assert!(!device.populate(2, 5));
    assert_eq!(dma.mapped(), offsets([0, 1]));
    assert!(device.populate(4, 6));
    // One that comes late is refused as a whole.
    let late = device.dma(3);
    assert!(device.manager.register(section(0, 8), late.listener()).is_err());
    assert_eq!((late.mapped(), dma.mapped()), (Vec::new(), offsets([0, 1, 4, 5])));
    device.manager.unregister(id).unwrap();
    assert_eq!(dma.mapped(), Vec::<u64>::new());
    assert_eq!((dma.faults(), late.faults()), (Vec::new(), Vec::new()));
}

#[test]
fn memory_that_goes_while_it_is_mapped_is_seen() {
    let device = InProcess::new();
    let dma = device.dma(NO_LIMIT);
    device.manager.register(section(0, REGION / BLOCK), dma.listener()).unwrap();
    assert!(device.populate(0, 2));
    device.ram.punch(ADDR + BLOCK..ADDR + 2 * BLOCK).unwrap();
    device.discard(0, 2);
    assert_eq!(dma.faults().len(), 1, "{:?}", dma.faults());
}

/// A daemon, a guest, and a DMA user of the guest's memory at the daemon's discard channel.
struct Remote {
    dma: DmaMappings,
    manager: RemoteRamDiscardManager,
    machine: Arc<Machine>,
    daemon: Daemon,
}

impl Remote {
    fn new(limit: usize) -> Self {
        let options = DaemonOptions::new(ADDR, REGION).block_size(BLOCK).discard_socket();
        let daemon = Daemon::start(daemon_binary(), options).unwrap();
        let machine = Machine::start(MachineOptions {
            socket: daemon.socket(),
            discard_socket: Some(daemon.discard_socket()),
            addr: ADDR,
            region_size: REGION,
            incoming: false,
            paused: false,
            compat_level: None,
        });
        let machine = machine.unwrap();
        let stream = UnixStream::connect(daemon.discard_socket()).unwrap();
        let manager = RemoteRamDiscardManager::attach(stream, PATIENCE).unwrap();
        let dma = DmaMappings::new(machine.ram().clone(), ADDR, manager.granularity(), limit);
        manager.register(section(0, REGION / BLOCK), dma.listener()).unwrap();
        Self { dma, manager, machine, daemon }
    }

    fn resize(&self, blocks: u64) {
        assert!(self.daemon.api().resize(blocks * BLOCK).unwrap().is_success());
    }

    fn settle(&self, blocks: u64) {
        self.resize(blocks);
        self.machine.settle(blocks * BLOCK).unwrap();
        assert_eq!(self.dma.mapped(), offsets(0..blocks));
        assert_eq!(self.dma.faults(), Vec::<String>::new());
        let rest = ADDR + blocks * BLOCK..ADDR + REGION;
        assert_eq!(self.machine.ram().resident_bytes(rest).unwrap(), 0);
    }
}

#[test]
fn through_the_channel_every_plugged_block_is_mapped_and_none_that_is_discarded() {
    let remote = Remote::new(NO_LIMIT);
    for blocks in [16, 5, 40, 0, 7] {
        remote.settle(blocks);
    }
    // What a system reset unplugs is unmapped first, in one piece or many.
    let reset = || {
        assert!(remote.daemon.api().system_reset()?.is_success());
        Ok(())
    };
    remote.machine.reboot(reset).unwrap();
    remote.machine.settle(7 * BLOCK).unwrap();
    assert_eq!(remote.dma.mapped(), offsets(0..7));
    assert_eq!(remote.dma.faults(), Vec::<String>::new());
    assert!(remote.manager.lost().is_none());
}

#[test]
fn through_the_channel_a_plug_beyond_the_limit_is_busy_until_there_is_room() {
    let remote = Remote::new(20);
    remote.settle(12);
    remote.resize(24);
    let start = Instant::now();
    while remote.machine.with_driver(|driver| driver.answers().busy) == 0 {
        assert!(start.elapsed() < PATIENCE, "no plug was refused");
        thread::sleep(Duration::from_millis(2));
    }
    assert_eq!(remote.dma.mapped(), offsets(0..12));
    assert_eq!(remote.daemon.api().device().unwrap()["plugged_size"], 12 * BLOCK);
    remote.settle(20);
    remote.settle(3);
}
