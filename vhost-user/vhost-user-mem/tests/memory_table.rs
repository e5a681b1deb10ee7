//! What the daemon takes as guest memory, dirty log and device state, what it refuses, and that it
//! says why.

mod common;

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout, memfd};
use small_vmm::protocol::{self, MemoryRegion, Request, feature};

use common::{ADDR, BOOT, REGION, RING, gpa, options, ram};

const PAGE: u64 = 4096;
const LOG_SIZE: u64 = (ADDR + REGION) / PAGE / 8;
const PLAIN: u64 = feature::VERSION_1 | feature::PROTOCOL_FEATURES;

fn frontend(daemon: &Daemon) -> Frontend {
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend
}

fn assert_logged(daemon: &Daemon, text: &str) {
    assert!(daemon.wait_logged(text, common::PATIENCE), "{text:?} is not in {}", daemon.stderr());
}

/// A file of the size of the boot memory, and where it is.
fn file_in(dir: &str) -> File {
    let file = tempfile::tempfile_in(dir).unwrap();
    file.set_len(BOOT).unwrap();
    file
}

fn on_disk() -> File {
    let file = file_in(env!("CARGO_TARGET_TMPDIR"));
    assert!(rustix::fs::fcntl_get_seals(&file).is_err(), "the build directory is in memory");
    file
}

fn boot(file: File) -> GuestRam {
    GuestRam::new(Layout::new().file(0, BOOT, file, 0)).unwrap()
}

#[test]
fn the_same_regions_in_any_order_are_taken_while_the_ring_runs_and_stay_logged() {
    let daemon = common::daemon(options());
    let ram = ram();
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(PLAIN, USUAL_PROTOCOL_FEATURES).unwrap();
    let mut regions = ram.regions().to_vec();
    for region in &regions {
        frontend.add_mem_region(&ram, region).unwrap();
    }
    let log = memfd("log", LOG_SIZE, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    frontend.set_log_base(&log, LOG_SIZE, 0).unwrap();
    frontend.set_features(PLAIN | feature::LOG_ALL).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, false).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    for _ in 0..2 {
        regions.reverse();
        frontend.set_mem_table_of(&ram, &regions).unwrap();
        let used = driver.ring().used_addr() / PAGE;
        log.write_all_at(&[0], used / 8).unwrap();
        assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
        let mut byte = [0];
        log.read_exact_at(&mut byte, used / 8).unwrap();
        assert_eq!(byte[0] >> (used % 8) & 1, 1, "the answer is not marked");
    }
}

