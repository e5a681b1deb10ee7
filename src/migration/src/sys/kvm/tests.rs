//! A bare-metal guest of two instructions, tracked by its dirty log.

use super::*;
use crate::channel::Channel;
use crate::devices::NoDevices;
use crate::dirty::{
    DirtyTracker, KvmDirtyLog, LoggedRange, Merged, NeverWritten, VhostLog, WriteProtect,
};
use crate::page_bitmap::{PageBitmap, bytes_of};
use crate::precopy;
use crate::progress::Progress;
use crate::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
use crate::stream::Configuration;
use crate::test_support::{memfd, migration_block};
use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd, VmFd};
use ram_discard::ByteRange;
use ram_discard::memory::{HostMapping, RamBlock};
use std::fs::File;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

const PAGE: u64 = 4096;
/// Pages of the slot. Not a multiple of 64, so that the end of its log is one as well.
const PAGES: u64 = 200;
/// The page of the block at which the slot's memory starts.
const SLOT_AT: u64 = 37;
const BLOCK_PAGES: u64 = 300;
const GUEST_ADDR: u64 = 0;
const CODE: u64 = 0x1000;
/// `mov [0], al; hlt; jmp` back, in 16 bits.
const PROGRAM: [u8; 6] = [0xa2, 0x00, 0x00, 0xf4, 0xeb, 0xfa];

struct Guest {
    vcpu: VcpuFd,
    vm: VmFd,
    file: File,
    mapping: Arc<HostMapping>,
}

impl Guest {
    /// `None`, having said why, on a machine that runs no guests.
    fn new() -> Option<Self> {
        let guest = Self::create();
        let works = guest.and_then(|mut guest| {
            guest.write(3)?;
            Ok(guest)
        });
        works.inspect_err(|error| eprintln!("skipped, no KVM guest: {error}")).ok()
    }

    fn create() -> Result<Self, kvm_ioctls::Error> {
        let file = rustix::fs::memfd_create("kvm-test", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(BLOCK_PAGES * PAGE).unwrap();
        let mapping = Arc::new(HostMapping::map(&file, 0, BLOCK_PAGES * PAGE).unwrap());
        let vm = Kvm::new()?.create_vm()?;
        let region = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: GUEST_ADDR,
            memory_size: PAGES * PAGE,
            userspace_addr: mapping.addr() as u64 + SLOT_AT * PAGE,
        };
        // SAFETY: the mapping outlives the VM, and nothing else uses its memory.
        unsafe { vm.set_user_memory_region(region) }?;
        mapping.write(SLOT_AT * PAGE + CODE, &PROGRAM);
        let vcpu = vm.create_vcpu(0)?;
        let mut sregs = vcpu.get_sregs()?;
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        vcpu.set_sregs(&sregs)?;
        let mut regs = vcpu.get_regs()?;
        (regs.rip, regs.rflags) = (CODE, 2);
        vcpu.set_regs(&regs)?;
        Ok(Self { vcpu, vm, file, mapping })
    }

    /// Has the guest write a byte to a page of the slot, and looks that it did.
    fn write(&mut self, page: u64) -> Result<(), kvm_ioctls::Error> {
        let mut sregs = self.vcpu.get_sregs()?;
        sregs.ds.base = GUEST_ADDR + page * PAGE;
        self.vcpu.set_sregs(&sregs)?;
        let mut regs = self.vcpu.get_regs()?;
        regs.rax = regs.rax % 255 + 1;
        self.vcpu.set_regs(&regs)?;
        let exit = self.vcpu.run()?;
        assert!(matches!(exit, VcpuExit::Hlt), "{exit:?}");
        let mut byte = [0];
        self.mapping.read((SLOT_AT + page) * PAGE, &mut byte);
        if u64::from(byte[0]) == regs.rax { Ok(()) } else { Err(kvm_ioctls::Error::new(libc::EIO)) }
    }

    fn vm(&self) -> OwnedFd {
        // SAFETY: the VM is open while it is borrowed.
        let vm = unsafe { BorrowedFd::borrow_raw(self.vm.as_raw_fd()) };
        vm.try_clone_to_owned().unwrap()
    }

    fn slot(&self) -> KvmSlot {
        let range = GpaRange::new(GUEST_ADDR, PAGES * PAGE).unwrap();
        // SAFETY: the slot was set with these values and is never changed.
        unsafe { KvmSlot::new(0, 0, range, self.mapping.addr() as u64 + SLOT_AT * PAGE) }
    }

    fn tracker(&self) -> KvmDirtyLog {
        let slots = vec![(self.slot(), SLOT_AT * PAGE)];
        KvmDirtyLog::new(self.vm(), BLOCK_PAGES * PAGE, slots).unwrap()
    }
}

