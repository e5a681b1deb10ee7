//! The pages of an image that is being written, by any number of threads.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::{ControlFlow, Range};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::sync::{Arc, OnceLock};

use migration::Progress;
use migration::inspect::SavedVirtioMem;
use migration::page_bitmap::{PageBitmap, bytes_of, pages_touched};
use migration::snapshot::write_bitmap;
use migration::stream::{MappedRamHeader, TARGET_PAGE_SIZE};
use parking_lot::Mutex;
use ram_discard::{ByteRange, MemoryState, RamDiscardSource};
use rustix::fs::{FallocateFlags, fallocate};
use rustix::io::Errno;
use vmstate::printable;

use super::write_out::WriteOut;
use crate::error::PagerError;
use crate::sys::writeback;

const PAGE: usize = TARGET_PAGE_SIZE as usize;
const ZEROS: [u8; PAGE] = [0; PAGE];

/// A RAM block, and where the file has it.
#[derive(Debug)]
pub struct PlacedBlock {
    id: String,
    used_length: u64,
    header: MappedRamHeader,
    /// What is discarded of it, if it is a virtio-mem device's.
    device: Option<SavedVirtioMem>,
    state: Mutex<State>,
}

/// Which pages there are.
#[derive(Debug)]
struct State {
    /// With content that counts: the last that came of the page was not zeros.
    present: PageBitmap,
    /// Written at some time, so that the file holds something there.
    written: PageBitmap,
    /// Said to be stale at a time when the source will send them again.
    outstanding: PageBitmap,
    /// The first page that came for discarded memory, bytes from the start of the block.
    stray: Option<u64>,
}

impl PlacedBlock {
    pub(super) fn new(
        id: String,
        used_length: u64,
        header: MappedRamHeader,
        device: Option<SavedVirtioMem>,
    ) -> Self {
        let nr_pages = used_length / TARGET_PAGE_SIZE;
        let state = State {
            present: PageBitmap::new(nr_pages),
            written: PageBitmap::new(nr_pages),
            outstanding: PageBitmap::new(nr_pages),
            stray: None,
        };
        Self { id, used_length, header, device, state: Mutex::new(state) }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its used length, bytes.
    pub fn used_length(&self) -> u64 {
        self.used_length
    }

    /// The parts of `range` that are not discarded.
    fn populated(&self, range: ByteRange, mut part: impl FnMut(ByteRange)) {
        let Some(device) = &self.device else { return part(range) };
        // The region is the block.
        let Some(section) = range.section(0) else { return };
        let _ = device.replay(section, MemoryState::Populated, &mut |populated| {
            populated.in_block(0).into_iter().for_each(&mut part);
            ControlFlow::Continue(())
        });
    }
}

/// The blocks of an image. Pages are written whole, the last that comes of a page counts.
#[derive(Debug)]
pub struct Pages {
    file: File,
    path: PathBuf,
    blocks: Vec<PlacedBlock>,
    by_id: HashMap<String, usize>,
    progress: Arc<Progress>,
    write_out: OnceLock<WriteOut>,
}

impl Pages {
    pub(super) fn new(
        file: File,
        path: &Path,
        blocks: Vec<PlacedBlock>,
        progress: Arc<Progress>,
    ) -> Self {
        let by_id = blocks.iter().enumerate().map(|(index, block)| (block.id.clone(), index));
        let by_id = by_id.collect();
        let write_out = OnceLock::new();
        Self { file, path: path.to_owned(), blocks, by_id, progress, write_out }
    }

    /// The blocks, in the order of the stream.
    pub fn blocks(&self) -> &[PlacedBlock] {
        &self.blocks
    }

    /// The index of the block of that id.
    ///
    /// # Errors
    ///
    /// When there is none.
    pub fn find(&self, id: &str) -> Result<usize, PagerError> {
        self.by_id.get(id).copied().ok_or_else(|| {
            let id = printable(id);
            PagerError::Protocol(format!("a page of a RAM block {id:?} that is not in the list"))
        })
    }

    /// Target pages of a block.
    pub fn nr_pages(&self, block: usize) -> u64 {
        self.blocks[block].used_length / TARGET_PAGE_SIZE
    }

