//! Finding out which pages are written while they are sent.
//!
//! Who writes decides which tracker sees it; what several see is [`Merged`]:
//!
//! | tracker | sees the writes of |
//! | --- | --- |
//! | [`WriteProtect`] | everybody who writes through this process's page tables: vCPUs, threads, system calls |
//! | [`KvmDirtyLog`] | vCPUs and KVM's in-kernel devices |
//! | [`VhostLog`] | vhost-user back-ends that log, and whatever the VMM marks itself |
//! | [`NeverWritten`] | none: the VM does not run |
//!
//! DMA into pinned pages goes through no page table: O_DIRECT, fixed buffers of io_uring, vfio. The
//! page counts as written when it is pinned, and what lands there after the next sync is seen by
//! neither of the first two. A VMM with such I/O merges a [`VhostLog`] with them and
//! [marks](VhostLog::mark) what was written; for vfio, what the device's or the IOMMU's own log
//! tells.
//!
//! The order that loses no write: [`sync`](DirtyTracker::sync), take pages out of the bitmap,
//! [`clear`](DirtyTracker::clear) them, read them.

mod kvm;
mod merged;
mod vhost_log;
mod write_protect;

use std::io;
use std::ops::Range;

use ram_discard::ByteRange;

use super::page_bitmap::{PageBitmap, pages_touched};

pub use crate::sys::kvm::KvmSlot;
pub use kvm::KvmDirtyLog;
pub use merged::Merged;
pub use vhost_log::{LoggedRange, VhostLog};
pub use write_protect::WriteProtect;

/// Finds out which pages of one RAM block are written. Ranges are bytes from the start of the
/// block; pages are target pages. What a bitmap is too short for is left out.
///
/// A write is never missed: what a tracker cannot tell apart it reports.
pub trait DirtyTracker: Send {
    /// Starts to log writes to `populated`: ascending, disjoint, whole pages of the host. The rest
    /// of the block is discarded, and must not be made to cost anything; writes there are
    /// reported where that is to be had for nothing.
    ///
    /// # Errors
    ///
    /// When writes cannot be logged; nothing is then.
    fn start(&mut self, populated: &[ByteRange]) -> io::Result<()>;

    /// Adds the pages written since logging started, or since they were reported last. A page that
    /// was reported may be reported again, and writes to it may not, until it is cleared.
    ///
    /// # Errors
    ///
    /// When the log cannot be read.
    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()>;

    /// Makes sure that writes to `range` from now on are reported: called before its pages are
    /// read, or when it is masked. Forgets what [`sync`](Self::sync) has reported, there and where
    /// it is cheaper also around it; a write that was not reported yet is never forgotten. So
    /// `range` may well be larger than what is read.
    ///
    /// # Errors
    ///
    /// When the log cannot be cleared.
    fn clear(&mut self, range: ByteRange) -> io::Result<()>;

    /// `range`, whole pages of the host of which nothing was populated, is about to be: writes to it are logged
    /// when this returns. For trackers that log all of the block nothing is done.
    ///
    /// # Errors
    ///
    /// When they cannot be logged.
    fn populate(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    /// `range`, which was populated, is discarded from now on, and must not be made to cost anything. For trackers
    /// that log all of the block nothing is done.
    ///
    /// # Errors
    ///
    /// When that cannot be noted.
    fn discard(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    /// Ends logging.
    ///
    /// # Errors
    ///
    /// When it cannot be ended.
    fn stop(&mut self) -> io::Result<()>;
}

/// The tracker of memory that is not written: the guest is stopped.
#[derive(Clone, Copy, Debug, Default)]
pub struct NeverWritten;

impl DirtyTracker for NeverWritten {
    fn start(&mut self, _populated: &[ByteRange]) -> io::Result<()> {
        Ok(())
    }

    fn sync(&mut self, _dirty: &mut PageBitmap) -> io::Result<()> {
        Ok(())
    }

    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The pages of `range` that `dirty` has bits for.
fn pages_within(range: ByteRange, dirty: &PageBitmap) -> Range<u64> {
    let pages = pages_touched(range);
    pages.start..pages.end.min(dirty.nr_pages())
}
