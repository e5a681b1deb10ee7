//! The RAM blocks of a VM, and what must be alike on both sides.

use std::sync::Arc;

use parking_lot::RwLock;
use thiserror::Error;

use super::{MigrationBlock, Participation};
use crate::error::MigrationError;
use crate::stream::{
    BlockEntry, BlockList, CAPABILITY_IGNORE_SHARED, Configuration, TARGET_PAGE_SIZE,
};

/// Why a block cannot be registered, sent, or loaded. Nothing was changed.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum BlockError {
    /// There is one with the same id.
    #[error("RAM block {id:?} is registered twice")]
    Duplicate {
        /// Id of the block.
        id: String,
    },
    /// It has a RamDiscardManager, and another is given to it.
    #[error("RAM block {id:?} has a RamDiscardManager already: unset it before setting another")]
    ManagerTwice {
        /// Id of the block.
        id: String,
    },
    /// It takes part in a migration.
    #[error("RAM block {id:?} takes part in a migration: try again when that has ended")]
    Migrating {
        /// Id of the block.
        id: String,
    },
    /// There is none of that id.
    #[error("RAM block {id:?} is not registered")]
    NotRegistered {
        /// Id of the block.
        id: String,
    },
    /// Its length never changes.
    #[error("RAM block {id:?} was not registered as resizable")]
    NotResizable {
        /// Id of the block.
        id: String,
    },
    /// It cannot be so long.
    #[error(
        "RAM block {id:?} cannot have {used_length:#x} bytes: at most {limit:#x} are possible, in \
         pages of {page_size:#x}"
    )]
    Resize {
        /// Id of the block.
        id: String,
        /// Bytes that were asked for.
        used_length: u64,
        /// The most, bytes.
        limit: u64,
        /// Size of its pages, bytes.
        page_size: u64,
    },
    /// Its id is empty or has more than 255 bytes.
    #[error("RAM block {id:?}: an id has 1 to 255 bytes")]
    Id {
        /// Id of the block.
        id: String,
    },
    /// It is not declared whether it migrates.
    #[error("RAM block {id:?} was declared neither migratable nor not migratable")]
    Undeclared {
        /// Id of the block.
        id: String,
    },
    /// The stream sends one that is not here.
    #[error("RAM block {id:?} of the stream is unknown here")]
    Unknown {
        /// Id of the block.
        id: String,
    },
    /// The stream lists one twice.
    #[error("RAM block {id:?} is in the stream's list twice")]
    ListedTwice {
        /// Id of the block.
        id: String,
    },
    /// The stream sends one that does not migrate here.
    #[error("RAM block {id:?} of the stream is not migratable here")]
    NotMigratable {
        /// Id of the block.
        id: String,
    },
    /// A block that migrates here is not in the stream.
    #[error("RAM block {id:?} is migratable here and missing in the stream")]
    Missing {
        /// Id of the block.
        id: String,
    },
    /// Its length differs.
    #[error("RAM block {id:?}: length {stream:#x} in the stream, {local:#x} here")]
    Length {
        /// Id of the block.
        id: String,
        /// Bytes in the stream.
        stream: u64,
        /// Bytes here, at most.
        local: u64,
    },
    /// Its page size differs.
    #[error("RAM block {id:?}: page size {stream:#x} in the stream, {local:#x} here")]
    PageSize {
        /// Id of the block.
        id: String,
        /// Bytes in the stream.
        stream: u64,
        /// Bytes here.
        local: u64,
    },
    /// A shared block lies elsewhere.
    #[error("RAM block {id:?}: address {stream:#x} in the stream, {local:#x} here")]
    Address {
        /// Id of the block.
        id: String,
        /// Guest-physical address in the stream.
        stream: u64,
        /// Guest-physical address here.
        local: u64,
    },
}

/// Looks a block's guest-physical address up in the memory table as it is now.
type AddressOf = dyn Fn(&str) -> Option<u64> + Send + Sync;

/// The RAM blocks of a VM.
#[derive(Default)]
pub struct RamBlocks {
    blocks: Vec<Arc<MigrationBlock>>,
    address_of: RwLock<Option<Arc<AddressOf>>>,
}

