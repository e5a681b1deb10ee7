//! Page records, as the main channel and that of postcopy-preempt have them.

use migration::stream::{PageHeader, PageKind, TARGET_PAGE_SIZE};
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
    current: Option<usize>,
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
            let word = reader.be64("the header of a page")?;
            match PageHeader::parse(word, at)? {
                PageHeader::Page { kind, offset, continued } => {
                    self.page(reader, pages, kind, offset, continued)
                        .map_err(|error| located(error, at))?;
                }
                PageHeader::EndOfSection => {
                    self.run.write(pages)?;
                    return Ok(Mark::End);
                }
                PageHeader::Flush => {
                    self.run.write(pages)?;
                    return Ok(Mark::Flush);
                }
                PageHeader::List { .. } => {
                    let what = format!("byte {at:#x} of the stream: a second list of RAM blocks");
                    return Err(PagerError::Protocol(what));
                }
            }
        }
    }

    fn page<R: Read>(
        &mut self,
        reader: &mut WireReader<R>,
        pages: &Pages,
        kind: PageKind,
        offset: u64,
        continued: bool,
    ) -> Result<(), PagerError> {
        if !continued {
            let id = reader.name("the id of a RAM block")?;
            self.current = Some(pages.find(&id)?);
        }
        let Some(block) = self.current else {
            let what = "a page continues the block of the one before, and there is none";
            return Err(PagerError::Protocol(what.to_owned()));
        };
        pages.check(block, offset, TARGET_PAGE_SIZE)?;
        match kind {
            PageKind::Normal => self.run.push(pages, block, offset, reader),
            PageKind::Zero => {
                let byte = reader.u8("the byte of a page of zeros")?;
                if byte != 0 {
                    let what = format!("a page that is filled with {byte:#x}: only zeros are");
                    return Err(PagerError::Protocol(what));
                }
                // What came before it is written before it, and does not come back after it.
                self.run.write(pages)?;
                pages.zero(block, offset, TARGET_PAGE_SIZE)
            }
        }
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
