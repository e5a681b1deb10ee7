//! What no front-end should send.

use std::io::Write;
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use proptest::prelude::*;
use rustix::event::{EventfdFlags, eventfd};

use super::super::RelayError;
use super::super::message::{FDS_MAX, FrontendRequest as R, Header, protocol};
use super::harness::{Bench, OFFERED, event, memfd, state, witness};

fn ends(request: u32, flags: u32, body: &[u8]) -> RelayError {
    let mut bench = Bench::negotiated();
    let mut bytes = Vec::new();
    for number in [request, flags, body.len() as u32] {
        bytes.extend_from_slice(&number.to_le_bytes());
    }
    bytes.extend_from_slice(body);
    (&bench.front.stream).write_all(&bytes).unwrap();
    bench.outcome().unwrap_err()
}

#[test]
fn headers() {
    for (flags, size) in [(0, 0), (2, 0), (3, 0), (0x11, 0), (5, 0), (1, 4097)] {
        let error = ends(R::GET_FEATURES as u32, flags, &vec![0; size]);
        assert!(matches!(error, RelayError::Header { .. }), "{flags} {size}: {error}");
    }
}

#[test]
fn unknown_and_unsupported_requests() {
    for request in [0, 45, u32::MAX] {
        assert!(matches!(ends(request, 1, &[]), RelayError::Unknown(id) if id == request));
    }
    assert!(matches!(ends(R::SEND_RARP as u32, 1, &[0; 8]), RelayError::Unsupported(_)));
    assert!(matches!(ends(R::SET_STATUS as u32, 1, &[0; 8]), RelayError::NotNegotiated { .. }));
}

#[test]
fn sizes() {
    for request in R::ALL.iter().copied() {
        let shape = request.shape();
        let known = shape.feature.is_none_or(|feature| OFFERED & 1 << feature != 0);
        for size in [1, 7, 9, 41, 4096] {
            let fits = shape.sizes.iter().any(|&(min, max)| (min..=max).contains(&size));
            if known && !fits {
                let error = ends(request as u32, 1, &vec![0; size]);
                assert!(matches!(error, RelayError::Size { .. }), "{request} {size}: {error}");
            }
        }
    }
}

#[test]
fn descriptors() {
    for (request, body, count) in [
        (R::SET_VRING_KICK, 8, 2),
        (R::SET_BACKEND_REQ_FD, 0, 0),
        (R::SET_BACKEND_REQ_FD, 0, 2),
        (R::ADD_MEM_REG, 40, 0),
        (R::SET_MEM_TABLE, 40, 1),
        (R::SET_LOG_BASE, 16, 0),
        (R::GET_FEATURES, 0, 1),
    ] {
        let mut bench = Bench::negotiated();
        let (_kept, pipe) = witness();
        let header = Header::request(request as u32, body);
        assert!(bench.front.send(header, &vec![0; body], &vec![pipe.as_fd(); count]));
        assert!(matches!(bench.outcome(), Err(RelayError::Fds { .. })), "{request} {count}");
    }
}

#[test]
fn too_many_descriptors() {
    let mut bench = Bench::negotiated();
    let (_kept, pipe) = witness();
    let header = Header::request(R::SET_MEM_TABLE as u32, 8).to_bytes();
    let all = [pipe.as_fd(); FDS_MAX];
    super::super::link::send_some(bench.front.stream.as_fd(), &header[..1], &all).unwrap();
    super::super::link::send_some(bench.front.stream.as_fd(), &header[1..], &all[..1]).unwrap();
    assert!(matches!(bench.outcome(), Err(RelayError::TooManyFds)));
}

#[test]
fn values_are_refused_by_an_acknowledgement() {
    let unoffered = (1u64 << protocol::INFLIGHT_SHMFD).to_le_bytes();
    for (request, body) in [
        (R::SET_VRING_NUM, state(0, 0)),
        (R::SET_VRING_NUM, state(0, 3)),
        (R::SET_VRING_NUM, state(0, 256)),
        (R::SET_VRING_ENABLE, state(0, 2)),
        (R::SET_PROTOCOL_FEATURES, unoffered),
    ] {
        let mut bench = Bench::negotiated();
        assert_eq!(bench.ask(request, &body, &[]), 1);
        assert!(matches!(bench.outcome(), Err(RelayError::Value { .. })), "{request}");
        assert_eq!(bench.take_journal(), [""; 0]);
    }
}

#[test]
fn what_the_crate_refuses_is_named() {
    for refuses in [true, false] {
        let mut bench = Bench::sour(Some((R::SET_VRING_BASE, 1, refuses)));
        bench.negotiate(OFFERED);
        assert_eq!(bench.ask(R::SET_VRING_BASE, &[0; 8], &[]), 1);
        let error = bench.outcome().unwrap_err();
        assert!(error.to_string().contains("SET_VRING_BASE"), "{error}");
    }
}