#[test]
fn memory_that_is_refused_has_its_reason_in_the_log() {
    let daemon = common::daemon(options());
    let file = memfd("memory", BOOT, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let name = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
    let read_only = File::open(name).unwrap();
    let (pipe, _kept) = std::io::pipe().unwrap();
    let directory = File::open("/").unwrap();
    let good = MemoryRegion { guest_addr: 0x1000, size: 0x2000, user_addr: 0, mmap_offset: 0 };
    let not_memory = "neither a memfd nor on tmpfs or hugetlbfs";
    let cases: [(MemoryRegion, BorrowedFd<'_>, &str); 10] = [
        (MemoryRegion { size: 0, ..good }, file.as_fd(), "at 0x1000 of 0x0 bytes: a size of 0"),
        (MemoryRegion { mmap_offset: 512, ..good }, file.as_fd(), "its offset 0x200 in the file"),
        (MemoryRegion { guest_addr: u64::MAX, ..good }, file.as_fd(), "guest-physical addresses"),
        (MemoryRegion { user_addr: u64::MAX, ..good }, file.as_fd(), "all user addresses"),
        (MemoryRegion { guest_addr: 0x2000, ..good }, file.as_fd(), "overlaps a region at 0x0 of"),
        (MemoryRegion { size: BOOT + PAGE, ..good }, file.as_fd(), "bytes instead of 0x1001000"),
        (MemoryRegion { mmap_offset: BOOT, ..good }, file.as_fd(), "bytes instead of 0x1002000"),
        (good, read_only.as_fd(), "Permission denied"),
        (good, pipe.as_fd(), not_memory),
        (good, directory.as_fd(), not_memory),
    ];
    for (region, fd, reason) in cases {
        let frontend = frontend(&daemon);
        if region.guest_addr == 0x2000 {
            let first = MemoryRegion { guest_addr: 0, size: 0x3000, ..good };
            let payload = protocol::single_mem_region(first);
            frontend.request(Request::AddMemReg, &payload, &[file.as_fd()]).unwrap();
        }
        let add = protocol::single_mem_region(region);
        assert!(frontend.request(Request::AddMemReg, &add, &[fd]).is_err(), "{reason}");
        assert_logged(&daemon, reason);
    }
}

#[test]
fn a_memory_table_with_a_region_past_the_end_of_its_file_is_refused_wherever_it_stands() {
    let daemon = common::daemon(options());
    let file = |size| memfd("memory", size, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    let (short, long) = (file(BOOT), file(BOOT + PAGE));
    let region = |guest_addr| MemoryRegion {
        guest_addr,
        size: BOOT,
        user_addr: guest_addr,
        mmap_offset: PAGE,
    };
    // In either order of addresses, which is not that of the message.
    for (first, second) in [(region(0), region(1 << 30)), (region(1 << 30), region(0))] {
        for (fds, wrong) in [([&short, &long], first), ([&long, &short], second)] {
            let front_end = frontend(&daemon);
            let table = protocol::mem_table(&[first, second]);
            let fds = fds.map(|file| file.as_fd());
            assert!(front_end.request(Request::SetMemTable, &table, &fds).is_err());
            let found = format!("{BOOT:#x} bytes instead of {:#x}", BOOT + PAGE);
            assert_logged(
                &daemon,
                &format!(
                    "SET_MEM_TABLE with a region at {:#x} of {BOOT:#x} bytes: its file has {found}",
                    wrong.guest_addr
                ),
            );
        }
        let table = protocol::mem_table(&[first, second]);
        let fds = [long.as_fd(), long.as_fd()];
        frontend(&daemon).request(Request::SetMemTable, &table, &fds).unwrap();
    }
}

#[test]
fn a_region_is_removed_by_its_addresses_and_its_size() {
    let daemon = common::daemon(options());
    let ram = ram();
    let device = ram.region(ADDR).unwrap();
    let user_addr = ram.user_addr(ADDR).unwrap();
    let good = MemoryRegion { guest_addr: ADDR, size: REGION, user_addr, mmap_offset: 0 };
    for (region, reason) in [
        (MemoryRegion { user_addr: user_addr + 0x1000, ..good }, "instead of a region at 0x140000"),
        (MemoryRegion { size: REGION / 2, ..good }, "of 0x20000000 bytes at user address"),
        (MemoryRegion { guest_addr: 0x7000_0000, ..good }, "which was never added"),
    ] {
        let (frontend, _channel, _driver) = common::connect(&daemon, &ram);
        let remove = protocol::single_mem_region(region);
        assert!(frontend.request(Request::RemMemReg, &remove, &[]).is_err(), "{reason}");
        assert_logged(&daemon, reason);
    }
    let (frontend, _channel, mut driver) = common::connect(&daemon, &ram);
    // Where it starts in its file does not identify it.
    let remove = protocol::single_mem_region(MemoryRegion { mmap_offset: 0x1000, ..good });
    frontend.request(Request::RemMemReg, &remove, &[]).unwrap();
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
    frontend.add_mem_region(&ram, device).unwrap();
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
}

#[test]
fn rings_are_refused_in_memory_that_is_not_plugged_or_not_there_with_the_reason() {
    let daemon = common::daemon(options());
    let ram = ram();
    let (frontend, _channel, _driver) = common::connect(&daemon, &ram);
    let in_region = MemDriver::at(&ram, gpa(1), 128, true).unwrap();
    frontend.get_vring_base(0).unwrap();
    assert!(frontend.set_vring_addr(0, in_region.ring(), None).is_err());
    assert_logged(&daemon, "in memory of the device that is not plugged: is --addr right?");
    let (frontend, _channel, mut driver) = common::connect(&daemon, &ram);
    assert_eq!(driver.plug(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
    frontend.get_vring_base(0).unwrap();
    let mut in_region = MemDriver::at(&ram, gpa(1), 128, true).unwrap();
    frontend.start_ring(0, in_region.ring()).unwrap();
    assert_eq!(in_region.state(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
    let nowhere = protocol::vring_addr(0, 0, 16, 32, 64, 0);
    assert!(frontend.request(Request::SetVringAddr, &nowhere, &[]).is_err());
    assert_logged(&daemon, "user address 0x10, which is in no memory region");
}

/// Any file system may be served by the front-end itself, and then never answer.
#[test]
fn files_that_are_not_memory_are_refused_unless_they_are_allowed() {
    let daemon = common::daemon(options());
    let front_end = frontend(&daemon);
    front_end.set_mem_table(&boot(file_in("/dev/shm"))).unwrap();
    assert!(front_end.set_mem_table(&boot(on_disk())).is_err());
    assert_logged(&daemon, "SET_MEM_TABLE with a file that is neither a memfd nor on tmpfs");

    let front_end = frontend(&daemon);
    front_end.set_mem_table(&ram()).unwrap();
    let log = on_disk();
    assert!(front_end.set_log_base(&log, LOG_SIZE, 0).is_err());
    assert_logged(&daemon, "SET_LOG_BASE with a file that is neither a memfd nor on tmpfs");

    let front_end = frontend(&daemon);
    let state = on_disk();
    assert_eq!(front_end.set_device_state_fd(false, state.as_fd()).unwrap().0, 0x101);
    assert_logged(&daemon, "device state cannot be transferred by a file that is neither");
    let in_memory = memfd("state", 0, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert_ne!(front_end.set_device_state_fd(false, in_memory.as_fd()).unwrap().0, 0x101);
    assert_eq!(front_end.check_device_state().unwrap(), 0);
    front_end.disconnect();

    let daemon = common::daemon(options().arg("--allow-file-memory"));
    let front_end = frontend(&daemon);
    let memory = Arc::new(boot(on_disk()));
    front_end.set_mem_table(&memory).unwrap();
    front_end.set_log_base(&log, LOG_SIZE, 0).unwrap();
    let mut driver = MemDriver::at(&memory, RING, 128, true).unwrap();
    front_end.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    front_end.get_vring_base(0).unwrap();
    assert_ne!(front_end.set_device_state_fd(false, state.as_fd()).unwrap().0, 0x101);
    assert_eq!(front_end.check_device_state().unwrap(), 0);
}

#[test]
fn logs_that_are_refused_have_their_reason_in_the_log() {
    let daemon = common::daemon(options());
    let log = memfd("log", LOG_SIZE, rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    for (size, offset, reason) in [
        (LOG_SIZE / 2, 100, "bytes at 0x64: the offset is to be a page's"),
        (0, 0, "a log of 0 bytes"),
        (LOG_SIZE, PAGE, "a log that ends past its file"),
        (PAGE, 0, "could not handle SET_LOG_BASE and closed the connection: "),
    ] {
        let frontend = frontend(&daemon);
        frontend.set_mem_table(&ram()).unwrap();
        assert!(frontend.set_log_base(&log, size, offset).is_err(), "{reason}");
        assert_logged(&daemon, reason);
    }
}
