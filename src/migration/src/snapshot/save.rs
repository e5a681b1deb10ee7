//! Writing a stopped guest to a file.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use parking_lot::Mutex;
use ram_discard::{ByteRange, FreezeFor};

use super::file_io::{FileIo, PagesFile, Pieces};
use super::sink::FileSink;
use super::{PIECE, place, with_mapped_ram};
use crate::devices::{DevicePhase, DeviceSection, Devices};
use crate::error::MigrationError;
use crate::framing::{Framing, write};
use crate::page_bitmap::{DiscardMask, PageBitmap, bytes_of, pages_touched};
use crate::progress::{Counters, Progress, Status};
use crate::ram::{FrozenBlocks, ListOptions, MigrationBlock, RamBlocks};
use crate::stream::{
    BlockEntry, Configuration, MappedRamHeader, RAM_SECTION, RAM_VERSION, SectionHeader,
    SectionKind, TARGET_PAGE_SIZE, entry_len, put_description, put_end_of_section, put_entry,
    put_eof, put_footer, put_list_start, put_section,
};
use crate::sys::GatherWrite;

/// Section id of RAM; devices have larger ones.
const RAM_SECTION_ID: u32 = 0;

/// A stopped guest that is to be saved. It stays stopped, and is not changed.
pub struct StoppedGuest<'a> {
    /// Machine type and capabilities.
    pub configuration: Configuration,
    /// Its RAM.
    pub blocks: &'a RamBlocks,
    /// Everything else.
    pub devices: &'a mut dyn Devices,
    /// How its pages are written.
    pub io: FileIo,
    /// What can be seen of it, and how it is cancelled.
    pub progress: Arc<Progress>,
}

/// Writes `guest` to `file`, which is empty. Data is on the disk before the end of the stream is
/// written, and all of it when this returns; a file of its own name is [`write_image`]'s.
///
/// [`write_image`]: super::write_image
///
/// # Errors
///
/// Why it could not be written; the file is of no use then.
pub fn save(guest: StoppedGuest<'_>, file: &File) -> Result<(), MigrationError> {
    let progress = Arc::clone(&guest.progress);
    progress.set_status(Status::Setup);
    let result = save_stopped(guest, file);
    ended(&progress, &result);
    result
}

/// Tells how it ended.
pub(super) fn ended(progress: &Progress, result: &Result<(), MigrationError>) {
    match result {
        Ok(()) => progress.set_status(Status::Completed),
        Err(error) => progress.fail(error),
    }
}

fn save_stopped(guest: StoppedGuest<'_>, file: &File) -> Result<(), MigrationError> {
    let StoppedGuest { configuration, blocks, devices, io, progress } = guest;
    let mut out = FileSink::of_empty(file)?;
    let frozen = FrozenBlocks::new(blocks.migratable()?, FreezeFor::Source)?;
    let mut framing = Framing::begin(&mut out, &with_mapped_ram(&configuration))?;
    for section in devices.save(DevicePhase::Early)? {
        framing.full(&mut out, section)?;
    }
    progress.set_status(Status::Active);
    let placed = put_ram_start(&mut out, blocks, ListOptions::of(&configuration))?;
    write_pages(&placed, &frozen, file, io, &progress)?;
    let rest = devices.save(DevicePhase::Late)?;
    // Without its end the file is of no use.
    frozen.thaw()?;
    put_end(&mut out, framing, rest)
}

/// Writes what follows the pages: the END section of RAM, devices, end and description.
pub(super) fn put_end(
    out: &mut FileSink<'_>,
    mut framing: Framing,
    devices: Vec<DeviceSection>,
) -> Result<(), MigrationError> {
    framing.continued(out, RAM_SECTION_ID as usize, SectionKind::End, |out| {
        let mut bytes = Vec::new();
        put_end_of_section(&mut bytes);
        write(out, &bytes)
    })?;
    for section in devices {
        framing.full(out, section)?;
    }
    // A file with an end has all its pages, whatever happens to the host.
    out.sync()?;
    let mut bytes = Vec::new();
    put_eof(&mut bytes);
    put_description(&mut bytes, &framing.description());
    write(out, &bytes)?;
    out.sync()
}

