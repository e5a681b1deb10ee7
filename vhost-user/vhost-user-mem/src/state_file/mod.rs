//! The state file: what the device is, between two lives of the daemon.
//!
//! See `spec-notes/state-file.md` for the bytes. A redo log of one entry: a commit writes one of
//! two slots, in turn, and then the words of the bitmap that the slot's delta names. Being killed
//! before the slot is written leaves the old state, being killed after it the new one, since the
//! newest slot's delta is done again at open. All integers are little-endian.

//!
//! All of that is about a daemon that is killed. When the host goes down, the guest is gone with its
//! memory, and so is what the file says of its blocks, of which any part may have reached the disk.
//! A file of another boot therefore only keeps the requested size, which is synced when it is set.

mod boot;
mod error;
mod layout;
mod left;
mod made;
mod record;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use parking_lot::Mutex;
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

pub use boot::BootId;
pub use error::StateFileError;
use layout::{BITMAP, FILE_HEAD, Header, LASTING, Lasting, SLOTS, Slot};
use made::Content;
pub use record::{Commit, Delta, Geometry, JournalEntry, JournalUpdate, Saved};

/// An open state file, locked against other processes.
#[derive(Debug)]
pub struct StateFile {
    /// `None` when it is only in memory.
    path: Option<PathBuf>,
    geometry: Geometry,
    boot: BootId,
    file: Arc<File>,
    current: Current,
    words: Vec<u64>,
    slot: Slot,
    /// What was synced last; `None` when that is not known.
    lasting: Option<Lasting>,
    /// Words of the last delta that may not have been written after it was committed.
    unwritten: Option<std::ops::Range<usize>>,
    /// The file is of another boot, and nothing was written since.
    other_boot: bool,
}

/// The file that a [`StateFile`] is kept in, which may be replaced by another.
#[derive(Clone, Debug)]
pub struct Current(Arc<Mutex<Arc<File>>>);

impl Current {
    /// The file.
    pub fn current(&self) -> Arc<File> {
        Arc::clone(&self.0.lock())
    }
}

