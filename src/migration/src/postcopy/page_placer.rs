//! Pages of a stream, placed where the guest waits for them.

use std::time::Duration;

use ram_discard::ByteRange;
use vmstate::wire::WireRead;

use crate::error::MigrationError;
use crate::lazy::LazyRam;
use crate::stream::{PageBlocks, PageKind, PageRecord, PageRecords, TARGET_PAGE_SIZE};

/// Pages are placed in runs of at most so many bytes, or of one host page.
const RUN_MAX: usize = 256 << 10;

/// Between two attempts to place pages for which there is no memory.
const MEMORY_POLL: Duration = Duration::from_millis(50);

/// Places the pages of one channel.
pub(crate) struct PagePlacer<'a> {
    /// Whether to wait for memory when there is none.
    waits: &'a dyn Fn() -> bool,
    records: PageRecords,
    /// The block of what is collected.
    block: usize,
    /// Where it belongs: bytes from the start of the block.
    start: u64,
    /// Pages that follow each other and are not placed yet.
    bytes: Vec<u8>,
    /// Whether any of them is not zero.
    any: bool,
}

impl<'a> PagePlacer<'a> {
    /// Of a channel on which nothing was read. While there is no memory for a page and `waits` says
    /// so, nothing more is read, and it is tried again several times a second.
    pub(crate) fn new(waits: &'a dyn Fn() -> bool) -> Self {
        let records = PageRecords::new();
        Self { waits, records, block: 0, start: 0, bytes: Vec::new(), any: false }
    }

    /// Places the pages of a section, up to its end.
    pub(crate) fn place_section(
        &mut self,
        lazy: &LazyRam,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        self.records = PageRecords::new();
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
        if ended || self.bytes.len() as u64 == host_page(lazy, self.block) {
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
        let (block, kind, page) = match self.records.read(reader, lazy)? {
            PageRecord::Page { block, kind, page } => (block, kind, page),
            PageRecord::EndOfSection => return Ok(true),
            PageRecord::Flush => return Ok(false),
            PageRecord::List { .. } => return Err(bad(at, "a list of RAM blocks in postcopy")),
        };
        let page_size = host_page(lazy, block);
        self.make_room(lazy, block, page_size, page.start())?;
        if self.bytes.is_empty() {
            if !page.start().is_multiple_of(page_size) {
                return Err(bad(at, "a page starts within a host page"));
            }
            (self.block, self.start) = (block, page.start());
        }
        let len = self.bytes.len();
        self.bytes.resize(len + TARGET_PAGE_SIZE as usize, 0);
        match kind {
            PageKind::Normal => {
                reader.read_exact(&mut self.bytes[len..], "a page")?;
                self.any = true;
            }
            // By itself, since it needs no memory.
            PageKind::Zero if page_size == TARGET_PAGE_SIZE => {
                self.bytes.truncate(len);
                self.flush(lazy)?;
                lazy.place_zeros(block, page)?;
            }
            PageKind::Zero => {}
        }
        Ok(false)
    }

    /// Places what is collected when the page at `offset` of `block` does not follow it, or it is enough.
    fn make_room(
        &mut self,
        lazy: &LazyRam,
        block: usize,
        page_size: u64,
        offset: u64,
    ) -> Result<(), MigrationError> {
        let len = self.bytes.len() as u64;
        if len == 0 {
            return Ok(());
        }
        let whole = len.is_multiple_of(page_size);
        let full = whole && len >= page_size.max(RUN_MAX as u64);
        if full || (block, offset) != (self.block, self.start + len) {
            self.flush(lazy)?;
        }
        Ok(())
    }

    fn flush(&mut self, lazy: &LazyRam) -> Result<(), MigrationError> {
        let range = ByteRange::new(self.start, self.bytes.len() as u64);
        let Some(range) = range.filter(|_| !self.bytes.is_empty()) else { return Ok(()) };
        if self.any {
            let mut waited = false;
            loop {
                match lazy.place(self.block, self.start, &self.bytes) {
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
        } else {
            lazy.place_zeros(self.block, range)?;
        }
        self.bytes.clear();
        self.any = false;
        Ok(())
    }
}

impl PageBlocks for LazyRam {
    type Error = MigrationError;

    fn find(&self, id: &str, at: u64) -> Result<usize, MigrationError> {
        let found = Self::find(self, id);
        found.ok_or_else(|| {
            bad(at, &format!("a page of block {id:?}, of which none is outstanding"))
        })
    }

    fn id(&self, block: usize) -> &str {
        self.block(block).id()
    }

    fn used_length(&self, block: usize) -> u64 {
        self.block(block).used_length()
    }
}

fn host_page(lazy: &LazyRam, block: usize) -> u64 {
    lazy.block(block).page_size().max(TARGET_PAGE_SIZE)
}

fn bad(at: u64, what: &str) -> MigrationError {
    MigrationError::Page { at, what: what.to_owned() }
}
