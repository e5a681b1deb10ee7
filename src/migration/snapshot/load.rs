//! Reading a guest back from a file, by several threads.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread;

use parking_lot::Mutex;

use super::{PIECE, bitmap_len, with_mapped_ram};
use crate::migration::devices::Devices;
use crate::migration::error::MigrationError;
use crate::migration::file_reader::FileReader;
use crate::migration::handler::LoadHandler;
use crate::migration::loader::{Loader, out_of_place};
use crate::migration::page_bitmap::{PageBitmap, bytes_of};
use crate::migration::progress::{Counters, Progress, Status};
use crate::migration::ram::{ListOptions, MigrationBlock, RamBlocks};
use crate::migration::stream::{
    BlockList, Configuration, FormatError, ListLimits, MappedRamHeader, PageHeader, RAM_SECTION,
    RAM_VERSION, Record, SectionKind, TARGET_PAGE_SIZE, read_header, read_record,
};
use crate::migration::wire::WireRead;

/// A guest that is to be read from a file. It does not run yet.
pub struct Restore<'a> {
    /// Machine type and capabilities.
    pub configuration: Configuration,
    /// Its RAM.
    pub blocks: Arc<RamBlocks>,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// How many threads read pages; at least one does.
    pub threads: usize,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// Reads a guest from `file`, memory and devices. What the file has no page for is a hole.
///
/// # Errors
///
/// Why it could not be read; the guest must not run then.
pub fn restore(restore: Restore<'_>, file: &File) -> Result<(), MigrationError> {
    let Restore { configuration, blocks, devices, threads, progress } = restore;
    progress.set_status(Status::Setup);
    let ram = MappedLoad { blocks, file, threads, progress: Arc::clone(&progress), placed: None };
    let result = load(configuration, ram, devices, &progress, file);
    match &result {
        Ok(()) => progress.set_status(Status::Completed),
        Err(error) => progress.fail(error),
    }
    result
}

