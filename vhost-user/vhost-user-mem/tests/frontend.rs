//! The daemon as a front-end sees it: negotiation, configuration, memory, rings, resets,
//! reconnects.

mod common;

use common::{ADDR, BLOCK, REGION, RING, connect, gpa, options, ram, rig};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::config::MemConfig;
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType, Shape};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::protocol::{Request, feature, protocol_feature};
use std::os::fd::AsFd;
use std::time::{Duration, Instant};

#[test]
fn d21_features_offered_are_those_of_the_contract() {
    let daemon = common::daemon(options());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let negotiated = frontend.negotiate(u64::MAX, u64::MAX).unwrap();
    let usual = feature::VERSION_1
        | feature::RING_INDIRECT_DESC
        | feature::RING_EVENT_IDX
        | feature::VIRTIO_MEM_UNPLUGGED_INACCESSIBLE
        | feature::VIRTIO_MEM_PERSISTENT_SUSPEND
        | feature::LOG_ALL
        | feature::PROTOCOL_FEATURES;
    assert_eq!(negotiated.offered, usual);
    let protocol = protocol_feature::MQ
        | protocol_feature::CONFIG
        | protocol_feature::BACKEND_REQ
        | protocol_feature::REPLY_ACK
        | protocol_feature::CONFIGURE_MEM_SLOTS
        | protocol_feature::LOG_SHMFD
        | protocol_feature::RESET_DEVICE
        | protocol_feature::DEVICE_STATE;
    assert_eq!(negotiated.offered_protocol, protocol);
    let daemon = common::daemon(options().arg("--node-id").arg("3").arg("--postcopy"));
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let negotiated = frontend.negotiate(u64::MAX, u64::MAX).unwrap();
    assert_eq!(negotiated.offered, usual | feature::VIRTIO_MEM_ACPI_PXM);
    // Only when it was asked for, and where it works.
    let userfaultfd = migration::lazy::OfferedFaults::open();
    let pagefault = if userfaultfd.is_ok() { protocol_feature::PAGEFAULT } else { 0 };
    assert_eq!(negotiated.offered_protocol, protocol | pagefault);
    assert_eq!(frontend.config().unwrap().node_id, 3);
}

#[test]
fn d13_configuration_is_readable_before_features_and_memory() {
    let daemon = common::daemon(options());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.get_features().unwrap();
    frontend.set_protocol_features(protocol_feature::CONFIG).unwrap();
    let whole = frontend.get_config(0, 256).unwrap();
    assert_eq!(whole.len(), 256);
    assert!(whole[56..].iter().all(|&byte| byte == 0));
    let config = MemConfig::from_bytes(&whole[..56]);
    assert_eq!((config.addr, config.region_size, config.block_size), (ADDR, REGION, BLOCK));
    // Any part of a window of 4096 bytes, as far as a message can carry it.
    let space = [&whole[..], &[0; 4096 - 256]].concat();
    let read = |offset: u32, len: u32| {
        let part = frontend.get_config(offset, len).unwrap();
        let (start, len) = (offset as usize, len as usize);
        assert!(part == space[start..start + len], "{offset}+{len}");
    };
    for offset in (0..128).chain(248..264).chain(4032..4096) {
        for len in [1, 2, 4, 8, 56, 60].into_iter().filter(|len| offset + len <= 4096) {
            read(offset, len);
        }
    }
    let mut runner = TestRunner::new(Config { cases: 500, ..Config::default() });
    let parts = (0u32..4096).prop_flat_map(|offset| (Just(offset), 1..=(4096 - offset).min(4084)));
    runner
        .run(&parts, |(offset, len)| {
            read(offset, len);
            Ok(())
        })
        .unwrap();
}

#[test]
fn d12_writes_to_the_configuration_are_ignored() {
    let rig = rig();
    let before = rig.frontend.get_config(0, 256).unwrap();
    for offset in [0, 8, 16, 40, 48, 200] {
        rig.frontend.set_config(offset, 0, &[0xff; 8]).unwrap();
    }
    assert_eq!(rig.frontend.get_config(0, 256).unwrap(), before);
}

