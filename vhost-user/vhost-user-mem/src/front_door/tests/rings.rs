//! Rings, resets and owners, and when the front-end may be spoken to.

use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use rustix::fs::{OFlags, fcntl_getfl};

use super::super::message::{FrontendRequest as R, Header};
use super::harness::{Bench, Peer, event, state, witness};

/// A bench with a channel that answers nothing.
fn with_channel() -> (Bench, Peer) {
    let bench = Bench::negotiated();
    let (channel, theirs) = UnixStream::pair().unwrap();
    assert_eq!(bench.ask(R::SET_BACKEND_REQ_FD, &[], &[theirs.as_fd()]), 0);
    assert_eq!(bench.take_journal(), [""; 0], "the crate must not get the channel");
    (bench, Peer::new(channel))
}

fn assert_notified(channel: &Peer) {
    assert!(channel.readable(5000), "no configuration change came");
    let message = channel.receive().unwrap();
    assert_eq!(message.header, Header::request(2, 0).asking());
    channel.send(Header::reply(2, 8), &[0; 8], &[]);
}

#[test]
fn changes_wait_for_a_running_ring() {
    let (bench, channel) = with_channel();
    bench.notifier.notify();
    assert!(!channel.readable(100));
    bench.start_ring();
    assert_notified(&channel);

    assert_eq!(bench.get(R::GET_VRING_BASE, &state(0, 0)), state(0, 0));
    bench.notifier.notify();
    assert!(!channel.readable(100));
    bench.start_ring();
    assert_notified(&channel);
    bench.notifier.notify();
    assert_notified(&channel);
}

#[test]
fn a_reset_silences_until_a_ring_is_enabled() {
    let (bench, channel) = with_channel();
    bench.start_ring();
    bench.take_journal();
    assert_eq!(bench.ask(R::RESET_DEVICE, &[], &[]), 0);
    let expected = ["quiesce", "crate RESET_DEVICE", "rings_reset", "release"];
    assert_eq!(bench.take_journal(), expected);
    bench.notifier.notify();
    // All rings are disabled already: the crate would end the connection.
    assert_eq!(bench.ask(R::SET_VRING_ENABLE, &state(0, 0), &[]), 0);
    assert_eq!(bench.ask(R::SET_FEATURES, &(1u64 << 30).to_le_bytes(), &[]), 0);
    assert!(!channel.readable(100));
    assert_eq!(bench.ask(R::SET_VRING_ENABLE, &state(0, 1), &[]), 0);
    assert_notified(&channel);
}

#[test]
fn rings_without_the_enable_message_run_after_set_features() {
    let (bench, channel) = with_channel();
    bench.start_ring();
    assert_eq!(bench.ask(R::RESET_DEVICE, &[], &[]), 0);
    bench.notifier.notify();
    assert_eq!(bench.ask(R::SET_FEATURES, &[0; 8], &[]), 0);
    assert_notified(&channel);
}

#[test]
fn eventfds_are_passed_on_and_do_not_block_and_may_be_left_out() {
    let bench = Bench::negotiated();
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        let event = event();
        assert_eq!(bench.ask(request, &[0; 8], &[event.as_fd()]), 0);
        assert!(fcntl_getfl(&event).unwrap().contains(OFlags::NONBLOCK), "{request}");
        assert_eq!(bench.ask(request, &(1u64 << 8).to_le_bytes(), &[]), 0);
        assert_eq!(bench.take_journal(), vec![format!("crate {request}"); 2]);
    }
}

