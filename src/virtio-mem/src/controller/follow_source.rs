//! Block state that follows the device from which the guest comes, while its memory does.

use std::io;
use std::ops::Range;

use ram_discard::{MemoryState, Section, SourceFollower, SourceNotFollowed, try_all};

use super::freeze::Parts;
use super::{BlockUpdate, JournalUpdate, MemController, StateRecord};
use crate::device::{Change, DeviceState, VirtioMem};
use crate::region_memory::NotReady;

impl SourceFollower for Parts {
    fn follow_source(&self, section: Section, state: MemoryState) -> Result<(), SourceNotFollowed> {
        let gone = || SourceNotFollowed("the device is gone".to_owned());
        self.controller().ok_or_else(gone)?.follow_source(section, state)
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
        state: MemoryState,
    ) -> Result<(), SourceNotFollowed> {
        self.follow_source_all(&[section], state)
    }

    /// As [`follow_source`](Self::follow_source) of several sections, apart from each other: all of them, or none.
    ///
    /// # Errors
    ///
    /// As [`follow_source`](Self::follow_source).
    pub fn follow_source_all(
        &self,
        sections: &[Section],
        state: MemoryState,
    ) -> Result<(), SourceNotFollowed> {
        let refused = |reason: &dyn std::fmt::Display| SourceNotFollowed(reason.to_string());
        let blocks = sections.iter().map(|&section| self.whole_blocks(section));
        let blocks = blocks.collect::<Result<Vec<_>, _>>()?;
        let mut transaction = self.manager.begin();
        if transaction.is_frozen_for_source() {
            return Err(refused(&"block state is frozen: a migration from here is active"));
        }
        if self.state().guest_runs {
            return Err(refused(&"the guest runs here"));
        }
        self.check_blocks(&blocks, sections, state)?;
        for &section in sections {
            match self.memory.ready(section) {
                Ok(()) | Err(NotReady::NotMapped(_)) => {}
                Err(error) => return Err(refused(&error)),
            }
        }
        let cannot_save = |error| refused(&format_args!("cannot save the device state: {error}"));
        match state {
            MemoryState::Populated => {
                let told = transaction.notify_populate_all(self.source, sections);
                told.map_err(|error| refused(&error))?;
                let saved = self.commit_followed(&blocks, sections, state);
                saved
                    .inspect_err(|_| transaction.notify_discard_all(self.source, sections))
                    .map_err(cannot_save)
            }
            MemoryState::Discarded => {
                self.commit_followed(&blocks, sections, state).map_err(cannot_save)?;
                transaction.notify_discard_all(self.source, sections);
                Ok(())
            }
        }
    }

    /// Says whether the guest's queue runs, for a device that is told by another process what to follow
    /// ([`follow_source`](Self::follow_source)): it does not follow while it does. By default it is not known to.
    pub fn set_guest_runs(&self, runs: bool) {
        self.state().guest_runs = runs;
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

    /// Checks that the blocks of all sections, which are apart from each other, are in the other state.
    fn check_blocks(
        &self,
        blocks: &[Range<usize>],
        sections: &[Section],
        state: MemoryState,
    ) -> Result<(), SourceNotFollowed> {
        let mut changed = self.state().device.blocks().clone();
        for (blocks, section) in blocks.iter().zip(sections) {
            if !changed.all(blocks.clone(), state.opposite().is_populated()) {
                let what = match state {
                    MemoryState::Populated => "plugged",
                    MemoryState::Discarded => "unplugged",
                };
                return Err(SourceNotFollowed(format!("a part of {section} is {what} already")));
            }
            changed.set(blocks.clone(), state.is_populated());
        }
        Ok(())
    }

    /// Saves the change of each section and then makes it: of all, or of none.
    fn commit_followed(
        &self,
        blocks: &[Range<usize>],
        sections: &[Section],
        state: MemoryState,
    ) -> io::Result<()> {
        let before = self.state().device.usable_region_size();
        if state == MemoryState::Populated {
            // The source's own comes last; until then it is at least what is plugged.
            let end = sections.iter().map(|section| section.end()).max().unwrap_or(0);
            self.set_usable(before.max(end))?;
        }
        let change = |blocks: &Range<usize>, state| match state {
            MemoryState::Populated => Change::Plug(blocks.clone()),
            MemoryState::Discarded => Change::Unplug(blocks.clone()),
        };
        let committed = try_all(
            &mut (),
            blocks,
            |(), blocks| self.commit_or(&change(blocks, state), JournalUpdate::Forget),
            |(), blocks| {
                let undone =
                    self.commit_or(&change(blocks, state.opposite()), JournalUpdate::Forget);
                report(undone);
            },
        );
        committed.inspect_err(|_| report(self.set_usable(before)))
    }

    /// Has the usable region be of this size.
    fn set_usable(&self, usable_region_size: u64) -> io::Result<()> {
        let mut state = self.state();
        if state.device.usable_region_size() == usable_region_size {
            return Ok(());
        }
        let changed = DeviceState { usable_region_size, ..state.device.state() };
        let device = VirtioMem::restore(self.geometry, changed).map_err(io::Error::other)?;
        let record = StateRecord {
            usable_region_size,
            ..state.record(BlockUpdate::Keep, JournalUpdate::Keep)
        };
        state.save(&record)?;
        state.device = device;
        state.tell(|_| {});
        Ok(())
    }
}

/// What the store has is more than there is then: the next state that is saved mends it.
fn report(undone: io::Result<()>) {
    if let Err(error) = undone {
        tracing::error!(%error, "cannot save that a change of block state was taken back");
    }
}
