//! What each page of the guest is: missing, present, or zeros.
//!
//! ```text
//!   missing --copied from the memory file--> present --discarded by the VMM--> zeros
//!      |                                                                         ^
//!      +-------------------------- discarded by the VMM -------------------------+
//! ```
//!
//! A page that is once zeros stays so: the kernel may have it already, with what the guest wrote, but where it
//! misses it again it is zeros and never the file's. Holes of the memory file are zeros from the start.
//!
//! All of it lies in a [`Journal`], a memfd that outlives this process where another keeps it, with the place that
//! the kernel writes the messages of the userfaultfd to: so nothing is lost between their reading and their
//! effect.

use std::fs::File;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use migration::lazy::vmm_faults::{Event, MESSAGE_LEN};
use ram_discard::memory::HostMapping;
use rustix::fs::{MemfdFlags, memfd_create};

use super::memory_files::MemoryFiles;
use super::message::{MESSAGE_MAX, Region, parse};
use crate::error::PagerError;

/// Messages that are read at once.
pub const MESSAGES: usize = 32;
const MAGIC: &[u8; 8] = b"VMEMFCJ1";
/// Where the length of the regions' text is, and that of the memory file.
const TEXT_LEN_AT: u64 = 8;
const MEMORY_LEN_AT: u64 = 16;
const MESSAGES_AT: u64 = 1024;
const TEXT_AT: u64 = 4096;
const WORD: u64 = 8;

/// What a page is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    /// Its content is in the memory file.
    Missing,
    /// Its content is with the VMM.
    Present,
    /// It is zeros wherever the VMM misses it.
    Zeros,
}

/// The memfd with the states.
#[derive(Debug)]
pub struct Journal {
    file: File,
    map: HostMapping,
}

impl Journal {
    /// A new one, with the text of the regions as it came.
    ///
    /// # Errors
    ///
    /// When there is no memory.
    fn create(text: &[u8], memory_len: u64, bits: u64) -> Result<Self, PagerError> {
        let failed = || PagerError::system("keep the states of the guest's pages");
        let file = memfd_create("vmem-pager", MemfdFlags::CLOEXEC);
        let file = File::from(file.map_err(|errno| failed()(errno.into()))?);
        let len = text_end(text.len() as u64) + bits;
        file.set_len(len).map_err(failed())?;
        let map = HostMapping::map(&file, 0, len).map_err(failed())?;
        map.write(TEXT_LEN_AT, &(text.len() as u64).to_le_bytes());
        map.write(MEMORY_LEN_AT, &memory_len.to_le_bytes());
        map.write(TEXT_AT, text);
        Ok(Self { file, map })
    }

    /// Takes one over from a process before.
    fn open(fd: OwnedFd) -> Result<(Self, Vec<u8>, u64), PagerError> {
        let failed = || PagerError::system("take over the states of the guest's pages");
        let file = File::from(fd);
        let len = file.metadata().map_err(failed())?.len();
        let damaged =
            || PagerError::Protocol("the states that a pager left are not complete".to_owned());
        if len < TEXT_AT {
            return Err(damaged());
        }
        let map = HostMapping::map(&file, 0, len).map_err(failed())?;
        let mut magic = [0; 8];
        map.read(0, &mut magic);
        let (text_len, memory_len) = (word(&map, TEXT_LEN_AT), word(&map, MEMORY_LEN_AT));
        if &magic != MAGIC || text_len > MESSAGE_MAX as u64 || text_end(text_len) > len {
            return Err(damaged());
        }
        let mut text = vec![0; text_len as usize];
        map.read(TEXT_AT, &mut text);
        Ok((Self { file, map }, text, memory_len))
    }

    /// Where messages are read to: the memory, and its offset.
    pub fn messages(&self) -> (&HostMapping, u64) {
        (&self.map, MESSAGES_AT)
    }
}

fn text_end(len: u64) -> u64 {
    TEXT_AT + len.next_multiple_of(4096)
}

fn word(map: &HostMapping, at: u64) -> u64 {
    let mut bytes = [0; WORD as usize];
    map.read(at, &mut bytes);
    u64::from_le_bytes(bytes)
}

/// The guest's memory, page by page.
#[derive(Debug)]
pub struct Guest {
    journal: Journal,
    regions: Vec<Pages>,
}

/// The pages of a region.
#[derive(Debug)]
struct Pages {
    region: Region,
    count: u64,
    /// Where its bits are in the journal: those of present pages, and after them those of zeros.
    bits_at: u64,
    outstanding: u64,
}

impl Pages {
    fn words(&self) -> u64 {
        self.count.div_ceil(64)
    }

