//! The stream of a snapshot file: which blocks it has, and where their pages are.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use vmstate::wire::WireRead;

use super::{PIECE, bitmap_len, with_mapped_ram};
use crate::devices::Devices;
use crate::error::MigrationError;
use crate::file_reader::FileReader;
use crate::handler::LoadHandler;
use crate::loader::{Loader, out_of_place};
use crate::page_bitmap::{DiscardMask, PageBitmap};
use crate::progress::{Counters, Progress, Status};
use crate::ram::{InMigration, ListOptions, MigrationBlock, RamBlocks, prepare};
use crate::stream::{
    BlockList, Configuration, FormatError, ListLimits, MappedRamHeader, PageHeader, RAM_SECTION,
    RAM_VERSION, Record, SectionKind, TARGET_PAGE_SIZE, read_header, read_record,
};

/// Reads the stream of `file`. Once all of it is known, `with_pages` is to see to the pages, and
/// then the devices take their states over.
pub(super) fn load(
    configuration: &Configuration,
    blocks: Arc<RamBlocks>,
    devices: &mut dyn Devices,
    progress: &Progress,
    file: &File,
    with_pages: &mut dyn FnMut(Vec<Placed>) -> Result<(), MigrationError>,
) -> Result<(), MigrationError> {
    let configuration = with_mapped_ram(configuration);
    let options = ListOptions::of(&configuration);
    let ram = MappedLoad { blocks, options, file, progress, with_pages, placed: None };
    let length = file.metadata().map_err(MigrationError::io("look at the file"))?.len();
    let mut reader = FileReader::new(file, length).map_err(MigrationError::io("read the file"))?;
    let mut loader = Loader::new(vec![Box::new(ram)], devices, &configuration)?;
    let stream = read_header(&mut reader)?;
    Loader::check(&configuration, &stream)?;
    progress.set_status(Status::Active);
    loop {
        let at = reader.offset();
        match read_record(&mut reader)? {
            Record::Section(header) => loader.section(&header, &mut reader)?,
            Record::Continued { kind, section_id } => {
                loader.continued(kind, section_id, at, &mut reader)?;
            }
            Record::Eof => return loader.all_loaded(),
            // A file does not answer; what QEMU puts there tells nothing here.
            Record::Command(_) => {}
            Record::Description(_) => {
                return Err(out_of_place("description", at, "before the end of the sections"));
            }
        }
    }
}

/// The "ram" handler of a mapped-ram file.
struct MappedLoad<'a> {
    blocks: Arc<RamBlocks>,
    options: ListOptions,
    file: &'a File,
    progress: &'a Progress,
    with_pages: &'a mut dyn FnMut(Vec<Placed>) -> Result<(), MigrationError>,
    placed: Option<Vec<Placed>>,
}

/// A block, and where the file has which of its pages.
pub(super) struct Placed {
    pub(super) block: Arc<MigrationBlock>,
    pub(super) pages: PageBitmap,
    /// The first page, bytes from the start of the file.
    pub(super) pages_offset: u64,
    pub(super) in_migration: InMigration,
}

impl MappedLoad<'_> {
    fn take_list(&mut self, reader: &mut dyn WireRead, total: u64) -> Result<(), MigrationError> {
        let at = reader.offset();
        if self.placed.is_some() {
            let what = "a second list of RAM blocks".to_owned();
            return Err(MigrationError::Page { at, what });
        }
        let ignore_shared = self.options.ignore_shared;
        let limits = ListLimits { mapped_ram: true, ignore_shared, ..ListLimits::default() };
        let (registry, options) = (Arc::clone(&self.blocks), self.options);
        let list = BlockList::read(reader, total, limits, &mut |reader, entry| {
            // An unknown block is refused below; its length is not believed before.
            match (registry.get(&entry.id), &entry.mapped) {
                (Some(block), Some(header)) if options.leaves_out(block) => {
                    pass_nowhere(reader, header)
                }
                (Some(_), Some(header)) => pass_pages(reader, header, entry.used_length),
                _ => Ok(()),
            }
        })?;
        let accepted = self.blocks.accept(&list, self.options)?;
        let mut placed = Vec::new();
        for (block, entry) in accepted.into_iter().zip(&list.entries) {
            let is_sent = block.used().is_some() && !self.options.leaves_out(&block);
            if let Some(header) = entry.mapped.filter(|_| is_sent) {
                let in_migration = InMigration::new(&block);
                let pages = read_bitmap(&block, header, self.file)?;
                let pages_offset = header.pages_offset;
                Counters::add(&self.progress.counters.total, pages.count() * TARGET_PAGE_SIZE);
                placed.push(Placed { block, pages, pages_offset, in_migration });
            }
        }
        self.placed = Some(placed);
        Ok(())
    }
}

