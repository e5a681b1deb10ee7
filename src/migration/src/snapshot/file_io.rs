//! How pages move between memory and a file: by how many threads, and past the page cache or through it.

use std::fs::File;
use std::io;
use std::ops::{Range, RangeInclusive};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder};

use parking_lot::{Condvar, Mutex};
use rustix::fs::OFlags;

use super::PIECE;
use crate::error::MigrationError;
use crate::page_bitmap::PageBitmap;
use crate::stream::TARGET_PAGE_SIZE;
use crate::sys::GatherWrite;

/// What goes past the page cache, bytes at least: each such call waits for the disk, while the cache
/// collects small pieces.
const DIRECT_MIN: u64 = 64 << 10;

/// The most that a file system or a disk wants places and addresses aligned to, bytes.
const ALIGNMENT: usize = TARGET_PAGE_SIZE as usize;

/// How pages are written to a file, or read from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileIo {
    /// How many threads write to the file, or read from it, at once: 1 to [`THREADS_MAX`](Self::THREADS_MAX);
    /// what is less or more counts as the nearest of these. A restore has as many more, which put what was
    /// read into memory meanwhile.
    pub threads: usize,
    /// Whether pages go past the page cache (O_DIRECT; QEMU's direct-io) where kernel and file system
    /// take that; where they do not, pages go through it. Small pieces, headers and bitmaps always do.
    /// The file is opened once more for it: file locks of fcntl(2) do not outlive that.
    pub direct: bool,
}

impl FileIo {
    /// The most threads that move pages.
    pub const THREADS_MAX: usize = 64;

    /// Threads by default, by the cores of the host: a disk has as many requests outstanding, and is idle
    /// between two of too few. They wait more than they run.
    const THREADS_DEFAULT: RangeInclusive<usize> = 4..=8;

    fn threads(self) -> usize {
        self.threads.clamp(1, Self::THREADS_MAX)
    }

    /// Runs `work` on all threads, this one among them; the first error, of all that there are.
    ///
    /// # Errors
    ///
    /// What `work` fails with.
    pub(super) fn run(
        self,
        work: impl Fn() -> Result<(), MigrationError> + Sync,
    ) -> Result<(), MigrationError> {
        run_on(self.threads(), Builder::new, &work)
    }

    /// As [`run`](Self::run) on twice as many threads, of which no more than there are threads are in their
    /// [turn](Turns::take) at once: what is done outside of it does not keep the file waiting.
    ///
    /// # Errors
    ///
    /// What `work` fails with.
    pub(super) fn run_in_turns(
        self,
        work: impl Fn(&Turns) -> Result<(), MigrationError> + Sync,
    ) -> Result<(), MigrationError> {
        let turns = Turns { free: Mutex::new(self.threads()), freed: Condvar::new() };
        run_on(2 * self.threads(), Builder::new, &|| work(&turns))
    }
}

/// Runs `work` on so many threads, or on as many as the system gives (RLIMIT_NPROC, pids.max).
fn run_on(
    threads: usize,
    builder: impl Fn() -> Builder,
    work: &(impl Fn() -> Result<(), MigrationError> + Sync),
) -> Result<(), MigrationError> {
    thread::scope(|scope| {
        let mut others = Vec::with_capacity(threads - 1);
        for started in 1..threads {
            match builder().spawn_scoped(scope, work) {
                Ok(other) => others.push(other),
                Err(error) => {
                    tracing::warn!(%error, "pages are moved by {started} of {threads} threads");
                    break;
                }
            }
        }
        let mut result = work();
        for other in others {
            let joined = other.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
            result = result.and(joined);
        }
        result
    })
}

/// Turns at a file, of which so many are taken at once.
pub(super) struct Turns {
    free: Mutex<usize>,
    freed: Condvar,
}

impl Turns {
    /// Does `work` in a turn. The turn ends also when `work` panics.
    pub(super) fn take<T>(&self, work: impl FnOnce() -> T) -> T {
        let mut free = self.free.lock();
        self.freed.wait_while(&mut free, |free| *free == 0);
        *free -= 1;
        drop(free);
        let _turn = Turn(self);
        work()
    }
}

/// A turn that ends when it is dropped.
struct Turn<'a>(&'a Turns);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.free.lock() += 1;
        self.0.freed.notify_one();
    }
}

