//! Page records of a stream, placed where the guest waits for them.

use std::time::Duration;

use ram_discard::ByteRange;
use vmstate::wire::WireRead;

use crate::error::MigrationError;
use crate::lazy::LazyRam;
use crate::ram::MigrationBlock;
use crate::stream::{PageHeader, PageKind, TARGET_PAGE_SIZE};

/// Pages are placed in runs of at most so many bytes, or of one host page.
const RUN_MAX: usize = 256 << 10;

/// Between two attempts to place pages for which there is no memory.
const MEMORY_POLL: Duration = Duration::from_millis(50);

/// Reads the records of one channel.
pub(crate) struct PageRecords<'a> {
    /// Whether to wait for memory when there is none.
    waits: &'a dyn Fn() -> bool,
    /// The block of the record before.
    current: Option<usize>,
    /// Where what is collected belongs: bytes from the start of the current block.
    start: u64,
    /// Pages that follow each other and are not placed yet.
    bytes: Vec<u8>,
    /// Whether any of them is not zero.
    any: bool,
}

impl<'a> PageRecords<'a> {
    /// Of a channel on which nothing was read. While there is no memory for a page and `waits` says
    /// so, nothing more is read, and it is tried again several times a second.
    pub(crate) fn new(waits: &'a dyn Fn() -> bool) -> Self {
        Self { waits, current: None, start: 0, bytes: Vec::new(), any: false }
    }

    /// Places the pages of a section, up to its end.
    pub(crate) fn place_section(
        &mut self,
        lazy: &LazyRam,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        self.current = None;
        while !self.record(lazy, reader)? {}
        self.flush(lazy)
    }

    /// Places the next page as soon as it is whole; true at an end of section.
    pub(crate) fn place_page(
        &mut self,
        lazy: &LazyRam,
        reader: &mut dyn WireRead,
    ) -> Result<bool, MigrationError> {
        let ended = self.record(lazy, reader)?;
        let page_size = self.current.map_or(0, |index| host_page(lazy.block(index)));
        if ended || self.bytes.len() as u64 == page_size {
            self.flush(lazy)?;
        }
        Ok(ended)
    }

    /// Reads a record; true at the end of a section.
    fn record(
        &mut self,
        lazy: &LazyRam,
        reader: &mut dyn WireRead,
    ) -> Result<bool, MigrationError> {
        let at = reader.offset();
        let header = PageHeader::parse(reader.be64("a page")?, at)?;
        let (kind, offset, continued) = match header {
            PageHeader::Page { kind, offset, continued } => (kind, offset, continued),
            PageHeader::EndOfSection => return Ok(true),
            PageHeader::Flush => return Ok(false),
            PageHeader::List { .. } => return Err(bad(at, "a list of RAM blocks in postcopy")),
        };
        if !continued {
            let name = reader.name("the id of a block")?;
            let found = lazy.find(&name);
            if found.is_none() {
                return Err(bad(
                    at,
                    &format!("a page of block {name:?}, of which none is outstanding"),
                ));
            }
            if found != self.current {
                self.flush(lazy)?;
            }
            self.current = found;
        }
        let Some(index) = self.current else {
            return Err(bad(at, "a page continues a block that was never named"));
        };
        let block = lazy.block(index);
        // Before anything is computed with it: an offset may be any multiple of the page size.
        let within = ByteRange::new(offset, TARGET_PAGE_SIZE)
            .filter(|page| page.end() <= block.used_length());
        if within.is_none() {
            let (id, len) = (block.id(), block.used_length());
            let what = format!("a page at {offset:#x} of block {id:?}, which has {len:#x} bytes");
            return Err(bad(at, &what));
        }
        let page_size = host_page(block);
        self.make_room(lazy, page_size, offset)?;
        if self.bytes.is_empty() {
            if !offset.is_multiple_of(page_size) {
                return Err(bad(at, "a page starts within a host page"));
            }
            self.start = offset;
        }
        let len = self.bytes.len();
        self.bytes.resize(len + TARGET_PAGE_SIZE as usize, 0);
        match kind {
            PageKind::Normal => {
                reader.read_exact(&mut self.bytes[len..], "a page")?;
                self.any = true;
            }
            PageKind::Zero => {
                if reader.u8("the fill of a page")? != 0 {
                    return Err(bad(at, "a page is filled with another byte than 0"));
                }
                if page_size == TARGET_PAGE_SIZE {
                    // By itself, since it needs no memory.
                    self.bytes.truncate(len);
                    self.flush(lazy)?;
                    if let Some(range) = ByteRange::new(offset, TARGET_PAGE_SIZE) {
                        lazy.place_zeros(index, range)?;
                    }
                }
            }
        }
        Ok(false)
    }

    /// Places what is collected when the page at `offset` does not follow it, or it is enough.
    fn make_room(
        &mut self,
        lazy: &LazyRam,
        page_size: u64,
        offset: u64,
    ) -> Result<(), MigrationError> {
        let len = self.bytes.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let whole = len.is_multiple_of(page_size);
        let full = whole && len >= page_size.max(RUN_MAX as u64);
        if full || offset != self.start + len {
            self.flush(lazy)?;
        }
        Ok(())
    }

    fn flush(&mut self, lazy: &LazyRam) -> Result<(), MigrationError> {
        let Some(index) = self.current.filter(|_| !self.bytes.is_empty()) else { return Ok(()) };
        let range = ByteRange::new(self.start, self.bytes.len() as u64);
        if self.any {
            let mut waited = false;
            loop {
                match lazy.place(index, self.start, &self.bytes) {
                    Ok(()) => break,
                    Err(error) if error.is_no_memory() && (self.waits)() => {
                        if !waited {
                            tracing::warn!(%error, "no memory for pages that arrive; they wait");
                        }
                        waited = true;
                        std::thread::sleep(MEMORY_POLL);
                    }
                    Err(error) => return Err(error),
                }
            }
        } else if let Some(range) = range {
            lazy.place_zeros(index, range)?;
        }
        self.bytes.clear();
        self.any = false;
        Ok(())
    }
}

fn host_page(block: &MigrationBlock) -> u64 {
    block.page_size().max(TARGET_PAGE_SIZE)
}

fn bad(at: u64, what: &str) -> MigrationError {
    MigrationError::Page { at, what: what.to_owned() }
}