/// The pages of the slot that are reported.
fn dirty_pages(tracker: &mut dyn DirtyTracker) -> Vec<u64> {
    let mut dirty = PageBitmap::new(BLOCK_PAGES);
    tracker.sync(&mut dirty).unwrap();
    dirty.runs(0..BLOCK_PAGES).flatten().map(|page| page - SLOT_AT).collect()
}

fn pages(from: u64, to: u64) -> ByteRange {
    bytes_of(SLOT_AT + from..SLOT_AT + to)
}

#[test]
fn pages_that_a_guest_writes_are_reported_until_they_are_cleared() {
    let Some(mut guest) = Guest::new() else { return };
    let mut tracker = guest.tracker();
    guest.write(4).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [0; 0], "nothing is reported before the start");
    tracker.start(&[]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [0; 0]);
    for page in [5, 64, PAGES - 1] {
        guest.write(page).unwrap();
    }
    assert_eq!(dirty_pages(&mut tracker), [5, 64, PAGES - 1]);
    assert_eq!(dirty_pages(&mut tracker), [5, 64, PAGES - 1]);
    // Written since the last sync: not to be forgotten along.
    guest.write(6).unwrap();
    tracker.clear(pages(5, 6)).unwrap();
    assert!(dirty_pages(&mut tracker).contains(&6));
    tracker.clear(pages(0, PAGES)).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [0; 0]);
    guest.write(5).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [5]);
    tracker.stop().unwrap();
    tracker.start(&[]).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [0; 0]);
    guest.write(5).unwrap();
    assert_eq!(dirty_pages(&mut tracker), [5]);
}

/// The guest writes at random while pages are copied as the engine does it.
#[test]
fn no_write_of_a_guest_is_lost() {
    let Some(mut guest) = Guest::new() else { return };
    let mapping = Arc::clone(&guest.mapping);
    let trackers: [Box<dyn DirtyTracker>; 2] = [
        Box::new(guest.tracker()),
        // What KVM writes for the guest, it writes through this process's page tables.
        Box::new(Merged::new(vec![
            Box::new(NeverWritten),
            Box::new(WriteProtect::new(Arc::clone(&mapping), None).unwrap()),
        ])),
    ];
    for mut tracker in trackers {
        if let Err(error) = tracker.start(&[bytes_of(0..BLOCK_PAGES)]) {
            eprintln!("skipped: {error}");
            continue;
        }
        let mut copy = vec![0; (BLOCK_PAGES * PAGE) as usize];
        mapping.read(0, &mut copy);
        let mut dirty = PageBitmap::new(BLOCK_PAGES);
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        for round in 0..=400 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let last = round == 400;
            if seed & 3 == 0 || last {
                tracker.sync(&mut dirty).unwrap();
            }
            // A few pages at a time, so that syncs and writes fall between them.
            let mut sent = 0;
            while let Some(run) = dirty.next_run(0, BLOCK_PAGES, 2).filter(|_| sent < 3 || last) {
                dirty.clear_range(run.clone());
                tracker.clear(bytes_of(run.clone())).unwrap();
                let bytes = (run.start * PAGE) as usize..(run.end * PAGE) as usize;
                mapping.read(run.start * PAGE, &mut copy[bytes]);
                sent += 1;
            }
            if !last {
                guest.write(2 + (seed >> 8) % (PAGES - 2)).unwrap();
            }
        }
        tracker.stop().unwrap();
        let mut now = vec![0; copy.len()];
        mapping.read(0, &mut now);
        assert!(now == copy, "a write was missed");
    }
}

#[test]
fn slots_that_are_not_in_the_block_are_refused() {
    let Some(guest) = Guest::new() else { return };
    for (len, at) in [(PAGES * PAGE, PAGE), (BLOCK_PAGES * PAGE, 1), (u64::MAX, u64::MAX)] {
        let slots = vec![(guest.slot(), at)];
        assert!(KvmDirtyLog::new(guest.vm(), len, slots).is_err());
    }
}

#[test]
fn what_is_no_vm_is_an_error() {
    let file = File::open("/dev/null").unwrap();
    assert!(enable_manual_protect(&file).is_err());
    let range = GpaRange::new(0, PAGE).unwrap();
    // SAFETY: there is no VM that it could be used with.
    let slot = unsafe { KvmSlot::new(0, 0, range, 0) };
    let mut tracker = KvmDirtyLog::new(file.into(), PAGE, vec![(slot, 0)]).unwrap();
    assert!(tracker.start(&[]).is_err());
    tracker.sync(&mut PageBitmap::new(1)).unwrap();
}