#[test]
fn a_channel_must_be_a_unix_stream() {
    let mut bench = Bench::negotiated();
    let (_kept, pipe) = witness();
    assert_eq!(bench.ask(R::SET_BACKEND_REQ_FD, &[], &[pipe.as_fd()]), 1);
    assert!(matches!(bench.outcome(), Err(RelayError::Value { .. })));
}

#[test]
fn what_signals_a_ring_must_be_an_eventfd() {
    let (_kept, pipe) = witness();
    let (file, socket) = (memfd(8), UnixStream::pair().unwrap().0);
    for request in [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR] {
        for (fd, name) in [
            (pipe.as_fd(), "eventfd: pipe:["),
            (file.as_fd(), "eventfd: /memfd:test"),
            (socket.as_fd(), "eventfd: socket:["),
        ] {
            let mut bench = Bench::negotiated();
            assert_eq!(bench.ask(request, &[0; 8], &[fd]), 1);
            let error = bench.outcome().unwrap_err().to_string();
            assert!(error.contains(request.name()) && error.contains(name), "{error}");
            assert_eq!(bench.take_journal(), [""; 0]);
        }
    }
}

/// It is signalled as often as it counts, which may be for ever.
#[test]
fn a_kick_in_semaphore_mode_is_refused() {
    let flags = EventfdFlags::CLOEXEC | EventfdFlags::SEMAPHORE;
    let kick = eventfd(1_000_000, flags).unwrap();
    let mut bench = Bench::negotiated();
    assert_eq!(bench.ask(R::SET_VRING_CALL, &[0; 8], &[kick.as_fd()]), 0);
    bench.take_journal();
    assert_eq!(bench.ask(R::SET_VRING_KICK, &[0; 8], &[kick.as_fd()]), 1);
    let error = bench.outcome().unwrap_err().to_string();
    assert!(error.contains("SET_VRING_KICK with an eventfd in semaphore mode"), "{error}");
    assert_eq!(bench.take_journal(), [""; 0]);
}

#[test]
fn half_a_message_and_gone() {
    let mut bench = Bench::negotiated();
    (&bench.front.stream).write_all(&[1, 0, 0, 0, 1]).unwrap();
    bench.front.stream.shutdown(std::net::Shutdown::Both).unwrap();
    assert!(matches!(bench.outcome(), Err(RelayError::Truncated)));
}

#[test]
fn configuration_outside_is_answered_without_content() {
    let bench = Bench::negotiated();
    for (offset, size, flags) in [(4096, 8, 0), (0, 0, 0), (u32::MAX, 8, 0), (0, 8, 4)] {
        let mut body = [offset, size, flags].map(u32::to_le_bytes).concat();
        body.resize(12 + size as usize, 0);
        let reply = bench.get(R::GET_CONFIG, &body);
        assert_eq!(reply, [offset, 0, flags].map(u32::to_le_bytes).concat());
        assert_eq!(bench.ask(R::SET_CONFIG, &body, &[]), 1);
    }
    assert_eq!(bench.take_journal(), [""; 0]);
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..300)) {
        let mut bench = Bench::negotiated();
        let _ = (&bench.front.stream).write_all(&bytes);
        std::thread::sleep(Duration::from_millis(1));
        bench.handle.shutdown();
        let _ = bench.outcome();
    }

    #[test]
    fn random_requests_do_no_harm(
        requests in prop::collection::vec(
            (0..R::ALL.len(), 0usize..48, any::<u8>(), 0usize..3, any::<bool>()), 0..20)
    ) {
        let mut bench = Bench::negotiated();
        let ((kept, pipe), event) = (witness(), event());
        for (which, size, fill, count, asks) in requests {
            let header = Header::request(R::ALL[which] as u32, size);
            let header = if asks { header.asking() } else { header };
            let rings = [R::SET_VRING_KICK, R::SET_VRING_CALL, R::SET_VRING_ERR];
            let of_ring = rings.contains(&R::ALL[which]) && fill & 4 == 0;
            let fds = vec![if of_ring { event.as_fd() } else { pipe.as_fd() }; count];
            if !bench.front.send(header, &vec![fill & 3; size], &fds) {
                break;
            }
        }
        bench.front.stream.shutdown(std::net::Shutdown::Both).unwrap();
        let _ = bench.outcome();
        // With the handle goes the last duplicate of the socket, and what was not read from it.
        drop((bench, pipe));
        super::harness::assert_closed(kept);
    }
}