    fn place(&self, state: State, word: u64) -> u64 {
        let first = if state == State::Zeros { self.words() } else { 0 };
        self.bits_at + (first + word) * WORD
    }
}

impl Guest {
    /// Of regions that came as `text`. What is a hole in the memory file is zeros.
    ///
    /// # Errors
    ///
    /// When there is no memory.
    pub fn new(text: &[u8], regions: &[Region], files: &MemoryFiles) -> Result<Self, PagerError> {
        let mut at = text_end(text.len() as u64);
        let pages = lay_out(regions, &mut at);
        let bits = at - text_end(text.len() as u64);
        let mut guest = Self { journal: Journal::create(text, files.len(), bits)?, regions: pages };
        for region in 0..regions.len() {
            for hole in guest.holes(region, files) {
                guest.mark(region, hole, State::Zeros);
            }
        }
        // From here on the journal is one.
        guest.journal.map.write(0, MAGIC);
        Ok(guest)
    }

    /// Of the journal that a process before has left. What it read and did not do is done.
    ///
    /// # Errors
    ///
    /// When it is of other memory files, or not whole.
    pub fn take_over(fd: OwnedFd, files: &MemoryFiles) -> Result<Self, PagerError> {
        let mut guest = Self::look(fd, files)?;
        // The threads that wait are woken, and fault again.
        guest.take_messages();
        Ok(guest)
    }

    /// As [`take_over`](Self::take_over), and nothing is done.
    ///
    /// # Errors
    ///
    /// As for [`take_over`](Self::take_over).
    pub fn look(fd: OwnedFd, files: &MemoryFiles) -> Result<Self, PagerError> {
        let (journal, text, memory_len) = Journal::open(fd)?;
        if memory_len != files.len() {
            return Err(PagerError::Usage(format!(
                "--memory-file has {} bytes; the guest that was left has {memory_len}",
                files.len()
            )));
        }
        let regions = parse(&text, memory_len).ok().flatten();
        let regions = regions.ok_or_else(|| {
            PagerError::Protocol("the regions that a pager left are not complete".to_owned())
        })?;
        let mut at = text_end(text.len() as u64);
        let mut pages = lay_out(&regions, &mut at);
        if at > journal.map.len() {
            let what = "the states that a pager left are not complete".to_owned();
            return Err(PagerError::Protocol(what));
        }
        for pages in &mut pages {
            let known = (0..pages.words()).map(|index| {
                let present = word(&journal.map, pages.place(State::Present, index));
                let zeros = word(&journal.map, pages.place(State::Zeros, index));
                u64::from(((present | zeros) & mask(index, &(0..pages.count))).count_ones())
            });
            pages.outstanding = pages.count - known.sum::<u64>();
        }
        Ok(Self { journal, regions: pages })
    }

