//! Reading pages out of an image.

use std::fs::File;
use std::io::{self, IoSliceMut};
use std::ops::Range;
use std::os::unix::fs::FileExt;

use migration::stream::TARGET_PAGE_SIZE;
use rustix::fs::{SeekFrom, seek};
use rustix::io::{Errno, preadv};

use super::places::Placed;
use super::{GuestImage, ImageBlock};
use crate::error::PagerError;

const PAGE: usize = TARGET_PAGE_SIZE as usize;
/// Pages that are read in one call (`IOV_MAX`).
const PIECES_MAX: u64 = 1024;
/// Of fewer pages it is not asked whether the file has a hole there: reading zeros costs less.
const HOLE_MIN: u64 = 8;

/// Reads pages of an image; each thread has its own.
#[derive(Debug)]
pub struct PageReader<'a> {
    image: &'a GuestImage,
    /// What was read, headers of records in between included.
    bytes: Vec<u8>,
    known: Known,
}

/// What is known of a part of the file.
#[derive(Debug, Default)]
struct Known {
    range: Range<u64>,
    is_hole: bool,
}

impl<'a> PageReader<'a> {
    /// Of an image.
    pub fn new(image: &'a GuestImage) -> Self {
        Self { image, bytes: Vec::new(), known: Known::default() }
    }

    /// Calls `take` with each of `pages` of a block, which must be there, and its bytes, or `None` when
    /// it is a page of zeros.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is shorter than it was, or has no such page.
    pub fn read(
        &mut self,
        block: &ImageBlock,
        pages: Range<u64>,
        mut take: impl FnMut(u64, Option<&[u8]>),
    ) -> Result<(), PagerError> {
        self.read_pieces(block, pages, |page, bytes, stride| match bytes {
            None => take(page, None),
            Some(bytes) => {
                for (page, bytes) in (page..).zip(bytes.chunks(stride)) {
                    let bytes = &bytes[..PAGE];
                    take(page, (!is_zero(bytes)).then_some(bytes));
                }
            }
        })
    }

