//! The state file: what the device is, between two lives of the daemon.
//!
//! See `spec-notes/state-file.md` for the bytes. A redo log of one entry: a commit writes one of
//! two slots, in turn, and then the words of the bitmap that the slot's delta names. Being killed
//! before the slot is written leaves the old state, being killed after it the new one, since the
//! newest slot's delta is done again at open. All integers are little-endian.

mod layout;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use thiserror::Error;

use layout::{BITMAP, FILE_HEAD, Header, SLOTS, Slot};

/// What never changes; a file of another geometry is refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Size of the region, bytes.
    pub region_size: u64,
    /// Size of a block, bytes.
    pub block_size: u64,
    /// NUMA node, if one is offered.
    pub node_id: Option<u16>,
}

/// What a file holds, checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Saved {
    /// Requested size, bytes.
    pub requested_size: u64,
    /// Size of the usable region, bytes.
    pub usable_region_size: u64,
    /// One bit a block, block 0 in the lowest bit of word 0.
    pub plugged: Vec<u64>,
    /// Number of set bits.
    pub plugged_blocks: u64,
    /// Whether the management API holds migration active.
    pub api_migration: bool,
    /// Whether a system reset was put off until migration ends.
    pub reset_pending: bool,
    /// The last request that changed blocks.
    pub journal: Option<JournalEntry>,
}

/// A request that was executed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JournalEntry {
    /// Its canonical bytes.
    pub request: [u8; 24],
    /// Whether the guest is known to have the answer.
    pub answered: bool,
}

/// The state after a change.
#[derive(Clone, Copy, Debug)]
pub struct Commit<'a> {
    /// Requested size, bytes.
    pub requested_size: u64,
    /// Size of the usable region, bytes.
    pub usable_region_size: u64,
    /// Whether the management API holds migration active.
    pub api_migration: bool,
    /// Whether a system reset was put off until migration ends.
    pub reset_pending: bool,
    /// What happens to the blocks.
    pub delta: Delta,
    /// What happens to the journal.
    pub journal: JournalUpdate<'a>,
}

/// A change of block states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Delta {
    /// None.
    None,
    /// Blocks are plugged.
    Set {
        /// The first of them.
        first_block: u64,
        /// How many.
        nr_blocks: u64,
    },
    /// Blocks are unplugged.
    Clear {
        /// The first of them.
        first_block: u64,
        /// How many.
        nr_blocks: u64,
    },
    /// Every block is unplugged.
    ClearAll,
}

/// A change of the journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalUpdate<'a> {
    /// It stays.
    Keep,
    /// It no longer describes the blocks.
    Forget,
    /// This request was executed; its canonical bytes.
    Record(&'a [u8; 24]),
}

/// Why a state file cannot be used. It is left as it was.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// A system call failed.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why. Told with the path, so not as a source, which would be told again.
        error: io::Error,
    },
    /// Another daemon uses it.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// Not a regular file.
    #[error("{0} is not a regular file")]
    NotAFile(PathBuf),
    /// Not one of ours, or its head is damaged.
    #[error("{path} is no state file, or damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Written by a newer release.
    #[error("{path} has version {found}; this program knows versions up to {known}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// The device has another geometry.
    #[error("{path} is of a device with {field} {found}, not {expected}")]
    Geometry {
        /// The file.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// In the file.
        found: String,
        /// Asked for.
        expected: String,
    },
}

/// An open state file, locked against other processes.
#[derive(Debug)]
pub struct StateFile {
    path: PathBuf,
    geometry: Geometry,
    file: File,
    words: Vec<u64>,
    slot: Slot,
    /// Words of the last delta that may not have been written after it was committed.
    unwritten: Option<std::ops::Range<usize>>,
}

impl StateFile {
    /// Makes a file with every block unplugged. It appears under its name when it is whole, and
    /// at its full size, so that no later commit runs out of space.
    ///
    /// # Errors
    ///
    /// When it exists or cannot be made.
    pub fn create(
        path: &Path,
        geometry: &Geometry,
        requested_size: u64,
        usable_region_size: u64,
    ) -> Result<Self, StateFileError> {
        let slot = Slot { seq: 1, requested_size, usable_region_size, ..Slot::default() };
        let words = vec![0; layout::nr_words(geometry)];
        let make = |temporary: &Path| {
            let file = write_new(temporary, geometry, &slot, &words)?;
            // A link fails where the name exists, unlike a rename.
            std::fs::hard_link(temporary, path)?;
            Ok(file)
        };
        let file = with_temporary(path, make)
            .map_err(|error| StateFileError::Io { path: path.to_owned(), error })?;
        let geometry = *geometry;
        Ok(Self { path: path.to_owned(), geometry, file, words, slot, unwritten: None })
    }

