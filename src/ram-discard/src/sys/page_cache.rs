//! cachestat(2) (Linux 6.5): how much of a file is in memory.
//!
//! Structures are those of `linux/mman.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use crate::FileRange;

/// New system calls have the same distance on all architectures, also where they are offset.
const SYS_CACHESTAT: libc::c_long = libc::SYS_pidfd_open + (451 - 434);

#[repr(C)]
struct CachestatRange {
    off: u64,
    len: u64,
}

#[repr(C)]
#[derive(Default)]
struct Cachestat {
    nr_cache: u64,
    nr_dirty: u64,
    nr_writeback: u64,
    nr_evicted: u64,
    nr_recently_evicted: u64,
}

/// Pages of `range` (bytes of the file) that a file of tmpfs or a memfd holds, swapped out or not.
/// Takes some 50 ns for each. No lock of the file is held: its writers do not wait.
///
/// # Errors
///
/// When the kernel does not have it or does not tell: `ENOSYS`, `EPERM`, `EOPNOTSUPP`.
pub(crate) fn resident_pages(file: impl AsFd, range: FileRange) -> io::Result<u64> {
    let (fd, no_flags) = (file.as_fd().as_raw_fd(), 0u32);
    let range = CachestatRange { off: range.start(), len: range.len() };
    let mut stat = Cachestat::default();
    // SAFETY: cachestat(2) reads the first structure and writes the second, both of which are
    // valid during the call; no memory of the file is accessed.
    let result = unsafe {
        libc::syscall(
            SYS_CACHESTAT,
            fd,
            std::ptr::from_ref(&range),
            std::ptr::from_mut(&mut stat),
            no_flags,
        )
    };
    if result != 0 {
        return Err(io::Error::last_os_error());
    }
    // What is evicted from memory that has no file behind is in swap.
    Ok(stat.nr_cache + stat.nr_evicted)
}
