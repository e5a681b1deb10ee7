//! Messages that pass, in order and whole.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;

use super::super::link::send_some;
use super::super::message::{FrontendRequest as R, Header, protocol};
use super::harness::{Bench, FEATURES, OFFERED, assert_closed, event, memfd, region, witness};

#[test]
fn single_bytes_make_messages() {
    let bench = Bench::negotiated();
    let call = event();
    let header = Header::request(R::SET_VRING_CALL as u32, 8).asking();
    let bytes = [&header.to_bytes()[..], &[0; 8]].concat();
    for (at, byte) in bytes.iter().enumerate() {
        let fds = if at == 0 { vec![call.as_fd()] } else { Vec::new() };
        assert_eq!(send_some(bench.front.stream.as_fd(), &[*byte], &fds), Ok(1));
        std::thread::yield_now();
    }
    assert_eq!(bench.reply(R::SET_VRING_CALL), [0; 8]);
    assert_eq!(bench.take_journal(), ["crate SET_VRING_CALL"]);
}

#[test]
fn requests_in_one_write_are_answered_in_order() {
    let bench = Bench::negotiated();
    let mut bytes = Vec::new();
    for request in [R::GET_FEATURES, R::SET_OWNER, R::SET_OWNER, R::GET_PROTOCOL_FEATURES] {
        bytes.extend_from_slice(&Header::request(request as u32, 0).asking().to_bytes());
    }
    (&bench.front.stream).write_all(&bytes).unwrap();
    assert_eq!(bench.reply(R::GET_FEATURES), FEATURES.to_le_bytes());
    assert_eq!(bench.reply(R::SET_OWNER), [0; 8]);
    assert_eq!(bench.reply(R::SET_OWNER), [0; 8]);
    assert_eq!(bench.reply(R::GET_PROTOCOL_FEATURES), OFFERED.to_le_bytes());
}

#[test]
fn nothing_is_acknowledged_unasked() {
    let bench = Bench::new();
    bench.negotiate(OFFERED & !(1 << protocol::REPLY_ACK));
    let header = Header::request(R::SET_OWNER as u32, 0).asking();
    assert!(bench.front.send(header, &[], &[]));
    assert_eq!(bench.get(R::GET_FEATURES, &[]), FEATURES.to_le_bytes());
}

#[test]
fn descriptors_of_refused_requests_are_closed() {
    for request in [R::SEND_RARP, R::GET_FEATURES, R::SET_LOG_FD] {
        let bench = Bench::negotiated();
        let (kept, pipe) = witness();
        assert!(bench.front.send(Header::request(request as u32, 0), &[], &[pipe.as_fd()]));
        drop(pipe);
        assert_closed(kept);
    }
}

#[test]
fn memory_changes_while_quiesced() {
    let bench = Bench::negotiated();
    let (kept, pipe) = witness();
    assert_eq!(bench.ask(R::ADD_MEM_REG, &region(0, 4096), &[memfd(4096).as_fd()]), 0);
    assert_eq!(bench.ask(R::REM_MEM_REG, &region(0, 4096), &[pipe.as_fd()]), 0);
    drop(pipe);
    assert_closed(kept);
    let expected =
        ["quiesce", "crate ADD_MEM_REG", "release", "quiesce", "crate REM_MEM_REG", "release"];
    assert_eq!(bench.take_journal(), expected);
}

#[test]
fn either_end_ends_the_other() {
    let mut bench = Bench::negotiated();
    bench.front.stream.shutdown(std::net::Shutdown::Both).unwrap();
    bench.outcome().unwrap();

    let (crate_side, other) = UnixStream::pair().unwrap();
    let mut bench = Bench::over(crate_side, Default::default());
    drop(other);
    bench.outcome().ok();
    assert!(bench.front.receive().is_none());
}

#[test]
fn the_last_request_before_half_a_close_is_answered() {
    let mut bench = Bench::negotiated();
    bench.send(R::GET_FEATURES, &[]);
    bench.front.stream.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(bench.reply(R::GET_FEATURES), FEATURES.to_le_bytes());
    bench.outcome().unwrap();
}

#[test]
fn half_a_message_does_not_hold_the_end_up() {
    let mut bench = Bench::negotiated();
    (&bench.front.stream).write_all(&[1, 0, 0]).unwrap();
    bench.handle.shutdown();
    let _ = bench.outcome();
    // A crate that is busy does not either.
    let (crate_side, _other) = UnixStream::pair().unwrap();
    let mut bench = Bench::over(crate_side, Default::default());
    bench.handle.shutdown();
    let _ = bench.outcome();
}

#[test]
fn a_front_end_that_leaves_is_noticed_while_the_crate_works() {
    let (crate_side, _other) = UnixStream::pair().unwrap();
    let mut bench = Bench::over(crate_side, Default::default());
    bench.front.stream.shutdown(std::net::Shutdown::Both).unwrap();
    bench.outcome().unwrap();
}

#[test]
fn a_front_end_that_does_not_read_does_not_hold_the_end_up() {
    let mut bench = Bench::negotiated();
    let request = Header::request(R::GET_FEATURES as u32, 0).to_bytes();
    bench.front.stream.set_nonblocking(true).unwrap();
    while (&bench.front.stream).write(&request).is_ok() {}
    std::thread::sleep(std::time::Duration::from_millis(50));
    while (&bench.front.stream).write(&request).is_ok() {}
    bench.handle.shutdown();
    let _ = bench.outcome();
}