impl RamBlocks {
    /// No blocks.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a block.
    ///
    /// # Errors
    ///
    /// When its id is taken, empty or too long.
    pub fn register(&mut self, block: Arc<MigrationBlock>) -> Result<(), BlockError> {
        let id = block.id().to_owned();
        if id.is_empty() || id.len() > 255 {
            return Err(BlockError::Id { id });
        }
        if self.get(&id).is_some() {
            return Err(BlockError::Duplicate { id });
        }
        self.blocks.push(block);
        Ok(())
    }

    /// Takes a block out, and returns it.
    ///
    /// # Errors
    ///
    /// When there is none of that id, or it takes part in a migration.
    pub fn unregister(&mut self, id: &str) -> Result<Arc<MigrationBlock>, BlockError> {
        let index = self.blocks.iter().position(|block| block.id() == id);
        let index = index.ok_or_else(|| BlockError::NotRegistered { id: id.to_owned() })?;
        self.blocks[index].check_unused()?;
        Ok(self.blocks.remove(index))
    }

    /// Has addresses looked up in the VMM's memory table instead of the blocks' own first ones. QEMU
    /// sends a block's address in the memory region that contains it, so a VMM that nests regions as
    /// QEMU does tells that.
    ///
    /// The table is asked whenever a list of blocks is sent or checked. It may be replaced at any
    /// time, by a lookup as well: each block is looked up in the table of that moment.
    pub fn set_memory_table(
        &self,
        address_of: impl Fn(&str) -> Option<u64> + Send + Sync + 'static,
    ) {
        *self.address_of.write() = Some(Arc::new(address_of));
    }

    /// The block of that id.
    pub fn get(&self, id: &str) -> Option<&Arc<MigrationBlock>> {
        self.blocks.iter().find(|block| block.id() == id)
    }

    /// All blocks, in the order in which they were registered.
    pub fn iter(&self) -> impl Iterator<Item = &Arc<MigrationBlock>> {
        self.blocks.iter()
    }

    /// The blocks that take part in migration.
    ///
    /// # Errors
    ///
    /// When it is not declared of a block whether it does.
    pub fn migratable(&self) -> Result<Vec<Arc<MigrationBlock>>, BlockError> {
        let mut migratable = Vec::new();
        for block in &self.blocks {
            match block.options().participation {
                Participation::Listed => migratable.push(Arc::clone(block)),
                Participation::LeftOut => {}
                Participation::Undeclared => {
                    return Err(BlockError::Undeclared { id: block.id().to_owned() });
                }
            }
        }
        Ok(migratable)
    }

    /// The address of a block now, in the memory region that contains it: guest-physical where that
    /// is the whole of memory. 0 when it is not in the memory table.
    pub fn address_of(&self, block: &MigrationBlock) -> u64 {
        // Asked without the lock: the VMM has locks of its own, with which it replaces the table.
        let table = self.address_of.read().clone();
        match table {
            Some(address_of) => address_of(block.id()).unwrap_or(0),
            None => block.ram().range().start(),
        }
    }

    /// The list of blocks to send. Those with nothing in use are left out: the list ends with the sum of
    /// all lengths, so that the last of them would not be read.
    ///
    /// # Errors
    ///
    /// When it is not declared of a block whether it takes part.
    pub fn list(&self, options: ListOptions) -> Result<BlockList, BlockError> {
        let entries = self.migratable()?;
        let entry = |block: &Arc<MigrationBlock>| BlockEntry {
            id: block.id().to_owned(),
            used_length: block.used_length(),
            page_size: (options.postcopy && block.page_size() != TARGET_PAGE_SIZE)
                .then(|| block.page_size()),
            gpa: options.ignore_shared.then(|| self.address_of(block)),
            mapped: None,
        };
        let in_use = entries.iter().filter(|block| block.used_length() != 0);
        Ok(BlockList { entries: in_use.map(entry).collect() })
    }

