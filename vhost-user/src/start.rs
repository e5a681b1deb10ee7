//! What the device starts with: the state file, or the command line.

use std::io;
use std::ops::Range;

use anyhow::Context;
use virtio_mem::controller::{BlockUpdate, JournalUpdate, Start, StateRecord, StateStore};
use virtio_mem::device::{Change, DeviceState, Request, VirtioMem};

use crate::args::Config;
use crate::state_file::{Commit, Delta, Geometry, JournalUpdate as SavedJournal, Saved, StateFile};

/// Opens the state file, if there is to be one, and makes the device.
///
/// # Errors
///
/// When the state file cannot be used; it is then left as it was.
pub fn open(config: &Config) -> anyhow::Result<Start> {
    let device = VirtioMem::new(config.geometry, config.requested_size)?;
    let Some(path) = &config.state_file else { return Ok(Start::volatile(device)) };
    // The errors name the file.
    let option = || "--state-file";
    let geometry = Geometry {
        addr: config.geometry.addr(),
        region_size: config.geometry.region_size(),
        block_size: config.geometry.block_size(),
        node_id: config.geometry.node_id(),
    };
    if !path.try_exists().with_context(|| format!("--state-file: {}", path.display()))? {
        let (requested, usable) = (device.requested_size(), device.usable_region_size());
        let file = StateFile::create(path, &geometry, requested, usable).with_context(option)?;
        return Ok(Start { store: Box::new(Store(file)), ..Start::volatile(device) });
    }
    let (file, saved) = StateFile::open(path, &geometry).with_context(option)?;
    let Saved { requested_size, usable_region_size, plugged, journal, .. } = saved;
    let (api_migration, reset_pending) = (saved.api_migration, saved.reset_pending);
    let state = DeviceState { requested_size, usable_region_size, plugged };
    let device = VirtioMem::restore(config.geometry, state).with_context(option)?;
    let plugged_size = device.plugged_size();
    tracing::info!(plugged_size, requested_size, "state taken over from the state file");
    Ok(Start {
        device,
        store: Box::new(Store(file)),
        journal: journal
            .filter(|entry| !entry.answered)
            .map(|entry| Request::from_bytes(&entry.request)),
        api_migration,
        reset_pending,
        sweep: true,
    })
}

fn delta_of(change: &Change) -> Delta {
    let span = |blocks: &Range<usize>| (blocks.start as u64, blocks.len() as u64);
    match change {
        Change::Plug(blocks) => {
            let (first_block, nr_blocks) = span(blocks);
            Delta::Set { first_block, nr_blocks }
        }
        Change::Unplug(blocks) => {
            let (first_block, nr_blocks) = span(blocks);
            Delta::Clear { first_block, nr_blocks }
        }
        Change::UnplugAll => Delta::ClearAll,
    }
}

/// The state file as the controller's store.
struct Store(StateFile);

impl StateStore for Store {
    fn commit(&mut self, record: &StateRecord<'_>) -> io::Result<()> {
        let (mut delta, mut replaced) = (Delta::None, None);
        match record.blocks {
            BlockUpdate::Keep => {}
            BlockUpdate::Change(change) => delta = delta_of(change),
            BlockUpdate::Replace(words) => replaced = Some(words),
        }
        let request;
        let journal = match record.journal {
            JournalUpdate::Keep => SavedJournal::Keep,
            JournalUpdate::Forget => SavedJournal::Forget,
            JournalUpdate::Record(recorded) => {
                request = recorded.to_bytes();
                SavedJournal::Record(&request)
            }
        };
        let commit = Commit {
            requested_size: record.requested_size,
            usable_region_size: record.usable_region_size,
            api_migration: record.api_migration,
            reset_pending: record.reset_pending,
            delta,
            journal,
        };
        match replaced {
            None => self.0.commit(&commit),
            Some(words) => self.0.replace(&commit, words),
        }
        .map_err(io::Error::other)
    }

    fn mark_answered(&mut self) -> io::Result<()> {
        self.0.mark_answered()
    }
}
