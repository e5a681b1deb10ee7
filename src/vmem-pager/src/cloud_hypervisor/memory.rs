//! The memory that a restored guest gets: memfds with holes, filled from an image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::fs::{
    FallocateFlags, MemfdFlags, SealFlags, SeekFrom, fallocate, fcntl_add_seals, fstatfs,
    memfd_create, seek,
};
use rustix::io::Errno;

use super::copy::threads;
use super::image::SavedGuest;
use super::layout::Mapping;
use super::pace::Pace;
use crate::error::PagerError;
use crate::image::PageReader;

/// Pages filled at a time: they are in the cache when they are written.
const PIECE: u64 = 64;
const PAGE: usize = TARGET_PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// The memory of a mapping.
pub(super) struct Memory {
    file: File,
    /// Huge pages take no write(2): they are written through a mapping. The file is sealed, so that the
    /// other end cannot truncate it.
    huge: Option<HostMapping>,
    /// Bytes of a page.
    huge_page: u64,
    offset: u64,
}

impl Memory {
    /// Empty memory for a mapping: holes.
    ///
    /// # Errors
    ///
    /// When the system does not give it.
    pub fn new(mapping: &Mapping) -> Result<Self, PagerError> {
        let failed = |error: io::Error| {
            let what = format!("{}: cannot make its memory: {error}", mapping.name());
            PagerError::System { action: "restore", source: io::Error::new(error.kind(), what) }
        };
        let mut flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        if let Some(size) = mapping.huge_page {
            flags |= MemfdFlags::HUGETLB;
            if size != 0 {
                // MFD_HUGE_SHIFT.
                flags |= MemfdFlags::from_bits_retain(size.trailing_zeros() << 26);
            }
        }
        let file = memfd_create("guest-memory", flags).map_err(|errno| failed(errno.into()))?;
        let file = File::from(file);
        let range = mapping.file_range();
        let huge_page = match mapping.huge_page {
            None => TARGET_PAGE_SIZE,
            Some(_) => {
                let statfs = fstatfs(&file).map_err(|errno| failed(errno.into()))?;
                u64::try_from(statfs.f_bsize).unwrap_or(TARGET_PAGE_SIZE)
            }
        };
        if !range.len().is_multiple_of(huge_page) || !range.start().is_multiple_of(huge_page) {
            let what = format!("it is not of whole pages of {huge_page:#x} bytes");
            return Err(failed(io::Error::new(io::ErrorKind::InvalidInput, what)));
        }
        file.set_len(range.end()).map_err(failed)?;
        fcntl_add_seals(&file, SealFlags::SHRINK | SealFlags::GROW)
            .map_err(|errno| failed(errno.into()))?;
        let huge = mapping.huge_page.map(|_| HostMapping::map(&file, range.start(), range.len()));
        let huge = huge.transpose().map_err(failed)?;
        Ok(Self { file, huge, huge_page, offset: range.start() })
    }

    /// Its file.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Bytes of its huge pages, if it is of those.
    pub fn huge_page(&self) -> Option<u64> {
        self.huge.as_ref().map(|_| self.huge_page)
    }

    /// Has the kernel set huge pages aside for a part of it, which then can be had for sure.
    ///
    /// # Errors
    ///
    /// When there are not as many.
    pub fn reserve(&self, part: ByteRange) -> io::Result<()> {
        HostMapping::reserve(&self.file, self.offset + part.start(), part.len())
    }

