//! Memory comes when it is asked for, and the host has it back when it is taken away.

use anyhow::Result;

use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::{GIB, MIB, human};

const NOISE: u64 = 600;

/// 0 -> 2 GiB -> 4 GiB -> 512 MiB -> 0, with memory that the guest has written in between.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    let mut seen = machine.resize(2 * GIB)?;
    let untouched = seen.host;
    seen.claim("untouched memory costs the host next to nothing", untouched <= 64 * MIB);
    report.saw("0 -> 2G", seen);

    machine.guest.dirty(NOISE)?;
    machine.guest.free()?;
    let mut seen = machine.settle(2 * GIB)?;
    let held = seen.host;
    // Most of a tmpfs lands in movable memory, and all movable memory is hotplugged here.
    seen.claim(
        format!("the host holds most of {NOISE} MiB that were written"),
        held >= untouched + (NOISE - 50) * MIB && held <= untouched + (NOISE + 100) * MIB,
    );
    report.saw(format!("{NOISE}M written and freed"), seen);

    report.saw("2G -> 4G", machine.resize(4 * GIB)?);

    let mut seen = machine.resize(512 * MIB)?;
    seen.claim(format!("less is held than {}", human(held)), seen.host < held);
    report.saw("4G -> 512M", seen);

    let mut seen = machine.resize(0)?;
    seen.claim("the host holds nothing", seen.host == 0);
    report.saw("512M -> 0", seen);
    Ok(())
}
