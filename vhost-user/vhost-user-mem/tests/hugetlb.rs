//! Guest memory of huge pages: taken from the pool at PLUG, discarded at UNPLUG.
//!
//! The tests need a pool of a known size. Where it cannot be had they say so and are skipped.

mod common;
#[path = "../../../tests/common/huge_page_pool.rs"]
mod huge_page_pool;

use std::io::{self, Write};
use std::sync::Arc;
use std::time::{Duration, Instant};

use small_vmm::device_state::{load, save};
use small_vmm::driver::{BlockState, RequestType, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};
use small_vmm::protocol::{Request, protocol_feature};

use common::{ADDR, BLOCK, BOOT, REGION, connect, gpa, options, rig_with};
use huge_page_pool::Pool;

/// A pool with so many free pages of 2 MiB, the size of a block. Says why when it cannot be had.
fn pool_with_free(pages: u64) -> Option<Pool> {
    let pool = Pool::with_free(BLOCK, pages);
    pool.inspect_err(|error| say_skipped(&format!("no pool of huge pages: {error}"))).ok()
}

/// Past the test harness, which shows the output of failed tests only.
fn say_skipped(reason: &str) {
    let _ = writeln!(io::stderr(), "skipped: {reason}");
}

fn huge_region() -> Arc<GuestRam> {
    let layout = Layout::new().memfd("boot", 0, BOOT).unwrap();
    Arc::new(GuestRam::new(layout.hugetlb("virtio-mem", ADDR, REGION).unwrap()).unwrap())
}

#[test]
fn plug_takes_pages_from_the_pool_and_unplug_gives_them_back() {
    let Some(pool) = pool_with_free(4) else { return };
    let mut rig = rig_with(options(), huge_region());
    assert_eq!(pool.free(), 4, "memory that is only mapped takes nothing");
    assert_eq!(rig.plug(0, 3), ResponseType::Ack);
    assert_eq!(pool.free(), 1, "taken before the guest touches it");
    rig.stamp(0, 3);
    assert_eq!(rig.plug(3, 1), ResponseType::Ack);
    assert_eq!(pool.free(), 0);
    assert_eq!(rig.unplug(1, 2), ResponseType::Ack);
    assert_eq!(pool.free(), 2);
    rig.assert_stamped(0, 1);
    assert_eq!(rig.plug(100, 2), ResponseType::Ack);
    assert_eq!(rig.daemon.api().device().unwrap()["resident_size"], 4 * BLOCK);
    let resident = rig.daemon.api().get("/v1/device/resident").unwrap().json();
    let plugged = rig.daemon.api().get("/v1/device/blocks").unwrap().json();
    assert_eq!(resident["resident"], plugged["plugged"]);
    assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Ack);
    assert_eq!(pool.free(), 4);
}

#[test]
fn an_empty_pool_makes_the_guest_busy_and_nothing_is_changed() {
    let Some(pool) = pool_with_free(2) else { return };
    let mut rig = rig_with(options(), huge_region());
    assert_eq!(rig.plug(7, 1), ResponseType::Ack);
    rig.stamp(7, 8);
    let config = rig.frontend.config().unwrap();
    // One page is there, but not three: the first is discarded.
    assert_eq!(rig.plug(0, 3), ResponseType::Busy);
    assert_eq!((pool.free(), rig.frontend.config().unwrap()), (1, config));
    let state = rig.execute(RequestType::State, gpa(0), 7);
    assert_eq!(state.state(), BlockState::Unplugged);
    rig.assert_stamped(7, 8);
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    assert_eq!(rig.plug(1, 1), ResponseType::Busy);
    assert_eq!(rig.unplug(7, 1), ResponseType::Ack);
    assert_eq!(rig.plug(1, 1), ResponseType::Ack, "the guest need only try again");
}

#[test]
fn blocks_smaller_than_the_page_are_refused_with_the_reason() {
    let daemon = common::daemon(options().block_size(BLOCK / 2));
    // Pages are taken when they are touched, so this needs no pool.
    let Ok(layout) = Layout::new().hugetlb("virtio-mem", ADDR, REGION) else {
        return say_skipped("the kernel has no huge pages of 2 MiB");
    };
    let ram = GuestRam::new(layout).unwrap();
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    assert!(frontend.set_mem_table(&ram).is_err());
    let reason = "block size 0x100000 is not a multiple of the page size 0x200000";
    assert!(daemon.wait_logged(reason, common::PATIENCE), "{}", daemon.stderr());
}

