//! While a migration runs, blocks are frozen and the guest is told to wait; then it goes on at once.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};

use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::GIB;
use crate::wait;

/// Linux tries again by itself after 50 s; a guest that is done by then was told.
const TOLD: Duration = Duration::from_secs(30);

/// A grow and a shrink, each held up by a migration.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    report.saw("before", machine.resize(GIB)?);
    held_up(machine, report, "grow", GIB, 2 * GIB)?;
    held_up(machine, report, "shrink", 2 * GIB, GIB)
}

fn held_up(
    machine: &mut Machine,
    report: &mut Report,
    what: &str,
    from: u64,
    to: u64,
) -> Result<()> {
    let api = &machine.daemon.api;
    let before = api.requests(&["busy"])?;
    api.migration(true)?;
    ensure!(api.device()?.migration_active, "the API took a migration and knows of none");
    api.resize(to)?;
    let busy = wait::until("the guest to be told BUSY", wait::SHORT, || {
        let busy = api.requests(&["busy"])? - before;
        Ok((busy > 0).then_some(busy))
    })?;
    let mut seen = machine.observe()?;
    seen.api_note = format!("{busy} x BUSY");
    seen.claim("no block moved", seen.device.plugged_size == from);
    seen.claim("the guest still has what it had", seen.iomem == from);
    report.saw(format!("{what} while migrating"), seen);

    machine.daemon.api.migration(false)?;
    let thawed = Instant::now();
    let mut seen = machine.settle_within(to, TOLD)?;
    seen.api_note = format!("after {:.1} s", thawed.elapsed().as_secs_f32());
    report.saw(format!("{what} after it"), seen);
    Ok(())
}
