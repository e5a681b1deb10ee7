//! The source: follows block state, or freezes it, sends, and has the guest back when that fails.

use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use migration::dirty::{DirtyTracker, NeverWritten};
use migration::ram::{ListOptions, MigrationBlock, PageChannels, RamBlocks, RamSave};
use migration::snapshot::{self, FileIo, RunningGuest, StoppedGuest, write_image};
use migration::{Guest, GuestAfter, Outgoing, Parameters, Progress};
use ram_discard::{FreezeFor, RamDiscardManager};
use virtio_mem::discard_channel::RemoteRamDiscardManager;

use super::blocks::{self, REGION};
use super::devices::MachineDevices;
use super::{Links, MigrateOptions, configuration, recovery, transport};
use crate::machine::Machine;

/// How long the daemon may take to answer on the discard channel.
const DAEMON_TIMEOUT: Duration = Duration::from_secs(5);

/// Sends the guest away. On an error it runs on here.
pub(super) fn send(
    machine: &Arc<Machine>,
    options: &MigrateOptions,
    progress: Arc<Progress>,
) -> anyhow::Result<()> {
    let links = &options.links;
    let manager = attach(machine)?;
    let blocks = send_blocks(machine, &manager, options.discard_aware)?;
    // Without a manager the engine freezes nothing, and the device's state would still be sent early.
    let frozen = match options.discard_aware {
        true => None,
        false => Some(manager.freeze(FreezeFor::Source)?),
    };
    let elastic = options.elastic && options.discard_aware;
    let mut trackers = blocks::trackers(machine, &blocks, elastic)?;
    let tracker_of = |block: &MigrationBlock| -> Box<dyn DirtyTracker> {
        trackers.remove(block.id()).unwrap_or_else(|| Box::new(NeverWritten))
    };
    let list = ListOptions { postcopy: options.postcopy.is_some(), ..ListOptions::default() };
    let mut ram = RamSave::new(&blocks, list, Arc::clone(&progress), tracker_of)?;
    let mut devices = MachineDevices::of_source(machine, &manager)?;
    let mut parameters = Parameters::new(configuration(options.discard_aware, links));
    parameters.max_bandwidth = options.max_bandwidth;
    if !elastic {
        parameters.block_state_timeout = None;
    }
    if let Some(limit) = options.downtime_limit {
        parameters.downtime_limit = Duration::from_millis(limit);
    }
    if let Some(level) = links.zstd {
        parameters.multifd_zstd_level = level;
    }
    let channel = transport::channel_to(&options.to, links, &progress)?;
    let postcopy = match &options.postcopy {
        Some(postcopy) => Some(recovery::outgoing(&options.to, links, postcopy, &progress)?),
        None => None,
    };
    if links.channels != 0 {
        let connect = |_| transport::channel_to(&options.to, links, &progress);
        let channels = (0..links.channels).map(connect).collect::<anyhow::Result<_>>()?;
        ram = ram.with_channels(PageChannels::new(channels)?);
    }
    let outgoing = Outgoing {
        parameters,
        guest: &**machine,
        handlers: vec![Box::new(ram)],
        devices: &mut devices,
        postcopy,
        progress,
    };
    let sent = outgoing.run(channel);
    let guest = sent.as_ref().map_or_else(|failed| failed.guest, |()| GuestAfter::Gone);
    if guest == GuestAfter::Gone {
        machine.guest_left();
    }
    drop(frozen);
    Ok(sent?)
}

/// Writes the guest to a new file: in the background, as it was when it stood still for a moment,
/// or while it stands still.
pub(super) fn snapshot(
    machine: &Arc<Machine>,
    file: &Path,
    background: bool,
    progress: Arc<Progress>,
) -> anyhow::Result<()> {
    let manager = attach(machine)?;
    let blocks = send_blocks(machine, &manager, true)?;
    let mut devices = MachineDevices::of_source(machine, &manager)?;
    ensure!(!file.exists(), "cannot make {}: File exists", file.display());
    let configuration = configuration(true, &Links::default());
    let (blocks, devices) = (&blocks, &mut devices);
    if background {
        let guest = &**machine;
        let running = RunningGuest { configuration, blocks, devices, guest, progress };
        return Ok(write_image(file, |file| snapshot::save_in_background(running, file))?);
    }
    let io = FileIo::default();
    machine.stop().map_err(anyhow::Error::msg)?;
    let stopped = StoppedGuest { configuration, blocks, devices, io, progress };
    let saved = write_image(file, |file| snapshot::save(stopped, file));
    machine.run().map_err(anyhow::Error::msg)?;
    Ok(saved?)
}

/// Becomes a client of the daemon's discard channel.
pub(crate) fn attach(machine: &Machine) -> anyhow::Result<Arc<RemoteRamDiscardManager>> {
    let path = machine.options().discard_socket.as_deref();
    let path = path.context("block state cannot be frozen: there is no --discard-socket")?;
    let stream = UnixStream::connect(path)
        .with_context(|| format!("cannot connect to the discard channel {}", path.display()))?;
    Ok(Arc::new(RemoteRamDiscardManager::attach(stream, DAEMON_TIMEOUT)?))
}

fn send_blocks(
    machine: &Machine,
    manager: &Arc<RemoteRamDiscardManager>,
    discard_aware: bool,
) -> anyhow::Result<RamBlocks> {
    let blocks = blocks::blocks(machine, discard_aware)?;
    if let (true, Some(region)) = (discard_aware, blocks.get(REGION)) {
        region.set_discard_manager(0, Arc::clone(manager) as Arc<_>)?;
    }
    Ok(blocks)
}
