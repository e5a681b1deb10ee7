//! The daemon is killed while the guest changes its memory, and the guest does not even notice.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::{GIB, MIB, human};
use crate::wait;

const ROUNDS: u32 = 3;
const SMALL: u64 = 256 * MIB;
const LARGE: u64 = 4 * GIB;

/// Grows and shrinks, each with one kill at a random moment.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    report.saw("before", machine.resize(SMALL)?);
    let mut midway = 0;
    for round in 1..=ROUNDS {
        // A grow takes a second or two, a shrink half a second per 128 MiB.
        midway += killed(machine, report, &format!("grow {round}"), SMALL, LARGE, 400)?;
        midway += killed(machine, report, &format!("shrink {round}"), LARGE, SMALL, 4000)?;
    }
    let mut seen = machine.resize(0)?;
    seen.api_note = format!("{midway} kills midway");
    seen.claim("the host holds nothing", seen.host == 0);
    seen.claim("most kills fell into a change", midway >= ROUNDS);
    report.saw("after", seen);
    Ok(())
}

/// Whether the kill came after the first and before the last request is counted, as 0 or 1.
fn killed(
    machine: &mut Machine,
    report: &mut Report,
    stage: &str,
    from: u64,
    to: u64,
    span_ms: u64,
) -> Result<u32> {
    let Machine { daemon, .. } = machine;
    daemon.api.resize(to)?;
    wait::until("the guest to start", wait::SHORT, || {
        Ok((daemon.api.device()?.plugged_size != from).then_some(()))
    })?;
    let pause = random() % span_ms;
    thread::sleep(Duration::from_millis(pause));
    daemon.kill()?;
    daemon.restart()?;
    let found = daemon.api.device()?.plugged_size;
    let mut seen = machine.settle(to)?;
    seen.api_note = format!("killed with {} plugged", human(found));
    report.saw(format!("{stage} to {}, killed", human(to)), seen);
    Ok(u32::from(found != from && found != to))
}

/// Good enough to spread kills.
fn random() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) / 1_000
}
