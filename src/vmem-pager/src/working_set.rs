//! The order in which a guest touches its memory, and the file that keeps it.
//!
//! All big-endian; drawn in `spec-notes/pager-qemu-restore.md`.
//!
//! | bytes | |
//! | --- | --- |
//! | 8 | `VMEMWSET` |
//! | 4 | version, 1 |
//! | 4 | how many RAM blocks; of each: a byte and as many of its id, 8 bytes of its pages |
//! | 4 | how many runs; of each: 2 bytes of its block's place above, 8 of its first page, 4 of its pages |
//! | 4 | CRC-32 of all before |

use std::fs::File;
use std::io::{Read, Write};
use std::ops::Range;
use std::path::Path;

use migration::snapshot::NewImage;
use vmstate::wire::{WireRead, WireReader, WireWrite};

use crate::error::PagerError;
use crate::image::GuestImage;

const MAGIC: &[u8; 8] = b"VMEMWSET";
const VERSION: u32 = 1;
/// Bytes of a file that are read: some million runs.
const FILE_MAX: u64 = 64 << 20;
/// Bytes of the checksum.
const CRC_LEN: usize = 4;
/// RAM blocks, as many as a list has at most.
const BLOCKS_MAX: u32 = 4096;

/// Pages of RAM blocks, in the order of their first touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct WorkingSet {
    runs: Vec<(usize, Range<u64>)>,
}

impl WorkingSet {
    /// Appends pages of a block, by its place in the image.
    pub fn push(&mut self, block: usize, pages: Range<u64>) {
        match self.runs.last_mut() {
            Some((last, run)) if *last == block && run.end == pages.start => run.end = pages.end,
            _ if pages.is_empty() => {}
            _ => self.runs.push((block, pages)),
        }
    }

    /// Runs of pages of blocks, in their order.
    pub fn runs(&self) -> impl Iterator<Item = (usize, Range<u64>)> {
        self.runs.iter().cloned()
    }

    /// Writes it to a file, which has it whole or is what it was.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn save(&self, path: &Path, image: &GuestImage) -> Result<(), PagerError> {
        self.save_of(path, &blocks_of(image))
    }

    /// As [`save`](Self::save), with ids and pages of the RAM blocks.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub fn save_of(&self, path: &Path, blocks: &[(String, u64)]) -> Result<(), PagerError> {
        let written = NewImage::create(path).and_then(|new| {
            new.file().write_all(&self.encode(blocks))?;
            new.commit()
        });
        written.map_err(PagerError::file("write the working set to", path))
    }

    /// Reads the working set of a guest. `None` when it is of a guest with other RAM blocks.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is not one of a working set, or is damaged.
    pub fn load(path: &Path, image: &GuestImage) -> Result<Option<Self>, PagerError> {
        Self::load_of(path, &blocks_of(image))
    }

    /// As [`load`](Self::load), with ids and pages of the RAM blocks.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, is not one of a working set, or is damaged.
    pub fn load_of(path: &Path, blocks: &[(String, u64)]) -> Result<Option<Self>, PagerError> {
        let failed = PagerError::file("read the working set from", path);
        let mut bytes = Vec::new();
        let read =
            File::open(path).and_then(|file| file.take(FILE_MAX + 1).read_to_end(&mut bytes));
        read.map_err(failed)?;
        Self::decode(&bytes, blocks)
            .map_err(|what| PagerError::Image { path: path.to_owned(), what })
    }

    fn encode(&self, blocks: &[(String, u64)]) -> Vec<u8> {
        let mut out = MAGIC.to_vec();
        out.put_be32(VERSION);
        out.put_be32(u32::try_from(blocks.len()).expect("lists of blocks are limited"));
        for (id, pages) in blocks {
            out.put_name(id);
            out.put_be64(*pages);
        }
        // A run of more pages than a field holds is several.
        let pieces = self.runs.iter().flat_map(|(block, run)| {
            let starts = run.clone().step_by(u32::MAX as usize);
            starts.map(move |start| {
                let pages = (run.end - start).min(u64::from(u32::MAX));
                (*block as u16, start, pages as u32)
            })
        });
        let room = (FILE_MAX as usize - out.len() - 4 - CRC_LEN) / 14;
        let pieces: Vec<(u16, u64, u32)> = pieces.take(room).collect();
        out.put_be32(u32::try_from(pieces.len()).expect("fewer than what a file has room for"));
        for (block, start, pages) in pieces {
            out.put_be16(block);
            out.put_be64(start);
            out.put_be32(pages);
        }
        let crc = crc32fast::hash(&out);
        out.put_be32(crc);
        out
    }

    fn decode(bytes: &[u8], blocks: &[(String, u64)]) -> Result<Option<Self>, String> {
        if !bytes.starts_with(MAGIC) {
            return Err("not a working set: write one with --record".to_owned());
        }
        if bytes.len() as u64 > FILE_MAX {
            return Err(format!("a working set has at most {FILE_MAX} bytes"));
        }
        let parts = bytes.split_last_chunk::<CRC_LEN>();
        let parts = parts.and_then(|(body, crc)| Some((body, body.get(MAGIC.len()..)?, crc)));
        let (body, fields, crc) = parts.ok_or("the working set is cut")?;
        let mut reader = WireReader::new(fields);
        let damaged =
            |error: vmstate::wire::WireError| format!("the working set is damaged: {error}");
        let version = reader.be32("the version").map_err(damaged)?;
        if version != VERSION {
            return Err(format!(
                "a working set of version {version}; only version {VERSION} is understood"
            ));
        }
        if crc32fast::hash(body) != u32::from_be_bytes(*crc) {
            return Err("the working set is damaged: its checksum differs".to_owned());
        }
        let count = reader.be32("the number of RAM blocks").map_err(damaged)?;
        if count > BLOCKS_MAX {
            return Err(format!(
                "the working set has {count} RAM blocks; at most {BLOCKS_MAX} are possible"
            ));
        }
        let mut found = Vec::new();
        for _ in 0..count {
            let id = reader.name("the id of a RAM block").map_err(damaged)?;
            found.push((id, reader.be64("its pages").map_err(damaged)?));
        }
        let mut set = Self::default();
        for _ in 0..reader.be32("the number of runs").map_err(damaged)? {
            let block = reader.be16("the block of a run").map_err(damaged)?;
            let start = reader.be64("the first page of a run").map_err(damaged)?;
            let pages = reader.be32("the pages of a run").map_err(damaged)?;
            let end = start.checked_add(u64::from(pages));
            let within =
                found.get(usize::from(block)).zip(end).filter(|((_, all), end)| end <= all);
            let Some((_, end)) = within else {
                return Err(format!(
                    "the working set is damaged: {pages} pages at {start} of block {block}"
                ));
            };
            set.push(usize::from(block), start..end);
        }
        if !reader.is_at_end().unwrap_or(false) {
            return Err("the working set is damaged: bytes follow its end".to_owned());
        }
        Ok((found == blocks).then_some(set))
    }
}

