//! Postcopy between processes: the daemon misses pages of rings and buffers, the front-end brings
//! them, or does not.

mod common;

use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use common::page_source::{Loud, Source};
use common::{ADDR, BLOCK, BOOT, PATIENCE, REGION, RING, gpa, options};
use migration::lazy::{FaultHandler, LazyRam, PageSource, SharedFaults, SharedRange};
use migration::page_bitmap::PageBitmap;
use migration::ram::{BlockOptions, MigrationBlock};
use ram_discard::memory::RamBlock;
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::daemon::Daemon;
use small_vmm::device_state;
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::GuestRam;
use small_vmm::protocol::{MemoryRegion, Request, protocol_feature};

const PAGE: u64 = 4096;
/// So that the available ring is in another page than the used ring.
const SPLIT_RING: u64 = RING + 0x700;
/// Where in a device state the plugged size is, before the bitmap.
const SIZE_AT: usize = 80;
const PROTOCOL: u64 = USUAL_PROTOCOL_FEATURES | protocol_feature::PAGEFAULT;

/// A destination whose guest has made a request, all of whose boot memory is still at the source.
struct Destination {
    daemon: Daemon,
    ram: Arc<GuestRam>,
    driver: MemDriver,
    source: Arc<Source>,
    lazy: Arc<LazyRam>,
    _handler: FaultHandler,
}

/// `None` where the tests cannot run; says why.
fn destination(requests: &[MemRequest], never_come: &[u64]) -> Option<Destination> {
    let daemon = common::daemon(options().arg("--postcopy"));
    let ram = common::ram();
    let mut driver = MemDriver::at(&ram, SPLIT_RING, 128, true).unwrap();
    for request in requests {
        driver.submit(&request.to_bytes(), &Shape::default()).unwrap();
    }
    let source = Arc::new(Source::default());
    let boot = ram.region(0).unwrap();
    let mut outstanding = PageBitmap::new(BOOT / PAGE);
    for data in ram.resident_ranges(0..BOOT).unwrap() {
        for page in data.step_by(PAGE as usize) {
            let mut bytes = vec![0; PAGE as usize];
            boot.file.read_exact_at(&mut bytes, page).unwrap();
            if never_come.contains(&page) {
                assert!(bytes.iter().all(|&byte| byte == 0));
                continue;
            }
            source.pages.lock().unwrap().insert(page, bytes);
            outstanding.set(page / PAGE);
        }
    }
    ram.punch(0..BOOT).unwrap();
    let file = boot.file.try_clone().unwrap();
    let block = RamBlock::new("boot".to_owned(), 0, BOOT, file, 0).unwrap();
    let mapping = ram.mapping(0).unwrap();
    let block = MigrationBlock::new(Arc::new(block), mapping, BlockOptions::migratable()).unwrap();
    let lazy = match LazyRam::new(vec![(Arc::new(block), outstanding)]) {
        Ok(lazy) => Arc::new(lazy),
        Err(error) => {
            eprintln!("skipped: no postcopy in this environment: {error}");
            return None;
        }
    };
    lazy.set_source(Some(Arc::clone(&source) as Arc<dyn PageSource>));
    let handler = FaultHandler::start(Arc::clone(&lazy), Arc::new(Loud)).unwrap();
    Some(Destination { daemon, ram, driver, source, lazy, _handler: handler })
}

fn negotiated(daemon: &Daemon) -> Frontend {
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let agreed = frontend.negotiate(USUAL_FEATURES, PROTOCOL).unwrap();
    assert_ne!(agreed.protocol & protocol_feature::PAGEFAULT, 0, "{}", daemon.stderr());
    frontend
}

impl Drop for Destination {
    fn drop(&mut self) {
        // No guest runs on what never arrives.
        self.lazy.abandon();
    }
}

impl Destination {
    /// Connects in postcopy; the ring is not set up.
    fn listen(&self) -> (Frontend, SharedFaults) {
        let frontend = negotiated(&self.daemon);
        let userfaultfd = frontend.postcopy_advise().unwrap().unwrap();
        let shared = self.serve(userfaultfd);
        frontend.postcopy_listen().unwrap();
        let mapped = frontend.set_mem_table_postcopy(&self.ram).unwrap();
        assert_eq!(mapped.iter().map(|entry| entry.guest_addr).collect::<Vec<_>>(), [0, ADDR]);
        shared.set_ranges(boot_ranges(&mapped)).unwrap();
        frontend.confirm_memory(Request::SetMemTable).unwrap();
        (frontend, shared)
    }