/// How messages name a file that is only in memory.
const IN_MEMORY: &str = "the state in memory";

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
        let make = |content: &Content<'_>| {
            // A link stays one, also if it points to a file that is not there yet.
            let file = made::new(&made::resolve(path)?, content)?;
            left::remove(path, &file);
            Ok(file)
        };
        Self::first(Some(path), geometry, requested_size, usable_region_size, make)
    }

    /// The same without a file: its content outlives this program, but not the process.
    ///
    /// # Errors
    ///
    /// When there is no memory for it.
    pub fn in_memory(
        geometry: &Geometry,
        requested_size: u64,
        usable_region_size: u64,
    ) -> Result<Self, StateFileError> {
        Self::first(None, geometry, requested_size, usable_region_size, made::in_memory)
    }

    /// One with every block unplugged, in a file that `make` makes.
    fn first(
        path: Option<&Path>,
        geometry: &Geometry,
        requested_size: u64,
        usable_region_size: u64,
        make: impl FnOnce(&Content<'_>) -> io::Result<File>,
    ) -> Result<Self, StateFileError> {
        let named = || path.unwrap_or(Path::new(IN_MEMORY)).to_owned();
        let io = |error| StateFileError::Io { path: named(), error };
        let boot = BootId::of_host().map_err(io)?;
        let slot = Slot { seq: 1, requested_size, usable_region_size, ..Slot::default() };
        let words = vec![0; layout::nr_words(geometry)];
        let file = make(&Content { geometry, boot, slot: &slot, words: &words }).map_err(io)?;
        Ok(Self::made(path.map(Path::to_owned), *geometry, boot, file, slot, words))
    }

    fn made(
        path: Option<PathBuf>,
        geometry: Geometry,
        boot: BootId,
        file: File,
        slot: Slot,
        words: Vec<u64>,
    ) -> Self {
        let file = Arc::new(file);
        let current = Current(Arc::new(Mutex::new(Arc::clone(&file))));
        let lasting = Some(made::lasting(&slot));
        let (unwritten, other_boot) = (None, false);
        Self { path, geometry, boot, file, current, words, slot, lasting, unwritten, other_boot }
    }

    /// Opens a file and checks all of it. Nothing is written before the first commit; new files that a
    /// killed daemon did not finish are removed from beside it.
    ///
    /// # Errors
    ///
    /// When it is damaged, of another geometry, newer, or in use.
    pub fn open(path: &Path, geometry: &Geometry) -> Result<(Self, Saved), StateFileError> {
        let boot = BootId::of_host()
            .map_err(|error| StateFileError::Io { path: path.to_owned(), error })?;
        Self::open_in(path, geometry, boot)
    }

    /// Opens a file as [`open`](Self::open) does, on a host with this boot id.
    ///
    /// # Errors
    ///
    /// As there.
    pub fn open_in(
        path: &Path,
        geometry: &Geometry,
        boot: BootId,
    ) -> Result<(Self, Saved), StateFileError> {
        let io = |error| StateFileError::Io { path: path.to_owned(), error };
        if !std::fs::metadata(path).map_err(io)?.is_file() {
            return Err(StateFileError::NotAFile(path.to_owned()));
        }
        let file = OpenOptions::new().read(true).write(true).open(path).map_err(io)?;
        lock(&file, path)?;
        // The process that had it locked until now may have put another in its place.
        let (opened, named) = (file.metadata().map_err(io)?, std::fs::metadata(path).map_err(io)?);
        if (opened.dev(), opened.ino()) != (named.dev(), named.ino()) {
            return Err(StateFileError::InUse(path.to_owned()));
        }
        let opened = Self::read(file, Some(path), geometry, boot)?;
        left::remove(path, &opened.0.file);
        Ok(opened)
    }

    /// Takes over the [current](Self::current) file of a process that this one has replaced. It is
    /// still locked.
    ///
    /// # Errors
    ///
    /// When it is not one of this geometry.
    pub fn continue_with(
        file: File,
        path: Option<&Path>,
        geometry: &Geometry,
    ) -> Result<(Self, Saved), StateFileError> {
        let named = path.unwrap_or(Path::new(IN_MEMORY));
        let boot = BootId::of_host()
            .map_err(|error| StateFileError::Io { path: named.to_owned(), error })?;
        Self::read(file, path, geometry, boot)
    }

    /// Where the state is kept, for a process that continues with it.
    pub fn current(&self) -> Current {
        self.current.clone()
    }

    fn read(
        file: File,
        path: Option<&Path>,
        geometry: &Geometry,
        boot: BootId,
    ) -> Result<(Self, Saved), StateFileError> {
        let named = path.unwrap_or(Path::new(IN_MEMORY));
        let io = |error| StateFileError::Io { path: named.to_owned(), error };
        let damaged = |what: String| StateFileError::Damaged { path: named.to_owned(), what };
        let found_len = file.metadata().map_err(io)?.len();
        if found_len < FILE_HEAD {
            return Err(damaged(format!("{found_len} bytes are too few")));
        }
        let mut bytes = [0; layout::HEADER_LEN];
        file.read_exact_at(&mut bytes, 0).map_err(io)?;
        let written_in = Header::check(&bytes, geometry, named)?;
        let expected_len = layout::file_len(geometry);
        if found_len != expected_len {
            return Err(damaged(format!("{found_len} bytes instead of {expected_len}")));
        }
        let mut lasting: Option<Lasting> = None;
        for at in LASTING {
            let mut bytes = [0; layout::LASTING_LEN];
            file.read_exact_at(&mut bytes, at).map_err(io)?;
            lasting = Lasting::newest(lasting, Lasting::from_bytes(&bytes, at));
        }
        let other_boot = written_in != boot;
        let (slot, words, unwritten, answered) = if other_boot {
            let Lasting { requested_size, .. } = lasting
                .ok_or_else(|| damaged("neither requested size that was synced is whole".into()))?;
            let words = vec![0; layout::nr_words(geometry)];
            (Slot { requested_size, ..Slot::default() }, words, None, false)
        } else {
            let (slot, words, changed) = read_commit(&file, geometry, &io, &damaged)?;
            let mut answered = [0; layout::ANSWERED_LEN];
            file.read_exact_at(&mut answered, layout::ANSWERED).map_err(io)?;
            let answered = layout::answered_seq(&answered) == Some(slot.journal_seq);
            (slot, words, Some(changed), answered)
        };
        let saved = Saved {
            requested_size: slot.requested_size,
            usable_region_size: slot.usable_region_size,
            plugged: words.clone(),
            plugged_blocks: slot.plugged_blocks,
            api_migration: slot.api_migration,
            reset_pending: slot.reset_pending,
            journal: slot.journal.map(|request| JournalEntry { request, answered }),
            other_boot,
        };
        // Written with the next commit, and not yet: the device may still refuse what was saved.
        let path = path.map(Path::to_owned);
        let made = Self::made(path, *geometry, boot, file, slot, words);
        Ok((Self { lasting, unwritten, other_boot, ..made }, saved))
    }

    fn named(&self) -> PathBuf {
        self.path.clone().unwrap_or_else(|| IN_MEMORY.into())
    }

    /// Makes a change durable: once this returns, a killed daemon finds it again.
    ///
    /// # Errors
    ///
    /// When it cannot be written; the file still holds the state before.
    pub fn commit(&mut self, commit: &Commit<'_>) -> Result<(), StateFileError> {
        let path = self.named();
        let io = |error| StateFileError::Io { path: path.clone(), error };
        if self.other_boot {
            self.begin(commit).map_err(io)?;
        }
        let mut slot = Slot {
            seq: self.slot.seq.wrapping_add(1),
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
        let range = layout::words_of(commit.delta, &self.geometry)
            .ok_or_else(|| io(io::Error::from(io::ErrorKind::InvalidInput)))?;
        self.sync_requested(commit.requested_size).map_err(io)?;
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
        let named = self.named();
        let io = |error| StateFileError::Io { path: named.clone(), error };
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
        let content = Content { geometry: &self.geometry, boot: self.boot, slot: &slot, words };
        let file = match &self.path {
            None => made::in_memory(&content),
            // A link stays one.
            Some(path) => std::fs::canonicalize(path)
                .and_then(|path| made::instead_of(&self.file, &path, &content)),
        };
        self.file = Arc::new(file.map_err(io)?);
        *self.current.0.lock() = Arc::clone(&self.file);
        self.lasting = Some(made::lasting(&slot));
        (self.slot, self.words, self.unwritten, self.other_boot) =
            (slot, words.to_vec(), None, false);
        Ok(())
    }

    /// Makes the file of another boot one of this, with every block unplugged.
    fn begin(&mut self, commit: &Commit<'_>) -> io::Result<()> {
        let slot = Slot {
            seq: 1,
            requested_size: commit.requested_size,
            usable_region_size: commit.usable_region_size,
            ..Slot::default()
        };
        // The head last: until then, nothing but the synced size counts.
        made::write_words(&self.file, &self.words, 0)?;
        self.file.write_all_at(&[0; layout::ANSWERED_LEN], layout::ANSWERED)?;
        for at in SLOTS {
            self.file.write_all_at(&[0; layout::SLOT_LEN], at)?;
        }
        self.file.write_all_at(&slot.to_bytes(), slot.place())?;
        self.file.sync_data()?;
        self.file.write_all_at(&Header::new(&self.geometry, self.boot).to_bytes(), 0)?;
        self.file.sync_data()?;
        (self.slot, self.other_boot) = (slot, false);
        Ok(())
    }

    /// Makes a requested size outlive the host, if it is another than before.
    fn sync_requested(&mut self, requested_size: u64) -> io::Result<()> {
        let before = self.lasting.filter(|before| before.requested_size == requested_size);
        if before.is_some() {
            return Ok(());
        }
        let seq = self.lasting.map_or(0, |lasting| lasting.seq).wrapping_add(1);
        let lasting = Lasting { seq, requested_size };
        self.file.write_all_at(&lasting.to_bytes(), lasting.place())?;
        self.file.sync_data()?;
        self.lasting = Some(lasting);
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
        made::write_words(&self.file, &self.words[range.clone()], range.start)
    }
}

/// The newest commit of a file of this boot, the bitmap it left, and the words that it changed.
fn read_commit(
    file: &File,
    geometry: &Geometry,
    io: &dyn Fn(io::Error) -> StateFileError,
    damaged: &dyn Fn(String) -> StateFileError,
) -> Result<(Slot, Vec<u64>, std::ops::Range<usize>), StateFileError> {
    let read = |at| -> Result<Option<Slot>, StateFileError> {
        let mut bytes = [0; layout::SLOT_LEN];
        file.read_exact_at(&mut bytes, at).map_err(io)?;
        Slot::from_bytes(&bytes, at).map_err(|what| damaged(what.to_owned()))
    };
    // A slot lies within a page, so that a kill leaves it whole: a torn one is damage, and the
    // older one would hide that.
    let slot = match (read(SLOTS[0])?, read(SLOTS[1])?) {
        (None, Some(first)) if first.seq == 1 => first,
        (Some(a), Some(b)) if a.follows(&b) => a,
        (Some(a), Some(b)) if b.follows(&a) => b,
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
    Ok((slot, words, changed))
}

/// Locks a file for as long as it is open.
fn lock(file: &File, path: &Path) -> Result<(), StateFileError> {
    match flock(file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(()),
        Err(Errno::WOULDBLOCK) => Err(StateFileError::InUse(path.to_owned())),
        Err(error) => Err(StateFileError::NotLocked { path: path.to_owned(), error: error.into() }),
    }
}

#[cfg(test)]
mod tests;