impl Default for FileIo {
    /// As many threads as there are cores, but 4 to 8, and past the page cache where that is possible.
    fn default() -> Self {
        let cores = thread::available_parallelism().map_or(1, usize::from);
        let (least, most) = Self::THREADS_DEFAULT.into_inner();
        Self { threads: cores.clamp(least, most), direct: true }
    }
}

/// The pages of several blocks that are to be moved, in pieces, for any number of threads.
pub(super) struct Pieces<'a> {
    blocks: Vec<&'a PageBitmap>,
    /// Block and page that come next.
    next: Mutex<(usize, u64)>,
}

impl<'a> Pieces<'a> {
    pub(super) fn new(blocks: Vec<&'a PageBitmap>) -> Self {
        Self { blocks, next: Mutex::default() }
    }

    /// The block and the pages of the next piece, each once.
    pub(super) fn next(&self) -> Option<(usize, Range<u64>)> {
        let mut next = self.next.lock();
        while let Some(pages) = self.blocks.get(next.0) {
            if let Some(run) = pages.next_run(next.1, pages.nr_pages(), PIECE / TARGET_PAGE_SIZE) {
                next.1 = run.end;
                return Some((next.0, run));
            }
            *next = (next.0 + 1, 0);
        }
        None
    }

    /// There are no more: a thread has failed.
    pub(super) fn end(&self) {
        *self.next.lock() = (self.blocks.len(), 0);
    }
}

/// A file whose pages are written or read at their places.
pub(super) struct PagesFile<'a> {
    file: &'a File,
    /// The same file, past the page cache.
    direct: Option<File>,
    /// Whether the kernel has refused that when it was tried.
    refused: AtomicBool,
}

impl<'a> PagesFile<'a> {
    /// One that is written.
    pub(super) fn to_write(file: &'a File, io: FileIo) -> Self {
        Self::new(file, io, true)
    }

    /// One that is read.
    pub(super) fn to_read(file: &'a File, io: FileIo) -> Self {
        Self::new(file, io, false)
    }

    /// One that is written through the page cache.
    pub(super) fn cached(file: &'a File) -> Self {
        Self { file, direct: None, refused: AtomicBool::new(false) }
    }

    fn new(file: &'a File, io: FileIo, write: bool) -> Self {
        let direct = io.direct.then(|| reopen(file, write)).and_then(|opened| {
            opened
                .inspect_err(|error| tracing::debug!(%error, "pages go through the page cache"))
                .ok()
        });
        Self { file, direct, refused: AtomicBool::new(false) }
    }

    /// The file for a piece, past the page cache where that is worth it.
    fn direct(&self, offset: u64, len: u64) -> Option<&File> {
        let aligned = (offset | len).is_multiple_of(ALIGNMENT as u64);
        let direct = self.direct.as_ref().filter(|_| aligned && len >= DIRECT_MIN);
        direct.filter(|_| !self.refused.load(Ordering::Relaxed))
    }

    /// Whether what failed past the page cache is tried through it.
    fn falls_back(&self, error: &io::Error) -> bool {
        match error.raw_os_error() {
            // It is tried no more: the alignment is not enough, or the file system cannot.
            Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => {
                if !self.refused.swap(true, Ordering::Relaxed) {
                    tracing::debug!(%error, "pages go through the page cache from now on");
                }
                true
            }
            // Memory that a device cannot have, but that can be copied.
            Some(libc::EFAULT) => true,
            _ => false,
        }
    }

    /// Writes pages from `offset` on.
    ///
    /// # Errors
    ///
    /// Why the file does not take them; an unknown part is written.
    pub(super) fn write(&self, gathered: &GatherWrite, offset: u64) -> io::Result<()> {
        if let Some(direct) = self.direct(offset, gathered.len_bytes()) {
            match gathered.write_at(direct, offset) {
                Err(error) if self.falls_back(&error) => {}
                written => return written,
            }
        }
        gathered.write_at(self.file, offset)
    }

