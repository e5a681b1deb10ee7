//! The file behind guest RAM: what it is, and giving its memory back.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{self, FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use thiserror::Error;

use crate::FileRange;
use crate::sys::page_cache;

/// One fallocate call discards at most this much, or one page of the backing where that is larger,
/// so that a request for much memory does not hold the inode's locks for long.
const DISCARD_CHUNK: u64 = 256 << 20;

/// Resident pages are looked at in windows of this size, aligned in the file.
const WINDOW: u64 = 2 << 20;

/// One call counts at most this much, since it cannot be interrupted.
const COUNT_CHUNK: u64 = 1 << 30;

/// Where a hole is punched to see whether it can be: behind any memory, so that the size of the
/// file need not be asked for. File systems on disks do not go as far.
const FAR: u64 = 1 << 62;

const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// What kind of memory a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingKind {
    /// memfd or tmpfs, with or without transparent huge pages.
    Shmem,
    /// hugetlbfs or a hugetlb memfd.
    Hugetlb,
    /// A file on a file system that can punch holes.
    File,
}

/// Why memory is refused: it could never be discarded, or not whole blocks of it.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BackingError {
    /// The file descriptor cannot be written, so neither can holes be punched.
    #[error("the file is not open for reading and writing")]
    NotWritable,
    /// What is written to it lands at its end, wherever it belongs.
    #[error("the file is open for appending only (O_APPEND): open it without")]
    Appending,
    /// A seal forbids giving memory back.
    #[error("the file is sealed with {0}, which forbids giving its memory back")]
    Sealed(&'static str),
    /// The file system cannot punch holes.
    #[error("the file system cannot punch holes, so memory could never be discarded")]
    NoHoles,
    /// Blocks would not cover whole pages of the backing.
    #[error(
        "{what} {value:#x} is not a multiple of the page size {page_size:#x} of the backing, so \
         memory of a block could not be discarded"
    )]
    PageSize {
        /// What is unaligned.
        what: &'static str,
        /// Its value, bytes.
        value: u64,
        /// Page size of the backing, bytes.
        page_size: u64,
    },
    /// A system call failed.
    #[error("cannot {what}: {source}")]
    System {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        source: io::Error,
    },
}

/// An open file that holds guest RAM and can discard it.
#[derive(Debug)]
pub struct Backing {
    file: File,
    kind: BackingKind,
    page_size: u64,
    /// Where holes are punched that change nothing; `None` when that is at the end of the file.
    probe_at: Option<u64>,
}

