//! Copying memory of a paused guest to an image.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use migration::stream::TARGET_PAGE_SIZE;
use parking_lot::Mutex;
use ram_discard::ByteRange;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::layout::Mapping;
use super::taking::Taken;
use crate::error::PagerError;
use crate::image::pages::Pages;

/// Bytes that are read at a time: they are in the cache when they are written.
const PIECE: u64 = 256 << 10;
/// Bytes that go to the disk at a time, so that it is busy from the start: a guest that is paused writes none of them again.
const WRITEBACK: u64 = 8 << 20;
/// Threads that copy, if there are as many CPUs.
const THREADS_MAX: usize = 8;

/// Threads for copying memory.
pub(super) fn threads() -> usize {
    thread::available_parallelism().map_or(1, usize::from).min(THREADS_MAX)
}

/// Copies what a guest's memory holds: only what is plugged is looked at, and only what is resident is read.
///
/// # Errors
///
/// When memory cannot be read, the image not be written, or `keep_on` says why to stop.
pub(super) fn save(
    taken: &Taken,
    pages: &Pages,
    keep_on: &(dyn Fn() -> Result<(), PagerError> + Sync),
) -> Result<(), PagerError> {
    let pieces = Mutex::new(Pieces::new(taken));
    let failed = Mutex::new(None);
    let over = AtomicBool::new(false);
    let copy = || {
        let mut bytes = Vec::new();
        while !over.load(Ordering::Relaxed) {
            let copied = keep_on().and_then(|()| {
                let Some((mapping, range)) = pieces.lock().next()? else { return Ok(false) };
                copy(taken, mapping, range, pages, &mut bytes).map(|()| true)
            });
            match copied {
                Ok(true) => {}
                Ok(false) => return,
                Err(error) => {
                    failed.lock().get_or_insert(error);
                    over.store(true, Ordering::Relaxed);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads() {
            // With fewer threads it only takes longer.
            let builder = thread::Builder::new().name("copy".to_owned());
            let _ = builder.spawn_scoped(scope, copy);
        }
        copy();
    });
    failed.into_inner().map_or(Ok(()), Err)
}

/// Copies a part of a mapping.
fn copy(
    taken: &Taken,
    mapping: usize,
    range: ByteRange,
    pages: &Pages,
    bytes: &mut Vec<u8>,
) -> Result<(), PagerError> {
    bytes.resize(range.len() as usize, 0);
    let (file, mapping_) = (&taken.files[mapping], &taken.layout.mappings[mapping]);
    let at = mapping_.file_offset + range.start();
    // Read off the file: reading a hole through a mapping would fill it.
    file.read_exact_at(bytes, at).map_err(memory_failed(mapping_))?;
    pages.write(mapping, range.start(), bytes)?;
    if range.end() / WRITEBACK != range.start() / WRITEBACK {
        // What another thread has not written yet of it goes to the disk at the end.
        let end = range.end() / WRITEBACK * WRITEBACK;
        ByteRange::from_bounds(end - WRITEBACK, end)
            .into_iter()
            .for_each(|part| pages.begin_writeback(mapping, part));
    }
    Ok(())
}

fn memory_failed(mapping: &Mapping) -> impl FnOnce(io::Error) -> PagerError {
    let name = mapping.name();
    move |error| PagerError::Peer(format!("{name}: its memory cannot be read: {error}"))
}

/// The parts of all mappings that are plugged and resident, one after the other.
struct Pieces<'a> {
    taken: &'a Taken,
    mapping: usize,
    /// What is plugged of the mapping and was not looked at, the last first; bytes from its start.
    plugged: Vec<ByteRange>,
    /// What is resident of it and was not handed out.
    resident: Option<ByteRange>,
}

impl<'a> Pieces<'a> {
    fn new(taken: &'a Taken) -> Self {
        let mut pieces = Self { taken, mapping: 0, plugged: Vec::new(), resident: None };
        pieces.enter();
        pieces
    }

    /// Begins with a mapping.
    fn enter(&mut self) {
        let Some(mapping) = self.taken.layout.mappings.get(self.mapping) else { return };
        self.plugged = match &self.taken.devices[self.mapping] {
            Some(device) => {
                device.state.plugged().filter_map(|section| section.in_block(0)).collect()
            }
            None => ByteRange::new(0, mapping.range.len()).into_iter().collect(),
        };
        self.plugged.reverse();
    }

    fn next(&mut self) -> Result<Option<(usize, ByteRange)>, PagerError> {
        loop {
            if let Some(resident) = self.resident {
                let end = (resident.start() + 1).next_multiple_of(PIECE).min(resident.end());
                self.resident = ByteRange::from_bounds(end, resident.end());
                let piece = ByteRange::from_bounds(resident.start(), end);
                return Ok(piece.map(|piece| (self.mapping, piece)));
            }
            let Some(plugged) = self.plugged.pop() else {
                self.mapping += 1;
                if self.mapping >= self.taken.layout.mappings.len() {
                    return Ok(None);
                }
                self.enter();
                continue;
            };
            let mapping = &self.taken.layout.mappings[self.mapping];
            let found = data(&self.taken.files[self.mapping], mapping.file_offset, plugged);
            let Some(found) = found.map_err(memory_failed(mapping))? else { continue };
            self.plugged.extend(ByteRange::from_bounds(found.end(), plugged.end()));
            self.resident = Some(found);
        }
    }
}

/// The first part of `range` that holds data, in whole pages; `offset` is where byte 0 is in the file.
fn data(file: &File, offset: u64, range: ByteRange) -> io::Result<Option<ByteRange>> {
    let start = match seek(file, SeekFrom::Data(offset + range.start())) {
        Err(Errno::NXIO) => return Ok(None),
        found => found? - offset,
    };
    if start >= range.end() {
        return Ok(None);
    }
    let end = match seek(file, SeekFrom::Hole(offset + start)) {
        // It became shorter meanwhile: reading it will tell.
        Err(Errno::NXIO) => range.end(),
        found => found? - offset,
    };
    let start = start / TARGET_PAGE_SIZE * TARGET_PAGE_SIZE;
    let end = end.max(start + 1).next_multiple_of(TARGET_PAGE_SIZE).min(range.end());
    Ok(ByteRange::from_bounds(start.max(range.start()), end))
}
