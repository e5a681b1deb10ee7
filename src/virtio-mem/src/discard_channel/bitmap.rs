//! The block bitmap in memory that server and clients share.
//!
//! The file is an array of 64-bit words in the host's byte order: [`HEADER_WORDS`] of header, then
//! the bits, block 0 in the lowest bit of the first word after the header. A sequence counter
//! guards it (a seqlock): it is odd while the one writer writes, and a reader whose copy began and
//! ended with the same even count has a copy that is not torn. Readers make no system call and
//! cannot hold up the writer.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU64, Ordering, fence};

use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, fcntl_get_seals, memfd_create};
use thiserror::Error;

use crate::device::{BlockBitmap, Geometry};
use crate::sys::{ReadOnlyWords, SharedWords};

/// Words before the bits.
pub const HEADER_WORDS: usize = 8;

/// Word 0 of the file, as a number: "VMEMBITS" in little-endian.
pub const MAGIC: u64 = u64::from_le_bytes(*b"VMEMBITS");

/// Word 1 of the file.
pub const LAYOUT_VERSION: u64 = 1;

const AT_MAGIC: usize = 0;
const AT_VERSION: usize = 1;
const AT_NR_BLOCKS: usize = 2;
const AT_BLOCK_SIZE: usize = 3;
const AT_SEQUENCE: usize = 4;
const AT_EVENT: usize = 5;

const WORD_BITS: usize = u64::BITS as usize;

/// No client may change the file, and no process its size: a reader of a file that shrinks is
/// killed by SIGBUS.
const SEALS: SealFlags =
    SealFlags::SHRINK.union(SealFlags::GROW).union(SealFlags::FUTURE_WRITE).union(SealFlags::SEAL);

/// Why a file is not taken for a bitmap.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum BitmapError {
    /// The kernel refused something.
    #[error("cannot use the bitmap's file: {0}")]
    Io(#[from] io::Error),
    /// Its size may change under a reader.
    #[error("the bitmap's file is not sealed against a change of its size")]
    NotSealed,
    /// It is not as long as the bitmap of this geometry.
    #[error("the bitmap's file has {found} bytes, not {expected}")]
    Size {
        /// What it must be, bytes.
        expected: u64,
        /// What it is, bytes.
        found: u64,
    },
    /// A word of its header is not what it must be.
    #[error("word {index} of the bitmap's header is {found:#x}, not {expected:#x}")]
    Header {
        /// Which.
        index: usize,
        /// What it must be.
        expected: u64,
        /// What it is.
        found: u64,
    },
}

/// Size of the file for `nr_blocks` blocks, bytes.
pub fn file_size(nr_blocks: usize) -> u64 {
    (total_words(nr_blocks) * size_of::<u64>()) as u64
}

fn total_words(nr_blocks: usize) -> usize {
    HEADER_WORDS + nr_blocks.div_ceil(WORD_BITS)
}

/// The server's side: the one writer.
#[derive(Debug)]
pub struct BitmapWriter {
    words: SharedWords,
    /// Open for reading only.
    file: OwnedFd,
    nr_blocks: usize,
}

impl BitmapWriter {
    /// A bitmap with nothing plugged that shows event 0.
    ///
    /// # Errors
    ///
    /// When the kernel refuses the memory.
    pub fn new(geometry: &Geometry) -> io::Result<Self> {
        let nr_blocks = geometry.nr_blocks();
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let file = File::from(memfd_create("virtio-mem-blocks", flags)?);
        file.set_len(file_size(nr_blocks))?;
        let words = SharedWords::map(&file, total_words(nr_blocks))?;
        let header = words.words();
        header[AT_NR_BLOCKS].store(nr_blocks as u64, Ordering::Relaxed);
        header[AT_BLOCK_SIZE].store(geometry.block_size(), Ordering::Relaxed);
        header[AT_VERSION].store(LAYOUT_VERSION, Ordering::Relaxed);
        header[AT_MAGIC].store(MAGIC, Ordering::Relaxed);
        // From here on only the mapping above can write.
        fcntl_add_seals(&file, SEALS)?;
        let file = File::open(format!("/proc/self/fd/{}", file.as_raw_fd()))?;
        Ok(Self { words, file: file.into(), nr_blocks })
    }

