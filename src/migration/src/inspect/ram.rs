//! The RAM section: which pages of which block a file has.

use std::collections::HashMap;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use rustix::io::Errno;
use vmstate::wire::{WireError, WireRead};

use super::error::InspectError;
use super::pages::PageIndex;
use crate::file_reader::FileReader;
use crate::stream::{
    BlockEntry, BlockList, CAPABILITY_IGNORE_SHARED, CAPABILITY_MAPPED_RAM, Configuration,
    FormatError, ListLimits, MappedRamHeader, PageBlocks, PageKind, PageRecord, PageRecords,
    TARGET_PAGE_SIZE,
};

/// No processor addresses more: a longer block is a lie.
const BLOCK_MAX: u64 = 1 << 52;
/// Words of 64 pages that are held: 8 TiB of memory that is really there.
const WORDS_MAX: u64 = 1 << 25;
/// Bytes of a bitmap that are read at once.
const BITMAP_STEP: u64 = 64 << 10;

/// A RAM block and its pages. Every page is of [`TARGET_PAGE_SIZE`].
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct SavedRamBlock {
    /// Its id.
    pub id: String,
    /// Its used length, bytes.
    pub used_length: u64,
    /// Its address, where the file has it (x-ignore-shared). QEMU's is that in the memory region
    /// which contains the block: guest-physical for some, 0 for most.
    pub addr: Option<u64>,
    /// Where its bitmap and its pages are in the file, where pages have fixed places.
    pub mapped: Option<MappedRamHeader>,
    /// Pages with content.
    pub normal: u64,
    /// Pages of zeros.
    pub zero: u64,
    /// Pages that the file does not have.
    pub absent: u64,
    /// How many times a page was sent: a page may come again when the guest writes to it.
    pub sent: u64,
}

/// The RAM of a stream while it is read.
#[derive(Debug)]
pub(super) struct Ram<'a, P> {
    /// The file, if it may tell where it has holes.
    holes: Option<&'a File>,
    blocks: Blocks,
    /// Of each block, its pages.
    pages: Vec<P>,
    records: PageRecords,
    /// What all `pages` hold.
    held: u64,
}

/// The blocks of the list.
#[derive(Debug, Default)]
struct Blocks {
    /// In the order of the stream.
    list: Vec<SavedRamBlock>,
    by_id: HashMap<String, usize>,
}

impl PageBlocks for Blocks {
    type Error = InspectError;

    fn find(&self, id: &str, offset: u64) -> Result<usize, InspectError> {
        let found = self.by_id.get(id).copied();
        found.ok_or_else(|| InspectError::UnknownBlock { offset, id: id.to_owned() })
    }

    fn id(&self, block: usize) -> &str {
        &self.list[block].id
    }

    fn used_length(&self, block: usize) -> u64 {
        self.list[block].used_length
    }
}

impl<'a, P: PageIndex> Ram<'a, P> {
    /// Without blocks.
    pub fn new(holes: Option<&'a File>) -> Self {
        let (blocks, pages) = (Blocks::default(), Vec::new());
        Self { holes, blocks, pages, records: PageRecords::new(), held: 0 }
    }

    /// The blocks in the order of the stream, and of each its pages.
    pub fn into_parts(self) -> (Vec<SavedRamBlock>, Vec<P>) {
        (self.blocks.list, self.pages)
    }

    /// Reads what a section of RAM holds, up to its footer.
    pub fn read<R: Read + Seek>(
        &mut self,
        reader: &mut FileReader<R>,
        configuration: &Configuration,
    ) -> Result<(), InspectError> {
        let read = self.read_section(reader, configuration);
        for (block, pages) in self.blocks.list.iter_mut().zip(&self.pages) {
            (block.normal, block.zero) = pages.map().counts();
            block.absent = block.used_length / TARGET_PAGE_SIZE - block.normal - block.zero;
        }
        read
    }

