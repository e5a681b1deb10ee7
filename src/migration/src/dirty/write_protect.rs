//! Dirty pages by userfaultfd write-protection in asynchronous mode and PAGEMAP_SCAN.
//!
//! A page that is mapped with the protection was not written. The kernel lifts it at the first
//! write, and a scan finds the page and protects it again in one step.
//!
//! Where nothing is mapped, the protection is a marker in the page tables. Markers for memory that
//! was never touched would cost 2 GiB for 1 TiB, so they are put only where there is data: the
//! block is cut into chunks, and a chunk is *armed* once its file holds data there. What becomes
//! of the others is seen by the file: a chunk that has got data since was written.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use ram_discard::memory::{HostMapping, RamBlock};
use ram_discard::{ByteRange, FileRange};

use super::{DirtyTracker, pages_within};
use crate::page_bitmap::PageBitmap;
use crate::sys::pagemap::{Pagemap, Written};
use crate::sys::userfaultfd::AsyncWriteProtect;

/// What one page of page tables maps with 4 KiB pages: an armed chunk costs 4 KiB at most, and
/// what touched it has paid for that already.
const CHUNK: u64 = 2 << 20;

/// The most that is scanned in one call, or one page of the memory where that is larger, so that a thread
/// that maps memory meanwhile waits for milliseconds.
const SCAN: u64 = 1 << 30;

/// Tracks the writes of everybody who writes through this process's mapping of a block, other than by
/// DMA into pages that were pinned before the last sync: see the [module](super).
///
/// The memory is shmem (memfd, tmpfs; also with transparent huge pages), hugetlb, a file on disk,
/// or anonymous, and one userfaultfd at a time can have it. Pages are told by the target page, on
/// hugetlb by the huge page. Needs Linux 6.7 and no privileges.
///
/// Writes to discarded ranges are reported once each, unless the page is swapped out first.
#[derive(Debug)]
pub struct WriteProtect {
    mapping: Arc<HostMapping>,
    file: Option<Arc<RamBlock>>,
    /// Bytes of the block.
    len: u64,
    /// Bytes that an armed chunk covers: a multiple of the page size of the memory.
    chunk: u64,
    page_size: u64,
    pagemap: Pagemap,
    logging: Option<AsyncWriteProtect>,
    /// Ascending and disjoint.
    populated: Vec<ByteRange>,
    /// One bit a chunk. The populated part of an armed chunk has the protection, or a marker, on
    /// every page that was not written since the last scan.
    armed: PageBitmap,
}

impl WriteProtect {
    /// Tracks a block whose first byte is the first of `mapping`. With the `file` behind it, memory
    /// that was never touched costs nothing. Without (anonymous memory) the block is all of the
    /// mapping, and page tables are allocated for whatever is populated.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when the mapping is shorter than the block, or why the page tables of this
    /// process cannot be opened.
    pub fn new(mapping: Arc<HostMapping>, file: Option<Arc<RamBlock>>) -> io::Result<Self> {
        let (len, page_size) = match &file {
            Some(file) => (file.range().len(), file.page_size()),
            None => (mapping.len(), rustix::param::page_size() as u64),
        };
        if mapping.len() < len {
            let mapped = mapping.len();
            return Err(invalid(format!("a mapping of {mapped:#x} bytes for a block of {len:#x}")));
        }
        let chunk = CHUNK.max(page_size);
        Ok(Self {
            mapping,
            file,
            len,
            chunk,
            page_size,
            pagemap: Pagemap::open()?,
            logging: None,
            populated: Vec::new(),
            armed: PageBitmap::new(len.div_ceil(chunk)),
        })
    }

    /// Arms chunks, which have no protection yet, and adds their data to `dirty`.
    fn arm(&mut self, chunks: &[Range<u64>], dirty: Option<&mut PageBitmap>) -> io::Result<()> {
        let Some(logging) = &self.logging else { return Ok(()) };
        let parts = |chunks: &Range<u64>| {
            let end = (chunks.end * self.chunk).min(self.len);
            let chunks = ByteRange::from_bounds(chunks.start * self.chunk, end);
            let first = chunks.map_or(0, |chunks| {
                self.populated.partition_point(|range| range.end() <= chunks.start())
            });
            self.populated[first..]
                .iter()
                .map_while(move |range| chunks.and_then(|chunks| range.intersection(chunks)))
        };
        for part in chunks.iter().flat_map(parts) {
            logging.protect(&self.mapping, part)?;
        }
        // Only now: whatever was written before the protection is data by now, and whatever is
        // written after it is found by the next scan.
        if let (Some(dirty), Some(file)) = (dirty, &self.file) {
            let base = file_offset(file);
            for part in chunks.iter().flat_map(parts) {
                let in_file = part.in_file(base).ok_or(io::ErrorKind::InvalidInput)?;
                file.backing().for_each_resident(in_file, |data| {
                    if let Some(data) = data.in_block(base) {
                        dirty.set_range(pages_within(data, dirty));
                    }
                })?;
            }
        }
        for run in chunks {
            self.armed.set_range(run.clone());
        }
        Ok(())
    }

