//! Compares the pages of an image with the memory of the guest that was saved.

use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use migration::inspect::{SavedRamBlock, inspect};
use ram_discard::{FileRange, MemoryState, RamDiscardSource, Section};
use rustix::fs::{SeekFrom, seek};
use rustix::io::Errno;

const PAGE: u64 = 4096;
/// Of which as much is read at once.
const PIECE: u64 = 1 << 20;

/// Makes sure that an image has every page of a paused guest, given the memory of its blocks by the last parts of
/// their names. A page that the image does not have is one of zeros, or discarded. How many pages it has of them.
pub fn compare(image: &Path, memory: &[(&str, File)]) -> Result<u64> {
    let file = File::open(image).with_context(|| format!("no {}", image.display()))?;
    let inspection = inspect(&file);
    if let Some(error) = &inspection.error {
        bail!("{}: {error}", image.display());
    }
    ensure!(inspection.warnings.is_empty(), "{:?}", inspection.warnings);
    let mut pages = 0;
    for (name, memory) in memory {
        let of_name = |block: &&SavedRamBlock| block.id.rsplit('/').next() == Some(name);
        let block = inspection.blocks.iter().find(of_name);
        let block = block.with_context(|| format!("no block {name} in the image"))?;
        let mut devices = inspection.virtio_mem.iter();
        let device = devices.find(|device| device.ram_block.as_ref() == Some(&block.id));
        let discarded = |range: Section| {
            device.is_some_and(|device| device.next_range(range, MemoryState::Populated).is_none())
        };
        compare_block(&file, block, memory, &discarded)?;
        pages += block.normal;
    }
    Ok(pages)
}

fn compare_block(
    image: &File,
    block: &SavedRamBlock,
    memory: &File,
    discarded: &dyn Fn(Section) -> bool,
) -> Result<()> {
    let mapped = block.mapped.with_context(|| format!("{}: not mapped-ram", block.id))?;
    let mut bits = vec![0; (block.used_length / PAGE).div_ceil(64) as usize * 8];
    image.read_exact_at(&mut bits, mapped.bitmap_offset)?;
    let has = |page: u64| bits[(page / 8) as usize] >> (page % 8) & 1 != 0;
    let mut pages_with_content = 0;
    let (mut ours, mut theirs) = (vec![0; PIECE as usize], vec![0; PIECE as usize]);
    for data in data(memory, block.used_length)? {
        let mut at = data.start() / PAGE * PAGE;
        while at < data.end() {
            let len = PIECE.min(block.used_length - at);
            let (ours, theirs) = (&mut ours[..len as usize], &mut theirs[..len as usize]);
            image.read_exact_at(ours, mapped.pages_offset + at)?;
            memory.read_exact_at(theirs, at)?;
            let pages = ours.chunks(PAGE as usize).zip(theirs.chunks(PAGE as usize));
            for (page, (ours, theirs)) in (at / PAGE..).zip(pages) {
                let (is_zero, range) = (theirs.iter().all(|byte| *byte == 0), page_range(page)?);
                let right = match has(page) {
                    true => ours == theirs && !discarded(range),
                    false => is_zero || discarded(range),
                };
                ensure!(right, "{}: page {page:#x} differs", block.id);
            }
            at += len;
        }
        pages_with_content += data.len() / PAGE;
    }
    ensure!(block.normal <= pages_with_content + PIECE / PAGE, "{}: pages from nowhere", block.id);
    Ok(())
}

fn page_range(page: u64) -> Result<Section> {
    Section::new(page * PAGE, PAGE).context("pages lie in 64 bits")
}

/// Where a file has memory.
fn data(file: &File, end: u64) -> Result<Vec<FileRange>> {
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < end {
        let start = match seek(file, SeekFrom::Data(at)) {
            Ok(start) => start,
            Err(Errno::NXIO) => break,
            Err(errno) => return Err(std::io::Error::from(errno).into()),
        };
        at = seek(file, SeekFrom::Hole(start))?.min(end);
        let range = FileRange::from_bounds(start, at);
        ranges.extend(range.filter(|_| start < end));
    }
    Ok(ranges)
}

/// The shared memory of a process by its size, as far as it has files for it.
pub fn memory_of(process: u32, size: u64) -> Result<File> {
    for entry in std::fs::read_dir(format!("/proc/{process}/fd"))? {
        let path = entry?.path();
        let target = match std::fs::read_link(&path) {
            Err(error) if error.kind() == ErrorKind::NotFound => continue,
            target => target?,
        };
        let is_memfd = target.to_string_lossy().starts_with("/memfd:");
        if is_memfd && std::fs::metadata(&path)?.len() == size {
            return Ok(File::open(&path)?);
        }
    }
    bail!("QEMU has no memfd of {size} bytes")
}