    /// Whether whole pages of a block lie in `offset` and `len`.
    ///
    /// # Errors
    ///
    /// When they do not.
    pub fn check(&self, block: usize, offset: u64, len: u64) -> Result<ByteRange, PagerError> {
        let PlacedBlock { id, used_length, .. } = &self.blocks[block];
        let range = ByteRange::new(offset, len).filter(|range| {
            range.end() <= *used_length
                && offset.is_multiple_of(TARGET_PAGE_SIZE)
                && len.is_multiple_of(TARGET_PAGE_SIZE)
        });
        range.ok_or_else(|| {
            let id = printable(id);
            PagerError::Protocol(format!(
                "RAM block {id:?} of {used_length:#x} bytes: a page at {offset:#x} is past its end or \
                 not at a page's start"
            ))
        })
    }

    /// Writes pages of a block that follow each other, from `offset` on, which [`check`](Self::check) has
    /// seen. Pages of zeros, and pages of discarded memory, are left out.
    ///
    /// # Errors
    ///
    /// When the file does not take them.
    pub fn write(&self, block: usize, offset: u64, bytes: &[u8]) -> Result<(), PagerError> {
        let range = self.check(block, offset, bytes.len() as u64)?;
        let mut written = Ok(());
        let mut populated = 0;
        self.blocks[block].populated(range, |part| {
            populated += part.len();
            if written.is_ok() {
                let from = (part.start() - offset) as usize;
                written = self.write_part(block, part, &bytes[from..from + part.len() as usize]);
            }
        });
        self.note_stray(block, range, populated);
        written
    }

    fn write_part(&self, block: usize, range: ByteRange, bytes: &[u8]) -> Result<(), PagerError> {
        let first = range.start() / TARGET_PAGE_SIZE;
        let mut runs: Vec<(Range<u64>, bool)> = Vec::new();
        for (page, bytes) in (first..).zip(bytes.chunks_exact(PAGE)) {
            let is_zero = bytes == ZEROS;
            match runs.last_mut() {
                Some((run, zero)) if *zero == is_zero => run.end = page + 1,
                _ => runs.push((page..page + 1, is_zero)),
            }
        }
        let placed = &self.blocks[block];
        for (run, is_zero) in runs {
            if is_zero {
                self.zero_pages(placed, run);
                continue;
            }
            let (count, part) = (run.end - run.start, bytes_of(run.clone()));
            let from = (part.start() - range.start()) as usize;
            let at = placed.header.pages_offset + part.start();
            let written = self.file.write_all_at(&bytes[from..from + part.len() as usize], at);
            written.map_err(PagerError::file("write", &self.path))?;
            if let Some(write_out) = self.write_out.get() {
                write_out.wrote(part.len());
            }
            let mut state = placed.state.lock();
            state.present.set_range(run.clone());
            state.written.set_range(run);
            drop(state);
            let counters = &self.progress.counters;
            counters.normal.fetch_add(count, Ordering::Relaxed);
            counters.transferred.fetch_add(part.len(), Ordering::Relaxed);
        }
        Ok(())
    }

    /// Notes that pages of a block are zeros, from `offset` on, which [`check`](Self::check) has seen.
    ///
    /// # Errors
    ///
    /// When they are not in the block.
    pub fn zero(&self, block: usize, offset: u64, len: u64) -> Result<(), PagerError> {
        let range = self.check(block, offset, len)?;
        let placed = &self.blocks[block];
        let mut populated = 0;
        placed.populated(range, |part| {
            populated += part.len();
            self.zero_pages(placed, pages_touched(part));
        });
        self.note_stray(block, range, populated);
        Ok(())
    }

    /// The file keeps what it has of them until the end: without its bit, a page is a hole to readers.
    fn zero_pages(&self, placed: &PlacedBlock, run: Range<u64>) {
        let count = run.end - run.start;
        placed.state.lock().present.clear_range(run);
        self.progress.counters.duplicate.fetch_add(count, Ordering::Relaxed);
    }