    /// Writes at a place, bytes from the start of the mapping.
    ///
    /// # Errors
    ///
    /// When there is no memory left.
    pub fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        match &self.huge {
            None => self.file.write_all_at(bytes, self.offset + at),
            Some(mapping) => {
                // A page that the pool does not have would raise SIGBUS when it is written.
                self.allocate(at, bytes.len() as u64)?;
                mapping.write(at, bytes);
                Ok(())
            }
        }
    }

    /// Makes memory present; what there is stays as it is, holes become zeros.
    ///
    /// # Errors
    ///
    /// When there is no memory left.
    pub fn make_present(&self, at: u64, len: u64) -> io::Result<()> {
        if self.huge.is_some() {
            return self.allocate(at, len);
        }
        // What fallocate(2) alone allocates of a memfd counts as a hole until it is written.
        let mut page = at;
        while page < at + len {
            let place = self.offset + page;
            let data = match seek(&self.file, SeekFrom::Data(place)) {
                Err(Errno::NXIO) => u64::MAX,
                found => found?,
            };
            if data != place {
                self.file.write_all_at(&ZEROS, place)?;
            }
            page += TARGET_PAGE_SIZE;
        }
        Ok(())
    }

    fn allocate(&self, at: u64, len: u64) -> io::Result<()> {
        let unit = self.huge_page;
        let start = at / unit * unit;
        let end = (at + len).next_multiple_of(unit);
        loop {
            let from = self.offset + start;
            match fallocate(&self.file, FallocateFlags::empty(), from, end - start) {
                Err(Errno::INTR) => {}
                done => return Ok(done?),
            }
        }
    }

    /// Discards a page if it is of zeros; whether it was.
    ///
    /// # Errors
    ///
    /// When the system does not discard it.
    pub fn discard_zeros(&self, at: u64) -> io::Result<bool> {
        let mut page = [0; PAGE];
        self.file.read_exact_at(&mut page, self.offset + at)?;
        if page != ZEROS {
            return Ok(false);
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        fallocate(&self.file, flags, self.offset + at, TARGET_PAGE_SIZE)?;
        Ok(true)
    }
}

/// Fills the memory of those mappings that `wanted` names, with many threads: what is absent stays a hole.
///
/// # Errors
///
/// When the image cannot be read, there is no memory left, or `keep_on` says why to stop.
pub(super) fn fill(
    guest: &SavedGuest,
    memories: &[Memory],
    wanted: &(dyn Fn(&Mapping) -> bool + Sync),
    pace: &Pace,
    filled: &(dyn Fn(u64) + Sync),
    keep_on: &(dyn Fn() -> Result<(), PagerError> + Sync),
) -> Result<(), PagerError> {
    let mappings = guest.layout().mappings.iter().enumerate();
    // Ranges of pages are looked through by one thread each, so that what is absent costs next to nothing.
    let mut ranges: Vec<(usize, Range<u64>)> = Vec::new();
    for (index, mapping) in mappings.filter(|(_, mapping)| wanted(mapping)) {
        let pages = mapping.range.len() / TARGET_PAGE_SIZE;
        let part = (pages / 64).max(64 * PIECE);
        let starts = (0..pages).step_by(part as usize);
        ranges.extend(starts.map(|start| (index, start..(start + part).min(pages))));
    }
    let (next, over) = (AtomicUsize::new(0), AtomicBool::new(false));
    let failed = Mutex::new(None);
    let work = || {
        let mut reader = PageReader::new(guest.image());
        while let Some((mapping, range)) = ranges.get(next.fetch_add(1, Ordering::Relaxed)) {
            let block = guest.block(*mapping);
            let mut from = range.start;
            while let Some(run) = block.present().next_run(from, range.end, pace.pages(PIECE)) {
                from = run.end;
                let count = run.end - run.start;
                let done = pace
                    .wait(&keep_on)
                    .and_then(|()| write(&mut reader, guest, *mapping, run, memories));
                if let Err(error) = done {
                    failed.lock().get_or_insert(error);
                    over.store(true, Ordering::Relaxed);
                }
                if over.load(Ordering::Relaxed) {
                    return;
                }
                pace.filled(count);
                filled(count);
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads() {
            let _ = thread::Builder::new().name("fill".to_owned()).spawn_scoped(scope, work);
        }
        work();
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// Writes pages of a mapping that the image has, as few writes as there are runs of them.
pub(super) fn write(
    reader: &mut PageReader<'_>,
    guest: &SavedGuest,
    mapping: usize,
    pages: Range<u64>,
    memories: &[Memory],
) -> Result<(), PagerError> {
    let memory = &memories[mapping];
    let mut written = Ok(());
    // Memory is zeros before anything is written.
    reader.read_runs(guest.block(mapping), pages, |page, bytes| {
        if written.is_ok() {
            written = memory.write(page * TARGET_PAGE_SIZE, bytes);
        }
    })?;
    let name = guest.layout().mappings[mapping].name();
    written.map_err(|error| {
        let what = format!("{name}: {error}");
        PagerError::System { action: "fill memory", source: io::Error::new(error.kind(), what) }
    })
}