    /// Checks every entry of a list that came, and that none is missing; then resizable blocks
    /// take over the source's lengths, which are 0 of those that are missing. Returns the blocks in the order of the list.
    ///
    /// # Errors
    ///
    /// The first difference; nothing was changed.
    pub fn accept(
        &self,
        list: &BlockList,
        options: ListOptions,
    ) -> Result<Vec<Arc<MigrationBlock>>, BlockError> {
        let mut accepted: Vec<Arc<MigrationBlock>> = Vec::with_capacity(list.entries.len());
        let mut empty = Vec::new();
        for entry in &list.entries {
            let id = entry.id.clone();
            let block = match self.get(&entry.id) {
                Some(block) => block,
                None => return Err(BlockError::Unknown { id }),
            };
            if accepted.iter().any(|other| Arc::ptr_eq(other, block)) {
                return Err(BlockError::ListedTwice { id });
            }
            self.check(block, entry, options)?;
            accepted.push(Arc::clone(block));
        }
        for block in self.migratable()? {
            if accepted.iter().any(|other| Arc::ptr_eq(other, &block)) {
                continue;
            }
            // The source leaves out what has nothing in use.
            if block.options().resizable.is_none() && block.used_length() != 0 {
                return Err(BlockError::Missing { id: block.id().to_owned() });
            }
            empty.push(block);
        }
        empty.iter().for_each(|block| block.set_used_length(0));
        for (block, entry) in accepted.iter().zip(&list.entries) {
            block.set_used_length(entry.used_length);
        }
        Ok(accepted)
    }

    fn check(
        &self,
        block: &MigrationBlock,
        entry: &BlockEntry,
        options: ListOptions,
    ) -> Result<(), BlockError> {
        let id = entry.id.clone();
        if block.options().participation != Participation::Listed {
            return Err(BlockError::NotMigratable { id });
        }
        let (stream, local) = (entry.used_length, block.used_length());
        let fits = match block.options().resizable {
            Some(_) => {
                stream <= block.ram().range().len() && stream.is_multiple_of(block.page_size())
            }
            None => stream == local,
        };
        if !fits {
            return Err(BlockError::Length { id, stream, local });
        }
        if options.postcopy {
            let (stream, local) = (entry.page_size.unwrap_or(TARGET_PAGE_SIZE), block.page_size());
            if stream != local {
                return Err(BlockError::PageSize { id, stream, local });
            }
        }
        if options.leaves_out(block) {
            let (stream, local) = (entry.gpa.unwrap_or(0), self.address_of(block));
            if stream != local {
                return Err(BlockError::Address { id, stream, local });
            }
        }
        Ok(())
    }
}

/// What the list of blocks tells, by the capabilities of the migration.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ListOptions {
    /// Addresses, since shared blocks are not sent. Must be as the capability x-ignore-shared of the
    /// configuration, which [`of`](Self::of) sees to; anything else is refused.
    pub ignore_shared: bool,
    /// Page sizes where they are not the usual ones (postcopy-ram).
    pub postcopy: bool,
}

impl ListOptions {
    /// As the capabilities of a configuration have it; without postcopy, which no capability of the
    /// stream tells.
    pub fn of(configuration: &Configuration) -> Self {
        Self { ignore_shared: configuration.has(CAPABILITY_IGNORE_SHARED), postcopy: false }
    }

    /// Whether a block is listed, but none of its pages are sent: both sides share it.
    pub(crate) fn leaves_out(self, block: &MigrationBlock) -> bool {
        self.ignore_shared && block.options().shared
    }

    /// Refuses a configuration that says otherwise: the sides would read each other wrongly.
    pub(crate) fn check(self, configuration: &Configuration) -> Result<(), MigrationError> {
        let shown = |on: bool| if on { "on" } else { "off" }.to_owned();
        match Self::of(configuration).ignore_shared {
            on if on == self.ignore_shared => Ok(()),
            on => Err(MigrationError::Configuration {
                what: CAPABILITY_IGNORE_SHARED,
                stream: shown(on),
                local: shown(self.ignore_shared),
            }),
        }
    }
}
