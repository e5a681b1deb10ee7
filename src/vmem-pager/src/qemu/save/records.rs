//! Page records, as the main channel and that of postcopy-preempt have them.

use migration::stream::{PageBlocks, PageKind, PageRecord, PageRecords, TARGET_PAGE_SIZE};
use vmstate::wire::{WireRead, WireReader};

use crate::error::PagerError;
use crate::image::pages::Pages;
use std::io::Read;

/// Pages that follow each other are written at once, as many as fit so many bytes.
const RUN_MAX: usize = 1 << 20;
const PAGE: usize = TARGET_PAGE_SIZE as usize;

/// What a section of RAM has besides pages.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Mark {
    /// It ends.
    End,
    /// Pages on other channels are to be waited for.
    Flush,
}

/// Takes page records. The block that a record continues is the one of the record before, also across
/// the borders of sections.
#[derive(Debug, Default)]
pub(super) struct Records {
    records: PageRecords,
    run: Run,
}

/// Pages of one block that follow each other, not written yet.
#[derive(Debug, Default)]
struct Run {
    block: usize,
    offset: u64,
    bytes: Vec<u8>,
}

impl Run {
    fn end(&self) -> u64 {
        self.offset + self.bytes.len() as u64
    }

    fn write(&mut self, pages: &Pages) -> Result<(), PagerError> {
        if !self.bytes.is_empty() {
            pages.write(self.block, self.offset, &self.bytes)?;
            self.bytes.clear();
        }
        Ok(())
    }

    fn push<R: Read>(
        &mut self,
        pages: &Pages,
        block: usize,
        offset: u64,
        reader: &mut WireReader<R>,
    ) -> Result<(), PagerError> {
        if (self.block, self.end()) != (block, offset) || self.bytes.len() == RUN_MAX {
            self.write(pages)?;
            (self.block, self.offset) = (block, offset);
        }
        let at = self.bytes.len();
        self.bytes.resize(at + PAGE, 0);
        let read = reader.read_exact(&mut self.bytes[at..], "a page");
        // Half a page is none.
        read.inspect_err(|_| self.bytes.truncate(at))?;
        Ok(())
    }
}

impl Records {
    /// Takes records up to the next that is not a page. All pages before it are in the file then.
    ///
    /// # Errors
    ///
    /// When a record is impossible, the stream ends or fails, or the file does not take a page.
    pub fn take<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        pages: &Pages,
    ) -> Result<Mark, PagerError> {
        loop {
            let at = reader.offset();
            match self.records.read(reader, pages)? {
                PageRecord::Page { block, kind: PageKind::Normal, page } => {
                    self.run.push(pages, block, page.start(), reader)?;
                }
                PageRecord::Page { block, kind: PageKind::Zero, page } => {
                    // What came before it is written before it, and does not come back after it.
                    self.run.write(pages)?;
                    pages.zero(block, page.start(), TARGET_PAGE_SIZE)?;
                }
                PageRecord::EndOfSection => {
                    self.run.write(pages)?;
                    return Ok(Mark::End);
                }
                PageRecord::Flush => {
                    self.run.write(pages)?;
                    return Ok(Mark::Flush);
                }
                PageRecord::List { .. } => {
                    let what = format!("byte {at:#x} of the stream: a second list of RAM blocks");
                    return Err(PagerError::Protocol(what));
                }
            }
        }
    }
}

impl PageBlocks for Pages {
    type Error = PagerError;

    fn find(&self, id: &str, at: u64) -> Result<usize, PagerError> {
        Self::find(self, id).map_err(|error| located(error, at))
    }

    fn id(&self, block: usize) -> &str {
        self.blocks()[block].id()
    }

    fn used_length(&self, block: usize) -> u64 {
        self.blocks()[block].used_length()
    }
}

/// Says of a record where it stands.
fn located(error: PagerError, at: u64) -> PagerError {
    match error {
        PagerError::Protocol(what) => {
            PagerError::Protocol(format!("byte {at:#x} of the stream: {what}"))
        }
        other => other,
    }
}