/// Writes the START section of RAM: after each entry of the list the stream leaves room for the
/// bitmap and the pages. Returns the blocks whose pages are saved.
pub(super) fn put_ram_start(
    out: &mut FileSink<'_>,
    blocks: &RamBlocks,
    options: ListOptions,
) -> Result<Vec<(Arc<MigrationBlock>, MappedRamHeader)>, MigrationError> {
    let list = blocks.list(options)?;
    let mut bytes = Vec::new();
    let header = SectionHeader {
        kind: SectionKind::Start,
        section_id: RAM_SECTION_ID,
        idstr: RAM_SECTION.to_owned(),
        instance_id: 0,
        version_id: RAM_VERSION,
    };
    put_section(&mut bytes, &header);
    put_list_start(&mut bytes, &list);
    write(out, &bytes)?;
    let mut placed = Vec::new();
    // Addresses that no file has are found out below.
    out.will_need(list.entries.iter().fold(out.position, |all, entry| {
        let header = place(all.saturating_add(entry_len(entry)), entry.used_length);
        header.map_or(u64::MAX, |header| header.pages_offset + entry.used_length)
    }));
    for entry in &list.entries {
        let Some(block) = blocks.get(&entry.id).map(Arc::clone) else { continue };
        if options.leaves_out(&block) {
            bytes.clear();
            let nowhere = Some(MappedRamHeader::nowhere());
            put_entry(&mut bytes, &BlockEntry { mapped: nowhere, ..entry.clone() });
            write(out, &bytes)?;
            continue;
        }
        let mapped = place(out.position + entry_len(entry), entry.used_length);
        let mapped = mapped.ok_or_else(|| MigrationError::Io {
            what: "place the pages in the file",
            source: io::ErrorKind::FileTooLarge.into(),
        })?;
        bytes.clear();
        put_entry(&mut bytes, &BlockEntry { mapped: Some(mapped), ..entry.clone() });
        write(out, &bytes)?;
        out.position = mapped.pages_offset + entry.used_length;
        placed.push((block, mapped));
    }
    bytes.clear();
    put_end_of_section(&mut bytes);
    put_footer(&mut bytes, RAM_SECTION_ID);
    write(out, &bytes)?;
    Ok(placed)
}

/// The pages that exist and are not discarded.
pub(super) fn find_pages(
    block: &MigrationBlock,
    frozen: &FrozenBlocks,
    progress: &Progress,
) -> Result<PageBitmap, MigrationError> {
    let (pages, discarded) = pages_of(block, frozen.discarded(block))?;
    let counters = &progress.counters;
    Counters::add(&counters.discarded, discarded);
    Counters::add(&counters.holes, pages.nr_pages() - pages.count() - discarded);
    Counters::add(&counters.total, pages.count() * TARGET_PAGE_SIZE);
    Counters::add(&counters.remaining, pages.count() * TARGET_PAGE_SIZE);
    Ok(pages)
}

/// The pages that exist and are not in `discarded`; and how many are.
pub(super) fn pages_of(
    block: &MigrationBlock,
    discarded: Vec<ByteRange>,
) -> Result<(PageBitmap, u64), MigrationError> {
    let mut pages = PageBitmap::new(block.used_length() / TARGET_PAGE_SIZE);
    if let Some(used) = block.used() {
        block
            .for_each_sent(used, |data| {
                pages.set_range(pages_touched(data));
            })
            .map_err(MigrationError::memory(block.id(), "look for holes"))?;
    }
    let mask = DiscardMask::new(discarded);
    mask.apply(&mut pages);
    Ok((pages, mask.nr_pages()))
}

/// A block whose pages are written.
struct Written<'a> {
    block: &'a MigrationBlock,
    header: MappedRamHeader,
    /// Those that exist.
    pages: PageBitmap,
    /// Those that are in the file.
    written: Mutex<PageBitmap>,
}

