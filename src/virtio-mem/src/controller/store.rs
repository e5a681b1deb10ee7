//! Where the device's state outlives the process.

use std::io;

use crate::device::{Change, Request};

/// What happens to the note of the last request that was executed but not yet answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum JournalUpdate {
    /// It stays as it is.
    Keep,
    /// It no longer describes the blocks.
    Forget,
    /// This request was executed.
    Record(Request),
}

/// What happens to the block states.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockUpdate<'a> {
    /// They stay.
    Keep,
    /// A change that a request or a reset makes.
    Change(&'a Change),
    /// They become these, all at once: one bit a block, block 0 in the lowest bit of word 0.
    Replace(&'a [u64]),
}

/// A change of state, to be made durable before it is seen. Sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub struct StateRecord<'a> {
    /// Requested size after the change.
    pub requested_size: u64,
    /// Size of the usable region after the change.
    pub usable_region_size: u64,
    /// Whether the management API holds migration active after the change.
    pub api_migration: bool,
    /// Whether a system reset is to be done when migration ends.
    pub reset_pending: bool,
    /// What becomes of the block states.
    pub blocks: BlockUpdate<'a>,
    /// What becomes of the journal.
    pub journal: JournalUpdate,
}

/// Keeps the device's state where it survives the process being killed.
pub trait StateStore: Send {
    /// Makes `record` durable. When it returns, a process killed at any later instruction finds
    /// it again.
    ///
    /// # Errors
    ///
    /// When it could not; the state before it is then still there, whole.
    fn commit(&mut self, record: &StateRecord<'_>) -> io::Result<()>;

    /// Notes that the journaled request was answered.
    ///
    /// # Errors
    ///
    /// When it could not.
    fn mark_answered(&mut self) -> io::Result<()>;
}

/// For devices whose state ends with the process.
#[derive(Debug, Default)]
pub struct NoStateStore;

impl StateStore for NoStateStore {
    fn commit(&mut self, _record: &StateRecord<'_>) -> io::Result<()> {
        Ok(())
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        Ok(())
    }
}