    fn serve(&self, userfaultfd: OwnedFd) -> SharedFaults {
        SharedFaults::start(Arc::clone(&self.lazy), userfaultfd, Arc::new(Loud)).unwrap()
    }

    /// Connects in postcopy and has the worker wait for a page that is not given. The used index
    /// was read, by the thread that serves messages.
    fn stuck(&self) -> (Frontend, SharedFaults) {
        let (frontend, shared) = self.listen();
        frontend.setup_ring_from(0, self.driver.ring(), 0).unwrap();
        self.source.asked.store(0, Ordering::SeqCst);
        self.source.silent.store(true, Ordering::SeqCst);
        frontend.enable(0, true).unwrap();
        self.source.wait_asked();
        (frontend, shared)
    }

    /// Nothing was put where pages are missing: all of them can still come, and are complete then.
    fn assert_all_can_still_come(&self) {
        assert_ne!(self.lazy.outstanding(), 0);
        self.bring_the_rest();
        for (&offset, bytes) in &*self.source.pages.lock().unwrap() {
            assert_eq!(&self.ram.read_vec(offset, PAGE as usize).unwrap(), bytes, "{offset:#x}");
        }
    }

    fn bring_the_rest(&self) {
        let missing = self.lazy.outstanding_of(0);
        for page in missing.runs(0..missing.nr_pages()).flatten() {
            self.source.give(&self.lazy, 0, page * PAGE);
        }
        self.lazy.finish().unwrap();
    }

    /// Waits until the connection has ended and the daemon serves the next.
    fn wait_disconnected(&self) {
        let anew = "state taken over from the daemon before";
        assert!(self.daemon.wait_logged(anew, PATIENCE), "{}", self.daemon.stderr());
    }
}

fn boot_ranges(mapped: &[MemoryRegion]) -> Vec<SharedRange> {
    let boot = mapped.iter().filter(|entry| entry.guest_addr == 0);
    boot.map(|entry| SharedRange { address: entry.user_addr, len: entry.size, block: 0, offset: 0 })
        .collect()
}

fn state() -> MemRequest {
    MemRequest::new(RequestType::State, gpa(0), 1)
}

#[test]
fn a_request_whose_ring_and_buffers_arrive_on_demand_is_answered() {
    let plug = MemRequest::new(RequestType::Plug, gpa(3), 2);
    let Some(mut destination) = destination(&[state(), plug], &[]) else { return };
    let (frontend, shared) = destination.listen();
    let channel = BackendChannel::open(&frontend, Behaviour::AckAtOnce).unwrap();
    frontend.setup_ring_from(0, destination.driver.ring(), 0).unwrap();
    frontend.enable(0, true).unwrap();
    assert_eq!(destination.driver.complete().unwrap().kind(), ResponseType::Ack);
    // While memory arrives, no block changes.
    assert_eq!(destination.driver.complete().unwrap().kind(), ResponseType::Busy);
    assert_eq!(destination.daemon.api().device().unwrap()["migration_active"], true);
    assert!(destination.source.asked.load(Ordering::SeqCst) >= 3, "ring, request, response");

    let seen = channel.config_changes();
    destination.bring_the_rest();
    assert_eq!(frontend.postcopy_end().unwrap(), 0);
    drop(shared);
    // The guest is told to try again.
    assert!(channel.wait_beyond(seen, PATIENCE));
    assert_eq!(destination.driver.plug(gpa(3), 2).unwrap().kind(), ResponseType::Ack);
    assert_eq!(frontend.config().unwrap().plugged_size, 2 * BLOCK);
    // Ordinary again, also for memory.
    frontend.get_vring_base(0).unwrap();
    frontend.set_mem_table(&destination.ram).unwrap();
    destination.driver.reset().unwrap();
    frontend.start_ring(0, destination.driver.ring()).unwrap();
    assert_eq!(destination.driver.state(gpa(3), 2).unwrap().kind(), ResponseType::Ack);
}