    /// Opens a file and checks all of it. Nothing is written before the first commit.
    ///
    /// # Errors
    ///
    /// When it is damaged, of another geometry, newer, or in use.
    pub fn open(path: &Path, geometry: &Geometry) -> Result<(Self, Saved), StateFileError> {
        let io = |error| StateFileError::Io { path: path.to_owned(), error };
        let damaged = |what: String| StateFileError::Damaged { path: path.to_owned(), what };
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(StateFileError::NotAFile(path.to_owned()));
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        flock(&file, FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| StateFileError::InUse(path.to_owned()))?;
        // Whoever had it locked until now may have put another in its place.
        let (opened, named) = (file.metadata().map_err(io)?, std::fs::metadata(path).map_err(io)?);
        if (opened.dev(), opened.ino()) != (named.dev(), named.ino()) {
            return Err(StateFileError::InUse(path.to_owned()));
        }
        let found_len = file.metadata().map_err(io)?.len();
        if found_len < FILE_HEAD {
            return Err(damaged(format!("{found_len} bytes are too few")));
        }
        let mut bytes = [0; layout::HEADER_LEN];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        Header::check(&bytes, geometry, path)?;
        let expected_len = layout::file_len(geometry);
        if found_len != expected_len {
            return Err(damaged(format!("{found_len} bytes instead of {expected_len}")));
        }
        let read = |at| -> Result<Option<Slot>, StateFileError> {
            let mut bytes = [0; layout::SLOT_LEN];
            file.read_exact_at(&mut bytes, at).map_err(io)?;
            Slot::from_bytes(&bytes).map_err(|what| damaged(what.to_owned()))
        };
        // A slot lies within a page, so that a kill leaves it whole: a torn one is damage, and
        // the older one would hide that.
        let slot = match (read(SLOTS[0])?, read(SLOTS[1])?) {
            (None, Some(first)) if first.seq == 1 => first,
            (Some(a), Some(b)) if a.seq.abs_diff(b.seq) == 1 => {
                if a.seq > b.seq {
                    a
                } else {
                    b
                }
            }
            _ => return Err(damaged("its commits do not follow each other".to_owned())),
        };
        let mut bytes = vec![0; layout::nr_words(geometry) * 8];
        file.read_exact_at(&mut bytes, BITMAP).map_err(io)?;
        let mut words: Vec<u64> = bytes
            .chunks_exact(8)
            .map(|word| u64::from_le_bytes(word.try_into().expect("eight bytes")))
            .collect();
        // What a killed daemon did not get to write, done again; the checks below see the result.
        let changed = layout::apply(&mut words, slot.delta, geometry)
            .ok_or_else(|| damaged("the last change names blocks outside the region".to_owned()))?;
        slot.verify(&words, geometry).map_err(|what| damaged(what.to_owned()))?;
        let mut answered = [0; layout::ANSWERED_LEN];
        file.read_exact_at(&mut answered, layout::ANSWERED).map_err(io)?;
        let answered = layout::answered_seq(&answered) == Some(slot.journal_seq);
        let saved = Saved {
            requested_size: slot.requested_size,
            usable_region_size: slot.usable_region_size,
            plugged: words.clone(),
            plugged_blocks: slot.plugged_blocks,
            api_migration: slot.api_migration,
            reset_pending: slot.reset_pending,
            journal: slot.journal.map(|request| JournalEntry { request, answered }),
        };
        // Written with the next commit, and not yet: the device may still refuse what was saved.
        let (path, geometry) = (path.to_owned(), *geometry);
        let state = Self { path, geometry, file, words, slot, unwritten: Some(changed) };
        Ok((state, saved))
    }

    /// Makes a change durable: once this returns, a killed daemon finds it again.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the file still holds the state before.
    pub fn commit(&mut self, commit: &Commit<'_>) -> Result<(), StateFileError> {
        let path = &self.path;
        let io = |error| StateFileError::Io { path: path.clone(), error };
        let mut slot = Slot {
            seq: self.slot.seq + 1,
            requested_size: commit.requested_size,
            usable_region_size: commit.usable_region_size,
            api_migration: commit.api_migration,
            reset_pending: commit.reset_pending,
            delta: commit.delta,
            ..self.slot
        };
        match commit.journal {
            JournalUpdate::Keep => {}
            JournalUpdate::Forget => slot.journal = None,
            JournalUpdate::Record(request) => {
                slot.journal = Some(*request);
                slot.journal_seq = slot.seq;
            }
        }
        if let Some(range) = self.unwritten.take() {
            let written = self.write_words(range.clone());
            written.inspect_err(|_| self.unwritten = Some(range)).map_err(io)?;
        }
        let range = layout::words_of(commit.delta, self.words.len())
            .ok_or_else(|| io(io::Error::from(io::ErrorKind::InvalidInput)))?;
        let before = layout::sums(&self.words[range.clone()], range.start);
        let old = self.words[range.clone()].to_vec();
        layout::change(&mut self.words, commit.delta);
        let after = layout::sums(&self.words[range.clone()], range.start);
        slot.checksum ^= before.checksum ^ after.checksum;
        slot.plugged_blocks = slot.plugged_blocks - before.ones + after.ones;
        if let Err(source) = self.file.write_all_at(&slot.to_bytes(), slot.place()) {
            self.words[range.clone()].copy_from_slice(&old);
            return Err(io(source));
        }
        self.slot = slot;
        // Committed: should this fail, the next open does it again, or the next commit, before
        // its slot would hide this delta.
        if self.write_changed(range.clone(), &old).is_err() {
            self.unwritten = Some(range);
        }
        Ok(())
    }

