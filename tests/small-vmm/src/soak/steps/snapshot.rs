//! Snapshots, of a guest that stands still or runs, and guests restored from them on the other host.

use std::path::Path;
use std::sync::{Arc, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context;

use super::{clean_up, is_kept_out, wait_for_clients};
use crate::migration::Migration;
use crate::soak::random::Random;
use crate::soak::world::World;

/// How long saving or restoring may take.
const BOUND: Duration = Duration::from_secs(120);

pub(super) fn step(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let _moving = world.settled.write().unwrap_or_else(PoisonError::into_inner);
    let file = world.path("snapshot");
    if save(world, random, &file)? && random.percent(70) {
        restore(world, random, &file)?;
    }
    // Not there when nothing was saved.
    let _ = std::fs::remove_file(&file);
    Ok(())
}

/// Whether the guest was saved.
fn save(world: &World, random: &mut Random, file: &Path) -> anyhow::Result<bool> {
    let (host, machine) = (world.host(), world.machine());
    let (background, fault) = (random.percent(60), random.percent(20));
    world.journal.did("snapshots", format_args!("background {background}, fault {fault}"));
    let saving = Migration::snapshot(&machine, file, background)?;
    if fault {
        thread::sleep(random.millis(0, 300));
        machine.detach();
        host.end(&world.journal, random)?;
        host.restart()?;
        machine.reconnect().or_else(|_| {
            // It stood still for the snapshot.
            wait(world, &saving, "save");
            machine.reconnect()
        })?;
    }
    wait(world, &saving, "save");
    let report = saving.report();
    let saved = report.status == "completed";
    if !saved && !fault && !is_kept_out(world, &report) {
        world.journal.violated("a snapshot without a fault completes", format!("{report:?}"));
    }
    if !machine.is_running() {
        world.journal.violated("a guest that was saved runs on", format!("{report:?}"));
    }
    Ok(saved)
}

fn restore(world: &World, random: &mut Random, file: &Path) -> anyhow::Result<()> {
    let (from, source) = world.guest();
    let lazy = random.percent(50);
    wait_for_clients(world, 1 - from)?;
    let destination =
        world.waiting_machine(1 - from).context("a machine for the restored guest")?;
    world
        .journal
        .did("guests restored", format_args!("on {}, lazy {lazy}", world.hosts[1 - from].name));
    let restoring = Migration::restore(&destination, file, lazy)?;
    wait(world, &restoring, "restore");
    let report = restoring.report();
    if report.error_desc.is_some() || !destination.is_running() {
        world.journal.violated("a guest is restored", format!("{report:?}"));
        return Ok(());
    }
    world.move_guest(1 - from, Arc::clone(&destination));
    clean_up(world, &world.hosts[from], &source)
}

fn wait(world: &World, migration: &Migration, what: &str) {
    let begin = Instant::now();
    while !migration.is_over() {
        if begin.elapsed() > BOUND {
            let detail = format!("{what}: {:?}", migration.report());
            world.journal.violated("a migration ends", detail);
            return;
        }
        thread::sleep(Duration::from_millis(2));
    }
}
