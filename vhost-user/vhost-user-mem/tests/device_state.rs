//! DEVICE_STATE between real daemons: saved by one, loaded by another, and everything that a
//! front-end may send instead.

mod common;

use std::io::Write;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::Duration;

use common::{ADDR, BLOCK, REGION, Rig, gpa, options, ram, rig, rig_with};
use rustix::process::Signal;
use small_vmm::daemon::Daemon;
use small_vmm::device_state::{load, save};
use small_vmm::driver::{RequestType, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::GuestRam;
use small_vmm::protocol::{Request, words32};

/// Reply to a transfer that is refused.
const REFUSED: u64 = 0x101;
/// Where the fields of the frame and of the first section start.
const FRAME_VERSION: usize = 8;
const ADDR_AT: usize = 52;
const REGION_AT: usize = ADDR_AT + 8;
const BLOCK_AT: usize = ADDR_AT + 16;
const NODE_AT: usize = ADDR_AT + 24;
const SIZE_AT: usize = ADDR_AT + 28;
const BITMAP_AT: usize = ADDR_AT + 36;

/// A daemon with blocks 1, 2 and 7 plugged, and its ring stopped.
fn source() -> Rig {
    let mut rig = rig();
    assert_eq!(rig.plug(1, 2), ResponseType::Ack);
    assert_eq!(rig.plug(7, 1), ResponseType::Ack);
    rig.frontend.get_vring_base(0).unwrap();
    rig
}

/// A front-end that got no further than the protocol features.
fn early(daemon: &Daemon) -> Frontend {
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.get_features().unwrap();
    frontend.set_protocol_features(USUAL_PROTOCOL_FEATURES).unwrap();
    frontend
}

fn blocks(daemon: &Daemon) -> serde_json::Value {
    daemon.api().get("/v1/device/blocks").unwrap().json()
}

fn wait_for_log(daemon: &Daemon, text: &str) {
    let logged = daemon.wait_logged(text, common::PATIENCE);
    assert!(logged, "{text:?} is not in {}", daemon.stderr());
}

/// Puts the right checksum behind a state that was changed.
fn signed(bytes: &[u8]) -> Vec<u8> {
    let end = bytes.len() - 4;
    [&bytes[..end], &crc32fast::hash(&bytes[..end]).to_be_bytes()].concat()
}

#[test]
fn a_state_is_taken_over_and_comes_back_byte_for_byte() {
    let mut source = source();
    assert!(source.daemon.api().resize(9 * BLOCK).unwrap().is_success());
    let state = save(&source.frontend).unwrap().unwrap();
    let destination = common::daemon(options().requested_size(0));
    let frontend = early(&destination);
    assert!(load(&frontend, &state).unwrap());
    assert!(load(&frontend, &state).unwrap(), "and once more");
    assert_eq!(save(&frontend).unwrap().unwrap(), state);
    assert_eq!(frontend.config().unwrap(), source.frontend.config().unwrap());
    assert_eq!(blocks(&destination), blocks(&source.daemon));
    // The source goes on, as after a migration that failed.
    source.reconnect();
    assert_eq!(source.plug(3, 1), ResponseType::Ack);
    drop(frontend);
    let ram = ram();
    let (_frontend, _channel, mut driver) = common::connect(&destination, &ram);
    assert_eq!(driver.plug(gpa(1), 1).unwrap().kind(), ResponseType::Error);
    assert_eq!(driver.unplug(gpa(1), 2).unwrap().kind(), ResponseType::Ack);
}

#[test]
fn a_state_comes_before_features_and_memory_and_unplugged_memory_goes_once_it_is_mapped() {
    let state = save(&source().frontend).unwrap().unwrap();
    let destination = common::daemon(options().requested_size(0));
    let frontend = early(&destination);
    assert!(load(&frontend, &state).unwrap());
    let ram = ram();
    ram.write_stamps(gpa(0)..gpa(9), 1).unwrap();
    let offered = frontend.get_features().unwrap();
    frontend.set_features(offered & USUAL_FEATURES).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    assert_held(&ram);
}

#[test]
fn unplugged_memory_that_is_mapped_goes_and_plugged_memory_stays() {
    let state = save(&source().frontend).unwrap().unwrap();
    let destination = rig_with(options().requested_size(0), ram());
    destination.frontend.get_vring_base(0).unwrap();
    destination.stamp(0, 9);
    assert!(load(&destination.frontend, &state).unwrap());
    assert_held(&destination.ram);
}

/// Only blocks 1, 2 and 7 hold memory, and what was in it.
fn assert_held(ram: &Arc<GuestRam>) {
    assert_eq!(ram.resident_bytes(gpa(0)..gpa(9)).unwrap(), 3 * BLOCK);
    for (first, end) in [(1, 3), (7, 8)] {
        assert_eq!(ram.find_wrong_stamp(gpa(first)..gpa(end), 1).unwrap(), None);
    }
}

#[test]
fn a_loaded_state_replaces_what_was_plugged_and_the_guest_is_told() {
    let state = save(&source().frontend).unwrap().unwrap();
    let mut destination = rig();
    destination.plug(4, 3);
    destination.stamp(4, 7);
    destination.frontend.get_vring_base(0).unwrap();
    let seen = destination.channel.as_ref().unwrap().config_changes();
    assert!(load(&destination.frontend, &state).unwrap());
    assert_eq!(destination.resident(4, 7), 0);
    assert_eq!(destination.plugged_size(), 3 * BLOCK);
    destination.frontend.start_ring(0, destination.driver.ring()).unwrap();
    assert!(destination.channel.as_ref().unwrap().wait_beyond(seen, common::PATIENCE));
    assert_eq!(destination.plug(7, 1), ResponseType::Error);
}

#[test]
fn bad_states_are_refused_with_the_old_one_intact() {
    let good = save(&source().frontend).unwrap().unwrap();
    let mut destination = rig_with(options().state_file(), ram());
    destination.plug(0, 4);
    destination.stamp(0, 4);
    destination.frontend.get_vring_base(0).unwrap();
    let before = (destination.frontend.config().unwrap(), blocks(&destination.daemon));
    let file = std::fs::read(destination.daemon.state_file()).unwrap();
    let usable_at = good.len() - 20;
    let word = |value: u64| value.to_be_bytes().to_vec();
    let cases: [(usize, Vec<u8>, &str); 13] = [
        (0, b"X".to_vec(), "does not start as the state"),
        (FRAME_VERSION, vec![0, 0, 0, 2], "version 2; only 1"),
        (FRAME_VERSION + 4, vec![0, 0, 0, 3], "3 sections instead of 2"),
        (FRAME_VERSION + 9, b"V".to_vec(), "instead of \"virtio-mem-device-early\""),
        (ADDR_AT - 12, vec![0, 0, 0, 2], "version 2; 1 to 1"),
        (ADDR_AT - 8, word(7), "and says 7"),
        (
            ADDR_AT,
            word(ADDR + BLOCK),
            "field addr at byte 0x34: 5370806272 in the stream, 5368709120 here",
        ),
        (REGION_AT, word(2 * REGION), "field region_size"),
        (BLOCK_AT, word(2 * BLOCK), "field block_size"),
        (NODE_AT, vec![0, 0, 0, 1], "field node"),
        (SIZE_AT, word(BLOCK), "field size"),
        (usable_at, word(REGION + BLOCK), "usable region size"),
        (usable_at + 8, word(BLOCK + 1), "not a multiple"),
    ];
    for (at, bytes, reason) in cases {
        let mut bad = good.clone();
        bad[at..at + bytes.len()].copy_from_slice(&bytes);
        assert!(!load(&destination.frontend, &signed(&bad)).unwrap(), "{reason}");
        wait_for_log(&destination.daemon, reason);
    }
    let mut outside = good.clone();
    outside[usable_at..usable_at + 8].copy_from_slice(&(4 * BLOCK).to_be_bytes());
    outside[usable_at + 8..usable_at + 16].copy_from_slice(&(4 * BLOCK).to_be_bytes());
    assert!(!load(&destination.frontend, &signed(&outside)).unwrap());
    wait_for_log(&destination.daemon, "block 7 is plugged outside");
    let mut changed = good.clone();
    changed[BITMAP_AT + 7] ^= 1;
    changed[SIZE_AT + 5] ^= 0x20;
    assert!(!load(&destination.frontend, &changed).unwrap(), "without its checksum");
    assert!(!load(&destination.frontend, &[&good[..], &[0]].concat()).unwrap());
    assert!(!load(&destination.frontend, &[&good[..], &[0; 1 << 20]].concat()).unwrap());
    for len in (0..good.len()).step_by(5) {
        assert!(!load(&destination.frontend, &good[..len]).unwrap(), "{len}");
    }
    assert_eq!((destination.frontend.config().unwrap(), blocks(&destination.daemon)), before);
    assert_eq!(std::fs::read(destination.daemon.state_file()).unwrap(), file);
    destination.assert_stamped(0, 4);
    assert!(load(&destination.frontend, &good).unwrap(), "a good one is taken all the same");
}

#[test]
fn a_state_of_another_node_or_during_migration_is_refused() {
    let good = save(&source().frontend).unwrap().unwrap();
    let destination = common::daemon(options().arg("--node-id").arg("3"));
    assert!(!load(&early(&destination), &good).unwrap());
    wait_for_log(&destination, "field node at byte 0x4c: 0 in the stream, 3 here");
    let destination = common::daemon(options());
    assert!(destination.api().set_migration(true).unwrap().is_success());
    let frontend = early(&destination);
    assert!(!load(&frontend, &good).unwrap());
    assert!(destination.api().set_migration(false).unwrap().is_success());
    assert!(load(&frontend, &good).unwrap());
}

#[test]
fn a_loaded_state_survives_a_kill() {
    let state = save(&source().frontend).unwrap().unwrap();
    let mut destination = common::daemon(options().state_file());
    assert!(load(&early(&destination), &state).unwrap());
    let expected = blocks(&destination);
    destination.restart().unwrap();
    assert_eq!(blocks(&destination), expected);
    assert_eq!(save(&early(&destination)).unwrap().unwrap(), state);
}

#[test]
fn transfers_that_make_no_sense_are_answered_with_an_error() {
    let source = source();
    assert_ne!(source.frontend.check_device_state().unwrap(), 0, "there was none");
    let (reader, _writer) = std::io::pipe().unwrap();
    for (direction, phase) in [(2, 0), (0, 1), (1, u32::MAX)] {
        let body = words32(&[direction, phase]);
        let request = Request::SetDeviceStateFd;
        let reply = source.frontend.query(request, &body, &[reader.as_fd()]).unwrap();
        assert_eq!(reply.value(), REFUSED, "{direction} {phase}");
    }
    let zero = std::fs::File::open("/dev/zero").unwrap();
    assert_eq!(source.frontend.set_device_state_fd(true, zero.as_fd()).unwrap().0, REFUSED);
    let state = save(&source.frontend).unwrap().unwrap();
    source.frontend.start_ring(0, source.driver.ring()).unwrap();
    assert!(save(&source.frontend).unwrap().is_none(), "a ring runs");
    assert!(!load(&source.frontend, &state).unwrap(), "a ring runs");
    let daemon = common::daemon(options());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, 0).unwrap();
    assert!(save(&frontend).unwrap().is_none(), "not negotiated");
}