/// Ids and pages of the RAM blocks of a guest, by which it is told from others.
fn blocks_of(image: &GuestImage) -> Vec<(String, u64)> {
    image.blocks().iter().map(|block| (block.id().to_owned(), block.nr_pages())).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn blocks() -> Vec<(String, u64)> {
        vec![("vm0/vmem".to_owned(), 1 << 40), ("ram".to_owned(), 1000)]
    }

    fn set(runs: &[(usize, Range<u64>)]) -> WorkingSet {
        let mut set = WorkingSet::default();
        runs.iter().for_each(|(block, run)| set.push(*block, run.clone()));
        set
    }

    #[test]
    fn golden_file() {
        let mut expected = b"VMEMWSET\0\0\0\x01\0\0\0\x02".to_vec();
        expected.extend(b"\x08vm0/vmem\0\0\x01\0\0\0\0\0\x03ram\0\0\0\0\0\0\x03\xe8");
        expected.extend(b"\0\0\0\x02\0\x01\0\0\0\0\0\0\0\x05\0\0\0\x03");
        expected.extend(b"\0\0\0\0\0\0\0\0\0\0\0\0\0\x01");
        expected.extend(crc32fast::hash(&expected).to_be_bytes());
        // Pages that follow each other are one run.
        let set = set(&[(1, 5..6), (1, 6..8), (0, 0..1)]);
        assert_eq!(set.encode(&blocks()), expected);
        assert_eq!(WorkingSet::decode(&expected, &blocks()), Ok(Some(set)));
    }

    #[test]
    fn a_run_of_more_pages_than_a_field_holds_comes_back() {
        let set = set(&[(0, 7..(1 << 33))]);
        assert_eq!(WorkingSet::decode(&set.encode(&blocks()), &blocks()), Ok(Some(set)));
    }

    #[test]
    fn a_file_of_another_guest_is_told_from_a_damaged_one() {
        let bytes = set(&[(1, 5..6)]).encode(&blocks());
        let mut other = blocks();
        other[1].1 = 2000;
        assert_eq!(WorkingSet::decode(&bytes, &other), Ok(None));
        let damaged = |bytes: &[u8]| WorkingSet::decode(bytes, &blocks()).unwrap_err();
        assert!(damaged(b"QEVM").contains("not a working set"));
        for at in 8..bytes.len() {
            let mut changed = bytes.clone();
            changed[at] ^= 0x40;
            damaged(&changed);
            damaged(&bytes[..at]);
        }
        let mut newer = bytes[..bytes.len() - CRC_LEN].to_vec();
        newer[11] = 2;
        newer.extend(crc32fast::hash(&newer).to_be_bytes());
        assert!(damaged(&newer).contains("version 2"));
    }

    proptest! {
        #[test]
        fn whatever_was_touched_comes_back(
            runs in proptest::collection::vec((0usize..2, 0u64..990, 1u64..10), 0..50),
            garbage in proptest::collection::vec(any::<u8>(), 0..100),
        ) {
            let runs: Vec<_> = runs.into_iter().map(|(block, at, len)| (block, at..at + len)).collect();
            let set = set(&runs);
            prop_assert_eq!(WorkingSet::decode(&set.encode(&blocks()), &blocks()), Ok(Some(set)));
            // With a checksum that fits, so that what is behind it is looked at.
            let mut bytes = MAGIC.to_vec();
            bytes.put_be32(VERSION);
            bytes.extend(garbage);
            bytes.extend(crc32fast::hash(&bytes).to_be_bytes());
            let _ = WorkingSet::decode(&bytes, &blocks());
        }
    }
}
