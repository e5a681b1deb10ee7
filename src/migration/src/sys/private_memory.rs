//! Private anonymous memory, which is what a VMM without other processes beside it gives its guest.
//!
//! For tests and benches of those who fill such memory from outside.

use std::io;
use std::ptr::NonNull;
use std::sync::Arc;

use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::mm::{self, MapFlags, ProtFlags};

/// Owns the address range.
struct Owner {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: it is an address range that is only unmapped through this value.
unsafe impl Send for Owner {}
// SAFETY: as above; nothing is accessed through it.
unsafe impl Sync for Owner {}

impl Drop for Owner {
    fn drop(&mut self) {
        // SAFETY: the range was mapped by `PrivateMemory::map`, and its last user is gone.
        let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), self.len) };
    }
}

/// Private anonymous memory, zeros until it is written.
#[derive(Clone, Debug)]
pub struct PrivateMemory(Arc<HostMapping>);

impl PrivateMemory {
    /// Maps `len` bytes, with huge pages of 2 MiB where that is asked for.
    ///
    /// # Errors
    ///
    /// When the kernel refuses: `len` is 0, or the pool of huge pages lacks some.
    pub fn map(len: u64, huge: bool) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let mut flags = MapFlags::PRIVATE;
        flags |= if huge { MapFlags::HUGETLB | MapFlags::HUGE_2MB } else { MapFlags::NORESERVE };
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: without a wanted address the kernel takes a free one, so no mapping is replaced.
        let start = unsafe { mm::mmap_anonymous(std::ptr::null_mut(), len, prot, flags) }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        let owner = Arc::new(Owner { start, len });
        // SAFETY: the range stays mapped while `owner` lives, and no reference points to it.
        Ok(Self(Arc::new(unsafe { HostMapping::from_raw(start, len, owner) })))
    }

    /// Its bytes.
    pub fn mapping(&self) -> &HostMapping {
        &self.0
    }

    /// Address of its first byte.
    pub fn addr(&self) -> u64 {
        self.0.addr() as u64
    }

    /// Discards a range (bytes from the start), which reads as zeros afterwards: what a VMM does for a balloon and
    /// for virtio-mem. Waits for the reader of a userfaultfd that asked for these events.
    ///
    /// # Errors
    ///
    /// `EINVAL` when these are no whole pages.
    ///
    /// # Panics
    ///
    /// When the range leaves the memory.
    pub fn discard(&self, range: ByteRange) -> io::Result<()> {
        let (start, len) = self.0.locate(range.start(), range.len());
        // SAFETY: the range is inside the mapping, of which no reference exists: that its bytes become zeros
        // is as if they were written.
        unsafe { mm::madvise(start.cast(), len, mm::Advice::LinuxDontNeed) }?;
        Ok(())
    }
}