    /// The descriptor for clients: read-only, and so is any other way to the file.
    pub fn file(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Size of the file, bytes.
    pub fn file_size(&self) -> u64 {
        file_size(self.nr_blocks)
    }

    /// Number of the last event that the bits show.
    pub fn event(&self) -> u64 {
        self.words.words()[AT_EVENT].load(Ordering::Relaxed)
    }

    /// Sets or clears blocks, and notes the last event that the bits then show. A reader sees all
    /// of it or nothing.
    ///
    /// # Panics
    ///
    /// When a block is not in the region; nothing was written then.
    pub fn update(&mut self, event: u64, changes: &[(Range<usize>, bool)]) {
        for (blocks, _) in changes {
            assert!(blocks.end <= self.nr_blocks, "{blocks:?} of {} blocks", self.nr_blocks);
        }
        let words = self.words.words();
        let sequence = words[AT_SEQUENCE].load(Ordering::Relaxed);
        words[AT_SEQUENCE].store(sequence.wrapping_add(1), Ordering::Relaxed);
        // A reader that sees one of the stores below sees the odd count.
        fence(Ordering::Release);
        words[AT_EVENT].store(event, Ordering::Relaxed);
        for (blocks, plugged) in changes {
            set(&words[HEADER_WORDS..], blocks.clone(), *plugged);
        }
        words[AT_SEQUENCE].store(sequence.wrapping_add(2), Ordering::Release);
    }
}

/// Only the writer stores, so a load and a store need not be one operation.
fn set(bits: &[AtomicU64], blocks: Range<usize>, plugged: bool) {
    let mut at = blocks.start;
    while at < blocks.end {
        let index = at / WORD_BITS;
        let end = blocks.end.min((index + 1) * WORD_BITS);
        let mask = (u64::MAX >> (WORD_BITS - (end - at))) << (at % WORD_BITS);
        let before = bits[index].load(Ordering::Relaxed);
        let after = if plugged { before | mask } else { before & !mask };
        // Not written when it stays, so that pages of a large bitmap that are not used stay away.
        if after != before {
            bits[index].store(after, Ordering::Relaxed);
        }
        at = end;
    }
}

/// A client's side.
#[derive(Debug)]
pub struct BitmapReader {
    words: ReadOnlyWords,
    nr_blocks: usize,
}

/// A copy of some blocks that is not torn.
#[derive(Debug)]
pub struct BitmapCopy {
    /// The block that is the first of `blocks`; a multiple of 64.
    pub first_block: usize,
    /// The blocks.
    pub blocks: BlockBitmap,
    /// Number of the last event that they show.
    pub event: u64,
    /// Count of the changes of the bitmap, twice: another count, and it has changed since.
    pub sequence: u64,
}

impl BitmapReader {
    /// Maps a file that came from a server.
    ///
    /// # Errors
    ///
    /// When it is not the bitmap of this geometry, or its size could change.
    pub fn open(file: OwnedFd, geometry: &Geometry) -> Result<Self, BitmapError> {
        let file = File::from(file);
        let needed = SealFlags::SHRINK | SealFlags::GROW;
        if !fcntl_get_seals(&file).map_err(io::Error::from)?.contains(needed) {
            return Err(BitmapError::NotSealed);
        }
        let nr_blocks = geometry.nr_blocks();
        let (expected, found) = (file_size(nr_blocks), file.metadata()?.len());
        if expected != found {
            return Err(BitmapError::Size { expected, found });
        }
        let words = ReadOnlyWords::map(&file, total_words(nr_blocks))?;
        for (index, expected) in [
            (AT_MAGIC, MAGIC),
            (AT_VERSION, LAYOUT_VERSION),
            (AT_NR_BLOCKS, nr_blocks as u64),
            (AT_BLOCK_SIZE, geometry.block_size()),
        ] {
            let found = words.load(index);
            if found != expected {
                return Err(BitmapError::Header { index, expected, found });
            }
        }
        Ok(Self { words, nr_blocks })
    }

