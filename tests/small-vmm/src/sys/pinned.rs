//! A page that something other than a page table refers to, as a device does by DMA.

use std::io::{self, PipeReader, Read};
use std::os::fd::AsRawFd;

use crate::memory::{GuestRam, PAGE_SIZE};

/// A page of guest memory that is pinned: a pipe holds the page itself, whatever becomes of the
/// memory that it was at the time.
#[derive(Debug)]
pub struct Pinned(PipeReader);

impl Pinned {
    /// Pins the page at `gpa`; a hole becomes a page by that.
    ///
    /// # Errors
    ///
    /// When there is no such memory, no pipe, or no page to be had.
    pub fn page(ram: &GuestRam, gpa: u64) -> io::Result<Self> {
        let start = ram.user_addr(gpa).map_err(io::Error::other)?;
        let (reader, writer) = io::pipe()?;
        let page = libc::iovec {
            iov_base: std::ptr::with_exposed_provenance_mut(start as usize),
            iov_len: PAGE_SIZE as usize,
        };
        // SAFETY: the kernel reads one vector, which lives during the call. It takes a reference to
        // the page there if there is one, and fails otherwise; it writes nothing.
        let pinned = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const page, 1, 0) };
        match usize::try_from(pinned) {
            Ok(len) if len == PAGE_SIZE as usize => Ok(Self(reader)),
            Ok(len) => Err(io::Error::other(format!("{len} bytes of a page are pinned"))),
            Err(_) => Err(io::Error::last_os_error()),
        }
    }

    /// What the page holds now; it is not pinned any more.
    ///
    /// # Errors
    ///
    /// When the pipe fails.
    pub fn unpin(mut self) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; PAGE_SIZE as usize];
        self.0.read_exact(&mut bytes)?;
        Ok(bytes)
    }
}
