//! What a hostile front-end or guest sends may end its connection, never the daemon; nothing is
//! changed by it, nothing leaks, and the next good request works.

mod common;

use std::fs;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use common::{BLOCK, REGION, RING, connect, gpa, options, ram};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{OFlags, fcntl_setfl};
use small_vmm::connection::Connection;
use small_vmm::daemon::Daemon;
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::protocol::{self, Request, VERSION};
use small_vmm::split_ring::{DESC_F_WRITE, DESC_SIZE, Next, Segment};

/// Descriptors and threads of the daemon; waits until it serves no front-end.
fn resources(daemon: &Daemon) -> (usize, usize) {
    let deadline = Instant::now() + common::PATIENCE;
    while daemon.api().device().unwrap()["connected"] == true {
        assert!(Instant::now() < deadline, "the connection is not given up");
        std::thread::sleep(Duration::from_millis(2));
    }
    let count = |what| fs::read_dir(format!("/proc/{}/{what}", daemon.pid())).unwrap().count();
    (count("fd"), count("task"))
}

/// Resources once the API's own connections have settled.
fn settled(daemon: &Daemon) -> (usize, usize) {
    let mut last = resources(daemon);
    for _ in 0..100 {
        std::thread::sleep(Duration::from_millis(10));
        let now = resources(daemon);
        if now == last {
            break;
        }
        last = now;
    }
    last
}

