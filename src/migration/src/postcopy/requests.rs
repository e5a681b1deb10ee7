//! What the destination asked for and told, between the thread that hears it and the one that
//! sends.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Condvar, Mutex};
use ram_discard::ByteRange;

use crate::error::MigrationError;
use crate::handler::PostcopySave;
use crate::stream::TARGET_PAGE_SIZE;

/// The most requests that wait to be sent: more than vCPUs can have, each with all the faults that
/// KVM lets it run on with.
const WAITING_MAX: usize = 64 << 10;

/// What the destination asks for, by the blocks that there are.
#[derive(Debug)]
pub struct Asked {
    /// Ids and lengths in bytes.
    blocks: Vec<(Arc<str>, u64)>,
    /// The block of the request before.
    last: Option<usize>,
}

impl Asked {
    pub(crate) fn of(memory: &dyn PostcopySave) -> Self {
        let blocks = memory.blocks().into_iter();
        Self::new(blocks.map(|(id, nr_pages)| (id, nr_pages * TARGET_PAGE_SIZE)))
    }

    /// Of blocks by their ids and lengths in bytes.
    pub fn new(blocks: impl IntoIterator<Item = (String, u64)>) -> Self {
        let blocks = blocks.into_iter().map(|(id, len)| (id.into(), len));
        Self { blocks: blocks.collect(), last: None }
    }

    /// A new channel, on which no block was named yet.
    pub fn restart(&mut self) {
        self.last = None;
    }

    /// Block and range of a request.
    pub(super) fn find(
        &mut self,
        block: Option<&str>,
        start: u64,
        len: u32,
    ) -> Result<(Arc<str>, ByteRange), MigrationError> {
        let (index, range) = self.locate(block, start, len)?;
        Ok((Arc::clone(&self.blocks[index].0), range))
    }

    /// The block of a request, by its place among those that there are, and the range in it. A request
    /// that names no `block` is for that of the request before.
    ///
    /// # Errors
    ///
    /// When there is no such block, or the range is empty or not within it.
    pub fn locate(
        &mut self,
        block: Option<&str>,
        start: u64,
        len: u32,
    ) -> Result<(usize, ByteRange), MigrationError> {
        if let Some(id) = block {
            self.last = self.blocks.iter().position(|(known, _)| **known == *id);
        }
        let range = ByteRange::new(start, u64::from(len));
        let found = self.last.zip(range);
        found.filter(|(index, range)| range.end() <= self.blocks[*index].1).ok_or_else(|| {
            let of = block.unwrap_or("of the request before");
            let what = format!("a request for {len:#x} bytes at {start:#x} of block {of:?}");
            MigrationError::Unexpected(what)
        })
    }
}

/// Requests that wait for the next write on the main channel.
#[derive(Default)]
pub(super) struct Requests {
    told: Mutex<Told>,
    changed: Condvar,
}

/// What was told since the last look.
#[derive(Default)]
pub(super) struct Told {
    /// Pages asked for, of a block.
    pub(super) pages: Vec<(Arc<str>, ByteRange)>,
    /// The destination has everything.
    pub(super) done: bool,
    /// Nothing more will be told.
    pub(super) closed: bool,
}

impl Requests {
    /// # Errors
    ///
    /// When more wait than any destination that works asks for.
    pub(super) fn push(&self, block: Arc<str>, range: ByteRange) -> Result<(), MigrationError> {
        let mut told = self.told.lock();
        if told.pages.len() == WAITING_MAX {
            return Err(MigrationError::Flooded { what: "page requests", limit: WAITING_MAX });
        }
        told.pages.push((block, range));
        drop(told);
        self.changed.notify_all();
        Ok(())
    }

    pub(super) fn done(&self) {
        self.told.lock().done = true;
        self.changed.notify_all();
    }

    pub(super) fn close(&self) {
        self.told.lock().closed = true;
        self.changed.notify_all();
    }

    /// What was asked for so far; with nothing to tell, waits for up to `patience`.
    pub(super) fn wait(&self, patience: Duration) -> Told {
        let mut told = self.told.lock();
        if !patience.is_zero() && told.pages.is_empty() && !told.closed {
            self.changed.wait_for(&mut told, patience);
        }
        let pages = std::mem::take(&mut told.pages);
        Told { pages, done: told.done, closed: told.closed }
    }

    /// Waits until the destination has everything, or cannot say so any more.
    pub(super) fn wait_for_end(&self) -> Told {
        let mut told = self.told.lock();
        while !told.done && !told.closed {
            self.changed.wait_for(&mut told, Duration::from_secs(1));
        }
        Told { pages: Vec::new(), done: told.done, closed: told.closed }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page() -> ByteRange {
        ByteRange::new(0, TARGET_PAGE_SIZE).unwrap()
    }

    #[test]
    fn requests_that_nothing_works_through_end_the_destination() {
        let requests = Requests::default();
        let id: Arc<str> = "ram".into();
        for _ in 0..WAITING_MAX {
            requests.push(Arc::clone(&id), page()).unwrap();
        }
        let error = requests.push(Arc::clone(&id), page()).unwrap_err().to_string();
        assert!(error.contains("more than 65536 page requests"), "{error}");
        assert_eq!(requests.wait(Duration::ZERO).pages.len(), WAITING_MAX);
        requests.push(id, page()).unwrap();
    }

    #[test]
    fn requests_are_of_blocks_that_there_are() {
        let blocks = vec![("ram".into(), 1 << 20), ("vmem0".into(), 1 << 30)];
        let mut asked = Asked { blocks, last: None };
        assert!(asked.find(None, 0, 4096).is_err(), "no block was named");
        assert_eq!(&*asked.find(Some("vmem0"), 1 << 20, 4096).unwrap().0, "vmem0");
        assert_eq!(&*asked.find(None, (1 << 30) - 4096, 4096).unwrap().0, "vmem0");
        for (block, start, len) in [
            (Some("other"), 0, 4096),
            (Some("ram"), 1 << 20, 4096),
            (None, u64::MAX, 4096),
            (None, 0, 0),
        ] {
            assert!(asked.find(block, start, len).is_err(), "{block:?} {start:#x} {len:#x}");
        }
        asked.find(Some("ram"), 0, 4096).unwrap();
        asked.restart();
        assert!(asked.find(None, 0, 4096).is_err(), "a new channel");
    }
}