    /// Forgets pages that the source says are stale; it will send them again if they hold anything.
    ///
    /// # Errors
    ///
    /// When they are not in the block.
    pub fn forget(&self, block: usize, offset: u64, len: u64) -> Result<(), PagerError> {
        let range = self.check(block, offset, len)?;
        let mut state = self.blocks[block].state.lock();
        state.present.clear_range(pages_touched(range));
        state.outstanding.set_range(pages_touched(range));
        Ok(())
    }

    /// Takes room in the file for all pages that were forgotten, so that none of them can find the disk full.
    ///
    /// # Errors
    ///
    /// When there is not as much room.
    pub fn reserve(&self) -> Result<(), PagerError> {
        for placed in &self.blocks {
            let mut state = placed.state.lock();
            let State { outstanding, written, .. } = &mut *state;
            let mut from = 0;
            while let Some(run) = outstanding.next_run(from, outstanding.nr_pages(), u64::MAX) {
                from = run.end;
                let mut taken = Ok(());
                placed.populated(bytes_of(run), |part| {
                    if taken.is_ok() {
                        taken =
                            self.allocate(placed.header.pages_offset + part.start(), part.len());
                        // What stays zeros is made a hole again at the end.
                        written.set_range(pages_touched(part));
                    }
                });
                taken.map_err(PagerError::file("take room in", &self.path))?;
            }
        }
        Ok(())
    }

    /// From now on has the kernel begin, again and again, to bring to the disk what is written, by a thread: for pages that
    /// come in no order. Without a thread, all is left to the end.
    pub fn write_out_early(&self) {
        if let Ok(write_out) = WriteOut::start(&self.file) {
            let _ = self.write_out.set(write_out);
        }
    }

    /// Has the kernel begin to bring a part of a block to the disk, of what was written of it: then less is left to do
    /// at the end.
    ///
    /// # Panics
    ///
    /// When there is no such block.
    pub fn begin_writeback(&self, block: usize, part: ByteRange) {
        let at = self.blocks[block].header.pages_offset + part.start();
        // Whether all is on the disk is told at the end.
        let _ = writeback::begin(&self.file, at, part.len());
    }

    fn allocate(&self, offset: u64, len: u64) -> io::Result<()> {
        match fallocate(&self.file, FallocateFlags::KEEP_SIZE, offset, len) {
            // Then a full disk is found out later.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }

    fn note_stray(&self, block: usize, range: ByteRange, populated: u64) {
        let stray = (range.len() - populated) / TARGET_PAGE_SIZE;
        if stray != 0 {
            self.blocks[block].state.lock().stray.get_or_insert(range.start());
            self.progress.counters.dirty_while_discarded.fetch_add(stray, Ordering::Relaxed);
        }
    }

    /// The first page of each block that came for discarded memory: block, and bytes from its start.
    pub fn strays(&self) -> Vec<(&str, u64)> {
        let stray = |block: &PlacedBlock| block.state.lock().stray;
        self.blocks.iter().filter_map(|block| Some((block.id(), stray(block)?))).collect()
    }

    /// Pages that the image has.
    pub fn present(&self) -> u64 {
        self.blocks.iter().map(|block| block.state.lock().present.count()).sum()
    }

    /// Writes which pages there are, and makes holes of what has become zeros.
    pub(super) fn finish(&self) -> Result<(), PagerError> {
        let failed = || PagerError::file("write", &self.path);
        for PlacedBlock { state, header, used_length, .. } in &self.blocks {
            if *used_length == 0 {
                continue;
            }
            let mut state = state.lock();
            let State { present, written, .. } = &mut *state;
            written.and_not(present);
            let nr_pages = written.nr_pages();
            let mut from = 0;
            while let Some(run) = written.next_run(from, nr_pages, u64::MAX) {
                from = run.end;
                let part = bytes_of(run);
                self.punch(header.pages_offset + part.start(), part.len()).map_err(failed())?;
            }
            write_bitmap(present, *header, &self.file).map_err(failed())?;
        }
        Ok(())
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match fallocate(&self.file, flags, offset, len) {
            // It is wasted, and nothing else.
            Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
            Err(errno) => Err(errno.into()),
        }
    }
}
