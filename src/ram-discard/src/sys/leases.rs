//! Tests with leases on files, which no crate wraps safely.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::memory::Backing;

/// Linux's, in `asm-generic/fcntl.h`.
const F_SETSIG: libc::c_int = 10;

/// Whether this process has a lease now, so that others who open `file` have to wait for it.
fn lease(file: &File) -> bool {
    // A holder is told to let go by SIGIO, which would end it; this signal is ignored.
    // SAFETY: the descriptor is open, and both commands take a number and touch no memory.
    unsafe {
        libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG) == 0
            && libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK) == 0
    }
}

#[test]
fn memory_that_is_open_for_appending_is_refused_where_it_cannot_be_opened_again() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    let appending = file.try_clone().unwrap();
    rustix::fs::fcntl_setfl(&file, rustix::fs::OFlags::APPEND).unwrap();
    assert!(lease(&file), "{}", std::io::Error::last_os_error());
    let error = Backing::new(appending).unwrap_err().to_string();
    assert!(error.contains("open it without"), "{error}");
}

#[test]
fn memory_with_a_lease_of_its_owner_is_taken_without_waiting_for_that() {
    let file = tempfile::tempfile_in("/dev/shm").unwrap();
    file.set_len(1 << 20).unwrap();
    let theirs = file.try_clone().unwrap();
    assert!(lease(&file), "{}", std::io::Error::last_os_error());
    let (done, waited) = channel();
    std::thread::spawn(move || done.send(Backing::new(theirs).map(|backing| backing.kind())));
    // The kernel would break the lease after 45 s.
    let kind = waited.recv_timeout(Duration::from_secs(20)).expect("it waits").unwrap();
    assert_eq!(kind, crate::memory::BackingKind::Shmem);
}