#[test]
fn huge_pages_that_the_front_end_takes_away_end_its_connection_only() {
    let Some(_pool) = pool_with_free(1) else { return };
    let mut daemon = common::daemon(options());
    let layout = Layout::new().hugetlb("boot", 0, BOOT).unwrap();
    let ram = layout.memfd("virtio-mem", ADDR, REGION).unwrap();
    let ram = Arc::new(GuestRam::new(ram).unwrap());
    let (frontend, _channel, driver) = connect(&daemon, &ram);
    ram.region(0).unwrap().file.set_len(0).unwrap();
    driver.ring().force_kick().unwrap();
    frontend.connection().wait_closed().unwrap();
    assert!(daemon.is_running(), "{}", daemon.stderr());
    let (_frontend, _channel, mut driver) = connect(&daemon, &common::ram());
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
}

/// The state of a device with blocks 0, 1 and 2 plugged.
fn state_of_three_blocks() -> Vec<u8> {
    let mut source = common::rig();
    assert_eq!(source.plug(0, 3), ResponseType::Ack);
    source.frontend.get_vring_base(0).unwrap();
    save(&source.frontend).unwrap().unwrap()
}

#[test]
fn plugged_blocks_get_their_pages_when_memory_comes_after_their_state() {
    let state = state_of_three_blocks();
    let Some(pool) = pool_with_free(2) else { return };
    let daemon = common::daemon(options());
    let early = || {
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        frontend
    };
    let frontend = early();
    assert!(load(&frontend, &state).unwrap());
    let ram = huge_region();
    assert!(frontend.set_mem_table(&ram).is_err(), "a page is missing");
    assert!(daemon.wait_logged("no memory for plugged blocks", common::PATIENCE));
    drop((frontend, ram));
    let deadline = Instant::now() + common::PATIENCE;
    while pool.free() != 2 {
        assert!(Instant::now() < deadline, "the daemon holds on to memory that it refused");
        std::thread::sleep(Duration::from_millis(1));
    }
    drop(pool);
    let Some(pool) = pool_with_free(4) else { return };
    let ram = huge_region();
    ram.write_stamps(gpa(1)..gpa(2), 1).unwrap();
    let frontend = early();
    frontend.set_mem_table(&ram).unwrap();
    assert_eq!(pool.free(), 1);
    assert_eq!(ram.find_wrong_stamp(gpa(1)..gpa(2), 1).unwrap(), None, "what was there stays");
    // A migration that broke off leaves the state and takes the pages.
    ram.punch(gpa(0)..gpa(3)).unwrap();
    assert_eq!(pool.free(), 4);
    assert!(load(&frontend, &state).unwrap());
    assert_eq!(pool.free(), 1);
}

#[test]
fn no_page_is_taken_for_what_is_still_to_come_by_postcopy() {
    let state = state_of_three_blocks();
    let Some(pool) = pool_with_free(4) else { return };
    let daemon = common::daemon(options().arg("--postcopy"));
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let protocol = USUAL_PROTOCOL_FEATURES | protocol_feature::PAGEFAULT;
    let agreed = frontend.negotiate(USUAL_FEATURES, protocol).unwrap().protocol;
    if agreed & protocol_feature::PAGEFAULT == 0 {
        return say_skipped("no postcopy in this environment");
    }
    let _userfaultfd = frontend.postcopy_advise().unwrap().unwrap();
    frontend.postcopy_listen().unwrap();
    let ram = huge_region();
    frontend.set_mem_table_postcopy(&ram).unwrap();
    frontend.confirm_memory(Request::SetMemTable).unwrap();
    assert!(load(&frontend, &state).unwrap());
    assert_eq!(pool.free(), 4, "a page that is there would not be missed");
    assert_eq!(frontend.postcopy_end().unwrap(), 0);
    assert_eq!(pool.free(), 1);
}