fn assert_serves(daemon: &Daemon, plugged: u64) {
    let ram = ram();
    let (frontend, _channel, mut driver) = connect(daemon, &ram);
    assert_eq!(frontend.config().unwrap().plugged_size, plugged);
    assert_eq!(driver.state(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    frontend.disconnect();
}

#[expect(clippy::host_endian_bytes, reason = "eventfds count in the byte order of the host")]
fn event(count: u64) -> OwnedFd {
    let event = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    rustix::io::write(&event, &count.to_ne_bytes()).unwrap();
    event
}

/// Gives the daemon an eventfd, and then has it block again.
fn set_blocking(frontend: &Frontend, request: Request, event: &OwnedFd) {
    frontend.set_vring_fd(request, 0, Some(event.as_fd())).unwrap();
    fcntl_setfl(event, OFlags::empty()).unwrap();
}

/// Nothing tells when a thread has begun to wait.
fn let_it_wait() {
    std::thread::sleep(Duration::from_millis(50));
}

/// The API's own connections come and go, so that a few more are no leak; tens would be.
fn assert_no_leak(before: (usize, usize), after: (usize, usize)) {
    assert!(after.0 <= before.0 + 4 && after.1 <= before.1 + 4, "{before:?} -> {after:?}");
}

#[test]
fn malformed_messages_end_the_connection_at_most() {
    let mut daemon = common::daemon(options());
    assert_serves(&daemon, 0);
    let before = settled(&daemon);
    let bodies: [Vec<u8>; 5] =
        [vec![], vec![0], vec![0xff; 8], vec![0xff; 40], vec![0; protocol::HEADER_SIZE * 20]];
    for request in (0..50).chain([0xffff, u32::MAX]) {
        for flags in [VERSION, VERSION | 8, VERSION | 4, 0, 2, u32::MAX] {
            let body = &bodies[(request as usize + flags as usize % 7) % bodies.len()];
            let connection = Connection::connect(&daemon.socket(), common::PATIENCE).unwrap();
            let header = protocol::header(request, flags, u32::try_from(body.len()).unwrap());
            let _ = connection.send_raw(&[&header[..], body].concat(), &[]);
            connection.shutdown();
        }
    }
    // A size that is not there, and half a header.
    for bytes in [&protocol::header(1, VERSION, u32::MAX)[..], &[1, 0, 0, 0, 1]] {
        let connection = Connection::connect(&daemon.socket(), common::PATIENCE).unwrap();
        let _ = connection.send_raw(bytes, &[]);
        connection.shutdown();
    }
    assert!(daemon.is_running());
    assert_serves(&daemon, 0);
    assert_no_leak(before, settled(&daemon));
}

#[test]
fn random_bytes_end_the_connection_at_most() {
    let mut daemon = common::daemon(options());
    let mut runner = TestRunner::new(Config { cases: 200, ..Config::default() });
    let messages = prop::collection::vec(
        (
            0u32..48,
            prop_oneof![4 => Just(VERSION), 2 => Just(VERSION | 8), 1 => any::<u32>()],
            prop::collection::vec(any::<u8>(), 0..80),
        ),
        1..12,
    );
    runner
        .run(&messages, |messages| {
            let connection = Connection::connect(&daemon.socket(), common::PATIENCE).unwrap();
            for (request, flags, body) in messages {
                let size = u32::try_from(body.len()).unwrap();
                let header = protocol::header(request, flags, size);
                if connection.send_raw(&[&header[..], &body].concat(), &[]).is_err() {
                    break;
                }
            }
            connection.shutdown();
            Ok(())
        })
        .unwrap();
    assert!(daemon.is_running());
    assert_serves(&daemon, 0);
}

#[test]
fn many_connections_leak_neither_descriptors_nor_threads_nor_memory() {
    let daemon = common::daemon(options());
    let ram = ram();
    let visit = || {
        let (frontend, _channel, mut driver) = connect(&daemon, &ram);
        driver.plug(gpa(0), 1).unwrap();
        driver.unplug(gpa(0), 1).unwrap();
        frontend.disconnect();
    };
    (0..5).for_each(|_| visit());
    let before = settled(&daemon);
    (0..40).for_each(|_| visit());
    assert_no_leak(before, settled(&daemon));
}

/// Segments that point anywhere: the ring's memory, plugged and unplugged blocks, nowhere.
fn any_segment() -> impl Strategy<Value = Segment> {
    let addr = prop_oneof![
        3 => 0x20_0000u64..0x20_4000,
        1 => RING..RING + 0x3000,
        1 => (0u64..REGION).prop_map(|offset| common::ADDR + offset),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 0u32..64, 1 => any::<u32>()];
    let next = prop_oneof![
        6 => Just(Next::Auto),
        1 => Just(Next::Head),
        1 => any::<u16>().prop_map(Next::Entry),
    ];
    (addr, len, 0u16..8, next).prop_map(|(addr, len, flags, next)| Segment {
        addr,
        len,
        flags,
        next,
    })
}

#[test]
fn random_chains_change_nothing_they_should_not_and_the_queue_goes_on() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    let mut runner = TestRunner::new(Config { cases: 60, ..Config::default() });
    let chains = prop::collection::vec(prop::collection::vec(any_segment(), 1..6), 1..8);
    runner
        .run(&chains, |chains| {
            let (frontend, _channel, mut driver) = connect(&daemon, &ram);
            for chain in &chains {
                let ring = driver.ring_mut();
                ring.add(chain).unwrap();
                ring.force_kick().unwrap();
            }
            // A stop waits for what is being served; the next driver finds a device that works.
            frontend.get_vring_base(0).unwrap();
            let mut driver = MemDriver::at(&ram, RING + 0x10_0000, 64, true).unwrap();
            frontend.start_ring(0, driver.ring()).unwrap();
            let config = frontend.config().unwrap();
            config.check().unwrap();
            prop_assert_eq!(driver.unplug_all().unwrap().kind(), ResponseType::Ack);
            prop_assert_eq!(driver.plug(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
            prop_assert_eq!(driver.unplug(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
            frontend.disconnect();
            Ok(())
        })
        .unwrap();
    assert!(daemon.is_running());
}

/// What unplugged memory reads as there is no table that means anything; reading it would make the
/// host hold it.
#[test]
fn tables_of_descriptors_in_unplugged_memory_are_not_read_and_the_queue_goes_on() {
    let mut rig = common::rig();
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    let (request, response) = (0x20_0000, 0x20_0100);
    let bytes = MemRequest::new(RequestType::Plug, gpa(5), 1).to_bytes();
    rig.ram.write(request, &bytes).unwrap();
    let request = Segment::readable(request, 24);
    // The last entry of a plugged block, which goes on in the next, unplugged one.
    let entry = request.with_next(Next::Entry(1));
    rig.driver.ring().write_indirect(gpa(1) - DESC_SIZE, &[entry]).unwrap();
    for chain in [
        vec![Segment::indirect(gpa(3), 4)],
        vec![Segment::indirect(gpa(3), 4).with_flags(DESC_F_WRITE)],
        vec![request, Segment::indirect(gpa(3) + 8, 4)],
        vec![Segment::indirect(gpa(1) - DESC_SIZE, 2)],
        vec![Segment::indirect(gpa(1) - 8, 2)],
    ] {
        rig.driver.ring_mut().add(&chain).unwrap();
        rig.driver.ring_mut().kick().unwrap();
        assert_eq!(rig.driver.complete().unwrap().len, 0, "{chain:?}");
        assert_eq!(rig.resident(1, REGION / BLOCK), 0, "{chain:?}");
        assert_eq!(rig.plugged_size(), BLOCK, "{chain:?}");
    }
    // Where the memory is plugged, the same table makes a request.
    assert_eq!(rig.plug(1, 1), ResponseType::Ack);
    let chain = [request, Segment::writable(response, 10)];
    let table = rig.driver.ring().write_indirect(gpa(1) - DESC_SIZE, &chain).unwrap();
    rig.driver.ring_mut().add(&[table]).unwrap();
    rig.driver.ring_mut().kick().unwrap();
    assert_eq!(rig.driver.complete().unwrap().len, 10);
    assert_eq!(rig.plugged_size(), 3 * BLOCK);
}

#[test]
fn a_configuration_read_is_a_snapshot_whatever_goes_on() {
    let daemon = common::daemon(options());
    let ram = ram();
    let (frontend, _channel, mut driver) = connect(&daemon, &ram);
    let api = daemon.api();
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for round in 0..200u64 {
                let size = if round % 2 == 0 { REGION } else { 16 * BLOCK };
                assert!(api.resize(size).unwrap().is_success());
            }
        });
        let plugger = scope.spawn(move || {
            for round in 0..2000 {
                driver.plug(gpa(round % 16), 1).unwrap();
                driver.unplug(gpa(round % 16), 1).unwrap();
            }
        });
        while !plugger.is_finished() {
            frontend.config().unwrap().check().unwrap();
        }
    });
}

/// Each used element then makes another chain available, without end.
#[test]
fn rings_that_overlap_end_with_their_connection() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, false).unwrap();
    let request = MemRequest::new(RequestType::State, gpa(0), 1).to_bytes();
    driver.submit(&request, &Shape::default()).unwrap();
    let ring = driver.ring();
    // The descriptors of a whole request, wherever a used element points as a head.
    for entry in (2..126).step_by(2) {
        for at in 0..2 {
            let from = ring.desc_addr() + DESC_SIZE * at;
            let mut bytes = ram.read_vec(from, DESC_SIZE as usize).unwrap();
            if at == 0 {
                bytes[14..].copy_from_slice(&(entry + 1u16).to_le_bytes());
            }
            ram.write(ring.desc_addr() + DESC_SIZE * (u64::from(entry) + at), &bytes).unwrap();
        }
    }
    // The used index starts ahead, and with it the available one, which is the same.
    ram.write(ring.avail_addr() + 2, &5u16.to_le_bytes()).unwrap();
    frontend.set_vring_num(0, 128).unwrap();
    let user = |gpa| ram.user_addr(gpa).unwrap();
    let (descriptors, both) = (user(ring.desc_addr()), user(ring.avail_addr()));
    let addr = protocol::vring_addr(0, 0, descriptors, both, both, 0);
    frontend.request(Request::SetVringAddr, &addr, &[]).unwrap();
    frontend.set_vring_base(0, 0).unwrap();
    frontend.set_vring_fd(Request::SetVringKick, 0, Some(ring.kick_fd())).unwrap();
    frontend.enable(0, true).unwrap();
    ring.force_kick().unwrap();
    std::thread::sleep(Duration::from_millis(50));
    frontend.disconnect();
    assert_serves(&daemon, 0);
    assert!(daemon.is_running());
}

