//! The dirty log: every byte the daemon writes to guest memory is marked while it is on, and
//! block state is frozen.

mod common;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout, memfd};
use small_vmm::protocol::feature;

use common::{ADDR, BLOCK, BOOT, REGION, RING, gpa, options};

const PAGE: u64 = 4096;
/// Pages up to the end of the region, one bit each.
const LOG_SIZE: u64 = (ADDR + REGION) / PAGE / 8;
const PLAIN: u64 = feature::VERSION_1 | feature::PROTOCOL_FEATURES;

fn log_file() -> File {
    memfd("log", LOG_SIZE, rustix::fs::MemfdFlags::CLOEXEC).unwrap()
}

fn is_marked(log: &File, gpa: u64) -> bool {
    let mut byte = [0];
    log.read_exact_at(&mut byte, gpa / PAGE / 8).unwrap();
    byte[0] >> (gpa / PAGE % 8) & 1 == 1
}

#[test]
fn answers_and_used_ring_are_marked_also_in_regions_added_later() {
    let daemon = common::daemon(options());
    let second = 0x1000_0000;
    let layout = Layout::boot_and_device(BOOT, ADDR, REGION).unwrap();
    let ram = Arc::new(GuestRam::new(layout.memfd("later", second, BOOT).unwrap()).unwrap());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(PLAIN, USUAL_PROTOCOL_FEATURES).unwrap();
    let at_first: Vec<_> =
        ram.regions().iter().filter(|region| region.range().start != second).cloned().collect();
    frontend.set_mem_table_of(&ram, &at_first).unwrap();
    let log = log_file();
    frontend.set_log_base(&log, LOG_SIZE, 0).unwrap();
    frontend.set_features(PLAIN | feature::LOG_ALL).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, false).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Busy);
    assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert!(is_marked(&log, driver.ring().used_addr()));
    let marked = |log: &File, from: u64, to: u64| {
        (from..to).step_by(4096).filter(|gpa| is_marked(log, *gpa)).count()
    };
    assert!(marked(&log, RING, BOOT) >= 2, "the used ring and the response");

    frontend.get_vring_base(0).unwrap();
    frontend.add_mem_region(&ram, ram.region(second).unwrap()).unwrap();
    let mut driver = MemDriver::at(&ram, second, 128, false).unwrap();
    assert_eq!(marked(&log, second, second + BOOT), 0);
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert!(is_marked(&log, driver.ring().used_addr()));
    assert!(marked(&log, second, second + BOOT) >= 2);
}

#[test]
fn block_state_is_frozen_while_log_all_is_acknowledged_or_until_the_connection_goes() {
    let mut rig = common::rig();
    let features = rig.frontend.features();
    rig.plug(0, 1);
    let log = log_file();
    rig.frontend.set_log_base(&log, LOG_SIZE, 0).unwrap();
    for _ in 0..3 {
        rig.frontend.set_features(features | feature::LOG_ALL).unwrap();
        assert_eq!(rig.daemon.api().device().unwrap()["migration_active"], true);
        assert_eq!(rig.plug(1, 1), ResponseType::Busy);
        let seen = rig.channel.as_ref().unwrap().config_changes();
        rig.frontend.set_features(features & !feature::LOG_ALL).unwrap();
        assert!(rig.channel.as_ref().unwrap().wait_beyond(seen, common::PATIENCE));
        assert_eq!(rig.plug(1, 1), ResponseType::Ack);
        assert_eq!(rig.unplug(1, 1), ResponseType::Ack);
    }
    rig.frontend.set_features(features | feature::LOG_ALL).unwrap();
    assert_eq!(rig.unplug(0, 1), ResponseType::Busy);
    rig.reconnect();
    assert_eq!(rig.unplug(0, 1), ResponseType::Ack);
    assert_eq!(rig.plugged_size(), 0);
}

#[test]
fn migration_by_the_api_outlives_the_connection() {
    let mut rig = common::rig();
    rig.plug(0, 1);
    assert!(rig.daemon.api().set_migration(true).unwrap().is_success());
    rig.reconnect();
    assert_eq!(rig.plug(1, 1), ResponseType::Busy);
    assert!(rig.daemon.api().set_migration(false).unwrap().is_success());
    assert_eq!(rig.plug(1, 1), ResponseType::Ack);
    assert_eq!(rig.plugged_size(), 2 * BLOCK);
}
