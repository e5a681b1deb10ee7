//! A guest that plugs and unplugs while its memory still arrives: the VMM's engine, which brings the memory, follows the
//! daemon's block state over the discard channel.

mod common;

use std::fs::File;
use std::sync::Arc;
use std::time::{Duration, Instant};

use common::discard_channel::{attach, section, wait_logged};
use common::page_source::Loud;
use common::{ADDR, BLOCK, PATIENCE, RING, gpa, options};
use migration::lazy::{SharedFaults, SharedRange};
use migration::ram::{BlockOptions, MigrationBlock, RamBlocks};
use migration::snapshot::{self, FileIo, LazyRestore, Restore, StoppedGuest};
use migration::stream::Configuration;
use migration::{NoDevices, Progress};
use ram_discard::memory::RamBlock;
use ram_discard::test_utils::{Calls, Recorder};
use ram_discard::{FreezeFor, MemoryState, RamDiscardManager, Section};
use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::GuestRam;
use small_vmm::protocol::{Request, protocol_feature};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

const PAGE: u64 = 4096;
const PROTOCOL: u64 = USUAL_PROTOCOL_FEATURES | protocol_feature::PAGEFAULT;
/// Blocks that the guest has plugged, and written in full, when it comes.
const PLUGGED: u64 = 4;
/// What the daemon logs when the client is gone that follows.
const FROZEN: &str = "no block is plugged until all has";

/// A guest that runs, all of whose plugged memory is outstanding: it is read from a file as it is touched.
struct Arriving {
    daemon: Daemon,
    ram: Arc<GuestRam>,
    frontend: Frontend,
    driver: MemDriver,
    manager: Arc<RemoteRamDiscardManager>,
    restored: LazyRestore,
    _faults: SharedFaults,
}

fn blocks(ram: &GuestRam, manager: Option<&Arc<RemoteRamDiscardManager>>) -> RamBlocks {
    let mut blocks = RamBlocks::new();
    for (id, at) in [("boot", 0), ("vmem0", ADDR)] {
        let region = ram.region(at).unwrap();
        let file = region.file.try_clone().unwrap();
        let block = RamBlock::new(id.to_owned(), at, region.size, file, region.offset).unwrap();
        let mapping = ram.mapping(at).unwrap();
        let block = MigrationBlock::new(Arc::new(block), mapping, BlockOptions::migratable());
        let block = block.unwrap();
        if let Some(manager) = manager.filter(|_| at == ADDR) {
            block.set_discard_manager(0, Arc::clone(manager) as Arc<_>).unwrap();
        }
        blocks.register(Arc::new(block)).unwrap();
    }
    blocks
}

/// An image of a guest with stamps all over its plugged memory.
fn image() -> Arc<File> {
    let ram = common::ram();
    ram.write_stamps(gpa(0)..gpa(PLUGGED), 1).unwrap();
    let file = tempfile::tempfile().unwrap();
    let guest = StoppedGuest {
        configuration: Configuration::new("test"),
        blocks: &blocks(&ram, None),
        devices: &mut NoDevices,
        io: FileIo::default(),
        progress: Arc::new(Progress::new()),
    };
    snapshot::save(guest, &file).unwrap();
    Arc::new(file)
}