    /// Number of the last event that the bits show.
    pub fn event(&self) -> u64 {
        let event = self.words.load(AT_EVENT);
        fence(Ordering::Acquire);
        event
    }

    /// Count of the changes of the bitmap, twice; odd within one.
    pub fn sequence(&self) -> u64 {
        let sequence = self.words.load(AT_SEQUENCE);
        fence(Ordering::Acquire);
        sequence
    }

    /// Copies at least `blocks`, clipped to the region; `None` when the writer came in between, or
    /// when a bit past the last block is set.
    pub fn try_copy(&self, blocks: Range<usize>) -> Option<BitmapCopy> {
        let end = blocks.end.min(self.nr_blocks);
        let first_word = blocks.start.min(end) / WORD_BITS;
        let sequence = self.words.load(AT_SEQUENCE);
        // What is loaded below is as new as the count, or newer.
        fence(Ordering::Acquire);
        if !sequence.is_multiple_of(2) {
            return None;
        }
        let event = self.words.load(AT_EVENT);
        let words: Vec<u64> = (first_word..end.div_ceil(WORD_BITS))
            .map(|index| self.words.load(HEADER_WORDS + index))
            .collect();
        // If one of the loads above saw a later write, the one below sees its count.
        fence(Ordering::Acquire);
        if self.words.load(AT_SEQUENCE) != sequence {
            return None;
        }
        let first_block = first_word * WORD_BITS;
        let copied = (words.len() * WORD_BITS).min(self.nr_blocks - first_block);
        let blocks = BlockBitmap::from_words(copied, words)?;
        Some(BitmapCopy { first_block, blocks, event, sequence })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::AtomicBool;

    const BLOCK: u64 = 1 << 21;

    fn geometry(nr_blocks: u64) -> Geometry {
        Geometry::new(0, nr_blocks * BLOCK, BLOCK, None).unwrap()
    }

    fn pair(nr_blocks: u64) -> (BitmapWriter, BitmapReader) {
        let geometry = geometry(nr_blocks);
        let writer = BitmapWriter::new(&geometry).unwrap();
        let file = writer.file().try_clone_to_owned().unwrap();
        (writer, BitmapReader::open(file, &geometry).unwrap())
    }

    #[test]
    fn a_client_cannot_change_the_file_in_any_way() {
        let (mut writer, reader) = pair(640);
        let file = File::from(writer.file().try_clone_to_owned().unwrap());
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        let again = File::options().read(true).write(true).open(path).unwrap();
        for file in [&file, &again] {
            assert!(file.write_all_at(&[1], 0).is_err());
            assert!(file.set_len(0).is_err());
            assert!(file.set_len(1 << 20).is_err());
            assert!(SharedWords::map(file, 1).is_err());
            assert!(fcntl_add_seals(file, SealFlags::WRITE).is_err());
            let punch =
                rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE;
            assert!(rustix::fs::fallocate(file, punch, 0, 4096).is_err());
        }
        writer.update(1, &[(3..70, true)]);
        let snapshot = reader.try_copy(0..640).unwrap();
        assert_eq!((snapshot.event, snapshot.blocks.nr_plugged()), (1, 67));
    }

    #[test]
    fn a_file_that_is_not_the_bitmap_is_refused() {
        let writer = BitmapWriter::new(&geometry(640)).unwrap();
        let open =
            |geometry| BitmapReader::open(writer.file().try_clone_to_owned().unwrap(), &geometry);
        assert!(open(geometry(640)).is_ok());
        assert!(matches!(open(geometry(641)), Err(BitmapError::Size { .. })));
        assert!(matches!(
            open(geometry(639)),
            Err(BitmapError::Header { index: AT_NR_BLOCKS, expected: 639, found: 640 })
        ));
        let other_blocks = Geometry::new(0, 640 * 4096, 4096, None).unwrap();
        assert!(matches!(open(other_blocks), Err(BitmapError::Header { index: 3, .. })));

        let memfd = || memfd_create("fake", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING);
        let fake = File::from(memfd().unwrap());
        fake.set_len(file_size(640)).unwrap();
        let unsealed = BitmapReader::open(fake.try_clone().unwrap().into(), &geometry(640));
        assert!(matches!(unsealed, Err(BitmapError::NotSealed)));
        fcntl_add_seals(&fake, SealFlags::SHRINK | SealFlags::GROW).unwrap();
        let zeroes = BitmapReader::open(fake.try_clone().unwrap().into(), &geometry(640));
        assert!(matches!(zeroes, Err(BitmapError::Header { index: AT_MAGIC, .. })));
        let pipe = OwnedFd::from(io::pipe().unwrap().0);
        assert!(matches!(BitmapReader::open(pipe, &geometry(640)), Err(BitmapError::Io(_))));
    }

    #[test]
    fn a_region_without_blocks_has_an_empty_bitmap() {
        let (mut writer, reader) = pair(0);
        writer.update(1, &[]);
        assert_eq!(reader.try_copy(0..0).unwrap().event, 1);
    }

    /// All words are written in one update, from different ends; any mix of two updates shows.
    #[test]
    fn readers_never_see_a_torn_bitmap() {
        const NR_BLOCKS: usize = 64 * 512;
        const UPDATES: u64 = 4000;
        let (mut writer, reader) = pair(NR_BLOCKS as u64);
        let done = AtomicBool::new(false);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    let mut last = 0;
                    loop {
                        let ends = done.load(Ordering::Acquire);
                        if let Some(snapshot) = reader.try_copy(0..NR_BLOCKS) {
                            let plugged = !snapshot.event.is_multiple_of(2);
                            assert!(
                                snapshot.blocks.all(0..NR_BLOCKS, plugged),
                                "torn at event {}",
                                snapshot.event
                            );
                            assert!(last <= snapshot.event, "the past came back");
                            last = snapshot.event;
                        }
                        if ends {
                            break;
                        }
                    }
                    assert_eq!(last, UPDATES);
                });
            }
            for event in 1..=UPDATES {
                let plugged = !event.is_multiple_of(2);
                let (low, high) = (0..NR_BLOCKS / 2, NR_BLOCKS / 2..NR_BLOCKS);
                writer.update(event, &[(high, plugged), (low, plugged)]);
            }
            done.store(true, Ordering::Release);
        });
    }

    proptest! {
        #[test]
        fn agrees_with_the_block_bitmap(
            nr_blocks in 1usize..300,
            changes in prop::collection::vec((0usize..300, 0usize..300, any::<bool>()), 0..20),
            window in (0usize..300, 0usize..300),
        ) {
            let clip = |(a, b): (usize, usize)| {
                let (a, b) = (a.min(nr_blocks), b.min(nr_blocks));
                a.min(b)..a.max(b)
            };
            let mut model = BlockBitmap::new(nr_blocks);
            let (mut writer, reader) = pair(nr_blocks as u64);
            for (event, (a, b, plugged)) in changes.into_iter().enumerate() {
                model.set(clip((a, b)), plugged);
                writer.update(event as u64, &[(clip((a, b)), plugged)]);
            }
            let window = clip(window);
            let snapshot = reader.try_copy(window.clone()).unwrap();
            for block in window {
                let copied = block - snapshot.first_block;
                prop_assert_eq!(
                    snapshot.blocks.all(copied..copied + 1, true),
                    model.all(block..block + 1, true)
                );
            }
            let whole = reader.try_copy(0..nr_blocks).unwrap();
            prop_assert_eq!(whole.blocks, model);
        }
    }
}