#[test]
fn d14_d24_the_device_works_without_its_own_feature_bits() {
    let daemon = common::daemon(options());
    let ram = ram();
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
    frontend.negotiate(features, protocol_feature::CONFIG).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 128, false).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    assert_eq!(driver.plug(gpa(0), 4).unwrap().kind(), ResponseType::Ack);
    assert_eq!(driver.unplug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
    assert_eq!(ram.read_vec(gpa(0), 64).unwrap(), [0; 64], "unplugged memory is readable");
}

#[test]
fn d15_d16_d27_no_reset_changes_a_block_or_a_byte() {
    let mut rig = rig();
    rig.plug(1, 3);
    rig.stamp(1, 4);
    let config = rig.frontend.config().unwrap();
    let check = |rig: &mut common::Rig| {
        assert_eq!(rig.frontend.config().unwrap(), config);
        rig.assert_stamped(1, 4);
    };
    rig.frontend.reset_device().unwrap();
    check(&mut rig);
    rig.frontend.reset_owner().unwrap();
    check(&mut rig);
    rig.reconnect();
    check(&mut rig);
    rig.frontend.get_vring_base(0).unwrap();
    check(&mut rig);
    rig.reconnect();
    rig.frontend.set_mem_table(&rig.ram).unwrap();
    check(&mut rig);
    assert_eq!(rig.plug(1, 1), ResponseType::Error, "it is still plugged");
    assert_eq!(rig.unplug(1, 3), ResponseType::Ack);
}

#[test]
fn d18_after_a_reset_nothing_moves_until_the_ring_runs_again() {
    let mut rig = rig();
    rig.plug(0, 1);
    let features = rig.frontend.features();
    rig.frontend.reset_device().unwrap();
    let seen = rig.channel.as_ref().unwrap().config_changes();
    let used = rig.driver.ring().used_idx().unwrap();
    rig.driver
        .submit(&MemRequest::new(RequestType::Plug, gpa(1), 1).to_bytes(), &Shape::default())
        .unwrap();
    rig.driver.ring().force_kick().unwrap();
    assert!(rig.daemon.api().resize(BLOCK).unwrap().is_success());
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(rig.driver.ring().used_idx().unwrap(), used);
    assert_eq!(rig.channel.as_ref().unwrap().config_changes(), seen);
    // Once it runs again, what was announced meanwhile is told.
    rig.frontend.set_features(features).unwrap();
    rig.frontend.enable(0, true).unwrap();
    assert!(rig.channel.as_ref().unwrap().wait_beyond(seen, common::PATIENCE));
}

#[test]
fn d19_a_ring_that_is_not_enabled_is_not_served() {
    let daemon = common::daemon(options());
    let ram = ram();
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    frontend.set_mem_table(&ram).unwrap();
    let mut driver = MemDriver::at(&ram, RING, 8, true).unwrap();
    frontend.setup_ring(0, driver.ring()).unwrap();
    let request = MemRequest::new(RequestType::Plug, gpa(0), 1);
    driver.submit(&request.to_bytes(), &Shape::default()).unwrap();
    driver.ring().force_kick().unwrap();
    std::thread::sleep(Duration::from_millis(100));
    assert_eq!(driver.ring().used_idx().unwrap(), 0);
    frontend.enable(0, true).unwrap();
    assert_eq!(driver.complete().unwrap().kind(), ResponseType::Ack);
    assert_eq!(driver.ring().used_idx().unwrap(), 1, "exactly once");
}

#[test]
fn f14_queues_of_every_size_work() {
    let daemon = common::daemon(options());
    let ram = ram();
    for size in [2, 4, 16, 64, 128] {
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        frontend.set_mem_table(&ram).unwrap();
        let mut driver = MemDriver::at(&ram, RING, size, true).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        for _ in 0..300 {
            assert_eq!(driver.plug(gpa(7), 1).unwrap().kind(), ResponseType::Ack);
            assert_eq!(driver.unplug(gpa(7), 1).unwrap().kind(), ResponseType::Ack);
        }
        frontend.disconnect();
    }
}

