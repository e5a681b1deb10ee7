//! Guest RAM as the host sees it: which file backs which guest-physical range, how memory is
//! discarded, and how much the host really holds.
//!
//! Nothing here but [`HostMapping`] touches guest memory through a mapping: reading a hole through
//! one allocates it.

mod backing;
mod ram_block;

pub use crate::sys::HostMapping;
pub use crate::sys::mapping::ZERO_CHECK_ALIGN;
pub use backing::{Backing, BackingError, BackingKind};
#[cfg(any(test, feature = "test-utils"))]
pub use backing::{SEARCHES, Searches};
pub use ram_block::{RamBlock, RamBlockError};