/// The guest while it migrates: its vCPU and its VMM keep writing until it is stopped.
struct Running {
    stop: Arc<AtomicBool>,
    writer: Mutex<Option<JoinHandle<()>>>,
}

impl Running {
    fn start(mut guest: Guest, log: Arc<HostMapping>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let stopping = Arc::clone(&stop);
        let writer = std::thread::spawn(move || {
            let mut round = 0u64;
            loop {
                // Pages that the first pass may be through with when they are written last.
                let last = stopping.load(Ordering::Acquire);
                for page in [2 + round % (PAGES - 2), 5, 64, PAGES - 1] {
                    guest.write(page).unwrap();
                }
                // The VMM writes beside the slot, and says so.
                let page = round % SLOT_AT;
                guest.mapping.write(page * PAGE, &(round + 1).to_le_bytes());
                VhostLog::mark(&log, bytes_of(page..page + 1).gpa(0).unwrap()).unwrap();
                round += 1;
                if last {
                    return;
                }
            }
        });
        Self { stop, writer: Mutex::new(Some(writer)) }
    }
}

impl precopy::Guest for Running {
    fn stop(&self) -> Result<(), String> {
        self.stop.store(true, Ordering::Release);
        let writer = self.writer.lock().unwrap().take().expect("it is stopped once");
        writer.join().map_err(|_| "the vCPU failed".to_owned())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

/// A destination that only takes the guest.
struct Taken;

impl precopy::Guest for Taken {
    fn stop(&self) -> Result<(), String> {
        Err("it does not run".to_owned())
    }

    fn run(&self) -> Result<(), String> {
        Ok(())
    }
}

fn all_bytes(mapping: &HostMapping) -> Vec<u8> {
    let mut bytes = vec![0; (BLOCK_PAGES * PAGE) as usize];
    mapping.read(0, &mut bytes);
    bytes
}

#[test]
fn a_guest_that_writes_while_it_migrates_by_kvms_log_arrives_whole() {
    let Some(guest) = Guest::new() else { return };
    let size = BLOCK_PAGES * PAGE;
    let ram = RamBlock::new("ram".into(), 0, size, guest.file.try_clone().unwrap(), 0).unwrap();
    let mapping = Arc::clone(&guest.mapping);
    let block =
        MigrationBlock::new(Arc::new(ram), Arc::clone(&mapping), BlockOptions::migratable());
    let mut blocks = RamBlocks::new();
    blocks.register(Arc::new(block.unwrap())).unwrap();
    let there = memfd(size);
    let arrived = migration_block("ram", &there, size, BlockOptions::migratable());
    let arrived_at = Arc::clone(arrived.mapping());
    let mut blocks_there = RamBlocks::new();
    blocks_there.register(Arc::new(arrived)).unwrap();

    let log = Arc::new(HostMapping::map(&memfd(PAGE), 0, PAGE).unwrap());
    let logged = LoggedRange { guest_addr: 0, range: bytes_of(0..BLOCK_PAGES) };
    let mut trackers: Option<Box<dyn DirtyTracker>> = Some(Box::new(Merged::new(vec![
        Box::new(guest.tracker()),
        Box::new(VhostLog::new(Arc::clone(&log), vec![logged]).unwrap()),
    ])));
    let progress = Arc::new(Progress::new());
    let ram = RamSave::new(&blocks, ListOptions::default(), Arc::clone(&progress), |_| {
        trackers.take().expect("there is one block")
    });
    let (near, far) = UnixStream::pair().unwrap();
    let receiving = std::thread::spawn(move || {
        let progress = Arc::new(Progress::new());
        let blocks = Arc::new(blocks_there);
        let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
        let incoming = precopy::Incoming {
            configuration: Configuration::new("kvm"),
            guest: &Taken,
            handlers: vec![Box::new(ram)],
            devices: &mut NoDevices,
            postcopy: None,
            progress: Arc::clone(&progress),
        };
        incoming.run(Channel::new(far, progress).unwrap())
    });
    let running = Running::start(guest, log);
    let outgoing = precopy::Outgoing {
        parameters: precopy::Parameters::new(Configuration::new("kvm")),
        guest: &running,
        handlers: vec![Box::new(ram.unwrap())],
        devices: &mut NoDevices,
        postcopy: None,
        progress: Arc::clone(&progress),
    };
    outgoing.run(Channel::new(near, progress).unwrap()).unwrap();
    receiving.join().unwrap().unwrap();
    let (source, destination) = (all_bytes(&mapping), all_bytes(&arrived_at));
    let differs = (0..BLOCK_PAGES as usize)
        .filter(|page| source[page * 4096..][..4096] != destination[page * 4096..][..4096]);
    assert_eq!(differs.collect::<Vec<_>>(), [0; 0]);
}