    /// Reads pages from `offset` on.
    ///
    /// # Errors
    ///
    /// Why the file does not give them.
    pub(super) fn read(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        if let Some(direct) = self.direct(offset, bytes.len() as u64) {
            match direct.read_exact_at(bytes, offset) {
                Err(error) if self.falls_back(&error) => {}
                read => return read,
            }
        }
        self.file.read_exact_at(bytes, offset)
    }
}

/// Opens a regular file once more, past the page cache. Headers go on through it by the handle that there
/// is: never to the same blocks of the file as pages.
fn reopen(file: &File, write: bool) -> io::Result<File> {
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::Unsupported, "not a regular file"));
    }
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    let direct = OFlags::DIRECT.bits().cast_signed();
    File::options().read(true).write(write).custom_flags(direct).open(path)
}

/// A buffer for pages that are read, where the disk can write to it.
pub(super) struct AlignedBuffer {
    bytes: Vec<u8>,
    start: usize,
}

impl AlignedBuffer {
    /// Of `len` bytes.
    pub(super) fn new(len: usize) -> Self {
        let bytes = vec![0; len + ALIGNMENT];
        let start = bytes.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
        Self { bytes, start }
    }

    /// Its first `len` bytes.
    pub(super) fn first(&mut self, len: usize) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::memfd;
    use ram_discard::memory::HostMapping;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, AtomicUsize};

    const MIB: u64 = 1 << 20;

    fn memory() -> Arc<HostMapping> {
        let mapping = HostMapping::map(&memfd(MIB), 0, MIB).unwrap();
        let content: Vec<u8> = (0..MIB).map(|at| (at / 5 % 251) as u8 + 1).collect();
        mapping.write(0, &content);
        Arc::new(mapping)
    }

    fn gathered(mapping: &Arc<HostMapping>, offset: u64, len: u64) -> GatherWrite {
        let mut gathered = GatherWrite::new();
        gathered.push_memory(mapping, offset, len);
        gathered
    }

    /// What was written and read is `mapping`'s, at places that suit a disk and at ones that do not.
    fn moves_pages(file: &File, io: FileIo) {
        let mapping = memory();
        let mut content = vec![0; MIB as usize];
        mapping.read(0, &mut content);
        let to = PagesFile::to_write(file, io);
        to.write(&gathered(&mapping, 0, MIB), MIB).unwrap();
        to.write(&gathered(&mapping, 4096, 4096), 0).unwrap();
        to.write(&gathered(&mapping, 7, 128 << 10), (3 << 20) + 512).unwrap();
        let from = PagesFile::to_read(file, io);
        let mut buffer = AlignedBuffer::new(MIB as usize);
        for (len, at, expected) in [
            (MIB as usize, MIB, 0),
            (4096, 0, 4096),
            (128 << 10, (3 << 20) + 512, 7),
            (64 << 10, MIB + 4096, 4096),
        ] {
            from.read(buffer.first(len), at).unwrap();
            assert!(buffer.first(len) == &content[expected..expected + len], "{len} at {at}");
        }
        let error = from.read(buffer.first(MIB as usize), 1 << 40).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn pages_come_back_whether_they_pass_the_page_cache_or_not() {
        for direct in [true, false] {
            let io = FileIo { threads: 1, direct };
            moves_pages(&tempfile::tempfile().unwrap(), io);
            // Whatever memory takes of it.
            moves_pages(&memfd(0), io);
        }
    }

    #[test]
    fn what_the_kernel_refuses_past_the_page_cache_goes_through_it() {
        let file = tempfile::tempfile().unwrap();
        // Nothing can be written by this handle, nor read: EBADF is an error as any other.
        let null = File::options().read(true).open("/dev/null").unwrap();
        let mut pages = PagesFile { file: &file, direct: Some(null), refused: false.into() };
        let error = pages.write(&gathered(&memory(), 0, MIB), 0).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EBADF));
        assert_eq!(file.metadata().unwrap().len(), 0);
        // A pipe has no places: ESPIPE. What is refused is told by what the kernel says of it.
        for errno in [libc::EINVAL, libc::EOPNOTSUPP, libc::ENOSYS] {
            pages.refused = AtomicBool::new(false);
            assert!(pages.falls_back(&io::Error::from_raw_os_error(errno)));
            assert!(pages.direct(0, MIB).is_none());
        }
        pages.refused = AtomicBool::new(false);
        assert!(pages.falls_back(&io::Error::from_raw_os_error(libc::EFAULT)));
        for errno in [libc::ENOSPC, libc::EIO, libc::ESPIPE] {
            assert!(!pages.falls_back(&io::Error::from_raw_os_error(errno)));
        }
        assert!(pages.direct(0, MIB).is_some());
        // Where it was refused, the same call goes on through the cache.
        pages.refused = AtomicBool::new(true);
        pages.write(&gathered(&memory(), 0, MIB), 0).unwrap();
        assert_eq!(file.metadata().unwrap().len(), MIB);
    }

    #[test]
    fn no_more_turns_are_taken_at_once_than_there_are_threads_and_none_is_lost() {
        let taken = Mutex::new((0, 0));
        let io = FileIo { threads: 3, direct: false };
        let work = |turns: &Turns| {
            for _ in 0..50 {
                turns.take(|| {
                    let mut now = taken.lock();
                    now.0 += 1;
                    now.1 = now.0.max(now.1);
                    drop(now);
                    thread::yield_now();
                    taken.lock().0 -= 1;
                });
            }
            Ok(())
        };
        io.run_in_turns(work).unwrap();
        let (now, most) = *taken.lock();
        assert_eq!(now, 0);
        assert!((1..=3).contains(&most), "{most}");

        // Each thread waits for as many others as there are threads, outside of a turn and in one.
        let all = std::sync::Barrier::new(6);
        let three = std::sync::Barrier::new(3);
        let work = |turns: &Turns| {
            all.wait();
            turns.take(|| three.wait());
            Ok(())
        };
        io.run_in_turns(work).unwrap();

        // A turn that panics is over.
        let panics = AtomicBool::new(true);
        let one = FileIo { threads: 1, direct: false };
        let work = |turns: &Turns| {
            turns.take(|| assert!(!panics.swap(false, Ordering::Relaxed), "as the test has it"));
            Ok(())
        };
        let caught =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| one.run_in_turns(work)));
        assert!(caught.is_err());
    }

    #[test]
    fn where_the_system_gives_no_more_threads_those_that_there_are_do_all() {
        let mut all = PageBitmap::new(4000);
        all.set_range(0..4000);
        let pieces = Pieces::new(vec![&all]);
        let (asked, moved) = (AtomicUsize::new(0), AtomicU64::new(0));
        // The second one has a stack for which there are no addresses.
        let builder = || match asked.fetch_add(1, Ordering::Relaxed) {
            1 => Builder::new().stack_size(1 << 60),
            _ => Builder::new(),
        };
        let work = || {
            while let Some((_, run)) = pieces.next() {
                moved.fetch_add(run.end - run.start, Ordering::Relaxed);
            }
            Ok(())
        };
        run_on(8, builder, &work).unwrap();
        assert_eq!((asked.into_inner(), moved.into_inner()), (2, 4000));
    }

    #[test]
    fn each_piece_is_moved_once_by_whatever_thread_and_none_after_an_error() {
        let (mut one, mut other) = (PageBitmap::new(1000), PageBitmap::new(700));
        one.set_range(3..600);
        other.set_range(0..1);
        other.set_range(699..700);
        let empty = PageBitmap::new(5);
        let pieces = Pieces::new(vec![&one, &empty, &other]);
        let moved =
            Mutex::new(vec![PageBitmap::new(1000), PageBitmap::new(5), PageBitmap::new(700)]);
        let work = || {
            while let Some((block, run)) = pieces.next() {
                assert!(run.end - run.start <= PIECE / TARGET_PAGE_SIZE);
                let moved = &mut moved.lock()[block];
                assert_eq!(moved.runs(run.clone()).count(), 0, "{run:?} again");
                moved.set_range(run);
            }
            Ok(())
        };
        FileIo { threads: 4, direct: false }.run(work).unwrap();
        let counts: Vec<_> = moved.lock().iter().map(PageBitmap::count).collect();
        assert_eq!(counts, [597, 0, 2]);

        let pieces = Pieces::new(vec![&one]);
        let failing = || {
            pieces.next();
            pieces.end();
            Err(MigrationError::Cancelled)
        };
        assert!(FileIo { threads: 0, direct: false }.run(failing).is_err());
        assert_eq!(pieces.next(), None);
    }
}
