//! Memory that was used before the daemon saw it: preallocated, or left by a guest before.

mod common;

use std::sync::Arc;

use small_vmm::daemon::DaemonOptions;
use small_vmm::device_state::{load, save};
use small_vmm::driver::ResponseType;
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::GuestRam;

use common::{BLOCK, PATIENCE, Rig, connect, daemon, gpa, options, ram, rig_with};

/// Memory with content in the first 64 blocks of the region.
fn used() -> Arc<GuestRam> {
    let ram = ram();
    ram.write_stamps(gpa(0)..gpa(64), 1).unwrap();
    ram
}

/// Waits until the host holds nothing for a part of the region.
fn wait_until_nothing_is_held(rig: &Rig) {
    let deadline = std::time::Instant::now() + PATIENCE;
    while rig.resident(0, 64) != 0 {
        assert!(
            std::time::Instant::now() < deadline,
            "{:#x} bytes are resident",
            rig.resident(0, 64)
        );
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

fn assert_zeros(rig: &Rig, first: u64, end: u64) {
    let bytes = rig.ram.read_vec(gpa(first), (gpa(end) - gpa(first)) as usize).unwrap();
    assert!(bytes.iter().all(|&byte| byte == 0), "blocks {first}..{end} hold something");
}

fn assert_discards_what_it_finds(options: DaemonOptions) {
    let mut rig = rig_with(options, used());
    wait_until_nothing_is_held(&rig);
    assert_eq!(rig.plug(3, 2), ResponseType::Ack);
    assert_zeros(&rig, 3, 5);
    rig.stamp(3, 5);
    assert_eq!(rig.driver.unplug_all().unwrap().kind(), ResponseType::Ack);
    assert_eq!(rig.resident(0, 64), 0);
}

#[test]
fn a_new_daemon_discards_what_memory_held_before() {
    assert_discards_what_it_finds(options());
    assert_discards_what_it_finds(options().state_file());
}

#[test]
fn memory_of_the_next_front_end_is_discarded_too() {
    let mut rig = rig_with(options(), used());
    assert_eq!(rig.plug(3, 1), ResponseType::Ack);
    rig.frontend.disconnect();
    rig.channel = None;
    rig.ram = used();
    let (frontend, channel, driver) = connect(&rig.daemon, &rig.ram);
    (rig.frontend, rig.channel, rig.driver) = (frontend, Some(channel), driver);
    assert_eq!(rig.plug(5, 1), ResponseType::Ack);
    assert_zeros(&rig, 4, 64);
    rig.assert_stamped(3, 4);
}

#[test]
fn memory_that_came_before_its_state_is_kept_where_it_is_plugged() {
    let mut source = common::rig();
    assert_eq!(source.plug(2, 4), ResponseType::Ack);
    source.frontend.get_vring_base(0).unwrap();
    let state = save(&source.frontend).unwrap().unwrap();
    let (daemon, ram) = (daemon(options()), used());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    assert!(load(&frontend, &state).unwrap());
    assert_eq!(ram.resident_bytes(gpa(0)..gpa(64)).unwrap(), 4 * BLOCK);
    assert_eq!(ram.find_wrong_stamp(gpa(2)..gpa(6), 1).unwrap(), None);
}