    fn read_section<R: Read + Seek>(
        &mut self,
        reader: &mut FileReader<R>,
        configuration: &Configuration,
    ) -> Result<(), InspectError> {
        loop {
            let offset = reader.offset();
            match self.records.read(reader, &self.blocks)? {
                PageRecord::EndOfSection => return Ok(()),
                PageRecord::Flush => {}
                PageRecord::List { total } => self.read_list(reader, total, configuration)?,
                PageRecord::Page { block, kind, page } => {
                    self.note(offset, block, page.start(), kind, reader.offset())?;
                    if kind == PageKind::Normal {
                        reader.skip(TARGET_PAGE_SIZE, "a page")?;
                    }
                }
            }
        }
    }

    /// Notes the page at `start` of a block, whose header is at `offset` and its bytes at `bytes`.
    fn note(
        &mut self,
        offset: u64,
        block: usize,
        start: u64,
        kind: PageKind,
        bytes: u64,
    ) -> Result<(), InspectError> {
        let (block, pages) = (&mut self.blocks.list[block], &mut self.pages[block]);
        let before = pages.entries() as u64;
        pages.note(start / TARGET_PAGE_SIZE, kind, bytes);
        block.sent += 1;
        // A page that comes again may also join what was apart.
        self.held = (self.held + pages.entries() as u64).saturating_sub(before);
        self.check_held(offset)
    }

    fn check_held(&self, offset: u64) -> Result<(), InspectError> {
        let what = "words of 64 pages";
        match self.held <= WORDS_MAX {
            true => Ok(()),
            false => Err(InspectError::TooMany { offset, what, limit: WORDS_MAX }),
        }
    }

    /// A list comes once, before all pages.
    fn read_list<R: Read + Seek>(
        &mut self,
        reader: &mut FileReader<R>,
        total: u64,
        configuration: &Configuration,
    ) -> Result<(), InspectError> {
        let at = reader.offset();
        if !self.blocks.list.is_empty() {
            return Err(value(at, "second list of RAM blocks", total));
        }
        let limits = ListLimits {
            ignore_shared: configuration.has(CAPABILITY_IGNORE_SHARED),
            mapped_ram: configuration.has(CAPABILITY_MAPPED_RAM),
            with_page_size: &[],
            may_have_page_size: false,
        };
        let end = at + reader.left();
        let list = BlockList::read(reader, total, limits, &mut |reader, entry| {
            let at = reader.offset();
            self.add(entry, at)?;
            self.read_bitmap(reader, entry, end)
        })?;
        if !limits.mapped_ram {
            list.entries.iter().try_for_each(|entry| self.add(entry, at))?;
        }
        Ok(())
    }

    fn add(&mut self, entry: &BlockEntry, at: u64) -> Result<(), FormatError> {
        let BlockEntry { id, used_length, gpa: addr, mapped, .. } = entry.clone();
        let impossible = |what, found| FormatError::Value { offset: at, what, found };
        if used_length > BLOCK_MAX {
            return Err(impossible("length of a RAM block", used_length));
        }
        let index = self.blocks.list.len();
        if self.blocks.by_id.insert(id.clone(), index).is_some() {
            return Err(impossible("RAM block with the id of another, number", index as u64));
        }
        let absent = used_length / TARGET_PAGE_SIZE;
        let (normal, zero, sent) = (0, 0, 0);
        let block = SavedRamBlock { id, used_length, addr, mapped, normal, zero, absent, sent };
        self.blocks.list.push(block);
        self.pages.push(P::default());
        Ok(())
    }

