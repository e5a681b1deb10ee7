//! The daemon is killed while the guest changes its memory, and the guest does not even notice.

use std::thread;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::Result;

use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::{GIB, MIB, human};
use crate::wait;

const ROUNDS: usize = 3;
const KILLS: usize = 3;
const SMALL: u64 = 256 * MIB;
const LARGE: u64 = 4 * GIB;

/// Grows and shrinks, each with kills at random moments.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    report.saw("before", machine.resize(SMALL)?);
    let mut midway = 0;
    for round in 1..=ROUNDS {
        // A grow takes a second or two, a shrink up to a second per 128 MiB.
        midway += killed(machine, report, &format!("grow {round}"), SMALL, LARGE, 250)?;
        midway += killed(machine, report, &format!("shrink {round}"), LARGE, SMALL, 2500)?;
    }
    let mut seen = machine.resize(0)?;
    seen.api_note = format!("{midway} kills midway");
    seen.claim("the host holds nothing", seen.host == 0);
    seen.claim("some kills fell into a change", midway >= ROUNDS);
    report.saw("after", seen);
    Ok(())
}

/// How many kills came when the first request had been counted and the last had not.
fn killed(
    machine: &mut Machine,
    report: &mut Report,
    stage: &str,
    from: u64,
    to: u64,
    span_ms: u64,
) -> Result<usize> {
    let Machine { daemon, .. } = machine;
    daemon.api.resize(to)?;
    wait::until("the guest to start", wait::SHORT, || {
        Ok((daemon.api.device()?.plugged_size != from).then_some(()))
    })?;
    let mut moments = Vec::new();
    for _ in 0..KILLS {
        thread::sleep(Duration::from_millis(random() % span_ms));
        let plugged = daemon.api.device()?.plugged_size;
        if plugged == to {
            break;
        }
        daemon.kill()?;
        daemon.restart()?;
        moments.push(human(plugged));
    }
    let mut seen = machine.settle(to)?;
    seen.api_note = format!("killed at {}", moments.join(" "));
    report.saw(format!("{stage} to {}", human(to)), seen);
    Ok(moments.len())
}

/// Good enough to spread kills.
fn random() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::from(now.subsec_nanos()) / 1_000
}
