//! The file behind guest RAM: what it is, and giving its memory back.

use std::fs::File;
use std::io;
use std::os::unix::fs::OpenOptionsExt;

use rustix::fs::{self, FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;
use thiserror::Error;

use crate::ByteRange;
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

/// An open file that holds guest RAM and can give it back.
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
    pub fn discard(&self, range: ByteRange) -> io::Result<()> {
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
    pub fn reserve(&self, range: ByteRange) -> io::Result<()> {
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
    /// Of a whole file in memory the kernel keeps count. In a part of one, the pages that are held
    /// are counted, some 50 ns each, or searched one by one before Linux 6.5, which takes several
    /// times that. Giving memory back meanwhile waits for neither. Of files on disks, holes are
    /// searched.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched.
    pub fn resident(&self, range: ByteRange) -> io::Result<Option<u64>> {
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

    /// Whether the kernel keeps count of what `range` holds: it is a whole file in memory. Files on disks
    /// also have blocks for what is no data.
    pub fn is_counted_by_the_kernel(&self, range: ByteRange) -> bool {
        let is_whole = || self.file_len().is_ok_and(|len| len <= range.end());
        match self.kind {
            BackingKind::Shmem => range.start() == 0 && is_whole(),
            // Not counted at all.
            BackingKind::Hugetlb => true,
            BackingKind::File => false,
        }
    }

    /// Bytes of `range` that a file in memory holds, as the kernel counts them.
    fn count_pages(&self, range: ByteRange) -> io::Result<u64> {
        let chunks = range.chunks(COUNT_CHUNK);
        let pages = chunks.map(|chunk| page_cache::resident_pages(&self.file, chunk));
        Ok(pages.sum::<io::Result<u64>>()? * self.page_size)
    }

    /// Bytes of `range` that a file in memory holds data in. A search for the end of the data
    /// would hold the inode's lock, which giving memory back needs, for as long as that goes on.
    fn search_pages(&self, range: ByteRange) -> io::Result<u64> {
        let mut held = 0;
        self.for_each_data_page(range, |pages| held += pages.len())?;
        Ok(held)
    }

    /// Discards what `range` (bytes of the file, whole pages) holds, if anything. Costs one short
    /// search where it is empty, and what lies past its end costs nothing.
    ///
    /// # Errors
    ///
    /// When the file cannot be searched or the kernel refuses.
    pub fn sweep(&self, range: ByteRange) -> io::Result<()> {
        if self.kind == BackingKind::Hugetlb {
            return self.discard(range);
        }
        // Where the data ends is not searched: to punch what is empty costs less.
        let mut rest = Some(range);
        while let Some(range) = rest
            && let Some(data) = self.next_data(range.start())?
        {
            let start = data / self.page_size * self.page_size;
            let from = ByteRange::from_bounds(start.max(range.start()), range.end());
            let Some(part) = from.and_then(|from| from.chunks(self.chunk()).next()) else { break };
            self.discard(part)?;
            rest = ByteRange::from_bounds(part.end(), range.end());
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
        range: ByteRange,
        mut visit: impl FnMut(ByteRange),
    ) -> io::Result<()> {
        let mut rest = Some(range);
        while let Some(range) = rest
            && let Some(data) = self.next_data(range.start())?
        {
            let start = (data / self.page_size * self.page_size).max(range.start());
            let end = (start + 1).next_multiple_of(WINDOW).min(range.end());
            let Some(window) = ByteRange::from_bounds(start, end) else { break };
            rest = ByteRange::from_bounds(window.end(), range.end());
            let held = page_cache::resident_pages(&self.file, window).ok();
            if self.kind == BackingKind::Shmem
                && held.and_then(|pages| pages.checked_mul(self.page_size)) == Some(window.len())
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
        range: ByteRange,
        mut visit: impl FnMut(ByteRange),
    ) -> io::Result<()> {
        let mut run: Option<ByteRange> = None;
        let mut at = range.start();
        while let Some(data) = self.next_data(at)?.filter(|data| *data < range.end()) {
            let start = (data / self.page_size * self.page_size).max(range.start());
            let end = (start + 1).next_multiple_of(self.page_size).min(range.end());
            let before = run.filter(|run| run.end() == start);
            if before.is_none() {
                run.into_iter().for_each(&mut visit);
            }
            run = ByteRange::from_bounds(before.map_or(start, ByteRange::start), end);
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
        range: ByteRange,
        mut visit: impl FnMut(ByteRange) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut rest = Some(range);
        while let Some(range) = rest
            && let Some(data) = self.first_data(range)?
        {
            visit(data)?;
            rest = ByteRange::from_bounds(data.end(), range.end());
        }
        Ok(())
    }

    /// The first maximal part of `range` (bytes of the file) that holds data. The search for its
    /// end may go far beyond the range.
    fn first_data(&self, range: ByteRange) -> io::Result<Option<ByteRange>> {
        let mut at = range.start();
        while let Some(start) = self.next_data(at)?.filter(|start| *start < range.end()) {
            let end = match seek(&self.file, SeekFrom::Hole(start)) {
                // Truncated meanwhile.
                Err(Errno::NXIO) => range.end(),
                other => other?,
            };
            let data = ByteRange::from_bounds(start, end).and_then(|d| d.intersection(range));
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
mod tests {
    use super::*;
    use crate::huge_page_pool::Pool;
    use rustix::fs::MemfdFlags;
    use std::os::unix::fs::{FileExt, MetadataExt};

    const PAGE: u64 = 4096;

    fn memfd(size: u64) -> File {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(fs::memfd_create("backing-test", flags).unwrap());
        file.set_len(size).unwrap();
        file
    }

    fn range(start: u64, len: u64) -> ByteRange {
        ByteRange::new(start, len).unwrap()
    }

    #[test]
    fn discard_gives_memory_back_and_leaves_the_neighbours() {
        let file = memfd(64 * PAGE);
        file.write_all_at(&vec![0xaa; 64 * 4096], 0).unwrap();
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(backing.kind(), BackingKind::Shmem);
        backing.discard(range(8 * PAGE, 16 * PAGE)).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, 48 * PAGE);
        assert_eq!(backing.resident(range(0, 64 * PAGE)).unwrap(), Some(48 * PAGE));
        assert_eq!(backing.resident(range(4 * PAGE, 8 * PAGE)).unwrap(), Some(4 * PAGE));
        let mut bytes = vec![0; 64 * 4096];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert!(bytes[..8 * 4096].iter().chain(&bytes[24 * 4096..]).all(|&b| b == 0xaa));
        assert!(bytes[8 * 4096..24 * 4096].iter().all(|&b| b == 0));
    }

    #[test]
    fn counting_what_is_resident_neither_allocates_nor_moves_the_offset() {
        use std::io::Seek;
        let mut file = memfd(64 * PAGE);
        file.write_all_at(&[1], 5 * PAGE).unwrap();
        file.seek(io::SeekFrom::Start(7)).unwrap();
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        assert_eq!(backing.resident(range(0, 64 * PAGE)).unwrap(), Some(PAGE));
        assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE);
        assert_eq!(file.stream_position().unwrap(), 7);
    }

    #[test]
    fn sweep_finds_strays() {
        let file = memfd(64 * PAGE);
        for page in [3, 4, 20, 63] {
            file.write_all_at(&[1], page * PAGE).unwrap();
        }
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        backing.sweep(range(4 * PAGE, 60 * PAGE)).unwrap();
        assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE);
    }

    #[test]
    fn a_sweep_and_a_look_at_what_is_resident_search_no_end_of_the_data() {
        let file = memfd(4096 * PAGE);
        file.write_all_at(&vec![1; 4096 * 4096], 0).unwrap();
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        let resident = |range| {
            let mut found = Vec::new();
            backing.for_each_resident(range, |part| found.push(part)).unwrap();
            found
        };
        SEARCHES.take();
        assert_eq!(resident(range(PAGE, PAGE)), [range(PAGE, PAGE)]);
        backing.sweep(range(PAGE, PAGE)).unwrap();
        backing.sweep(range(1023 * PAGE, 2 * PAGE)).unwrap();
        assert_eq!(SEARCHES.take().holes, 0);
        assert_eq!(file.metadata().unwrap().blocks() * 512, 4093 * PAGE);
        assert_eq!(resident(range(0, 3 * PAGE)), [range(0, PAGE), range(2 * PAGE, PAGE)]);
        let across = [range(1022 * PAGE, PAGE), range(1025 * PAGE, 2 * PAGE)];
        assert_eq!(resident(range(1022 * PAGE, 5 * PAGE)), across);
        assert_eq!(SEARCHES.take().holes, 0);
    }

    #[test]
    fn a_chunk_is_never_smaller_than_a_page() {
        let mut backing = Backing::new(memfd(PAGE)).unwrap();
        for page_size in [4 << 10, 2 << 20, 1 << 30, 16 << 30] {
            backing.page_size = page_size;
            assert!(backing.chunk().is_multiple_of(page_size), "{page_size:#x}");
        }
    }

    /// A memfd of two huge pages, and a pool that has them; `None`, having said why, where it cannot
    /// be had.
    fn huge(page_size: u64, size: MemfdFlags) -> Option<(Pool, Backing)> {
        let pool = Pool::with_free(page_size, 2);
        let pool = pool.inspect_err(|error| eprintln!("skipped: {error}")).ok()?;
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | size;
        let file = File::from(fs::memfd_create("backing-test", flags).unwrap());
        file.set_len(2 * page_size).unwrap();
        Some((pool, Backing::new(file).unwrap()))
    }

    #[test]
    fn huge_pages_that_are_discarded_are_in_the_pool_again() {
        for (page_size, size) in [(2 << 20, MemfdFlags::HUGE_2MB), (1 << 30, MemfdFlags::HUGE_1GB)]
        {
            let Some((pool, backing)) = huge(page_size, size) else { continue };
            assert_eq!(backing.page_size(), page_size);
            let held = || backing.file().metadata().unwrap().blocks() * 512;
            backing.reserve(range(0, 2 * page_size)).unwrap();
            assert_eq!((held(), pool.free()), (2 * page_size, 0));
            backing.discard(range(page_size, page_size)).unwrap();
            assert_eq!((held(), pool.free()), (page_size, 1));
            for part in [range(0, page_size / 2), range(4096, page_size)] {
                let refused = backing.discard(part).unwrap_err();
                assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{part}");
            }
            assert_eq!(held(), page_size);
            backing.sweep(range(0, 2 * page_size)).unwrap();
            assert_eq!((held(), pool.free()), (0, 2));
        }
    }

    #[test]
    fn sealed_memory_is_refused_also_when_sealed_later() {
        let file = memfd(PAGE);
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        fs::fcntl_add_seals(&file, fs::SealFlags::FUTURE_WRITE).unwrap();
        assert!(matches!(backing.probe(), Err(BackingError::Sealed("F_SEAL_FUTURE_WRITE"))));
        assert!(matches!(Backing::new(file), Err(BackingError::Sealed(_))));
    }

    #[test]
    fn sealed_memory_of_huge_pages_is_refused_also_when_sealed_later() {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING | MemfdFlags::HUGETLB;
        for seal in [fs::SealFlags::FUTURE_WRITE, fs::SealFlags::WRITE] {
            // Needs no huge page, since none is touched.
            let Ok(file) = fs::memfd_create("backing-test", flags) else { return };
            let backing = Backing::new(File::from(file.try_clone().unwrap())).unwrap();
            assert_eq!(backing.kind(), BackingKind::Hugetlb);
            fs::fcntl_add_seals(&file, seal).unwrap();
            assert!(matches!(backing.probe(), Err(BackingError::Sealed(_))));
        }
    }

    #[test]
    fn what_is_held_is_what_the_kernel_counts_and_no_end_of_data_is_searched() {
        let file = memfd(8 * PAGE);
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        file.write_all_at(&[1], PAGE).unwrap();
        file.write_all_at(&[1; 2 * 4096], 4 * PAGE).unwrap();
        let held = |from: u64, to: u64| {
            backing.resident(range(from * PAGE, (to - from) * PAGE)).unwrap().unwrap() / PAGE
        };
        SEARCHES.take();
        assert_eq!([held(0, 8), held(0, 7), held(1, 8), held(2, 5)], [3, 3, 3, 1]);
        assert_eq!(SEARCHES.take().holes, 0);
        for (from, to) in [(0, 8), (0, 7), (2, 4), (2, 5), (5, 6), (6, 8)] {
            let searched = backing.search_pages(range(from * PAGE, (to - from) * PAGE));
            assert_eq!(searched.unwrap(), held(from, to) * PAGE, "{from}..{to}");
        }
        assert_eq!(SEARCHES.take().holes, 0);
        // Held, though no data.
        fs::fallocate(&file, FallocateFlags::KEEP_SIZE, 6 * PAGE, PAGE).unwrap();
        assert_eq!(held(0, 8), 4);
    }

    #[test]
    fn probing_takes_nothing_from_the_file() {
        let file = memfd(4 * PAGE);
        file.write_all_at(&[0xaa; 4 * 4096], 0).unwrap();
        let on_disk = tempfile::tempfile().unwrap();
        on_disk.write_all_at(&[0xaa; 4 * 4096], 0).unwrap();
        for file in [file, on_disk] {
            let backing = Backing::new(file.try_clone().unwrap()).unwrap();
            backing.probe().unwrap();
            let mut bytes = [0; 4 * 4096];
            file.read_exact_at(&mut bytes, 0).unwrap();
            assert_eq!(bytes, [0xaa; 4 * 4096]);
            assert_eq!(backing.file_len().unwrap(), 4 * PAGE);
        }
    }

    #[test]
    fn memory_that_is_open_for_appending_is_written_at_its_place() {
        let file = memfd(4 * PAGE);
        fs::fcntl_setfl(&file, OFlags::APPEND).unwrap();
        let backing = Backing::new(file.try_clone().unwrap()).unwrap();
        backing.file().write_all_at(&[7], 2 * PAGE).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, 2 * PAGE).unwrap();
        assert_eq!((byte, file.metadata().unwrap().len()), ([7], 4 * PAGE));
    }

    #[test]
    fn memory_that_cannot_be_written_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let read_only = File::open(file.path()).unwrap();
        assert!(matches!(Backing::new(read_only), Err(BackingError::NotWritable)));
    }
}