#[test]
fn a_call_without_room_holds_nobody_up() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    let (frontend, _channel, mut driver) = connect(&daemon, &ram);
    let call = event(u64::MAX - 1);
    frontend.set_vring_fd(Request::SetVringCall, 0, Some(call.as_fd())).unwrap();
    let state = MemRequest::new(RequestType::State, gpa(0), 1).to_bytes();
    for _ in 0..2 {
        driver.submit(&state, &Shape::default()).unwrap();
        driver.ring().force_kick().unwrap();
        driver.ring_mut().poll_used(common::PATIENCE).unwrap();
    }
    assert_eq!(frontend.get_vring_base(0).unwrap(), 2);
    frontend.disconnect();
    assert_serves(&daemon, 0);
    assert!(daemon.is_running());
}

#[test]
fn a_call_that_blocks_ends_with_its_connection() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    // The others wait for the worker in turn: in the crate, and in the relay.
    for waits in [None, Some(Request::GetVringBase), Some(Request::ResetDevice)] {
        let (frontend, _channel, mut driver) = connect(&daemon, &ram);
        let call = event(u64::MAX - 1);
        set_blocking(&frontend, Request::SetVringCall, &call);
        let state = MemRequest::new(RequestType::State, gpa(0), 1).to_bytes();
        driver.submit(&state, &Shape::default()).unwrap();
        driver.ring().force_kick().unwrap();
        // At the signal of the ring's start, or at that of the answer.
        let_it_wait();
        if let Some(request) = waits {
            let body: &[u8] = if request == Request::GetVringBase { &[0; 8] } else { &[] };
            frontend.connection().send(request, 0, body, &[]).unwrap();
            let_it_wait();
        }
        frontend.disconnect();
        assert_serves(&daemon, 0);
    }
    assert!(daemon.is_running());
}

