//! A signal ends the daemon whatever it is in the middle of, with its sockets removed.

mod common;

use std::any::Any;
use std::io::{self, ErrorKind, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use common::silent_file::{SILENT, add, put_descriptors_into, silent_file};
use common::{ADDR, BOOT, PATIENCE, REGION, Rig, gpa, options, ram, rig_with};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::fs::{OFlags, fcntl_setfl};
use rustix::process::Signal;
use small_vmm::daemon::DaemonOptions;
use small_vmm::driver::{MemRequest, RequestType, Shape};
use small_vmm::protocol::{self, Request};

/// What a test keeps until the daemon has ended.
type Kept = Box<dyn Any>;

/// A daemon with all sockets that is brought somewhere, and then told to end.
fn ends(bring: impl FnOnce(&mut Rig) -> Kept) {
    ends_of(options().discard_socket().state_file(), bring);
}

fn ends_of(options: DaemonOptions, bring: impl FnOnce(&mut Rig) -> Kept) {
    let mut rig = rig_with(options, ram());
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
            let (reader, writer) = io::pipe().unwrap();
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

fn with_files() -> DaemonOptions {
    options().discard_socket().state_file().arg("--allow-file-memory")
}

#[test]
fn while_the_owner_of_the_device_s_memory_does_not_answer() {
    let Some(mut silent) = silent_file(REGION) else { return };
    ends_of(with_files(), |rig| {
        let device = rig.ram.region(ADDR).unwrap();
        rig.frontend.rem_mem_region(&rig.ram, device).unwrap();
        silent.fall_silent();
        add(&rig.frontend, ADDR, REGION, &silent);
        silent.wait_asked();
        Box::new(silent)
    });
}

/// The kernel waits for the answer to what the owner has taken, whatever becomes of the process.
#[test]
fn when_the_owner_has_taken_a_request_the_sockets_go_and_the_process_ends_with_the_owner() {
    let Some(mut silent) = silent_file(REGION) else { return };
    let mut rig = rig_with(with_files(), ram());
    let device = rig.ram.region(ADDR).unwrap();
    rig.frontend.rem_mem_region(&rig.ram, device).unwrap();
    silent.fall_silent();
    add(&rig.frontend, ADDR, REGION, &silent);
    silent.take_request();
    rig.daemon.signal(Signal::TERM).unwrap();
    let sockets = [rig.daemon.socket(), rig.daemon.discard_socket(), rig.daemon.api_socket()];
    wait_until(|| sockets.iter().all(|socket| !socket.exists()));
    drop(silent);
    let status = rig.daemon.terminate(PATIENCE);
    assert!(status.is_ok_and(|status| status.success()), "{}", rig.daemon.stderr());
    rig.daemon.restart().unwrap();
}

/// The thread is vhost-user-backend's.
#[test]
fn while_the_thread_of_the_ring_hangs() {
    let Some(mut silent) = silent_file(BOOT) else { return };
    ends_of(with_files(), |rig| {
        put_descriptors_into(&silent, &rig.frontend, &rig.ram, &rig.driver);
        // Of the ring, the descriptors alone are in that file, and no other thread reads them.
        silent.fall_silent();
        submit(rig);
        silent.wait_asked();
        Box::new(silent)
    });
}

#[test]
fn while_the_thread_of_the_messages_hangs() {
    let Some(mut silent) = silent_file(BOOT) else { return };
    ends_of(with_files(), |rig| {
        add(&rig.frontend, 1 << 40, BOOT, &silent);
        rig.frontend.get_vring_base(0).unwrap();
        silent.fall_silent();
        let ring = protocol::vring_addr(0, 0, SILENT, SILENT + 0x2000, SILENT + 0x1000, 0);
        rig.frontend.connection().send(Request::SetVringAddr, 0, &ring, &[]).unwrap();
        silent.wait_asked();
        Box::new(silent)
    });
}

fn wait_until(is: impl Fn() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is() {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(2));
    }
}