    /// Makes a change durable that gives every block a new state: `words` is the whole bitmap. The
    /// commit's own delta is of no account, and the journal is forgotten. A new file takes the
    /// place of this one, so that a killed daemon leaves the one or the other.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the file still holds the state before.
    pub fn replace(&mut self, commit: &Commit<'_>, words: &[u64]) -> Result<(), StateFileError> {
        let io = |error| StateFileError::Io { path: self.path.clone(), error };
        if words.len() != self.words.len() {
            return Err(io(io::Error::from(io::ErrorKind::InvalidInput)));
        }
        let sums = layout::sums(words, 0);
        let slot = Slot {
            seq: 1,
            requested_size: commit.requested_size,
            usable_region_size: commit.usable_region_size,
            plugged_blocks: sums.ones,
            checksum: sums.checksum,
            api_migration: commit.api_migration,
            reset_pending: commit.reset_pending,
            ..Slot::default()
        };
        // A link stays one.
        let path = std::fs::canonicalize(&self.path).map_err(io)?;
        let make = |temporary: &Path| {
            let file = write_new(temporary, &self.geometry, &slot, words)?;
            file.set_permissions(self.file.metadata()?.permissions())?;
            std::fs::rename(temporary, &path)?;
            Ok(file)
        };
        let file = with_temporary(&path, make).map_err(io)?;
        (self.file, self.slot, self.words, self.unwritten) = (file, slot, words.to_vec(), None);
        Ok(())
    }

    /// Notes that the guest has the answer to the journaled request.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub fn mark_answered(&mut self) -> io::Result<()> {
        let bytes = layout::answered_bytes(self.slot.journal_seq);
        self.file.write_all_at(&bytes, layout::ANSWERED)
    }

    /// Writes those words of `range` that are no longer `old`, by pages: unplugging everything
    /// names the whole bitmap, of which little may have been set.
    fn write_changed(&self, range: std::ops::Range<usize>, old: &[u64]) -> io::Result<()> {
        const PAGE: usize = 4096 / 8;
        let pages = range.clone().step_by(PAGE).map(|start| start..range.end.min(start + PAGE));
        pages
            .zip(old.chunks(PAGE))
            .filter(|(page, old)| self.words[page.clone()] != **old)
            .try_for_each(|(page, _)| self.write_words(page))
    }

    fn write_words(&self, range: std::ops::Range<usize>) -> io::Result<()> {
        write_words(&self.file, &self.words[range.clone()], range.start)
    }
}

/// Words that are written at once.
const CHUNK: usize = 8192;

/// Writes words of the bitmap, the first of which has the index `first`.
fn write_words(file: &File, words: &[u64], first: usize) -> io::Result<()> {
    for (chunk, words) in words.chunks(CHUNK).enumerate() {
        let bytes: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        file.write_all_at(&bytes, BITMAP + (first + chunk * CHUNK) as u64 * 8)?;
    }
    Ok(())
}

/// Calls `make` with a name beside `path` that nothing has, and leaves nothing under it.
fn with_temporary(path: &Path, make: impl Fn(&Path) -> io::Result<File>) -> io::Result<File> {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".new-{}", std::process::id()));
    let temporary = PathBuf::from(name);
    // One that was killed may have had the same id.
    let _ = std::fs::remove_file(&temporary);
    let made = make(&temporary);
    let _ = std::fs::remove_file(&temporary);
    made
}

/// Writes a whole file of one commit, at its full size, and locks it.
fn write_new(path: &Path, geometry: &Geometry, slot: &Slot, words: &[u64]) -> io::Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    let len = layout::file_len(geometry);
    match rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, len) {
        // Without it, a commit may fail later; the guest is then told BUSY.
        Err(rustix::io::Errno::OPNOTSUPP) => file.set_len(len)?,
        other => other?,
    }
    file.write_all_at(&Header::new(geometry).to_bytes(), 0)?;
    file.write_all_at(&slot.to_bytes(), slot.place())?;
    for (chunk, part) in words.chunks(CHUNK).enumerate() {
        // The file is zeros so far.
        if part.iter().any(|word| *word != 0) {
            write_words(&file, part, chunk * CHUNK)?;
        }
    }
    file.sync_all()?;
    flock(&file, FlockOperation::NonBlockingLockExclusive)?;
    Ok(file)
}

#[cfg(test)]
mod tests;