    /// Reads the bitmap of the block that was added last, and goes to the end of its pages.
    fn read_bitmap(
        &mut self,
        reader: &mut dyn WireRead,
        entry: &BlockEntry,
        end: u64,
    ) -> Result<(), FormatError> {
        let at = reader.offset();
        let Some(MappedRamHeader { bitmap_offset, pages_offset, .. }) = entry.mapped else {
            return Ok(());
        };
        // Shared memory that is not sent has neither; only x-ignore-shared tells addresses.
        if entry.gpa.is_some() && (bitmap_offset, pages_offset) == (0, 0) {
            return Ok(());
        }
        let words = (entry.used_length / TARGET_PAGE_SIZE).div_ceil(64);
        let bitmap_end = bitmap_offset.checked_add(words * 8).filter(|bitmap| *bitmap <= end);
        let Some(bitmap_end) = bitmap_end else {
            return Err(WireError::Truncated { offset: end, what: "the bitmap of a block" }.into());
        };
        let pages_end = pages_offset.checked_add(entry.used_length);
        // All lies in the order in which it is read: nothing overlaps, nothing is read twice.
        let (true, true, Some(pages_end)) =
            (bitmap_offset >= at, pages_offset >= bitmap_end, pages_end)
        else {
            let what = "place of the pages of a block";
            return Err(FormatError::Value { offset: at, what, found: pages_offset });
        };
        reader.skip(bitmap_offset - at, "the bitmap of a block")?;
        let pages = self.pages.last_mut().expect("a block was added");
        let mut chunk = vec![0; BITMAP_STEP as usize];
        let mut index = 0;
        // Between its pages the bitmap of a large region is mostly a hole.
        let mut is_empty = true;
        while index < words {
            let offset = reader.offset();
            if is_empty
                && let Some(len) = self.holes.and_then(|file| hole(file, offset..bitmap_end))
            {
                reader.skip(len, "the bitmap of a block")?;
                index += len / 8;
                is_empty = false;
                continue;
            }
            let len = (words - index).min(BITMAP_STEP / 8) as usize * 8;
            reader.read_exact(&mut chunk[..len], "the bitmap of a block")?;
            is_empty = chunk[..len].iter().fold(0, |any, byte| any | byte) == 0;
            if is_empty {
                index += len as u64 / 8;
                continue;
            }
            for word in chunk[..len].as_chunks::<8>().0 {
                let word = u64::from_le_bytes(*word);
                if index + 1 == words && word & !last_mask(entry.used_length) != 0 {
                    let what = "bitmap with pages beyond the block, last word";
                    return Err(FormatError::Value { offset, what, found: word });
                }
                if word != 0 {
                    pages.note_normal(index, word);
                }
                index += 1;
            }
            let held = self.held + pages.entries() as u64;
            if held > WORDS_MAX {
                let what = "number of words of 64 pages";
                return Err(FormatError::Value { offset, what, found: held });
            }
        }
        self.held += pages.entries() as u64;
        reader.skip(pages_end - bitmap_end, "the pages of a block")?;
        Ok(())
    }
}

/// Whole words at the start of a range of the file that are a hole, bytes; `None` when those are not worth being passed
/// over. Where the file is read next stays as it is.
pub(super) fn hole(mut file: &File, range: Range<u64>) -> Option<u64> {
    let next = file.stream_position().ok()?;
    let data = match rustix::fs::seek(file, rustix::fs::SeekFrom::Data(range.start)) {
        Err(Errno::NXIO) => Some(range.end),
        // A file system that does not tell has no holes.
        found => found.ok(),
    };
    file.seek(SeekFrom::Start(next)).ok()?;
    let len = (data?.min(range.end) - range.start) / 8 * 8;
    (len >= BITMAP_STEP).then_some(len)
}

/// The bits of the last word of a bitmap that stand for pages of the block.
fn last_mask(used_length: u64) -> u64 {
    match (used_length / TARGET_PAGE_SIZE) % 64 {
        0 => u64::MAX,
        pages => (1 << pages) - 1,
    }
}

fn value(offset: u64, what: &'static str, found: impl Into<u64>) -> InspectError {
    FormatError::Value { offset, what, found: found.into() }.into()
}
