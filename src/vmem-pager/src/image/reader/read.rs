//! Reading pages out of an image.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

use migration::stream::TARGET_PAGE_SIZE;
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

use super::places::Placed;
use super::{GuestImage, ImageBlock};
use crate::error::PagerError;

const PAGE: usize = TARGET_PAGE_SIZE as usize;

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

    /// Calls `take` with the first page, the bytes, and how far pages are from each other in them, of what is read at a
    /// time; or with one page of zeros.
    fn read_pieces(
        &mut self,
        block: &ImageBlock,
        pages: Range<u64>,
        mut take: impl FnMut(u64, Option<&[u8]>, usize),
    ) -> Result<(), PagerError> {
        let failed = |error| PagerError::file("read a page from", &self.image.path)(error);
        let mut page = pages.start;
        while page < pages.end {
            let Some(Placed { at, stride, pages: count }) =
                block.places.find(page, pages.end - page)
            else {
                let source =
                    io::Error::other(format!("page {page} of {:?} is not there", block.id));
                return Err(failed(source));
            };
            if self.known.is_hole(&self.image.file, at, TARGET_PAGE_SIZE) {
                take(page, None, PAGE);
                page += 1;
                continue;
            }
            let len = (count - 1) * stride + TARGET_PAGE_SIZE;
            // What was there is read over.
            if (self.bytes.len() as u64) < len {
                self.bytes.resize(len as usize, 0);
            }
            let bytes = &mut self.bytes[..len as usize];
            self.image.file.read_exact_at(bytes, at).map_err(failed)?;
            take(page, Some(bytes), stride as usize);
            page += count;
        }
        Ok(())
    }
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

fn is_zero(page: &[u8]) -> bool {
    // Most pages are seen not to be at their start.
    page.chunks(512).all(|bytes| bytes.iter().fold(0, |any, byte| any | byte) == 0)
}