#[test]
fn a_pipe_that_is_never_closed_holds_up_nobody() {
    let mut rig = source();
    let state = save(&rig.frontend).unwrap().unwrap();
    let (reader, mut writer) = std::io::pipe().unwrap();
    assert_eq!(rig.frontend.set_device_state_fd(true, reader.as_fd()).unwrap().0, 0x100);
    writer.write_all(&state).unwrap();
    let (other, _kept) = std::io::pipe().unwrap();
    let second = rig.frontend.set_device_state_fd(true, other.as_fd()).unwrap();
    assert_eq!(second.0, REFUSED, "one at a time");
    assert_eq!(rig.plugged_size(), 3 * BLOCK, "other messages are answered");
    // A guest that goes on does not wait for it, and does not find its blocks changed after.
    rig.frontend.start_ring(0, rig.driver.ring()).unwrap();
    assert_eq!(rig.plug(20, 1), ResponseType::Ack);
    drop(writer);
    assert_ne!(rig.frontend.check_device_state().unwrap(), 0);
    wait_for_log(&rig.daemon, "the guest made requests meanwhile");
    assert_eq!(rig.execute(RequestType::Plug, gpa(20), 1).kind(), ResponseType::Error);

    rig.frontend.get_vring_base(0).unwrap();
    let (reader, _writer) = std::io::pipe().unwrap();
    assert_eq!(rig.frontend.set_device_state_fd(true, reader.as_fd()).unwrap().0, 0x100);
    rig.reconnect();
    assert_eq!(rig.plug(21, 1), ResponseType::Ack);
    rig.frontend.get_vring_base(0).unwrap();

    // The front-end waits for an answer, and a signal comes.
    let (reader, _writer) = std::io::pipe().unwrap();
    assert_eq!(rig.frontend.set_device_state_fd(true, reader.as_fd()).unwrap().0, 0x100);
    let asking = rig.frontend.clone();
    let asked = std::thread::spawn(move || asking.check_device_state());
    std::thread::sleep(Duration::from_millis(50));
    rig.daemon.signal(Signal::TERM).unwrap();
    assert!(asked.join().unwrap().is_err());
    assert!(rig.daemon.terminate(common::PATIENCE).unwrap().success());
}

#[test]
fn a_reader_that_goes_away_fails_the_save_and_the_source_goes_on() {
    let mut rig = source();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    assert_eq!(rig.frontend.set_device_state_fd(false, writer.as_fd()).unwrap().0, 0x100);
    assert_ne!(rig.frontend.check_device_state().unwrap(), 0);
    assert!(save(&rig.frontend).unwrap().is_some());
    rig.frontend.start_ring(0, rig.driver.ring()).unwrap();
    assert_eq!(rig.unplug(1, 2), ResponseType::Ack);
}