#[test]
fn a_page_that_never_comes_is_zeros() {
    // The used ring and the response were never written at the source.
    let probe = MemDriver::at(&common::ram(), SPLIT_RING, 128, true).unwrap();
    let used = probe.ring().used_addr() / PAGE * PAGE;
    let Some(mut destination) = destination(&[state()], &[used]) else { return };
    let (frontend, _shared) = destination.listen();
    frontend.setup_ring_from(0, destination.driver.ring(), 0).unwrap();
    frontend.enable(0, true).unwrap();
    assert_eq!(destination.driver.complete().unwrap().kind(), ResponseType::Ack);
    assert!(destination.lazy.statistics().zero.count >= 1);
}

#[test]
fn a_fault_in_discarded_memory_is_the_kernels() {
    let Some(destination) = destination(&[], &[]) else { return };
    let frontend = negotiated(&destination.daemon);
    let _userfaultfd = frontend.postcopy_advise().unwrap().unwrap();
    frontend.postcopy_listen().unwrap();
    let mapped = frontend.set_mem_table_postcopy(&destination.ram).unwrap();
    frontend.confirm_memory(Request::SetMemTable).unwrap();
    for region in mapped {
        let device = region.guest_addr == ADDR;
        assert_eq!(waits_for_pages(&destination.daemon, region.user_addr), !device);
    }
}

/// Whether a missing page at an address of the daemon is the front-end's to bring.
fn waits_for_pages(daemon: &Daemon, address: u64) -> bool {
    let smaps = std::fs::read_to_string(format!("/proc/{}/smaps", daemon.pid())).unwrap();
    let mut lines = smaps.lines().skip_while(|line| {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let parse = |text| u64::from_str_radix(text, 16).ok();
        let range = range.and_then(|(start, end)| Some(parse(start)?..parse(end)?));
        !range.is_some_and(|range| range.contains(&address))
    });
    let flags = lines.find_map(|line| line.strip_prefix("VmFlags:")).expect("it is mapped");
    // VM_UFFD_MISSING.
    flags.split(' ').any(|flag| flag == "um")
}

#[test]
fn the_end_lets_go_on_who_still_waits() {
    let Some(destination) = destination(&[state()], &[]) else { return };
    let (frontend, shared) = destination.stuck();
    // The daemon answers everything that needs no memory.
    assert_eq!(frontend.config().unwrap().region_size, REGION);
    assert_eq!(destination.daemon.api().device().unwrap()["connected"], true);
    assert_eq!(frontend.postcopy_end().unwrap(), 0);
    assert_eq!(destination.daemon.api().device().unwrap()["migration_active"], false);
    // Although the front-end still has its copy of the descriptor.
    frontend.get_vring_base(0).unwrap();
    drop(shared);
}

#[test]
fn memory_that_does_not_arrive_is_replaced_although_the_system_reserves_no_more() {
    let Some(mut destination) = destination(&[state()], &[]) else { return };
    let (frontend, shared) = destination.stuck();
    let status = std::fs::read_to_string(format!("/proc/{}/status", destination.daemon.pid()));
    let status = status.unwrap();
    let data = status.lines().find_map(|line| line.strip_prefix("VmData:")).unwrap();
    let data: u64 = data.trim().trim_end_matches(" kB").parse().unwrap();
    // As with vm.overcommit_memory=2: there is room for threads, and none for a guest's memory.
    let limit = Some((data << 10) + (REGION >> 2));
    let pid = i32::try_from(destination.daemon.pid()).ok().and_then(Pid::from_raw);
    prlimit(pid, Resource::Data, Rlimit { current: limit, maximum: None }).unwrap();
    frontend.disconnect();
    destination.wait_disconnected();
    assert!(destination.daemon.is_running(), "{}", destination.daemon.stderr());
    drop(shared);
}

#[test]
fn a_front_end_that_leaves_while_the_worker_waits_harms_nobody() {
    let Some(destination) = destination(&[state()], &[]) else { return };
    let (frontend, shared) = destination.stuck();
    frontend.disconnect();
    destination.wait_disconnected();
    // It still has the descriptor, and serves the guest with what comes late.
    destination.assert_all_can_still_come();
    drop(shared);
    let ram = &destination.ram;
    let (_frontend, _channel, mut driver) = common::connect(&destination.daemon, ram);
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
}

