//! What needs `unsafe`: ioctls that no crate wraps safely, and system calls that take guest memory
//! by address.
//!
//! This is the only folder of the crate with `unsafe` code.

#![allow(unsafe_code, reason = "system calls and mappings; each block says why it is sound")]

pub(crate) mod gather;
pub(crate) mod huge_page_cache;
pub(crate) mod huge_pages;
pub(crate) mod kvm;
pub mod page_faults;
pub mod pagemap;
pub mod private_memory;
pub mod shared_faults;
#[cfg(test)]
pub(crate) mod testing;
pub mod userfaultfd;
pub mod vmm_faults;

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::ioctl::Opcode;

pub use gather::GatherWrite;
pub(crate) use gather::WritePolicy;

/// An ioctl that takes a structure by address and may return a number.
///
/// # Safety
///
/// `opcode` takes a `T` on this descriptor, and addresses in `argument` are valid for what the
/// kernel does with them.
unsafe fn ioctl<T>(fd: impl AsFd, opcode: Opcode, argument: &mut T) -> io::Result<u32> {
    // SAFETY: the caller's promise; `argument` is valid for reads and writes during the call.
    let result =
        unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), opcode.into(), std::ptr::from_mut(argument)) };
    u32::try_from(result).map_err(|_| io::Error::last_os_error())
}
