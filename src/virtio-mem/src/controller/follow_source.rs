//! Block state that follows the device from which the guest comes, while its memory does.

use std::ops::Range;

use ram_discard::{Section, SourceFollower, SourceNotFollowed};

use super::MemController;
use super::freeze::Parts;
use crate::device::{DeviceState, VirtioMem};
use crate::region_memory::NotReady;

impl SourceFollower for Parts {
    fn follow_source(&self, section: Section, populated: bool) -> Result<(), SourceNotFollowed> {
        let gone = || SourceNotFollowed("the device is gone".to_owned());
        self.controller().ok_or_else(gone)?.follow_source(section, populated)
    }
}

impl MemController {
    /// Plugs or unplugs the blocks of `section`, as the device did from which the guest comes. As a request of the
    /// guest, but for what only a guest is held to: the requested size, and that block state is frozen for a
    /// destination. What it does not have mapped is of no concern.
    ///
    /// # Errors
    ///
    /// When the section is not made of blocks that are all in the other state, a migration from here is active,
    /// memory cannot be discarded, a listener refuses, or the state cannot be saved. Nothing was changed then.
    pub fn follow_source(
        &self,
        section: Section,
        populated: bool,
    ) -> Result<(), SourceNotFollowed> {
        let refused = |reason: &dyn std::fmt::Display| SourceNotFollowed(reason.to_string());
        let blocks = self.whole_blocks(section)?;
        let mut transaction = self.manager.begin();
        if transaction.is_frozen_for_source() {
            return Err(refused(&"block state is frozen: a migration from here is active"));
        }
        let device = self.with_blocks(&blocks, section, populated)?;
        match self.memory.ready(section) {
            Ok(()) | Err(NotReady::NotMapped(_)) => {}
            Err(error) => return Err(refused(&error)),
        }
        if populated {
            let told = transaction.notify_populate(self.source, section);
            told.map_err(|error| refused(&error))?;
            let saved = self.commit_state(device, true);
            let saved = saved.inspect_err(|_| transaction.notify_discard(self.source, section));
            saved.map_err(|error| refused(&format_args!("cannot save the device state: {error}")))
        } else {
            let saved = self.commit_state(device, true);
            saved
                .map_err(|error| refused(&format_args!("cannot save the device state: {error}")))?;
            transaction.notify_discard(self.source, section);
            Ok(())
        }
    }

    /// The blocks that `section` is made of.
    fn whole_blocks(&self, section: Section) -> Result<Range<usize>, SourceNotFollowed> {
        let (region_size, block_size) = (self.geometry.region_size(), self.geometry.block_size());
        let whole = |at: u64| at.is_multiple_of(block_size);
        if section.end() > region_size || !whole(section.start()) || !whole(section.end()) {
            let what = format!(
                "{section} is not made of whole blocks of {block_size:#x} bytes of a region of {region_size:#x}"
            );
            return Err(SourceNotFollowed(what));
        }
        let index = |at: u64| usize::try_from(at / block_size).unwrap_or(usize::MAX);
        Ok(index(section.start())..index(section.end()))
    }

    /// The device with these blocks changed, which are now in the other state.
    fn with_blocks(
        &self,
        blocks: &Range<usize>,
        section: Section,
        populated: bool,
    ) -> Result<VirtioMem, SourceNotFollowed> {
        let state = self.state();
        let mut changed = state.device.blocks().clone();
        if !changed.all(blocks.clone(), !populated) {
            let what = if populated { "plugged" } else { "unplugged" };
            return Err(SourceNotFollowed(format!("a part of {section} is {what} already")));
        }
        changed.set(blocks.clone(), populated);
        // The source's own comes last; until then it is at least what is plugged.
        let usable_region_size = state.device.usable_region_size().max(section.end());
        let state = DeviceState {
            requested_size: state.device.requested_size(),
            usable_region_size,
            plugged: changed.words().to_vec(),
        };
        VirtioMem::restore(self.geometry, state)
            .map_err(|error| SourceNotFollowed(error.to_string()))
    }
}