#[test]
fn a_front_end_that_leaves_while_messages_wait_harms_nobody() {
    type Send = fn(&Destination, &Frontend);
    let sends: [Send; 3] = [
        // Waits for the worker, in the relay.
        |_, frontend| frontend.reset_device().unwrap(),
        // Waits for the worker, in the crate.
        |_, frontend| {
            let connection = frontend.connection();
            connection.send(Request::GetVringBase, 0, &[0; 8], &[]).unwrap();
        },
        // Waits for a lock that the worker holds.
        |destination, frontend| {
            let call = destination.driver.ring().call_fd();
            frontend.set_vring_fd(Request::SetVringCall, 0, Some(call)).unwrap();
        },
    ];
    for send in sends {
        let Some(destination) = destination(&[state()], &[]) else { return };
        let (frontend, _shared) = destination.stuck();
        frontend.set_need_reply(false);
        send(&destination, &frontend);
        std::thread::sleep(Duration::from_millis(20));
        frontend.disconnect();
        destination.wait_disconnected();
        destination.assert_all_can_still_come();
    }
    // The thread that serves messages itself misses a page.
    let Some(destination) = destination(&[state()], &[]) else { return };
    let (frontend, _shared) = destination.listen();
    destination.source.silent.store(true, Ordering::SeqCst);
    frontend.set_need_reply(false);
    frontend.set_vring_addr(0, destination.driver.ring(), None).unwrap();
    destination.source.wait_asked();
    frontend.disconnect();
    destination.wait_disconnected();
    destination.assert_all_can_still_come();
}

#[test]
fn a_signal_ends_the_daemon_while_it_waits() {
    let Some(mut destination) = destination(&[state()], &[]) else { return };
    let (_frontend, _shared) = destination.stuck();
    let status = destination.daemon.terminate(PATIENCE).unwrap();
    assert!(status.success(), "{status}");
    let said = destination.daemon.stderr();
    assert!(said.lines().any(|line| line.ends_with(": ended")), "{said}");
    destination.assert_all_can_still_come();
}

#[test]
fn state_that_comes_after_the_memory_says_what_is_waited_for() {
    let mut source = common::rig();
    source.plug(2, 1);
    let (mut read, write) = io::pipe().unwrap();
    source.frontend.get_vring_base(0).unwrap();
    let saved = source.frontend.set_device_state_fd(false, write.as_fd());
    assert_eq!(saved.unwrap().0 & 0xff, 0);
    drop(write);
    let mut state = Vec::new();
    read.read_to_end(&mut state).unwrap();
    assert_eq!(source.frontend.check_device_state().unwrap(), 0);

    let Some(destination) = destination(&[], &[]) else { return };
    let (frontend, _shared) = destination.listen();
    let (pipe, mut write) = io::pipe().unwrap();
    frontend.set_device_state_fd(true, pipe.as_fd()).unwrap();
    write.write_all(&state).unwrap();
    drop(write);
    assert_eq!(frontend.check_device_state().unwrap(), 0, "{}", destination.daemon.stderr());
    assert_eq!(frontend.config().unwrap().plugged_size, BLOCK);
    let maps = std::fs::read_to_string(format!("/proc/{}/smaps", destination.daemon.pid()));
    let waited = flags_of(&maps.unwrap(), "virtio-mem", "um");
    assert_eq!(waited, [BLOCK >> 10], "the plugged block and nothing else, KiB");
}

/// A state of a device with blocks of 4 KiB, the bitmap of which repeats one byte.
fn state_of_small_blocks(plugged: u8) -> Vec<u8> {
    let rig = common::rig_with(options().block_size(PAGE), common::ram());
    rig.frontend.get_vring_base(0).unwrap();
    let mut state = device_state::save(&rig.frontend).unwrap().unwrap();
    let bitmap = SIZE_AT + 8..SIZE_AT + 8 + (REGION / PAGE / 8) as usize;
    let size = bitmap.len() as u64 * u64::from(plugged.count_ones()) * PAGE;
    state[SIZE_AT..bitmap.start].copy_from_slice(&size.to_be_bytes());
    state[bitmap].fill(plugged);
    let end = state.len() - 4;
    let checksum = crc32fast::hash(&state[..end]).to_be_bytes();
    state[end..].copy_from_slice(&checksum);
    state
}