    /// The chunks that are not armed and have data in what is populated of them, in ascending runs.
    /// Costs a call for each of them, whatever the size of the block.
    fn fresh(&self) -> io::Result<Vec<Range<u64>>> {
        let mut fresh: Vec<Range<u64>> = Vec::new();
        let Some(file) = &self.file else { return Ok(fresh) };
        let base = file_offset(file);
        let mut at = 0;
        while let Some(unarmed) = self.next_unarmed(at) {
            let Some(data) = file.backing().next_data(base + unarmed)? else { break };
            let data = data - base;
            if self.next_unarmed(data) != Some(data) {
                at = data;
                continue;
            }
            let chunk = data / self.chunk;
            match fresh.last_mut() {
                Some(run) if run.end == chunk => run.end += 1,
                _ => fresh.push(chunk..chunk + 1),
            }
            at = (chunk + 1) * self.chunk;
        }
        Ok(fresh)
    }

    /// The first populated byte from `at` on whose chunk is not armed.
    fn next_unarmed(&self, mut at: u64) -> Option<u64> {
        loop {
            let first = self.populated.partition_point(|range| range.end() <= at);
            let from = self.populated.get(first)?.start().max(at);
            let chunk = from / self.chunk;
            match self.armed.next_run(chunk, self.armed.nr_pages(), u64::MAX) {
                Some(armed) if armed.start == chunk => at = armed.end * self.chunk,
                _ => return Some(from),
            }
        }
    }

    /// A truncated file has no data and no page to be protected: nothing would be found.
    fn check_size(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let len = file.backing().file_len().map_err(io::Error::other)?;
        let needed = file_offset(file) + self.len;
        if len < needed {
            let what =
                format!("the file of RAM block {} has {len:#x} bytes of {needed:#x}", file.id());
            return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
        }
        Ok(())
    }
}

impl DirtyTracker for WriteProtect {
    fn start(&mut self, populated: &[ByteRange]) -> io::Result<()> {
        self.stop()?;
        self.check_size()?;
        let mut end = 0;
        for range in populated {
            let aligned =
                [range.start(), range.end()].iter().all(|at| at.is_multiple_of(self.page_size));
            if range.start() < end || range.end() > self.len || !aligned {
                return Err(invalid(format!("populated range {range} is out of order or place")));
            }
            end = range.end();
        }
        // All of it at once, discarded ranges too: this is one flag of the mapping and costs
        // nothing, while a mapping cut at each discarded range would run into the limit on their
        // number.
        let logging = AsyncWriteProtect::open()?;
        logging.register(&self.mapping, 0, self.len)?;
        self.logging = Some(logging);
        self.populated = populated.to_vec();
        let armed = match self.file {
            Some(_) => self.fresh().and_then(|chunks| self.arm(&chunks, None)),
            None => self.arm(std::slice::from_ref(&(0..self.armed.nr_pages())), None),
        };
        if armed.is_err() {
            self.stop()?;
        }
        armed
    }

    fn sync(&mut self, dirty: &mut PageBitmap) -> io::Result<()> {
        if self.logging.is_none() {
            return Ok(());
        }
        self.check_size()?;
        for (part, written) in windows(&self.populated, &self.armed, self.chunk, self.len) {
            self.pagemap.take_written(&self.mapping, part, written, |run| {
                dirty.set_range(pages_within(run, dirty));
            })?;
        }
        let fresh = self.fresh()?;
        self.arm(&fresh, Some(dirty))
    }

    /// Nothing to do: a sync protects what it reports.
    fn clear(&mut self, _range: ByteRange) -> io::Result<()> {
        Ok(())
    }

