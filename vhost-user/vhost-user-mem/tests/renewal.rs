//! A front-end that was given a userfaultfd of the daemon is the last one of that process image: the
//! daemon starts itself anew, and all but its memory stays.

mod common;

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{BLOCK, PATIENCE, connect, gpa, options, ram};
use migration::lazy::{ClientFaults, OfferedFaults};
use rustix::io::Errno;
use rustix::process::Signal;
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::driver::ResponseType;
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::GuestRam;
use small_vmm::protocol::{MemoryRegion, Request, protocol_feature};

const PROTOCOL: u64 = USUAL_PROTOCOL_FEATURES | protocol_feature::PAGEFAULT;
const PAGE: u64 = 4096;

/// `None` where the tests cannot run; says why.
fn daemon(options: DaemonOptions) -> Option<Daemon> {
    if let Err(error) = OfferedFaults::open() {
        eprintln!("skipped: no postcopy in this environment: {error}");
        return None;
    }
    Some(common::daemon(options.arg("--postcopy")))
}

/// What a front-end has that used postcopy: the daemon's page faults, and where its memory was.
fn use_postcopy(socket: &Path, ram: &GuestRam) -> (OwnedFd, Vec<MemoryRegion>) {
    let frontend = Frontend::connect(socket).unwrap();
    let agreed = frontend.negotiate(USUAL_FEATURES, PROTOCOL).unwrap();
    assert_ne!(agreed.protocol & protocol_feature::PAGEFAULT, 0);
    let userfaultfd = frontend.postcopy_advise().unwrap().unwrap();
    frontend.postcopy_listen().unwrap();
    let mapped = frontend.set_mem_table_postcopy(ram).unwrap();
    frontend.confirm_memory(Request::SetMemTable).unwrap();
    frontend.disconnect();
    (userfaultfd, mapped)
}

#[test]
fn without_the_option_no_front_end_gets_the_page_faults() {
    let daemon = common::daemon(options());
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    let agreed = frontend.negotiate(USUAL_FEATURES, PROTOCOL).unwrap();
    assert_eq!(agreed.offered_protocol & protocol_feature::PAGEFAULT, 0);
    assert!(frontend.postcopy_advise().is_err());
    let (_frontend, _channel, mut driver) = connect(&daemon, &ram());
    assert_eq!(driver.plug(gpa(0), 1).unwrap().kind(), ResponseType::Ack);
}

#[test]
fn what_a_front_end_has_kept_reaches_nothing_of_the_next() {
    let Some(daemon) = daemon(options()) else { return };
    let ram = ram();
    let (kept, mapped) = use_postcopy(&daemon.socket(), &ram);
    let (frontend, _channel, mut driver) = connect(&daemon, &ram);
    assert_eq!(driver.plug(gpa(1), 1).unwrap().kind(), ResponseType::Ack);
    let faults = ClientFaults::new(kept).unwrap();
    let maps = fs::read_to_string(format!("/proc/{}/maps", daemon.pid())).unwrap();
    // Not the page of the kernel at the end of the address space.
    let lines = maps.lines().filter(|line| !line.contains("vsyscall"));
    let starts = lines.filter_map(|line| u64::from_str_radix(line.split('-').next()?, 16).ok());
    for address in mapped.iter().map(|region| region.user_addr).chain(starts) {
        // Nothing is behind it any more: not only not there.
        let error = faults.place_zeros(address, PAGE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(Errno::SRCH.raw_os_error()), "{address:#x}: {error}");
    }
    assert_eq!(frontend.config().unwrap().plugged_size, BLOCK);
}