#[test]
fn a_state_in_tatters_takes_few_mappings_whenever_it_comes() {
    // More ranges than a process may have mappings.
    let (full, tatters) = (state_of_small_blocks(0xff), state_of_small_blocks(0x55));
    // The last is torn by what is discarded.
    let cases = [(None, Some(&tatters)), (Some(&tatters), None), (Some(&full), Some(&tatters))];
    for (before, after) in cases {
        let daemon = common::daemon(options().block_size(PAGE).arg("--postcopy"));
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        let agreed = frontend.negotiate(USUAL_FEATURES, PROTOCOL).unwrap();
        if agreed.protocol & protocol_feature::PAGEFAULT == 0 {
            return eprintln!("skipped: no postcopy in this environment");
        }
        let load = |state: Option<&Vec<u8>>| {
            let loaded = state.is_none_or(|state| device_state::load(&frontend, state).unwrap());
            assert!(loaded, "{}", daemon.stderr());
        };
        load(before);
        let _userfaultfd = frontend.postcopy_advise().unwrap().unwrap();
        frontend.postcopy_listen().unwrap();
        let ram = common::ram();
        frontend.set_mem_table_postcopy(&ram).unwrap();
        frontend.confirm_memory(Request::SetMemTable).unwrap();
        load(after);
        assert_eq!(frontend.config().unwrap().plugged_size, REGION / 2);
        let waited = || {
            let maps = std::fs::read_to_string(format!("/proc/{}/smaps", daemon.pid()));
            flags_of(&maps.unwrap(), "virtio-mem", "um")
        };
        assert_eq!(waited(), [REGION >> 10], "all of it, as one");
        assert_eq!(frontend.postcopy_end().unwrap(), 0);
        assert_eq!(waited(), [0; 0]);
    }
}

/// Sizes (KiB) of the mappings of a file that have a flag, by `/proc/PID/smaps`.
fn flags_of(smaps: &str, name: &str, flag: &str) -> Vec<u64> {
    let (mut found, mut size, mut ours) = (Vec::new(), 0, false);
    for line in smaps.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match words[0] {
            "Size:" => size = words[1].parse().unwrap(),
            "VmFlags:" if ours && words.contains(&flag) => found.push(size),
            first if !first.ends_with(':') => ours = line.contains(name),
            _ => {}
        }
    }
    found
}

#[test]
fn what_is_out_of_order_is_refused_with_the_reason() {
    let Some(destination) = destination(&[], &[]) else { return };
    let said = |what: &str| {
        let deadline = Instant::now() + PATIENCE;
        while !destination.daemon.stderr().contains(what) {
            assert!(Instant::now() < deadline, "{what}: {}", destination.daemon.stderr());
            std::thread::sleep(Duration::from_millis(2));
        }
    };
    let frontend = negotiated(&destination.daemon);
    assert!(frontend.postcopy_listen().is_err());
    said("POSTCOPY_ADVISE has not come just before");

    let frontend = negotiated(&destination.daemon);
    frontend.set_mem_table(&destination.ram).unwrap();
    frontend.postcopy_advise().unwrap().unwrap();
    assert!(frontend.postcopy_listen().is_err());
    said("memory was mapped before POSTCOPY_LISTEN");

    let frontend = negotiated(&destination.daemon);
    assert!(frontend.postcopy_end().is_err());
    said("no POSTCOPY_ADVISE has come");

    // A migration that ends before it switches to postcopy.
    let frontend = negotiated(&destination.daemon);
    frontend.postcopy_advise().unwrap().unwrap();
    assert_eq!(frontend.postcopy_end().unwrap(), 0);
    frontend.set_mem_table(&destination.ram).unwrap();
    frontend.disconnect();

    // Regions one by one, with one confirmation.
    let frontend = negotiated(&destination.daemon);
    frontend.postcopy_advise().unwrap().unwrap();
    frontend.postcopy_listen().unwrap();
    for region in destination.ram.regions() {
        let mapped = frontend.add_mem_region_postcopy(&destination.ram, region).unwrap();
        assert_eq!((mapped.guest_addr, mapped.size), (region.gpa, region.size));
        assert_ne!(mapped.user_addr, destination.ram.user_addr(region.gpa).unwrap());
    }
    frontend.confirm_memory(Request::AddMemReg).unwrap();
    assert_eq!(frontend.postcopy_end().unwrap(), 0);
}
