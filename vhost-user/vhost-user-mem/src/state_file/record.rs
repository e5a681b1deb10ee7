//! What a file holds, and what changes it.

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
    /// The host has been started anew since: all but the requested size is that of a new device,
    /// and the size of the usable region follows from it.
    pub other_boot: bool,
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