#[test]
fn owners_come_and_go() {
    let bench = Bench::negotiated();
    assert_eq!(bench.ask(R::SET_OWNER, &[], &[]), 0);
    assert_eq!(bench.ask(R::SET_OWNER, &[], &[]), 0);
    bench.start_ring();
    assert_eq!(bench.ask(R::SET_FEATURES, &(1u64 << 30 | 1 << 26).to_le_bytes(), &[]), 0);
    bench.take_journal();
    assert_eq!(bench.ask(R::RESET_OWNER, &[], &[]), 0);
    let expected = ["quiesce", "crate SET_VRING_ENABLE", "rings_reset", "release", "log_all false"];
    assert_eq!(bench.take_journal(), expected);
    assert_eq!(bench.ask(R::SET_OWNER, &[], &[]), 0);
    assert_eq!(bench.ask(R::SET_VRING_ENABLE, &state(0, 1), &[]), 0);

    // Rings that cannot be disabled are left alone.
    assert_eq!(bench.ask(R::SET_FEATURES, &[0; 8], &[]), 0);
    bench.take_journal();
    assert_eq!(bench.ask(R::RESET_OWNER, &[], &[]), 0);
    assert_eq!(bench.take_journal(), [""; 0]);

    // Only rings that exist are disabled, also when all were enabled at once.
    assert_eq!(bench.ask(R::SET_FEATURES, &(1u64 << 30).to_le_bytes(), &[]), 0);
    bench.take_journal();
    assert_eq!(bench.ask(R::RESET_OWNER, &[], &[]), 0);
    let expected = ["quiesce", "crate SET_VRING_ENABLE", "rings_reset", "release"];
    assert_eq!(bench.take_journal(), expected);
}

#[test]
fn device_state_needs_stopped_rings() {
    let bench = Bench::negotiated();
    let transfer = |expected: u64| {
        let (_kept, pipe) = witness();
        let header = Header::request(R::SET_DEVICE_STATE_FD as u32, 8);
        assert!(bench.front.send(header, &[0; 8], &[pipe.as_fd()]));
        assert_eq!(bench.reply(R::SET_DEVICE_STATE_FD), expected.to_le_bytes());
    };
    transfer(0);
    bench.start_ring();
    transfer(0x101);
    bench.get(R::GET_VRING_BASE, &state(0, 0));
    transfer(0);
}

#[test]
fn directions_and_phases_that_are_not_known_are_answered() {
    let bench = Bench::negotiated();
    bench.take_journal();
    for (direction, phase) in [(2u32, 0u32), (u32::MAX, 0), (0, 1), (1, u32::MAX)] {
        let (_kept, pipe) = witness();
        let header = Header::request(R::SET_DEVICE_STATE_FD as u32, 8);
        let body = [direction.to_le_bytes(), phase.to_le_bytes()].concat();
        assert!(bench.front.send(header, &body, &[pipe.as_fd()]));
        assert_eq!(bench.reply(R::SET_DEVICE_STATE_FD), 0x101u64.to_le_bytes());
    }
    assert_eq!(bench.take_journal(), [""; 0]);
}

#[test]
fn log_events_are_taken_and_not_used() {
    let bench = Bench::negotiated();
    let (_kept, pipe) = witness();
    assert_eq!(bench.ask(R::SET_LOG_FD, &[], &[pipe.as_fd()]), 0);
    assert_eq!(bench.take_journal(), [""; 0]);
}

#[test]
fn descriptors_of_a_running_ring_are_replaced_while_it_is_disabled() {
    let bench = Bench::negotiated();
    let replace = |request: R, expected: &[&str]| {
        for fd in [true, false] {
            let event = event();
            let fds = if fd { vec![event.as_fd()] } else { Vec::new() };
            let value = if fd { 0u64 } else { 1 << 8 };
            assert_eq!(bench.ask(request, &value.to_le_bytes(), &fds), 0);
            assert_eq!(bench.take_journal(), expected, "{request}");
        }
    };
    let disabled = |request| ["crate SET_VRING_ENABLE", request, "crate SET_VRING_ENABLE"];
    replace(R::SET_VRING_CALL, &["crate SET_VRING_CALL"]);
    bench.start_ring();
    bench.take_journal();
    replace(R::SET_VRING_KICK, &disabled("crate SET_VRING_KICK"));
    replace(R::SET_VRING_CALL, &disabled("crate SET_VRING_CALL"));
    replace(R::SET_VRING_ERR, &["crate SET_VRING_ERR"]);
    assert_eq!(bench.ask(R::SET_FEATURES, &[0; 8], &[]), 0);
    bench.take_journal();
    let mut expected = vec!["crate SET_FEATURES"];
    expected.extend(disabled("crate SET_VRING_KICK"));
    expected.push("crate SET_FEATURES");
    replace(R::SET_VRING_KICK, &expected);
    bench.get(R::GET_VRING_BASE, &state(0, 0));
    bench.take_journal();
    replace(R::SET_VRING_CALL, &["crate SET_VRING_CALL"]);
}
