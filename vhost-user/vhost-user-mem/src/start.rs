//! What the device starts with: the state file, or the command line.

use std::fs::File;
use std::io;
use std::ops::Range;

use anyhow::Context;
use virtio_mem::controller::{BlockUpdate, InitialState, JournalUpdate, StateRecord, StateStore};
use virtio_mem::device::{Change, DeviceState, Request, VirtioMem};

use crate::args::Config;
use crate::state_file::{
    Commit, Current, Delta, Geometry, JournalUpdate as SavedJournal, Saved, StateFile,
};

/// Opens the state file, if there is to be one, and makes the device. `left` is what the daemon
/// kept its state in until it started itself anew.
///
/// The second value is where the state is kept, if it outlives the process.
///
/// # Errors
///
/// When the state file cannot be used; it is then left as it was.
pub fn open(
    config: &Config,
    left: Option<File>,
) -> anyhow::Result<(InitialState, Option<Current>)> {
    let device = VirtioMem::new(config.geometry, config.requested_size)?;
    let geometry = Geometry {
        addr: config.geometry.addr(),
        region_size: config.geometry.region_size(),
        block_size: config.geometry.block_size(),
        node_id: config.geometry.node_id(),
    };
    let (requested, usable) = (device.requested_size(), device.usable_region_size());
    let (file, saved, whence) = if let Some(left) = left {
        let path = config.state_file.as_deref();
        let (file, saved) = StateFile::continue_with(left, path, &geometry)
            .context("the state of the daemon before it started anew")?;
        (file, saved, "the daemon before")
    } else {
        let Some(path) = &config.state_file else {
            if !config.postcopy {
                return Ok((InitialState::volatile(device), None));
            }
            let file = StateFile::in_memory(&geometry, requested, usable)
                .context("cannot keep the state for a start anew")?;
            let current = file.current();
            let store = Box::new(Store(file));
            return Ok((InitialState { store, ..InitialState::volatile(device) }, Some(current)));
        };
        // The errors name the file.
        let option = || "--state-file";
        if !path.try_exists().with_context(|| format!("--state-file: {}", path.display()))? {
            let file =
                StateFile::create(path, &geometry, requested, usable).with_context(option)?;
            let current = file.current();
            let store = Box::new(Store(file));
            return Ok((InitialState { store, ..InitialState::volatile(device) }, Some(current)));
        }
        let (file, saved) = StateFile::open(path, &geometry).with_context(option)?;
        (file, saved, "the state file")
    };
    let Saved { requested_size, usable_region_size, plugged, journal, .. } = saved;
    let (api_migration, reset_pending) = (saved.api_migration, saved.reset_pending);
    let state_of = || format!("state of {whence}");
    let device = if saved.other_boot {
        tracing::info!("the host was started anew, and the guest is gone: no block is plugged");
        VirtioMem::new(config.geometry, requested_size).with_context(state_of)?
    } else {
        let state = DeviceState { requested_size, usable_region_size, plugged };
        VirtioMem::restore(config.geometry, state).with_context(state_of)?
    };
    let plugged_size = device.plugged_size();
    tracing::info!(plugged_size, requested_size, "state taken over from {whence}");
    let current = file.current();
    let start = InitialState {
        device,
        store: Box::new(Store(file)),
        journal: journal
            .filter(|entry| !entry.answered)
            .map(|entry| Request::from_bytes(&entry.request)),
        api_migration,
        reset_pending,
        sweep: true,
    };
    Ok((start, Some(current)))
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
