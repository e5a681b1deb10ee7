//! Guest RAM as it migrates: which blocks there are, sending their pages, and taking them.

mod block;
mod changes;
mod channels;
mod frozen;
mod load;
mod options;
mod prepare;
mod registry;
mod save;
mod zero_runs;

pub(crate) use block::InMigration;
pub use block::MigrationBlock;
pub use channels::PageChannels;
pub(crate) use frozen::FrozenBlocks;
pub use load::RamLoad;
pub use options::{BlockOptions, Participation, ZeroPageDetection};
pub(crate) use prepare::prepare;
pub use registry::{BlockError, ListOptions, RamBlocks};
pub use save::RamSave;

#[cfg(test)]
mod tests;