impl Backing {
    /// Looks at `file` and refuses it when its memory could not be discarded.
    ///
    /// # Errors
    ///
    /// The reason.
    pub fn new(file: File) -> Result<Self, BackingError> {
        let system = |what| move |errno: Errno| BackingError::System { what, source: errno.into() };
        let flags = fs::fcntl_getfl(&file).map_err(system("read the flags of the file"))?;
        if !flags.contains(OFlags::RDWR) {
            return Err(BackingError::NotWritable);
        }
        let statfs = fs::fstatfs(&file).map_err(system("look at the file system"))?;
        // The magic is a 32 bit number in a wider, signed field.
        let kind = match statfs.f_type.cast_unsigned() & 0xffff_ffff {
            TMPFS_MAGIC => BackingKind::Shmem,
            HUGETLBFS_MAGIC => BackingKind::Hugetlb,
            _ => BackingKind::File,
        };
        let page_size = match kind {
            BackingKind::Hugetlb => u64::try_from(statfs.f_bsize).unwrap_or(u64::MAX),
            BackingKind::Shmem | BackingKind::File => rustix::param::page_size() as u64,
        };
        // A file description of our own, since looking for holes moves the offset that duplicated
        // descriptors share. Where it cannot be had, the shared one has to do.
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&file));
        // Without waiting for another process that has a lease on the file.
        let at_once = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
        let own = File::options().read(true).write(true).custom_flags(at_once).open(path);
        let file = match own {
            Ok(own) => own,
            Err(_) if flags.contains(OFlags::APPEND) => return Err(BackingError::Appending),
            Err(_) => file,
        };
        let mut backing = Self { file, kind, page_size, probe_at: None };
        if kind != BackingKind::File && backing.file_len()? <= FAR {
            backing.probe_at = Some(FAR);
        }
        backing.probe()?;
        Ok(backing)
    }

    /// The file itself.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// What kind of memory the file is.
    pub fn kind(&self) -> BackingKind {
        self.kind
    }

    /// The unit in which memory can be discarded, bytes.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Whether memory can be discarded now. Seals can be added at any time, so this is asked
    /// before every change of block state.
    ///
    /// # Errors
    ///
    /// The reason why not.
    pub fn probe(&self) -> Result<(), BackingError> {
        // A hole past the end of the file changes nothing, and takes the kernel through the
        // same checks as a real one: seals, attributes of the inode, security modules.
        let at = match self.probe_at {
            Some(at) => at,
            None => self.file_len()?.next_multiple_of(self.page_size),
        };
        // Less than a page of shmem is nothing to unmap, which is the quickest; hugetlb may look
        // at seals only where there is a page.
        let len = if self.kind == BackingKind::Shmem { 1 } else { self.page_size };
        match punch(&self.file, at, len) {
            Ok(()) => Ok(()),
            Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => Err(BackingError::NoHoles),
            Err(errno) => Err(self.sealed().map_or_else(
                || BackingError::System { what: "punch a hole", source: errno.into() },
                BackingError::Sealed,
            )),
        }
    }

    /// The seal that forbids giving memory back, if there is one.
    fn sealed(&self) -> Option<&'static str> {
        let seals = fs::fcntl_get_seals(&self.file).ok()?;
        let forbidding = [
            (fs::SealFlags::WRITE, "F_SEAL_WRITE"),
            (fs::SealFlags::FUTURE_WRITE, "F_SEAL_FUTURE_WRITE"),
        ];
        forbidding.into_iter().find(|(seal, _)| seals.contains(*seal)).map(|(_, name)| name)
    }

    /// Discards the memory of `range` (bytes of the file, whole pages): the host frees it, and it
    /// reads as zeros.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for parts of hugetlb pages, of which the kernel would free nothing and say that
    /// it did. When the kernel refuses; what lies before the failing chunk is discarded.
    pub fn discard(&self, range: FileRange) -> io::Result<()> {
        // Of whole pages a punch leaves none in the file, also of those that are pinned.
        let whole = [range.start(), range.end()].iter().all(|at| at.is_multiple_of(self.page_size));
        if self.kind == BackingKind::Hugetlb && !whole {
            let what = format!(
                "{range} is not made of whole pages of {:#x} bytes, of which alone memory can be \
                 discarded",
                self.page_size
            );
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        for chunk in range.chunks(self.chunk()) {
            punch(&self.file, chunk.start(), chunk.len())?;
        }
        Ok(())
    }

    /// The most that one call discards or takes: whole pages of the backing.
    fn chunk(&self) -> u64 {
        // Both are powers of two.
        DISCARD_CHUNK.max(self.page_size)
    }

    /// Takes host memory for all of `range` (bytes of the file).
    ///
    /// # Errors
    ///
    /// When there is not enough; what was taken stays, since only the caller knows what was there
    /// before.
    pub fn reserve(&self, range: FileRange) -> io::Result<()> {
        for chunk in range.chunks(self.chunk()) {
            let flags = FallocateFlags::KEEP_SIZE;
            let reserve = || fs::fallocate(&self.file, flags, chunk.start(), chunk.len());
            rustix::io::retry_on_intr(reserve)?;
        }
        Ok(())
    }

    /// Bytes of `range` (of the file, whole pages) that the host holds. `None` for hugetlb files,
    /// which do not tell their holes.
    ///
    /// Of a whole file in memory the kernel keeps count. In a part of one, the pages that are resident
    /// are counted, some 50 ns each, or searched one by one before Linux 6.5, which takes several
    /// times that. Giving memory back meanwhile waits for neither. Of files on disks, holes are
    /// searched.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched.
    pub fn resident(&self, range: FileRange) -> io::Result<Option<u64>> {
        if self.kind == BackingKind::Hugetlb {
            return Ok(None);
        }
        if self.kind == BackingKind::Shmem {
            if self.is_counted_by_the_kernel(range) {
                let stat = fs::fstat(&self.file)?;
                return Ok(u64::try_from(stat.st_blocks).ok().map(|blocks| blocks * 512));
            }
            return self.count_pages(range).or_else(|_| self.search_pages(range)).map(Some);
        }
        let mut resident = 0;
        self.for_each_data(range, |data| {
            resident += data.len();
            Ok(())
        })?;
        Ok(Some(resident))
    }

    /// Bytes that the host holds for the whole file.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub fn resident_size(&self) -> io::Result<u64> {
        let blocks = fs::fstat(&self.file)?.st_blocks;
        Ok(u64::try_from(blocks).unwrap_or(0).saturating_mul(512))
    }

    /// Whether the kernel keeps count of what `range` holds: it is a whole file in memory. Files on disks
    /// also have blocks for what is no data.
    pub fn is_counted_by_the_kernel(&self, range: FileRange) -> bool {
        let is_whole = || self.file_len().is_ok_and(|len| len <= range.end());
        match self.kind {
            BackingKind::Shmem => range.start() == 0 && is_whole(),
            // Not counted at all.
            BackingKind::Hugetlb => true,
            BackingKind::File => false,
        }
    }

    /// Resident bytes of `range` of a file in memory, as the kernel counts them.
    fn count_pages(&self, range: FileRange) -> io::Result<u64> {
        let chunks = range.chunks(COUNT_CHUNK);
        let pages = chunks.map(|chunk| page_cache::resident_pages(&self.file, chunk));
        Ok(pages.sum::<io::Result<u64>>()? * self.page_size)
    }

    /// Resident bytes of `range` of a file in memory. A search for the end of the data
    /// would hold the inode's lock, which giving memory back needs, for as long as that goes on.
    fn search_pages(&self, range: FileRange) -> io::Result<u64> {
        let mut resident = 0;
        self.for_each_data_page(range, |pages| resident += pages.len())?;
        Ok(resident)
    }

    /// Discards what `range` (bytes of the file, whole pages) holds, if anything. Costs one short
    /// search where it is empty, and what lies past its end costs nothing.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched or the kernel refuses.
    pub fn sweep(&self, range: FileRange) -> io::Result<()> {
        self.sweep_all([range])
    }

    /// As [`sweep`](Self::sweep) of each of several ranges, ascending and apart. One search passes over all
    /// that lie before the data it finds, so that ranges of an empty file cost nothing each.
    ///
    /// # Errors
    ///
    /// The first failure; the other ranges were still tried.
    pub fn sweep_all(&self, ranges: impl IntoIterator<Item = FileRange>) -> io::Result<()> {
        let mut swept = Ok(());
        let mut data = Some(0);
        for range in ranges {
            swept = swept.and(self.sweep_from(range, &mut data));
        }
        swept
    }

    /// Sweeps `range`. `data` is where the last search ended (`None`: there is no data from there on), which
    /// began no later than `range` does; it becomes where this one ends.
    fn sweep_from(&self, range: FileRange, data: &mut Option<u64>) -> io::Result<()> {
        if self.kind == BackingKind::Hugetlb {
            return self.discard(range);
        }
        let mut rest = Some(range);
        // Where the data ends is not searched: to punch what is empty costs less.
        while let (Some(range), Some(known)) = (rest, *data)
            && known < range.end()
        {
            if known <= range.start() {
                *data = self.next_data(range.start())?;
            }
            let Some(found) = data.filter(|data| *data < range.end()) else { break };
            let start = found / self.page_size * self.page_size;
            let from = FileRange::from_bounds(start.max(range.start()), range.end());
            let Some(part) = from.and_then(|from| from.chunks(self.chunk()).next()) else { break };
            self.discard(part)?;
            *data = Some(part.end());
            rest = FileRange::from_bounds(part.end(), range.end());
        }
        Ok(())
    }

    /// Calls `visit` with the parts of `range` (bytes of the file, whole pages) that hold data,
    /// ascending; pages that were only reserved may be among them. Unlike
    /// [`for_each_data`](Self::for_each_data) it costs nothing that there is data past the range.
    /// hugetlb files do not tell their holes.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched.
    pub fn for_each_resident(
        &self,
        range: FileRange,
        mut visit: impl FnMut(FileRange),
    ) -> io::Result<()> {
        let mut rest = Some(range);
        while let Some(range) = rest
            && let Some(data) = self.next_data(range.start())?
        {
            let start = (data / self.page_size * self.page_size).max(range.start());
            let end = (start + 1).next_multiple_of(WINDOW).min(range.end());
            let Some(window) = FileRange::from_bounds(start, end) else { break };
            rest = FileRange::from_bounds(window.end(), range.end());
            let resident = page_cache::resident_pages(&self.file, window).ok();
            if self.kind == BackingKind::Shmem
                && resident.and_then(|pages| pages.checked_mul(self.page_size))
                    == Some(window.len())
            {
                visit(window);
                continue;
            }
            self.for_each_data_page(window, &mut visit)?;
        }
        Ok(())
    }

    /// Calls `visit` with the runs of pages of `range` that hold data, by a short search for each.
    fn for_each_data_page(
        &self,
        range: FileRange,
        mut visit: impl FnMut(FileRange),
    ) -> io::Result<()> {
        let mut run: Option<FileRange> = None;
        let mut at = range.start();
        while let Some(data) = self.next_data(at)?.filter(|data| *data < range.end()) {
            let start = (data / self.page_size * self.page_size).max(range.start());
            let end = (start + 1).next_multiple_of(self.page_size).min(range.end());
            let before = run.filter(|run| run.end() == start);
            if before.is_none() {
                run.into_iter().for_each(&mut visit);
            }
            run = FileRange::from_bounds(before.map_or(start, FileRange::start), end);
            at = end;
        }
        run.into_iter().for_each(visit);
        Ok(())
    }

    /// Calls `visit` with each maximal part of `range` (bytes of the file) that holds data,
    /// ascending. Holes are found without being touched; hugetlb files do not tell theirs.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched, or the first error of `visit`.
    pub fn for_each_data(
        &self,
        range: FileRange,
        mut visit: impl FnMut(FileRange) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = Some(range);
        while let Some(range) = rest
            && let Some(data) = self.first_data(range)?
        {
            visit(data)?;
            rest = FileRange::from_bounds(data.end(), range.end());
        }
        Ok(())
    }

    /// The first maximal part of `range` (bytes of the file) that holds data. The search for its
    /// end may go far beyond the range.
    fn first_data(&self, range: FileRange) -> io::Result<Option<FileRange>> {
        let mut at = range.start();
        while let Some(start) = self.next_data(at)?.filter(|start| *start < range.end()) {
            let end = match seek(&self.file, SeekFrom::Hole(start)) {
                // Truncated meanwhile.
                Err(Errno::NXIO) => range.end(),
                other => other?,
            };
            let data = FileRange::from_bounds(start, end).and_then(|d| d.intersection(range));
            if data.is_some() {
                return Ok(data);
            }
            // Punched meanwhile.
            at = start + 1;
        }
        Ok(None)
    }

    /// The first byte from `from` (of the file) on that holds data. Nothing is touched; hugetlb
    /// files do not tell their holes.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched.
    pub fn next_data(&self, from: u64) -> io::Result<Option<u64>> {
        match seek(&self.file, SeekFrom::Data(from)) {
            // No data up to the end of the file.
            Err(Errno::NXIO) => Ok(None),
            found => Ok(Some(found?)),
        }
    }

    /// Size of the file, bytes.
    pub fn file_len(&self) -> Result<u64, BackingError> {
        let metadata = self.file.metadata();
        metadata
            .map(|metadata| metadata.len())
            .map_err(|source| BackingError::System { what: "read the size of the file", source })
    }
}

fn punch(file: &File, offset: u64, len: u64) -> rustix::io::Result<()> {
    let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    rustix::io::retry_on_intr(|| fs::fallocate(file, flags, offset, len))
}

fn seek(file: &File, to: SeekFrom) -> rustix::io::Result<u64> {
    #[cfg(any(test, feature = "test-utils"))]
    SEARCHES.with_borrow_mut(|searches| match to {
        SeekFrom::Hole(_) => searches.holes += 1,
        _ => searches.data += 1,
    });
    fs::seek(file, to)
}

/// Searches that a thread made. Of those for data each is short where there is data; one for a hole
/// is as long as the data.
#[cfg(any(test, feature = "test-utils"))]
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Searches {
    /// For data.
    pub data: usize,
    /// For holes.
    pub holes: usize,
}

#[cfg(any(test, feature = "test-utils"))]
thread_local! {
    /// The searches of this thread.
    pub static SEARCHES: std::cell::RefCell<Searches> = std::cell::RefCell::default();
}

#[cfg(test)]
mod tests;