    /// Calls `take` with the first page and the bytes of runs of `pages` of a block, which must be there. Pages of zeros
    /// are left out; runs are as long as the file has them one behind the other.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    pub fn read_runs(
        &mut self,
        block: &ImageBlock,
        pages: Range<u64>,
        mut take: impl FnMut(u64, &[u8]),
    ) -> Result<(), PagerError> {
        self.read_pieces(block, pages, |page, bytes, stride| {
            let Some(bytes) = bytes else { return };
            let count = bytes.len().div_ceil(stride);
            let at = |index: usize| &bytes[index * stride..][..PAGE];
            let mut index = 0;
            while index < count {
                let start = index;
                while index < count && !is_zero(at(index)) && (index == start || stride == PAGE) {
                    index += 1;
                }
                match index - start {
                    // A page of zeros.
                    0 => index += 1,
                    pages => take(page + start as u64, &bytes[start * stride..][..pages * PAGE]),
                }
            }
        })
    }

    /// Reads each of `pages` of a block, which must be there, to its place in `to`: one behind the other, and before each
    /// as many bytes as are over, which stay as they are.
    ///
    /// # Errors
    ///
    /// As [`read`](Self::read).
    ///
    /// # Panics
    ///
    /// When `to` does not have as much room for each.
    pub fn read_apart(
        &mut self,
        block: &ImageBlock,
        pages: Range<u64>,
        mut to: &mut [u8],
    ) -> Result<(), PagerError> {
        let Some(step) = to.len().checked_div((pages.end - pages.start) as usize) else {
            return Ok(());
        };
        let head = step.checked_sub(PAGE).expect("room for each page");
        let mut page = pages.start;
        while page < pages.end {
            let placed = self.find(block, page, (pages.end - page).min(PIECES_MAX))?;
            let count = placed.map_or(1, |placed| placed.pages);
            let places;
            (places, to) = to.split_at_mut(count as usize * step);
            let mut places = places.chunks_exact_mut(step).map(|place| &mut place[head..]);
            match placed {
                None => places.for_each(|place| place.fill(0)),
                Some(placed) if placed.stride == TARGET_PAGE_SIZE => {
                    let mut places: Vec<IoSliceMut<'_>> = places.map(IoSliceMut::new).collect();
                    read_all(&self.image.file, &mut places, placed.at)
                        .map_err(PagerError::file("read a page from", &self.image.path))?;
                }
                Some(placed) => {
                    let bytes = self.bytes_of(placed)?;
                    for bytes in bytes.chunks(placed.stride as usize) {
                        places.next().expect("a place for each").copy_from_slice(&bytes[..PAGE]);
                    }
                }
            }
            page += count;
        }
        Ok(())
    }

    /// Calls `take` with the first page, the bytes, and how far pages are from each other in them, of what is read at a
    /// time; or with one page of zeros.
    fn read_pieces(
        &mut self,
        block: &ImageBlock,
        pages: Range<u64>,
        mut take: impl FnMut(u64, Option<&[u8]>, usize),
    ) -> Result<(), PagerError> {
        let mut page = pages.start;
        while page < pages.end {
            match self.find(block, page, pages.end - page)? {
                None => {
                    take(page, None, PAGE);
                    page += 1;
                }
                Some(placed) => {
                    take(page, Some(self.bytes_of(placed)?), placed.stride as usize);
                    page += placed.pages;
                }
            }
        }
        Ok(())
    }

    /// Where `page` is, and as many of those that follow it as are read in one step; `None` when it is known to be a hole.
    fn find(
        &mut self,
        block: &ImageBlock,
        page: u64,
        max: u64,
    ) -> Result<Option<Placed>, PagerError> {
        let Some(placed) = block.places.find(page, max) else {
            let source = io::Error::other(format!("page {page} of {:?} is not there", block.id));
            return Err(PagerError::file("read a page from", &self.image.path)(source));
        };
        let is_hole =
            max >= HOLE_MIN && self.known.is_hole(&self.image.file, placed.at, TARGET_PAGE_SIZE);
        Ok((!is_hole).then_some(placed))
    }

    /// The bytes of pages, and what is between them in the file.
    fn bytes_of(&mut self, placed: Placed) -> Result<&[u8], PagerError> {
        let len = ((placed.pages - 1) * placed.stride + TARGET_PAGE_SIZE) as usize;
        // What was there is read over.
        if self.bytes.len() < len {
            self.bytes.resize(len, 0);
        }
        let bytes = &mut self.bytes[..len];
        let read = self.image.file.read_exact_at(bytes, placed.at);
        read.map_err(PagerError::file("read a page from", &self.image.path))?;
        Ok(bytes)
    }
}

/// Reads a part of a file to several places.
fn read_all(file: &File, mut places: &mut [IoSliceMut<'_>], mut at: u64) -> io::Result<()> {
    while !places.is_empty() {
        match preadv(file, places, at) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(read) => {
                at += read as u64;
                IoSliceMut::advance_slices(&mut places, read);
            }
            Err(Errno::INTR) => {}
            Err(errno) => return Err(errno.into()),
        }
    }
    Ok(())
}

impl Known {
    /// Whether all of a range is a hole of the file, which reads as zeros.
    fn is_hole(&mut self, file: &File, at: u64, len: u64) -> bool {
        if !self.range.contains(&at) {
            let len = file.metadata().map_or(at, |metadata| metadata.len());
            let next = |to: SeekFrom, none| match seek(file, to) {
                Err(Errno::NXIO) => none,
                // A file system that does not tell has no holes.
                Err(_) => at,
                Ok(next) => next,
            };
            // Past the end of a file that became shorter there are no zeros, but nothing.
            let data = next(SeekFrom::Data(at), len);
            self.is_hole = data > at;
            let end = if self.is_hole { data } else { next(SeekFrom::Hole(at), at) };
            self.range = at..end.max(at + 1);
        }
        self.is_hole && at + len <= self.range.end
    }
}

/// Whether a page is zeros.
pub(crate) fn is_zero(page: &[u8]) -> bool {
    // Most pages are seen not to be at their start.
    page.chunks(512).all(|bytes| bytes.iter().fold(0, |any, byte| any | byte) == 0)
}