#[test]
fn get_vring_base_returns_what_was_answered_and_nothing_moves_after() {
    let mut rig = rig();
    for _ in 0..20 {
        for block in 0..50 {
            let request = MemRequest::new(RequestType::State, gpa(block), 1);
            rig.driver.submit(&request.to_bytes(), &Shape::default()).unwrap();
        }
        rig.driver.ring().force_kick().unwrap();
        let base = rig.frontend.get_vring_base(0).unwrap();
        let used = rig.driver.ring().used_idx().unwrap();
        assert_eq!(base, used);
        std::thread::sleep(Duration::from_millis(5));
        assert_eq!(rig.driver.ring().used_idx().unwrap(), used);
        let (frontend, channel, driver) = {
            rig.frontend.disconnect();
            connect(&rig.daemon, &rig.ram)
        };
        rig.frontend = frontend;
        rig.channel = Some(channel);
        rig.driver = driver;
    }
}

#[test]
fn memory_is_let_go_when_the_front_end_leaves() {
    let mut rig = rig();
    rig.plug(0, 1);
    rig.stamp(0, 1);
    assert_eq!(rig.daemon.api().device().unwrap()["resident_size"], BLOCK);
    rig.frontend.disconnect();
    let deadline = Instant::now() + common::PATIENCE;
    loop {
        let device = rig.daemon.api().device().unwrap();
        if device["connected"] == false {
            assert!(device["resident_size"].is_null());
            assert_eq!(device["plugged_size"], BLOCK);
            break;
        }
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(5));
    }
    let maps = std::fs::read_to_string(format!("/proc/{}/maps", rig.daemon.pid())).unwrap();
    assert!(!maps.contains("memfd:"), "{maps}");
}

#[test]
fn memory_that_could_never_be_given_back_is_refused_with_the_reason() {
    let daemon = common::daemon(options());
    let ram = ram();
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    let seals = rustix::fs::SealFlags::FUTURE_WRITE;
    let fd = ram.region(ADDR).unwrap().fd();
    if rustix::fs::fcntl_add_seals(fd, seals).is_ok() {
        assert!(frontend.set_mem_table(&ram).is_err());
        let (_frontend, _channel, _driver) = connect_boot_only(&daemon);
    }
}

fn connect_boot_only(daemon: &small_vmm::daemon::Daemon) -> (Frontend, BackendChannel, MemDriver) {
    let layout = small_vmm::memory::Layout::new().memfd("boot", 0, common::BOOT).unwrap();
    let ram = std::sync::Arc::new(small_vmm::memory::GuestRam::new(layout).unwrap());
    connect(daemon, &ram)
}

#[test]
fn config_changes_reach_front_ends_of_every_behaviour() {
    for (behaviour, ack) in [
        (Behaviour::AckAtOnce, true),
        (Behaviour::AckAfterGetConfig, true),
        (Behaviour::NeverAck, true),
        (Behaviour::AckAtOnce, false),
    ] {
        let daemon = common::daemon(options());
        let ram = ram();
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        let without = if ack { 0 } else { protocol_feature::REPLY_ACK };
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES & !without).unwrap();
        let channel = BackendChannel::open(&frontend, behaviour).unwrap();
        frontend.set_mem_table(&ram).unwrap();
        let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        for size in [1, 2, 3, 4] {
            let seen = channel.config_changes();
            assert!(daemon.api().resize(size * BLOCK).unwrap().is_success());
            assert!(channel.wait_beyond(seen, common::PATIENCE), "{behaviour:?} {ack}");
            assert_eq!(frontend.config().unwrap().requested_size, size * BLOCK);
            assert_eq!(driver.plug(gpa(size), 1).unwrap().kind(), ResponseType::Ack);
        }
    }
}

#[test]
fn a_closed_back_end_channel_does_no_harm() {
    let mut rig = rig();
    rig.channel = None;
    for size in 1..50 {
        assert!(rig.daemon.api().resize(size * BLOCK).unwrap().is_success());
    }
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
    let channel = BackendChannel::open(&rig.frontend, Behaviour::AckAtOnce).unwrap();
    assert!(rig.daemon.api().resize(3 * BLOCK).unwrap().is_success());
    assert!(channel.wait_beyond(0, common::PATIENCE));
}