/// The guest runs; its block state is not followed yet. `None` where the tests cannot run; says why.
fn arriving() -> Option<Arriving> {
    let image = image();
    let daemon = common::daemon(options().arg("--postcopy").discard_socket());
    let ram = common::ram();
    let manager = Arc::new(attach(&daemon));
    manager.follow_source(section(0, PLUGGED), MemoryState::Populated).unwrap();
    let progress = Arc::new(Progress::new());
    // Nothing is read that is not touched.
    progress.cancel();
    let restore = Restore {
        configuration: Configuration::new("test"),
        blocks: Arc::new(blocks(&ram, Some(&manager))),
        devices: &mut NoDevices,
        io: FileIo::default(),
        progress,
    };
    let restored = match snapshot::restore_lazily(restore, image, Arc::new(Loud)) {
        Ok(restored) => restored,
        Err(error) => {
            eprintln!("skipped: no postcopy in this environment: {error}");
            return None;
        }
    };
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let agreed = frontend.negotiate(USUAL_FEATURES, PROTOCOL).unwrap();
    assert_ne!(agreed.protocol & protocol_feature::PAGEFAULT, 0, "{}", daemon.stderr());
    let userfaultfd = frontend.postcopy_advise().unwrap().unwrap();
    let memory = Arc::clone(restored.memory());
    frontend.postcopy_listen().unwrap();
    let faults = SharedFaults::start(Arc::clone(&memory), userfaultfd, Arc::new(Loud)).unwrap();
    let mapped = frontend.set_mem_table_postcopy(&ram).unwrap();
    let ranges = mapped.iter().map(|entry| {
        let block = memory.find(if entry.guest_addr == ADDR { "vmem0" } else { "boot" }).unwrap();
        SharedRange { address: entry.user_addr, len: entry.size, block, offset: 0 }
    });
    faults.set_ranges(ranges.collect()).unwrap();
    frontend.confirm_memory(Request::SetMemTable).unwrap();
    let driver = MemDriver::at(&ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    Some(Arriving { daemon, ram, frontend, driver, manager, restored, _faults: faults })
}

impl Drop for Arriving {
    fn drop(&mut self) {
        // No guest runs on what never arrives.
        self.restored.memory().abandon();
    }
}

impl Arriving {
    fn plug(&mut self, block: u64, nb_blocks: u16) -> ResponseType {
        self.driver.plug(gpa(block), nb_blocks).unwrap().kind()
    }

    fn unplug(&mut self, block: u64, nb_blocks: u16) -> ResponseType {
        self.driver.unplug(gpa(block), nb_blocks).unwrap().kind()
    }

    fn resident(&self, first: u64, end: u64) -> u64 {
        self.ram.resident_bytes(gpa(first)..gpa(end)).unwrap()
    }

    /// As the guest reads it, through the VMM's mapping.
    fn byte(&self, block: u64, offset: u64) -> u8 {
        let mut byte = [0];
        self.ram.mapping(ADDR).unwrap().read(block * BLOCK + offset, &mut byte);
        byte[0]
    }

    fn is_frozen(&self) -> bool {
        self.daemon.api().device().unwrap()["migration_active"] == true
    }

    /// The rest is read, as it is touched, and the daemon told of the end.
    fn arrive(&self) {
        let mapping = self.ram.mapping(ADDR).unwrap();
        for page in 0..PLUGGED * BLOCK / PAGE {
            mapping.read(page * PAGE, &mut [0]);
        }
        assert_eq!(self.restored.outstanding(), 0);
        self.restored.wait().unwrap();
        assert_eq!(self.frontend.postcopy_end().unwrap(), 0);
    }

    fn assert_stamped(&self, first: u64, end: u64) {
        assert_eq!(self.ram.find_wrong_stamp(gpa(first)..gpa(end), 1).unwrap(), None);
    }
}

#[test]
fn what_is_plugged_is_zeros_and_what_is_unplugged_never_arrives() {
    let Some(mut guest) = arriving() else { return };
    assert_eq!(guest.plug(PLUGGED, 1), ResponseType::Busy, "it is not followed yet");
    guest.restored.follow().unwrap();
    assert!(!guest.is_frozen());
    let all = guest.restored.outstanding();
    assert_eq!(all, PLUGGED * BLOCK / PAGE);
    assert_eq!(guest.plug(PLUGGED, 2), ResponseType::Ack);
    assert_eq!(guest.unplug(1, 2), ResponseType::Ack);
    assert_eq!(guest.restored.outstanding(), all / 2);
    assert_eq!(guest.plug(1, 1), ResponseType::Ack);
    // The file is not read for what is plugged, though it has pages for it.
    assert_eq!([(1, 0), (1, BLOCK - 1), (PLUGGED, 5)].map(|(b, at)| guest.byte(b, at)), [0; 3]);
    guest.ram.mapping(ADDR).unwrap().write(BLOCK, &[0x77; PAGE as usize]);
    guest.ram.mapping(ADDR).unwrap().write(PLUGGED * BLOCK, &[0x55; PAGE as usize]);
    guest.assert_stamped(0, 1);
    guest.arrive();
    guest.assert_stamped(0, 1);
    guest.assert_stamped(3, 4);
    assert_eq!((guest.byte(1, 9), guest.byte(PLUGGED, 9)), (0x77, 0x55));
    assert_eq!(guest.resident(2, 3), 0);
    let plugged = guest.manager.words().unwrap()[0];
    assert_eq!(plugged, 0b11_1011);
    assert_eq!(guest.unplug(0, 1), ResponseType::Ack);
    assert_eq!(guest.resident(0, 1), 0);
}

#[test]
fn without_a_client_that_follows_no_block_is_plugged_until_all_has_arrived() {
    let Some(mut guest) = arriving() else { return };
    let calls = Calls::default();
    let client = attach(&guest.daemon);
    let frozen = client.freeze(FreezeFor::Destination).unwrap();
    let followed = frozen.follow(Recorder::boxed("copy", &calls)).unwrap();
    assert_eq!(guest.plug(PLUGGED, 1), ResponseType::Ack);
    assert_eq!(*calls.lock(), [("copy", true, section(PLUGGED, PLUGGED + 1))]);
    // There is one at a time.
    let second = guest.manager.freeze(FreezeFor::Destination).unwrap();
    let refused = second.follow(Recorder::boxed("other", &calls)).unwrap_err();
    assert!(refused.to_string().contains("another client"), "{refused}");
    drop((refused, followed, client));
    wait_logged(&guest.daemon, FROZEN);
    assert!(guest.is_frozen());
    assert_eq!(guest.plug(PLUGGED + 1, 1), ResponseType::Busy);
    assert_eq!(guest.unplug(0, 1), ResponseType::Busy);
    // Another one may follow from there on.
    guest.restored.follow().unwrap();
    assert_eq!(guest.plug(PLUGGED + 1, 1), ResponseType::Ack);
    assert_eq!(guest.unplug(0, 1), ResponseType::Ack);
    guest.arrive();
    guest.assert_stamped(1, PLUGGED);
    assert_eq!(guest.resident(0, 1), 0);
    // From here on the client's word is not needed.
    assert_eq!(guest.plug(PLUGGED + 2, 1), ResponseType::Ack, "{}", guest.daemon.stderr());
    assert!(!guest.is_frozen());
}

/// A listener that is silent for longer than the channel waits.
struct Slow;

impl ram_discard::RamDiscardListener for Slow {
    fn name(&self) -> &str {
        "slow"
    }

    fn notify_populate(&mut self, _: Section) -> Result<(), String> {
        std::thread::sleep(Duration::from_secs(3));
        Ok(())
    }

    fn notify_discard(&mut self, _: Section) {}
}

#[test]
fn a_client_that_follows_and_does_not_answer_makes_the_request_busy() {
    let Some(mut guest) = arriving() else { return };
    let client = attach(&guest.daemon);
    let frozen = client.freeze(FreezeFor::Destination).unwrap();
    let _followed = frozen.follow(Box::new(Slow)).unwrap();
    assert_eq!(guest.plug(PLUGGED, 1), ResponseType::Busy);
    wait_logged(&guest.daemon, FROZEN);
    assert_eq!(guest.plug(PLUGGED, 1), ResponseType::Busy);
    assert_eq!(guest.manager.words().unwrap()[0], 0b1111);
    guest.arrive();
    let deadline = Instant::now() + PATIENCE;
    while guest.plug(PLUGGED, 1) != ResponseType::Ack {
        assert!(Instant::now() < deadline, "{}", guest.daemon.stderr());
    }
    guest.assert_stamped(0, PLUGGED);
}

#[test]
fn pages_that_come_for_what_was_unplugged_unseen_are_discarded_in_the_end() {
    let Some(mut guest) = arriving() else { return };
    // A client says that it follows, and what brings the memory does not.
    let client = attach(&guest.daemon);
    let frozen = client.freeze(FreezeFor::Destination).unwrap();
    let _followed = frozen.follow(Recorder::boxed("copy", &Calls::default())).unwrap();
    assert_eq!(guest.unplug(1, 1), ResponseType::Ack);
    guest.arrive();
    assert_eq!(guest.resident(1, 2), 0);
    guest.assert_stamped(2, PLUGGED);
}
