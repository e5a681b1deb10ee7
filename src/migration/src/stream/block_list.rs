//! The "ram" section: the list of blocks.

use super::page::MEM_SIZE;
use super::{FormatError, TARGET_PAGE_SIZE};
use vmstate::wire::{WireRead, WireWrite};

/// Id string of the section.
pub const RAM_SECTION: &str = "ram";
/// Its version.
pub const RAM_VERSION: u32 = 4;
/// Pages of a block start at a multiple of this in a mapped-ram file, bytes.
pub const MAPPED_RAM_ALIGNMENT: u64 = 1 << 20;
/// Version of a [`MappedRamHeader`].
const MAPPED_RAM_VERSION: u32 = 1;

/// The most blocks in a list: far more than any machine has, few enough to be held.
const BLOCKS_MAX: usize = 4096;

/// The blocks of a stream.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct BlockList {
    /// In the order of the stream.
    pub entries: Vec<BlockEntry>,
}

/// A block of the list.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockEntry {
    /// Its id.
    pub id: String,
    /// Its used length, bytes.
    pub used_length: u64,
    /// Its page size, bytes, where postcopy may follow and it is not the usual one.
    pub page_size: Option<u64>,
    /// Its guest-physical address, where shared memory is not sent.
    pub gpa: Option<u64>,
    /// Where a file has its pages.
    pub mapped: Option<MappedRamHeader>,
}

/// Where a mapped-ram file has the bitmap and the pages of a block, bytes from its start; both 0
/// when it has none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MappedRamHeader {
    /// Bytes of a page.
    pub page_size: u64,
    /// One bit a page, little-endian 64-bit words, first page in the lowest bit.
    pub bitmap_offset: u64,
    /// The first page.
    pub pages_offset: u64,
}

impl MappedRamHeader {
    /// Bytes of an encoded header.
    pub const LEN: u64 = 28;

    /// Of a block whose pages are not in the file, since both sides share it (x-ignore-shared).
    pub fn nowhere() -> Self {
        Self { page_size: TARGET_PAGE_SIZE, bitmap_offset: 0, pages_offset: 0 }
    }

    fn put(&self, out: &mut Vec<u8>) {
        out.put_be32(MAPPED_RAM_VERSION);
        out.put_be64(self.page_size);
        out.put_be64(self.bitmap_offset);
        out.put_be64(self.pages_offset);
    }

    fn read(reader: &mut dyn WireRead) -> Result<Self, FormatError> {
        let offset = reader.offset();
        let version = reader.be32("the version of a mapped-ram header")?;
        if version != MAPPED_RAM_VERSION {
            return Err(FormatError::value(offset, "version of a mapped-ram header", version));
        }
        let page_size = reader.be64("the page size of a block")?;
        if page_size != TARGET_PAGE_SIZE {
            return Err(FormatError::value(offset, "page size of a mapped-ram block", page_size));
        }
        Ok(Self {
            page_size,
            bitmap_offset: reader.be64("the offset of a bitmap")?,
            pages_offset: reader.be64("the offset of pages")?,
        })
    }
}

/// What the entries of a list have besides name and length: not told by the list itself.
#[derive(Clone, Copy, Debug, Default)]
pub struct ListLimits<'a> {
    /// Entries have a guest-physical address (x-ignore-shared).
    pub ignore_shared: bool,
    /// Entries have a mapped-ram header.
    pub mapped_ram: bool,
    /// Entries of blocks with these ids have a page size (postcopy, larger pages).
    pub with_page_size: &'a [&'a str],
    /// Which entries have a page size is to be found out: postcopy was advised, with larger pages.
    pub may_have_page_size: bool,
}

/// Appends a list of blocks, all at once.
pub fn put_list(out: &mut Vec<u8>, list: &BlockList) {
    put_list_start(out, list);
    list.entries.iter().for_each(|entry| put_entry(out, entry));
}

/// Appends what comes before the entries of a list. In a mapped-ram file, where the entries go by
/// [`put_entry`], each is followed by a gap.
pub fn put_list_start(out: &mut Vec<u8>, list: &BlockList) {
    let total: u64 = list.entries.iter().map(|entry| entry.used_length).sum();
    out.put_be64(total | MEM_SIZE);
}

/// Appends an entry of a list.
pub fn put_entry(out: &mut Vec<u8>, entry: &BlockEntry) {
    out.put_name(&entry.id);
    out.put_be64(entry.used_length);
    if let Some(page_size) = entry.page_size {
        out.put_be64(page_size);
    }
    if let Some(gpa) = entry.gpa {
        out.put_be64(gpa);
    }
    if let Some(mapped) = &entry.mapped {
        mapped.put(out);
    }
}

/// Bytes that [`put_entry`] appends before the mapped-ram header.
pub fn entry_len(entry: &BlockEntry) -> u64 {
    let mut bytes = Vec::new();
    put_entry(&mut bytes, &BlockEntry { mapped: None, ..entry.clone() });
    bytes.len() as u64
}

/// Reads the page size that may stand after a length, and never is that of a target page. A name or the end
/// of the section may stand there, too: no name is empty, and no end is as round a number.
fn find_page_size(reader: &mut dyn WireRead) -> Result<Option<u64>, FormatError> {
    let next = reader.peek(8, "the next RAM block")?;
    let word = u64::from_be_bytes(*next.first_chunk().expect("8 bytes were peeked"));
    if !word.is_power_of_two() || word <= TARGET_PAGE_SIZE || word >> 56 != 0 {
        return Ok(None);
    }
    reader.take(8);
    Ok(Some(word))
}

impl BlockList {
    /// Reads the entries of a list of `total` bytes. A mapped-ram header is followed by its
    /// bitmap and pages, which `skip` is asked to pass over.
    ///
    /// # Errors
    ///
    /// When the entries do not add up to `total`, or something in them is impossible.
    pub fn read(
        reader: &mut dyn WireRead,
        total: u64,
        limits: ListLimits<'_>,
        skip: &mut dyn FnMut(&mut dyn WireRead, &BlockEntry) -> Result<(), FormatError>,
    ) -> Result<Self, FormatError> {
        let mut list = Self::default();
        let mut left = total;
        while left != 0 {
            let offset = reader.offset();
            if list.entries.len() == BLOCKS_MAX {
                return Err(FormatError::value(offset, "number of RAM blocks", total));
            }
            let id = reader.name("the id of a RAM block")?;
            let used_length = reader.be64("the length of a RAM block")?;
            left = match left.checked_sub(used_length) {
                Some(rest) if used_length.is_multiple_of(TARGET_PAGE_SIZE) => rest,
                _ => return Err(FormatError::value(offset, "length of a RAM block", used_length)),
            };
            let page_size = match limits.with_page_size.contains(&id.as_str()) {
                true => Some(reader.be64("the page size of a RAM block")?),
                false if limits.may_have_page_size => find_page_size(reader)?,
                false => None,
            };
            let gpa = match limits.ignore_shared {
                true => Some(reader.be64("the address of a RAM block")?),
                false => None,
            };
            let mapped = match limits.mapped_ram {
                true => Some(MappedRamHeader::read(reader)?),
                false => None,
            };
            let entry = BlockEntry { id, used_length, page_size, gpa, mapped };
            if mapped.is_some() {
                skip(reader, &entry)?;
            }
            list.entries.push(entry);
        }
        Ok(list)
    }
}
