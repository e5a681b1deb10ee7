//! A guest that starts anew gives everything back first, and then gets what is asked for.

use anyhow::Result;

use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::{GIB, MIB};

const UNPLUG_ALL: &str = "unplugging all memory is required";

/// A reboot from within, and the reset button.
pub fn run(machine: &mut Machine, report: &mut Report) -> Result<()> {
    report.saw("before", machine.resize(GIB)?);
    again(machine, report, "reboot", |machine| machine.guest.reboot())?;
    again(machine, report, "reset button", |machine| {
        machine.qemu.qmp.system_reset()?;
        machine.guest.wait_ready()
    })
}

fn again(
    machine: &mut Machine,
    report: &mut Report,
    stage: &str,
    restart: fn(&mut Machine) -> Result<()>,
) -> Result<()> {
    machine.guest.dirty(100)?;
    let answered = |machine: &Machine| machine.daemon.api.requests(&["unplug_all", "ack"]);
    let before = answered(machine)?;
    restart(machine)?;
    // Nothing tells an old gigabyte from a new one but the guest's own word.
    let told = machine.guest.run(&format!(
        "for i in $(seq 100); do dmesg | grep -q '{UNPLUG_ALL}' && echo yes && break; usleep 100000; done; true"
    ))?;
    let mut seen = machine.settle(GIB)?;
    let unplugs = answered(machine)? - before;
    seen.guest_note = "UNPLUG_ALL in dmesg".to_owned();
    seen.api_note = format!("{unplugs} x UNPLUG_ALL");
    seen.claim(format!("dmesg has `{UNPLUG_ALL}`"), told.contains("yes"));
    seen.claim("UNPLUG_ALL was answered", unplugs > 0);
    seen.claim("the 100M of the last boot are gone", seen.host <= 64 * MIB);
    report.saw(stage, seen);
    Ok(())
}
