//! PAGEMAP_SCAN (Linux 6.7): which pages of a mapping were written, and protecting them again in
//! the same step.
//!
//! Structures and numbers are those of `linux/fs.h`.

use std::fs::File;
use std::io;

use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::ioctl::{Opcode, opcode};

const PAGEMAP_SCAN: Opcode = opcode::read_write::<PmScanArg>(b'f', 16);
const PM_SCAN_WP_MATCHING: u64 = 1 << 0;
const PM_SCAN_CHECK_WPASYNC: u64 = 1 << 1;
const PAGE_IS_WRITTEN: u64 = 1 << 1;
const PAGE_IS_PRESENT: u64 = 1 << 3;

/// How many runs the kernel tells in one call.
const REGIONS: usize = 1024;

#[repr(C)]
struct PmScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Which pages count as written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Written {
    /// All that do not carry the write-protection: also those with nothing mapped, which were
    /// written and swapped out, or never protected. Protecting these takes page tables.
    Unprotected,
    /// Those of them that are mapped now. Never takes page tables.
    Mapped,
}

impl Written {
    fn categories(self) -> u64 {
        match self {
            Self::Unprotected => PAGE_IS_WRITTEN,
            Self::Mapped => PAGE_IS_WRITTEN | PAGE_IS_PRESENT,
        }
    }
}

/// The page tables of this process.
#[derive(Debug)]
pub struct Pagemap {
    file: File,
    regions: Vec<PageRegion>,
}

impl Pagemap {
    /// Opens the page tables of this process.
    ///
    /// # Errors
    ///
    /// When `/proc` is not there.
    pub fn open() -> io::Result<Self> {
        let file = File::open("/proc/self/pagemap")?;
        Ok(Self { file, regions: vec![PageRegion::default(); REGIONS] })
    }

    /// Tells `visit` the written runs of `range` (bytes of the mapping, whole pages), ascending,
    /// and protects them again, each page in one step: a write is either before, and told, or after,
    /// and told next time.
    ///
    /// # Errors
    ///
    /// `EPERM` when a part is not under [`AsyncWriteProtect`](super::userfaultfd::AsyncWriteProtect)
    /// any more, because something else was mapped there. What was told before was protected.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn take_written(
        &mut self,
        mapping: &HostMapping,
        range: ByteRange,
        written: Written,
        mut visit: impl FnMut(ByteRange),
    ) -> io::Result<()> {
        let base = mapping.locate(range.start(), range.len()).0.addr() as u64 - range.start();
        let mut at = range.start();
        while at < range.end() {
            let mut arg = PmScanArg {
                size: size_of::<PmScanArg>() as u64,
                flags: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC,
                start: base + at,
                end: base + range.end(),
                walk_end: 0,
                vec: self.regions.as_mut_ptr().expose_provenance() as u64,
                vec_len: self.regions.len() as u64,
                max_pages: 0,
                category_inverted: 0,
                category_mask: written.categories(),
                category_anyof_mask: 0,
                return_mask: PAGE_IS_WRITTEN,
            };
            // SAFETY: PAGEMAP_SCAN takes this structure; `vec` has room for `vec_len` regions and
            // outlives the call.
            let found = match unsafe { super::ioctl(&self.file, PAGEMAP_SCAN, &mut arg) } {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                found => found?,
            };
            for region in &self.regions[..found as usize] {
                let run = ByteRange::from_bounds(region.start, region.end);
                let run = run.and_then(|run| run.in_part(base));
                if let Some(run) = run.and_then(|run| run.intersection(range)) {
                    visit(run);
                }
            }
            let next = arg.walk_end.saturating_sub(base);
            if next <= at {
                // The kernel stops at a huge page that the range covers in part.
                let what = format!("{range} is not made of whole pages of the mapping");
                return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
            }
            at = next;
        }
        Ok(())
    }
}