/// Reads which pages of a block there are, and refuses them where the block is discarded.
fn read_bitmap(
    block: &MigrationBlock,
    header: MappedRamHeader,
    file: &File,
) -> Result<PageBitmap, MigrationError> {
    let nr_pages = block.used_length() / TARGET_PAGE_SIZE;
    let mut bitmap = PageBitmap::new(nr_pages);
    let len = bitmap_len(block.used_length());
    let at = header.bitmap_offset;
    // In pieces, and holes as holes: the bitmap of a large region is mostly empty.
    let mut bytes = vec![0; PIECE.min(len) as usize];
    let mut done = 0;
    while done < len {
        let piece = &mut bytes[..PIECE.min(len - done) as usize];
        file.read_exact_at(piece, at + done).map_err(MigrationError::io("read a bitmap"))?;
        for (index, word) in piece.chunks_exact(8).enumerate() {
            let word = u64::from_le_bytes(word.try_into().unwrap_or_default());
            if word == 0 {
                continue;
            }
            let first = (done + index as u64 * 8) * 8;
            let end = nr_pages.min(first + 64);
            if end - first < 64 && word >> (end - first) != 0 {
                let what = format!("a page past the end of block {:?}", block.id());
                return Err(MigrationError::Page { at: at + done + index as u64 * 8, what });
            }
            bitmap.or_bits(first..end, &[word]);
        }
        done += piece.len() as u64;
    }
    if let Some(page) = DiscardMask::new(block.discarded()?).first_set(&bitmap) {
        let (block, offset) = (block.id().to_owned(), page * TARGET_PAGE_SIZE);
        let at = header.pages_offset + offset;
        return Err(MigrationError::Discarded { block, offset, at });
    }
    Ok(bitmap)
}

/// Goes to where the stream goes on after a block's bitmap and pages.
fn pass_pages(
    reader: &mut dyn WireRead,
    header: &MappedRamHeader,
    used_length: u64,
) -> Result<(), FormatError> {
    let here = reader.offset();
    let impossible = |what, found| FormatError::Value { offset: here, what, found };
    let bitmap_end = header.bitmap_offset.checked_add(bitmap_len(used_length));
    if header.bitmap_offset < here || bitmap_end.is_none_or(|end| end > header.pages_offset) {
        return Err(impossible("offset of a bitmap", header.bitmap_offset));
    }
    let end = header.pages_offset.checked_add(used_length);
    let Some(end) = end else {
        return Err(impossible("offset of pages", header.pages_offset));
    };
    Ok(reader.skip(end - here, "the pages of a block")?)
}

/// A block that both sides share has no pages in the file.
fn pass_nowhere(reader: &dyn WireRead, header: &MappedRamHeader) -> Result<(), FormatError> {
    if *header == MappedRamHeader::nowhere() {
        return Ok(());
    }
    let what = "place of the pages of a block that both sides share";
    Err(FormatError::Value { offset: reader.offset(), what, found: header.pages_offset })
}

impl LoadHandler for MappedLoad<'_> {
    fn idstr(&self) -> &str {
        RAM_SECTION
    }

    fn version_id(&self) -> u32 {
        RAM_VERSION
    }

    fn load_setup(&mut self) -> Result<(), MigrationError> {
        prepare(&self.blocks, self.options)
    }

    fn load(
        &mut self,
        kind: SectionKind,
        _version_id: u32,
        reader: &mut dyn WireRead,
    ) -> Result<(), MigrationError> {
        loop {
            let at = reader.offset();
            match PageHeader::read(reader)? {
                PageHeader::List { total } if kind == SectionKind::Start => {
                    self.take_list(reader, total)?;
                }
                PageHeader::EndOfSection => return Ok(()),
                PageHeader::Flush => {}
                PageHeader::Page { .. } | PageHeader::List { .. } => {
                    let what = "a page in the stream of a mapped-ram file".to_owned();
                    return Err(MigrationError::Page { at, what });
                }
            }
        }
    }

    fn complete(&mut self) -> Result<(), MigrationError> {
        match self.placed.take() {
            Some(placed) => (self.with_pages)(placed),
            None => Err(MigrationError::NoRam),
        }
    }

    fn cleanup(&mut self) {}
}
