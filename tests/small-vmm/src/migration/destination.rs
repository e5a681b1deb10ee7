//! The destination: nothing runs here before everything has come and fits.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use migration::postcopy::{Channels, OnListen};
use migration::ram::{ListOptions, RamBlocks, RamLoad};
use migration::snapshot::{self, FileIo, LazyRestore, Restore};
use migration::{Guest, Incoming, Progress};

use super::blocks::{self, REGION};
use super::devices::MachineDevices;
use super::transport::Listener;
use super::{Expected, Links, configuration, describe, recovery};
use crate::machine::Machine;

/// Waits for a guest and takes it over. On an error it does not run here, and another may come.
pub(super) fn receive(
    machine: &Arc<Machine>,
    listener: &Listener,
    expected: Expected,
    progress: &Arc<Progress>,
) -> anyhow::Result<()> {
    let Expected { discard_aware, postcopy, links } = expected;
    let Channels { main, urgent } = recovery::accept(listener, postcopy, &links, progress)?;
    let pages = recovery::accept_pages(listener, &links, progress)?;
    let Prepared { blocks, mut devices, waits } = prepare(machine, discard_aware, postcopy)?;
    let list = ListOptions { postcopy, ..ListOptions::default() };
    let mut ram = RamLoad::new(Arc::clone(&blocks), list, Arc::clone(progress));
    if let Some(pages) = pages {
        ram = ram.with_channels(pages);
    }
    let incoming = Incoming {
        configuration: configuration(discard_aware, &links),
        guest: &**machine,
        handlers: vec![Box::new(ram)],
        devices: &mut devices,
        postcopy: postcopy.then(|| {
            let listening = waits.then(|| on_listen(machine));
            recovery::incoming(
                (listener, links.clone()),
                urgent,
                blocks,
                machine,
                progress,
                listening,
            )
        }),
        progress: Arc::clone(progress),
    };
    let received = incoming.run(main);
    if let Err(error) = received {
        give_up(machine);
        return Err(error.into());
    }
    if postcopy {
        machine.memory_arrived();
    }
    Ok(())
}

/// Shares memory with the daemon, or has it get ready for memory that arrives; whether it waits for that.
fn share_memory(machine: &Machine, arriving: bool) -> anyhow::Result<bool> {
    if arriving {
        return machine.advise_postcopy();
    }
    machine.share_memory()?;
    Ok(false)
}

fn on_listen(machine: &Machine) -> OnListen<'_> {
    Box::new(|memory| machine.listen(memory).map_err(|error| describe(&error)))
}

/// No guest has come, or one whose memory never will.
fn give_up(machine: &Machine) {
    if !machine.awaits_guest() {
        return machine.abandon_postcopy();
    }
    if let Err(error) = machine.end_postcopy() {
        eprintln!("small-vmm: {error:#}");
    }
}

/// Reads the guest from a file, and lets it run.
pub(super) fn restore(
    machine: &Arc<Machine>,
    file: &Path,
    progress: Arc<Progress>,
) -> anyhow::Result<()> {
    let Prepared { blocks, mut devices, .. } = prepare(machine, true, false)?;
    let from = open(file)?;
    let restore = Restore {
        configuration: configuration(true, &Links::default()),
        blocks,
        devices: &mut devices,
        io: FileIo::default(),
        progress,
    };
    snapshot::restore(restore, &from)?;
    machine.run().map_err(anyhow::Error::msg)
}

/// Reads the guest's devices from a file, lets it run, and reads its memory.
pub(super) fn restore_lazily(
    machine: &Arc<Machine>,
    file: &Path,
    progress: Arc<Progress>,
) -> anyhow::Result<()> {
    let Prepared { blocks, mut devices, waits } = prepare(machine, true, true)?;
    let restore = Restore {
        configuration: configuration(true, &Links::default()),
        blocks,
        devices: &mut devices,
        io: FileIo::default(),
        progress,
    };
    let begun = begin_restore(machine, restore, file, waits).inspect_err(|_| give_up(machine));
    begun?.wait()?;
    machine.memory_arrived();
    Ok(())
}

/// Lets the guest run, whose memory is still being read.
fn begin_restore(
    machine: &Arc<Machine>,
    restore: Restore<'_>,
    file: &Path,
    waits: bool,
) -> anyhow::Result<LazyRestore> {
    let from = Arc::new(open(file)?);
    let restored = snapshot::restore_lazily(restore, from, Arc::clone(machine) as Arc<_>)?;
    if waits {
        machine.listen(restored.memory())?;
    }
    restored.follow()?;
    machine.run().map_err(anyhow::Error::msg)?;
    Ok(restored)
}

fn open(file: &Path) -> anyhow::Result<File> {
    File::open(file).with_context(|| format!("cannot open {}", file.display()))
}

/// What a guest finds that comes.
struct Prepared {
    blocks: Arc<RamBlocks>,
    devices: MachineDevices,
    /// Whether the daemon waits for memory that arrives.
    waits: bool,
}

/// Memory and devices as they were at the start, whatever an earlier attempt has left.
fn prepare(
    machine: &Arc<Machine>,
    discard_aware: bool,
    arriving: bool,
) -> anyhow::Result<Prepared> {
    machine.await_guest()?;
    machine.tear_down_ring()?;
    machine.expect_memory(arriving);
    // First: a daemon that is connected to anew for that may start itself anew, without the clients of its discard channel.
    let waits = share_memory(machine, arriving)?;
    let prepare = || {
        let blocks = Arc::new(blocks::blocks(machine, discard_aware)?);
        let mut devices = MachineDevices::of_destination(machine, arriving)?;
        if let (true, Some(region)) = (discard_aware, blocks.get(REGION)) {
            devices.guard(region)?;
        }
        Ok(Prepared { blocks, devices, waits })
    };
    prepare().inspect_err(|_| give_up(machine))
}