    /// The journal, for who keeps it.
    pub fn journal(&self) -> BorrowedFd<'_> {
        self.journal.file.as_fd()
    }

    /// Where messages are read to.
    pub fn messages(&self) -> (&HostMapping, u64) {
        self.journal.messages()
    }

    /// Its regions, ascending by their place in the memory file.
    pub fn regions(&self) -> impl Iterator<Item = Region> {
        self.regions.iter().map(|pages| pages.region)
    }

    /// A region.
    pub fn region(&self, region: usize) -> Region {
        self.regions[region].region
    }

    /// Pages that are missing, of a region.
    pub fn outstanding(&self, region: usize) -> u64 {
        self.regions[region].outstanding
    }

    /// Bytes that are missing, of all.
    pub fn outstanding_bytes(&self) -> u64 {
        self.regions.iter().map(|pages| pages.outstanding * pages.region.page_size).sum()
    }

    /// Region and page of an address of the VMM.
    pub fn find(&self, address: u64) -> Option<(usize, u64)> {
        self.regions.iter().enumerate().find_map(|(index, Pages { region, .. })| {
            let at = address.checked_sub(region.base).filter(|at| *at < region.size)?;
            Some((index, at / region.page_size))
        })
    }

    /// What a page is.
    pub fn state(&self, region: usize, page: u64) -> State {
        let pages = &self.regions[region];
        let bit = |state| word(&self.journal.map, pages.place(state, page / 64)) >> (page % 64) & 1;
        match (bit(State::Zeros), bit(State::Present)) {
            (1, _) => State::Zeros,
            (_, 1) => State::Present,
            _ => State::Missing,
        }
    }

    /// The first pages of `within` that are missing and follow each other.
    pub fn missing(&self, region: usize, within: Range<u64>) -> Option<Range<u64>> {
        let end = within.end.min(self.regions[region].count);
        let start = self.next(region, within.start, end, true)?;
        Some(start..self.next(region, start, end, false).unwrap_or(end))
    }

    /// The first page from `from` that is missing, or that is not.
    fn next(&self, region: usize, from: u64, end: u64, missing: bool) -> Option<u64> {
        let pages = &self.regions[region];
        let mut at = from;
        while at < end {
            let known = [State::Present, State::Zeros]
                .map(|state| word(&self.journal.map, pages.place(state, at / 64)));
            let known = known[0] | known[1];
            let wanted = (known ^ if missing { u64::MAX } else { 0 }) >> (at % 64);
            let found = at + u64::from(wanted.trailing_zeros());
            if wanted != 0 {
                return Some(found).filter(|found| *found < end);
            }
            at = (at / 64 + 1) * 64;
        }
        None
    }

    /// Pages of a region are [present](State::Present) or [zeros](State::Zeros) from now on.
    pub fn mark(&mut self, region: usize, range: Range<u64>, state: State) {
        let map = &self.journal.map;
        let pages = &mut self.regions[region];
        let range = range.start..range.end.min(pages.count);
        if range.is_empty() || state == State::Missing {
            return;
        }
        for index in range.start / 64..range.end.div_ceil(64) {
            let new = mask(index, &range);
            let place = pages.place(state, index);
            let old = word(map, place);
            let other = match state {
                State::Zeros => State::Present,
                _ => State::Zeros,
            };
            let other = word(map, pages.place(other, index));
            pages.outstanding -= u64::from((new & !old & !other).count_ones());
            map.write(place, &(old | new).to_le_bytes());
        }
    }

    /// Does what the messages say that were read, and makes room for others. What is not done by that is
    /// returned; the pages that the VMM discarded, as their bytes.
    pub fn take_messages(&mut self) -> (Vec<Event>, u64) {
        let (mut events, mut discarded) = (Vec::new(), 0);
        for index in 0..MESSAGES {
            let mut message = [0; MESSAGE_LEN];
            self.journal.map.read(MESSAGES_AT + (index * MESSAGE_LEN) as u64, &mut message);
            match Event::decode(&message) {
                None => break,
                Some(Event::Remove { start, end }) => discarded += self.discard(start, end),
                Some(event) => events.push(event),
            }
        }
        // In this order: what is cleared has been done.
        self.journal.map.fill_zero(MESSAGES_AT, (MESSAGES * MESSAGE_LEN) as u64);
        (events, discarded)
    }

    /// The VMM discards from `start` to `end`. Of a huge page that is not in there as a whole, the VMM keeps
    /// what it has.
    fn discard(&mut self, start: u64, end: u64) -> u64 {
        let mut discarded = 0;
        for index in 0..self.regions.len() {
            let Region { base, size, page_size, .. } = self.regions[index].region;
            let (start, end) = (start.max(base), end.min(base + size));
            if start < end {
                let pages = (start - base).div_ceil(page_size)..(end - base) / page_size;
                discarded += pages.end.saturating_sub(pages.start) * page_size;
                self.mark(index, pages, State::Zeros);
            }
        }
        discarded
    }

    /// Pages of a region without data in the memory file, as ranges.
    pub fn holes(&self, region: usize, files: &MemoryFiles) -> Vec<Range<u64>> {
        let Pages { region, count, .. } = &self.regions[region];
        let Region { offset, size, page_size, .. } = *region;
        let (mut holes, mut at) = (Vec::new(), 0);
        for data in files.data(offset..offset + size) {
            let first = (data.start - offset) / page_size;
            if first > at {
                holes.push(at..first);
            }
            at = (data.end - offset).div_ceil(page_size);
        }
        if at < *count {
            holes.push(at..*count);
        }
        holes
    }
}

fn lay_out(regions: &[Region], at: &mut u64) -> Vec<Pages> {
    let lay_out = |region: &Region| {
        let count = region.size / region.page_size;
        let pages = Pages { region: *region, count, bits_at: *at, outstanding: count };
        *at += 2 * pages.words() * WORD;
        pages
    };
    regions.iter().map(lay_out).collect()
}

/// The bits of word `index` that are of pages in `range`.
fn mask(index: u64, range: &Range<u64>) -> u64 {
    let low = range.start.saturating_sub(index * 64).min(64) as u32;
    let high = range.end.saturating_sub(index * 64).min(64) as u32;
    let below = |bit: u32| if bit == 64 { u64::MAX } else { (1 << bit) - 1 };
    below(high) & !below(low)
}
