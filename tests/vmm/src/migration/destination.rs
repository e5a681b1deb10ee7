//! The destination: nothing runs here before everything has come and fits.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::thread;

use anyhow::{Context, ensure};
use virtio_mem::migration::channel::Channel;
use virtio_mem::migration::precopy::{Guest, Incoming};
use virtio_mem::migration::progress::Progress;
use virtio_mem::migration::ram::{ListOptions, RamBlocks, RamLoad};
use virtio_mem::migration::snapshot::{self, Restore};

use super::blocks::{self, REGION};
use super::configuration;
use super::devices::MachineDevices;
use super::transport::Listener;
use crate::machine::Machine;

/// Waits for a guest and takes it over. On an error it does not run here, and another may come.
pub(super) fn receive(
    machine: &Arc<Machine>,
    listener: &Listener,
    discard_aware: bool,
    progress: Arc<Progress>,
) -> anyhow::Result<()> {
    let stream = listener.accept(|| progress.is_cancelled())?;
    let (blocks, mut devices) = prepare(machine, discard_aware)?;
    let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
    let channel = Channel::new(stream, Arc::clone(&progress))?;
    let incoming = Incoming {
        configuration: configuration(discard_aware),
        guest: &**machine,
        handlers: vec![Box::new(ram)],
        devices: &mut devices,
        postcopy: None,
        progress,
    };
    Ok(incoming.run(channel)?)
}

/// Reads the guest from a file, and lets it run.
pub(super) fn restore(
    machine: &Arc<Machine>,
    file: &Path,
    progress: Arc<Progress>,
) -> anyhow::Result<()> {
    let (blocks, mut devices) = prepare(machine, true)?;
    let from = File::open(file).with_context(|| format!("cannot open {}", file.display()))?;
    let restore = Restore {
        configuration: configuration(true),
        blocks,
        devices: &mut devices,
        threads: thread::available_parallelism().map_or(1, usize::from),
        progress,
    };
    snapshot::restore(restore, &from)?;
    machine.run().map_err(anyhow::Error::msg)
}

/// Memory and devices as they were at the start, whatever an earlier attempt has left.
fn prepare(
    machine: &Arc<Machine>,
    discard_aware: bool,
) -> anyhow::Result<(Arc<RamBlocks>, MachineDevices)> {
    ensure!(machine.options().incoming && !machine.is_running(), "a guest runs here already");
    machine.tear_down_ring()?;
    let blocks = Arc::new(blocks::blocks(machine, discard_aware)?);
    let devices = MachineDevices::of_destination(machine)?;
    if let (true, Some(region)) = (discard_aware, blocks.get(REGION)) {
        region.set_discard_manager(0, devices.manager());
    }
    Ok((blocks, devices))
}
