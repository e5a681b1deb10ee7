//! Guest RAM as the host sees it: which file backs which guest-physical range, how memory is
//! discarded, and how much the host really holds.
//!
//! Nothing here touches guest memory through a mapping: reading a hole through one allocates it.

mod backing;
mod ram_block;
mod recent;
mod region_memory;

pub use backing::{Backing, BackingError, BackingKind};
#[cfg(test)]
pub(crate) use backing::{SEARCHES, Searches};
pub use ram_block::{RamBlock, RamBlockError};
pub(crate) use region_memory::MemoryListener;
pub use region_memory::{NotReady, RegionMemory};