#[test]
fn without_event_idx_the_no_interrupt_flag_is_respected() {
    let daemon = common::daemon(options());
    let ram = ram();
    for no_interrupt in [true, false] {
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        let features = feature::VERSION_1 | feature::PROTOCOL_FEATURES;
        frontend.negotiate(features, USUAL_PROTOCOL_FEATURES).unwrap();
        frontend.set_mem_table(&ram).unwrap();
        let mut driver = MemDriver::at(&ram, RING, 128, false).unwrap();
        driver.ring().set_no_interrupt(no_interrupt).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        if !no_interrupt {
            // For an interrupt that may have been lost before; not what is looked for here.
            assert!(driver.ring().wait_call(common::PATIENCE).unwrap());
            driver.ring().calls().unwrap();
        }
        let request = MemRequest::new(RequestType::State, gpa(0), 1).to_bytes();
        driver.submit(&request, &Shape::default()).unwrap();
        driver.ring().force_kick().unwrap();
        let deadline = Instant::now() + common::PATIENCE;
        while driver.ring().used_idx().unwrap() == 0 {
            assert!(Instant::now() < deadline, "no answer");
            std::thread::sleep(Duration::from_millis(1));
        }
        // A stopped ring has nothing more to say: what was to be signalled has been.
        frontend.get_vring_base(0).unwrap();
        let call = driver.ring().call_fd();
        let mut polled = [PollFd::from_borrowed_fd(call, PollFlags::IN)];
        let signalled = poll(&mut polled, Some(&Timespec::default())).unwrap() == 1;
        assert_eq!(signalled, !no_interrupt);
    }
}

#[test]
fn one_queue_and_the_slots_of_the_crate_are_told() {
    let daemon = common::daemon(options());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    assert_eq!(frontend.get_queue_num().unwrap(), 1);
    assert_eq!(frontend.get_max_mem_slots().unwrap(), 509);
}

/// The front-end takes a kick itself when it stops a ring, and may replace the descriptor while it
/// is signalled.
#[test]
fn kicks_that_are_not_there_any_more_do_not_end_the_service() {
    let mut rig = rig();
    let kicks: Vec<_> =
        (0..64).map(|_| eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)).collect();
    for kick in kicks {
        let kick = kick.unwrap();
        // The old one is signalled all the time: whatever has been seen of it may be read from the
        // new one.
        rig.driver.ring().force_kick().unwrap();
        rig.frontend.set_vring_fd(Request::SetVringKick, 0, Some(kick.as_fd())).unwrap();
        rig.driver.ring().force_kick().unwrap();
        let ring = rig.driver.ring();
        rig.frontend.set_vring_fd(Request::SetVringKick, 0, Some(ring.kick_fd())).unwrap();
    }
    assert_eq!(rig.plug(0, 1), ResponseType::Ack);
}

#[test]
fn a_kick_that_replaces_that_of_a_running_ring_is_watched_and_the_old_one_is_not() {
    for enables in [true, false] {
        let daemon = common::daemon(options());
        let ram = ram();
        let frontend = Frontend::connect(&daemon.socket()).unwrap();
        let without = if enables { 0 } else { feature::PROTOCOL_FEATURES };
        frontend.negotiate(USUAL_FEATURES & !without, USUAL_PROTOCOL_FEATURES).unwrap();
        frontend.set_mem_table(&ram).unwrap();
        let mut driver = MemDriver::at(&ram, RING, 128, true).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
        let kick = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap();
        frontend.set_vring_fd(Request::SetVringKick, 0, Some(kick.as_fd())).unwrap();
        frontend.sync().unwrap();
        // A worker that watches the old one takes what is signalled there.
        let _ = rustix::io::read(driver.ring().kick_fd(), &mut [0; 8]);
        driver.ring().force_kick().unwrap();
        std::thread::sleep(Duration::from_millis(50));
        let mut old = [0; 8];
        rustix::io::read(driver.ring().kick_fd(), &mut old).expect("the old kick is watched");
        let request = MemRequest::new(RequestType::Plug, gpa(1), 1).to_bytes();
        driver.submit(&request, &Shape::default()).unwrap();
        #[expect(
            clippy::host_endian_bytes,
            reason = "eventfds count in the byte order of the host"
        )]
        rustix::io::write(&kick, &1u64.to_ne_bytes()).unwrap();
        assert_eq!(driver.complete().unwrap().kind(), ResponseType::Ack, "enables: {enables}");
        // Without any, nothing is watched that is signalled for good.
        frontend.set_vring_fd(Request::SetVringKick, 0, None).unwrap();
        frontend.set_vring_fd(Request::SetVringKick, 0, Some(driver.ring().kick_fd())).unwrap();
        assert_eq!(driver.plug(gpa(2), 1).unwrap().kind(), ResponseType::Ack);
    }
}