#[test]
fn all_but_the_memory_of_the_process_is_kept() {
    for options in [options(), options().state_file()] {
        let Some(mut daemon) = daemon(options.discard_socket().requested_size(8 * BLOCK)) else {
            return;
        };
        let ram = ram();
        {
            let (_frontend, _channel, mut driver) = connect(&daemon, &ram);
            assert_eq!(driver.plug(gpa(2), 3).unwrap().kind(), ResponseType::Ack);
            assert_eq!(driver.unplug(gpa(3), 1).unwrap().kind(), ResponseType::Ack);
        }
        assert!(daemon.api().resize(16 * BLOCK).unwrap().is_success());
        assert!(daemon.api().set_migration(true).unwrap().is_success());
        ram.write_stamps(gpa(2)..gpa(3), 1).unwrap();
        let sockets = [daemon.socket(), daemon.api_socket(), daemon.discard_socket()];
        let inodes = || sockets.each_ref().map(|path| fs::metadata(path).unwrap().ino());
        let before = (daemon.pid(), inodes());
        for round in 1..4 {
            drop(use_postcopy(&daemon.socket(), &ram));
            // It waits at the socket while there is another process image behind it.
            let (frontend, channel, mut driver) = connect(&daemon, &ram);
            assert!(channel.wait_beyond(0, PATIENCE), "told of what may have changed meanwhile");
            let config = frontend.config().unwrap();
            assert_eq!((config.plugged_size, config.requested_size), (2 * BLOCK, 16 * BLOCK));
            assert_eq!(driver.plug(gpa(5), 1).unwrap().kind(), ResponseType::Busy, "frozen");
            let device = daemon.api().device().unwrap();
            assert_eq!(
                (&device["connected"], &device["migration_active"]),
                (&true.into(), &true.into())
            );
            assert_eq!(ram.find_wrong_stamp(gpa(2)..gpa(3), 1).unwrap(), None);
            let anew = daemon.stderr().matches("starting anew").count();
            assert_eq!(anew, round, "{}", daemon.stderr());
        }
        assert!(daemon.api().set_migration(false).unwrap().is_success());
        let (_frontend, _channel, mut driver) = connect(&daemon, &ram);
        assert_eq!(driver.plug(gpa(3), 1).unwrap().kind(), ResponseType::Ack);
        assert_eq!((daemon.pid(), inodes()), before);
        assert!(daemon.terminate(PATIENCE).unwrap().success());
        assert!(sockets.iter().all(|path| !path.exists()));
    }
}

#[test]
fn a_listening_socket_that_was_inherited_is_served_again() {
    if OfferedFaults::open().is_err() {
        return eprintln!("skipped: no postcopy in this environment");
    }
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("vhost.sock");
    let listener = UnixListener::bind(&socket).unwrap();
    let mut daemon = Command::new(env!("CARGO_BIN_EXE_vhost-user-mem"))
        .args(["--fd", "0", "--postcopy", "--addr", "0x140000000", "--region-size", "1G"])
        .args(["--requested-size", "128M"])
        .stdin(OwnedFd::from(listener))
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    for _ in 0..2 {
        drop(use_postcopy(&socket, &ram()));
        let frontend = Frontend::connect(&socket).unwrap();
        frontend.negotiate(USUAL_FEATURES, PROTOCOL).unwrap();
        assert_eq!(frontend.config().unwrap().requested_size, 128 << 20);
    }
    assert!(daemon.try_wait().unwrap().is_none());
    rustix::process::kill_process(rustix::process::Pid::from_child(&daemon), Signal::TERM).unwrap();
    assert!(daemon.wait().unwrap().success());
    assert!(socket.exists(), "it is not the daemon's to remove");
}

#[test]
fn an_ordinary_front_end_does_not_start_it_anew() {
    let Some(daemon) = daemon(options()) else { return };
    for _ in 0..3 {
        connect(&daemon, &ram());
    }
    connect(&daemon, &ram());
    assert!(!daemon.stderr().contains("starting anew"), "{}", daemon.stderr());
}

#[test]
fn a_signal_at_any_moment_of_the_start_anew_ends_it_in_order() {
    for delay in 0..12 {
        let Some(mut daemon) = daemon(options()) else { return };
        drop(use_postcopy(&daemon.socket(), &ram()));
        std::thread::sleep(Duration::from_micros(delay * 700));
        daemon.signal(Signal::TERM).unwrap();
        let status = daemon.terminate(PATIENCE).unwrap();
        assert!(status.success(), "{status}: {}", daemon.stderr());
        for path in [daemon.socket(), daemon.api_socket()] {
            assert!(!path.exists(), "{}", path.display());
        }
    }
}
