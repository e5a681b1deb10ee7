//! A signal ends the daemon whatever it is in the middle of, with its sockets removed.

mod common;

use std::any::Any;
use std::io::{ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::{PATIENCE, Rig, gpa, options, ram, rig_with};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use small_vmm::driver::{MemRequest, RequestType, Shape};
use small_vmm::protocol::Request;

/// What a test keeps until the daemon has ended.
type Kept = Box<dyn Any>;

/// A daemon with all sockets that is brought somewhere, and then told to end.
fn ends(bring: impl FnOnce(&mut Rig) -> Kept) {
    let mut rig = rig_with(options().discard_socket().state_file(), ram());
    let kept = bring(&mut rig);
    let status = rig.daemon.terminate(PATIENCE);
    assert!(status.is_ok_and(|status| status.success()), "{}", rig.daemon.stderr());
    let sockets = [rig.daemon.socket(), rig.daemon.discard_socket(), rig.daemon.api_socket()];
    assert!(sockets.iter().all(|socket| !socket.exists()));
    drop(kept);
    rig.daemon.restart().unwrap();
}

/// Submits a plug and does not wait for its answer.
fn submit(rig: &mut Rig) {
    let (kind, addr) = (RequestType::Plug, gpa(0));
    rig.driver.submit(&MemRequest::new(kind, addr, 1).to_bytes(), &Shape::default()).unwrap();
    rig.driver.ring_mut().kick().unwrap();
}

/// Sends `bytes` until the daemon, which waits for room for its answers, reads no more.
fn fill(stream: &UnixStream, bytes: &[u8]) {
    stream.set_nonblocking(true).unwrap();
    let mut rest = bytes;
    loop {
        match (&mut &*stream).write(rest) {
            Ok(sent) => rest = if sent == rest.len() { bytes } else { &rest[sent..] },
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::WouldBlock);
                let mut polled = [PollFd::new(stream, PollFlags::OUT)];
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                if poll(&mut polled, Some(&second)).unwrap() == 0 {
                    return;
                }
            }
        }
    }
}

#[test]
fn while_a_front_end_does_not_read_its_replies() {
    ends(|rig| {
        let mut features = [0; 12];
        features[0] = 1;
        features[4] = 1;
        rig.frontend.disconnect();
        let stream = UnixStream::connect(rig.daemon.socket()).unwrap();
        fill(&stream, &features);
        Box::new(stream)
    });
}

#[test]
fn in_the_middle_of_a_message() {
    for sent in 1..12 + 8 {
        ends(|rig| {
            let mut header = [0; 20];
            (header[0], header[4], header[8]) = (Request::SetFeatures as u8, 1, 8);
            rig.frontend.connection().send_raw(&header[..sent], &[]).unwrap();
            Box::new(())
        });
    }
}

#[test]
fn while_a_call_has_no_room() {
    ends(|rig| {
        let call = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        rig.frontend.set_vring_fd(Request::SetVringCall, 0, Some(call.as_fd())).unwrap();
        // It is signalled when it is replaced. Without room, that would hold up the request.
        let mut polled = [PollFd::new(&call, PollFlags::IN)];
        let patience = Timespec { tv_sec: PATIENCE.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(poll(&mut polled, Some(&patience)).unwrap(), 1);
        rustix::io::read(&call, &mut [0; 8]).unwrap();
        fcntl_setfl(&call, OFlags::empty()).unwrap();
        #[expect(clippy::host_endian_bytes, reason = "eventfds count in that order")]
        rustix::io::write(&call, &(u64::MAX - 1).to_ne_bytes()).unwrap();
        submit(rig);
        wait_until(|| rig.plugged_size() != 0);
        Box::new(call)
    });
}

#[test]
fn while_device_state_waits_for_a_pipe() {
    for load in [true, false] {
        ends(|rig| {
            rig.frontend.get_vring_base(0).unwrap();
            let (reader, writer) = std::io::pipe().unwrap();
            let (theirs, ours): (OwnedFd, OwnedFd) = match load {
                true => (reader.into(), writer.into()),
                false => {
                    fcntl_setfl(&writer, OFlags::NONBLOCK).unwrap();
                    while rustix::io::write(&writer, &[0; 4096]).is_ok() {}
                    fcntl_setfl(&writer, OFlags::empty()).unwrap();
                    (writer.into(), reader.into())
                }
            };
            assert_eq!(rig.frontend.set_device_state_fd(load, theirs.as_fd()).unwrap().0, 0x100);
            Box::new(ours)
        });
    }
}

fn wait_until(is: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(2));
    }
}
