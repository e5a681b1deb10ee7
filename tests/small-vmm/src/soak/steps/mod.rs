//! What is done to the guest and its daemon, one step after the other.

mod daemon;
mod migrate;
mod snapshot;

use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::ensure;

use super::host::Host;
use super::invariants::quiet;
use super::random::Random;
use super::world::{World, retire};
use crate::machine::Machine;
use crate::migration::MigrationReport;

/// Between two looks in quiet.
const QUIET: Duration = Duration::from_secs(20);

/// How long clients may stay at a host that the guest has left.
const LEAVE: Duration = Duration::from_secs(20);

type Step = fn(&World, &mut Random) -> anyhow::Result<()>;

/// Steps, and how often each is taken.
const STEPS: [(u64, Step); 9] = [
    (18, daemon::end_and_restart),
    (8, daemon::compare_after_restart),
    (8, daemon::pause),
    (10, daemon::cut_off),
    (6, daemon::lose_log_reader),
    (6, daemon::freeze),
    (4, daemon::reboot),
    (20, migrate::step),
    (8, snapshot::step),
];

/// Takes steps until the run is over, and has a last look.
pub(super) fn run(world: &World, random: &mut Random) -> anyhow::Result<()> {
    let mut last = Instant::now();
    quiet(world);
    while !world.journal.is_over() {
        let pause = random.millis(50, 1200);
        world.journal.sleep(pause);
        choose(random)(world, random)?;
        if last.elapsed() > QUIET {
            quiet(world);
            last = Instant::now();
        }
    }
    quiet(world);
    Ok(())
}

fn choose(random: &mut Random) -> Step {
    let all = STEPS.iter().map(|(weight, _)| weight).sum();
    let mut at = random.below(all);
    for (weight, step) in STEPS {
        if at < weight {
            return step;
        }
        at -= weight;
    }
    STEPS[0].1
}

/// Waits until a host that a guest goes to has no clients any more: they could refuse what it has
/// plugged, or freeze the device, which then takes no guest.
fn wait_for_clients(world: &World, host: usize) -> anyhow::Result<()> {
    let begin = Instant::now();
    while let Some(device) = world.hosts[host].device(&world.journal) {
        if device["migration_active"] == false && !world.hosts[host].has_clients() {
            break;
        }
        ensure!(begin.elapsed() < LEAVE, "a client that has gone still freezes block state");
        thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// Whether a migration failed since the daemon keeps this user's clients out for a while: the other
/// clients of the soak are of the same user as the VMM, and some were dropped for good reason.
fn is_kept_out(world: &World, report: &MigrationReport) -> bool {
    let kept_out = report.error_desc.as_ref().is_some_and(|error| error.contains("(Paused,"));
    if kept_out {
        world.journal.count("migrations kept out with dropped clients", 1);
    }
    kept_out
}

/// Ends a machine that has no guest, and has its host's device as after power-on.
fn clean_up(world: &World, host: &Host, machine: &Arc<Machine>) -> anyhow::Result<()> {
    retire(machine);
    host.restart()?;
    if let Some(answer) = host.ask(&world.journal, |api| api.system_reset()) {
        ensure!(answer.is_success(), "system reset of host {}: {}", host.name, answer.text);
    }
    Ok(())
}