/// Writes all pages that exist and are not zero, and which those are.
fn write_pages(
    placed: &[(Arc<MigrationBlock>, MappedRamHeader)],
    frozen: &FrozenBlocks,
    file: &File,
    io: FileIo,
    progress: &Progress,
) -> Result<(), MigrationError> {
    let mut blocks = Vec::with_capacity(placed.len());
    for (block, header) in placed {
        let pages = find_pages(block, frozen, progress)?;
        let written = Mutex::new(PageBitmap::new(pages.nr_pages()));
        blocks.push(Written { block, header: *header, pages, written });
    }
    let pieces = Pieces::new(blocks.iter().map(|block| &block.pages).collect());
    let pages_file = PagesFile::to_write(file, io);
    io.run(|| {
        let mut gathered = GatherWrite::new();
        while let Some((index, run)) = pieces.next() {
            let Written { block, header, written, .. } = &blocks[index];
            let kept = match progress.is_cancelled() {
                true => Err(MigrationError::Cancelled),
                false => write_run(block, run, *header, &pages_file, &mut gathered, progress),
            };
            // The others have nothing more to do.
            let kept = kept.inspect_err(|_| pieces.end())?;
            let mut written = written.lock();
            for run in kept {
                written.set_range(run);
            }
        }
        Ok(())
    })?;
    for Written { header, written, .. } in &blocks {
        write_bitmap(&written.lock(), *header, file)
            .map_err(MigrationError::io("write a bitmap"))?;
    }
    Ok(())
}

/// Writes the pages of a run that are not zero to their places; which those were.
pub(super) fn write_run(
    block: &MigrationBlock,
    run: Range<u64>,
    header: MappedRamHeader,
    file: &PagesFile<'_>,
    gathered: &mut GatherWrite,
    progress: &Progress,
) -> Result<Vec<Range<u64>>, MigrationError> {
    let mapping = block.mapping();
    let mut kept: Vec<Range<u64>> = Vec::new();
    for page in run.clone() {
        if block.is_sent_as_zeros(page * TARGET_PAGE_SIZE) {
            continue;
        }
        match kept.last_mut() {
            Some(last) if last.end == page => last.end += 1,
            _ => kept.push(page..page + 1),
        }
    }
    for part in &kept {
        let range = bytes_of(part.clone());
        gathered.push_memory(mapping, range.start(), range.len());
        let written = file.write(gathered, header.pages_offset + range.start());
        gathered.clear();
        written.map_err(MigrationError::io("write pages"))?;
    }
    let counters = &progress.counters;
    let (all, normal) = (run.end - run.start, kept.iter().map(|part| part.end - part.start).sum());
    Counters::add(&counters.normal, normal);
    Counters::add(&counters.duplicate, all - normal);
    Counters::add(&counters.transferred, normal * TARGET_PAGE_SIZE);
    Counters::subtract(&counters.remaining, all * TARGET_PAGE_SIZE);
    Ok(kept)
}

/// Writes a bitmap. Parts of zeros that are as large as a page stay holes, so that the file does
/// not grow with the block, but with what is used of it.
///
/// # Errors
///
/// When the file does not take it.
pub fn write_bitmap(pages: &PageBitmap, header: MappedRamHeader, file: &File) -> io::Result<()> {
    const PART_WORDS: usize = 512;
    const PIECE_PARTS: usize = PIECE as usize / 8 / PART_WORDS;
    let mut parts = pages.words().chunks(PART_WORDS).zip(0u64..).peekable();
    let mut bytes = Vec::new();
    let is_zero = |part: &[u64]| part.iter().all(|&word| word == 0);
    while let Some((first, index)) = parts.next() {
        if is_zero(first) {
            continue;
        }
        bytes.clear();
        let mut put = |part: &[u64]| {
            part.iter().for_each(|word| bytes.extend_from_slice(&word.to_le_bytes()));
        };
        put(first);
        for _ in 1..PIECE_PARTS {
            let Some((part, _)) = parts.next_if(|(part, _)| !is_zero(part)) else { break };
            put(part);
        }
        file.write_all_at(&bytes, header.bitmap_offset + index * PART_WORDS as u64 * 8)?;
    }
    Ok(())
}