/// The worker hears of the first kick and reads the second one.
#[test]
fn a_kick_that_blocks_ends_with_its_connection() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    let (frontend, _channel, driver) = connect(&daemon, &ram);
    let silent = event(0);
    set_blocking(&frontend, Request::SetVringKick, &silent);
    driver.ring().force_kick().unwrap();
    let_it_wait();
    frontend.disconnect();
    assert_serves(&daemon, 0);
    assert!(daemon.is_running());
}

/// A pipe with less than eight bytes is readable, and reading eight waits.
#[test]
fn kicks_and_calls_that_are_no_eventfds_are_refused_with_the_reason() {
    let mut daemon = common::daemon(options());
    let ram = ram();
    for (request, name) in [
        (Request::SetVringKick, "SET_VRING_KICK"),
        (Request::SetVringCall, "SET_VRING_CALL"),
        (Request::SetVringErr, "SET_VRING_ERR"),
    ] {
        let (frontend, _channel, _driver) = connect(&daemon, &ram);
        let (read, mut write) = std::io::pipe().unwrap();
        write.write_all(&[1; 7]).unwrap();
        assert!(frontend.set_vring_fd(request, 0, Some(read.as_fd())).is_err());
        let reason = format!("{name} with a descriptor that is not an eventfd: pipe:[");
        assert!(daemon.wait_logged(&reason, common::PATIENCE), "{}", daemon.stderr());
        frontend.disconnect();
        assert_serves(&daemon, 0);
    }
    assert!(daemon.is_running());
}