    /// Where a chunk is armed already, because of what else is populated in it, the range gets the protection now;
    /// elsewhere the file shows what is written.
    fn populate(&mut self, range: ByteRange) -> io::Result<()> {
        let Some(logging) = &self.logging else { return Ok(()) };
        let aligned =
            [range.start(), range.end()].iter().all(|at| at.is_multiple_of(self.page_size));
        let first = self.populated.partition_point(|other| other.end() <= range.start());
        let free = self.populated.get(first).is_none_or(|next| next.start() >= range.end());
        if range.end() > self.len || !aligned || !free {
            return Err(invalid(format!("range {range} is out of place, or populated already")));
        }
        let chunks = range.start() / self.chunk..range.end().div_ceil(self.chunk);
        for run in self.armed.runs(chunks) {
            let armed = ByteRange::from_bounds(run.start * self.chunk, run.end * self.chunk);
            if let Some(part) = armed.and_then(|armed| armed.intersection(range)) {
                logging.protect(&self.mapping, part)?;
            }
        }
        // A sync costs a call for each range, so what adjoins is one.
        let (mut start, mut end, mut at, mut after) = (range.start(), range.end(), first, first);
        if let Some(next) = self.populated.get(first).filter(|next| next.start() == end) {
            (end, after) = (next.end(), first + 1);
        }
        let before = first.checked_sub(1).map(|before| self.populated[before]);
        if let Some(before) = before.filter(|before| before.end() == start) {
            (start, at) = (before.start(), first - 1);
        }
        self.populated.splice(at..after, ByteRange::from_bounds(start, end));
        Ok(())
    }

    /// A chunk of which nothing is populated any more is not armed.
    fn discard(&mut self, range: ByteRange) -> io::Result<()> {
        let first = self.populated.partition_point(|other| other.end() <= range.start());
        let touched = self.populated[first..].partition_point(|other| other.start() < range.end());
        let rest: Vec<_> = self.populated[first..first + touched]
            .iter()
            .flat_map(|other| other.subtract(range))
            .flatten()
            .collect();
        self.populated.splice(first..first + touched, rest);
        for chunk in range.start() / self.chunk..range.end().div_ceil(self.chunk) {
            let whole = ByteRange::from_bounds(chunk * self.chunk, (chunk + 1) * self.chunk);
            let used = whole.is_some_and(|whole| {
                let next = self.populated.partition_point(|other| other.end() <= whole.start());
                self.populated.get(next).is_some_and(|next| next.overlaps(whole))
            });
            if !used && chunk < self.armed.nr_pages() {
                self.armed.clear(chunk);
            }
        }
        Ok(())
    }

    fn stop(&mut self) -> io::Result<()> {
        self.logging = None;
        self.populated.clear();
        self.armed.clear_all();
        Ok(())
    }
}

/// The block from start to end, cut where armed memory begins and ends. What is not armed is only
/// asked for what is mapped, so that it gets no markers.
fn segments(
    populated: &[ByteRange],
    armed: &PageBitmap,
    chunk: u64,
    len: u64,
) -> impl Iterator<Item = (ByteRange, Written)> {
    let armed = populated.iter().flat_map(move |range| {
        let chunks = range.start() / chunk..range.end().div_ceil(chunk);
        armed.runs(chunks).filter_map(move |run| {
            ByteRange::from_bounds(run.start * chunk, run.end * chunk)?.intersection(*range)
        })
    });
    let mut at = 0;
    let ends = armed.map(|range| (range.start(), range.end())).chain([(len, len)]);
    ends.flat_map(move |(start, end)| {
        let rest = ByteRange::from_bounds(at, start).map(|rest| (rest, Written::Mapped));
        at = end;
        let armed = ByteRange::from_bounds(start, end).map(|range| (range, Written::Unprotected));
        [rest, armed].into_iter().flatten()
    })
}

/// The segments of a block, cut into what one call of a sync scans.
fn windows(
    populated: &[ByteRange],
    armed: &PageBitmap,
    chunk: u64,
    len: u64,
) -> impl Iterator<Item = (ByteRange, Written)> {
    let window = SCAN.max(chunk);
    let segments = segments(populated, armed, chunk, len);
    segments.flat_map(move |(range, how)| cut(range, window).map(move |part| (part, how)))
}

/// Parts of `range` that lie in one window each.
fn cut(range: ByteRange, window: u64) -> impl Iterator<Item = ByteRange> {
    let mut at = range.start();
    std::iter::from_fn(move || {
        let end = (at / window * window).saturating_add(window).min(range.end());
        let part = ByteRange::from_bounds(at, end)?;
        at = end;
        Some(part)
    })
}

/// Where the block starts in its file.
fn file_offset(file: &RamBlock) -> u64 {
    file.file_range(file.range()).map_or(0, FileRange::start)
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, what)
}

#[cfg(test)]
mod tests;