fn load(
    configuration: Configuration,
    ram: MappedLoad<'_>,
    devices: &mut dyn Devices,
    progress: &Progress,
    file: &File,
) -> Result<(), MigrationError> {
    let length = file.metadata().map_err(MigrationError::io("look at the file"))?.len();
    let mut reader = FileReader::new(file, length).map_err(MigrationError::io("read the file"))?;
    let mut loader = Loader::new(vec![Box::new(ram)], devices)?;
    let stream = read_header(&mut reader)?;
    Loader::check(&with_mapped_ram(&configuration), &stream)?;
    progress.set_status(Status::Active);
    loop {
        let at = reader.offset();
        match read_record(&mut reader)? {
            Record::Section(header) => loader.section(&header, &mut reader)?,
            Record::Continued { kind, section_id } => {
                loader.continued(kind, section_id, at, &mut reader)?;
            }
            Record::Eof => return loader.all_loaded(),
            // A file has nobody to answer; what QEMU puts there tells nothing here.
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
    file: &'a File,
    threads: usize,
    progress: Arc<Progress>,
    placed: Option<Vec<Placed>>,
}

/// A block and where the file has it.
struct Placed {
    block: Arc<MigrationBlock>,
    header: MappedRamHeader,
}

/// A run of pages that a thread reads at once.
struct Piece {
    placed: usize,
    pages: Range<u64>,
}

impl MappedLoad<'_> {
    fn take_list(&mut self, reader: &mut dyn WireRead, total: u64) -> Result<(), MigrationError> {
        let at = reader.offset();
        if self.placed.is_some() {
            let what = "a second list of RAM blocks".to_owned();
            return Err(MigrationError::Page { at, what });
        }
        let limits = ListLimits { mapped_ram: true, ..ListLimits::default() };
        let registry = Arc::clone(&self.blocks);
        let list = BlockList::read(reader, total, limits, &mut |reader, entry| {
            // An unknown block is refused below; its length is not believed before.
            match (registry.get(&entry.id), &entry.mapped) {
                (Some(_), Some(header)) => pass_pages(reader, header, entry.used_length),
                _ => Ok(()),
            }
        })?;
        let accepted = self.blocks.accept(&list, ListOptions::default())?;
        let mut placed = Vec::new();
        for (block, entry) in accepted.into_iter().zip(&list.entries) {
            if let (Some(header), Some(used)) = (entry.mapped, block.used()) {
                let swept = block.sweep(used);
                swept.map_err(MigrationError::memory(block.id(), "give memory back"))?;
                placed.push(Placed { block, header });
            }
        }
        self.placed = Some(placed);
        self.load_pages()
    }

    /// Reads all pages, by several threads.
    fn load_pages(&self) -> Result<(), MigrationError> {
        let placed = self.placed.as_deref().unwrap_or_default();
        let mut pieces = VecDeque::new();
        for (index, block) in placed.iter().enumerate() {
            let bitmap = block.read_bitmap(self.file)?;
            block.refuse_discarded(&bitmap)?;
            Counters::add(&self.progress.counters.total, bitmap.count() * TARGET_PAGE_SIZE);
            let (mut from, nr_pages) = (0, bitmap.nr_pages());
            while let Some(pages) = bitmap.next_run(from, nr_pages, PIECE / TARGET_PAGE_SIZE) {
                from = pages.end;
                pieces.push_back(Piece { placed: index, pages });
            }
        }
        let pieces = Mutex::new(pieces);
        let work = || -> Result<(), MigrationError> {
            let mut buffer = vec![0; PIECE as usize];
            loop {
                if self.progress.is_cancelled() {
                    return Err(MigrationError::Cancelled);
                }
                let Some(piece) = pieces.lock().pop_front() else { return Ok(()) };
                let nr_pages = piece.pages.end - piece.pages.start;
                let loaded = placed[piece.placed].load(piece.pages, self.file, &mut buffer);
                // The others have nothing more to do.
                loaded.inspect_err(|_| pieces.lock().clear())?;
                Counters::add(&self.progress.counters.normal, nr_pages);
                let bytes = nr_pages * TARGET_PAGE_SIZE;
                Counters::add(&self.progress.counters.transferred, bytes);
            }
        };
        thread::scope(|scope| {
            let others: Vec<_> = (1..self.threads.max(1)).map(|_| scope.spawn(work)).collect();
            let mut result = work();
            for other in others {
                result = result.and(other.join().unwrap_or_else(|panic| {
                    std::panic::resume_unwind(panic);
                }));
            }
            result
        })
    }
}

impl Placed {
    fn read_bitmap(&self, file: &File) -> Result<PageBitmap, MigrationError> {
        let nr_pages = self.block.used_length() / TARGET_PAGE_SIZE;
        let mut bitmap = PageBitmap::new(nr_pages);
        let len = bitmap_len(self.block.used_length());
        let at = self.header.bitmap_offset;
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
                    let what = format!("a page behind the end of block {:?}", self.block.id());
                    return Err(MigrationError::Page { at: at + done + index as u64 * 8, what });
                }
                bitmap.or_bits(first..end, &[word]);
            }
            done += piece.len() as u64;
        }
        Ok(bitmap)
    }

    fn refuse_discarded(&self, bitmap: &PageBitmap) -> Result<(), MigrationError> {
        for range in self.block.discarded()? {
            let first = range.start() / TARGET_PAGE_SIZE;
            if let Some(page) = bitmap.next_set(first, range.end() / TARGET_PAGE_SIZE) {
                let (block, offset) = (self.block.id().to_owned(), page * TARGET_PAGE_SIZE);
                let at = self.header.pages_offset + offset;
                return Err(MigrationError::Discarded { block, offset, at });
            }
        }
        Ok(())
    }

    fn load(
        &self,
        pages: Range<u64>,
        file: &File,
        buffer: &mut [u8],
    ) -> Result<(), MigrationError> {
        let range = bytes_of(pages);
        let bytes = &mut buffer[..range.len() as usize];
        file.read_exact_at(bytes, self.header.pages_offset + range.start())
            .map_err(MigrationError::io("read pages"))?;
        if self.block.tells_holes() {
            let at = self.block.file_base() + range.start();
            let written = self.block.ram().backing().file().write_all_at(bytes, at);
            written.map_err(MigrationError::memory(self.block.id(), "write pages"))
        } else {
            self.block.mapping().write(range.start(), bytes);
            Ok(())
        }
    }
}

/// Goes to where the stream goes on after a block's bitmap and pages.
fn pass_pages(
    reader: &mut dyn WireRead,
    header: &MappedRamHeader,
    used_length: u64,
) -> Result<(), FormatError> {
    let here = reader.offset();
    let impossible = |what, found| FormatError::Value { offset: here, what, found };
    if (header.bitmap_offset, header.pages_offset) == (0, 0) {
        // A block whose pages are not in the file.
        return Ok(());
    }
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

impl LoadHandler for MappedLoad<'_> {
    fn idstr(&self) -> &str {
        RAM_SECTION
    }

    fn version_id(&self) -> u32 {
        RAM_VERSION
    }

    fn load_setup(&mut self) -> Result<(), MigrationError> {
        self.blocks.migratable()?;
        Ok(())
    }

    fn load(&mut self, kind: SectionKind, reader: &mut dyn WireRead) -> Result<(), MigrationError> {
        loop {
            let at = reader.offset();
            match PageHeader::parse(reader.be64("the list of RAM blocks")?, at)? {
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
        match &self.placed {
            Some(_) => Ok(()),
            None => Err(MigrationError::Page { at: 0, what: "the file has no RAM".to_owned() }),
        }
    }

    fn cleanup(&mut self) {}
}
