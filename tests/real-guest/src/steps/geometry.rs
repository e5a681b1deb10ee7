//! Other block sizes, other region sizes, another NUMA node.

use anyhow::Result;

use crate::machine::Machine;
use crate::report::Report;
use crate::sizes::{GIB, MIB, change};
use crate::wait;

/// 0 -> 1 GiB -> 0.
pub fn up_and_down(machine: &mut Machine, report: &mut Report) -> Result<()> {
    report.saw("0 -> 1G", machine.resize(GIB)?);
    machine.guest.dirty(100)?;
    machine.guest.free()?;
    let mut seen = machine.resize(0)?;
    seen.claim("the host holds nothing", seen.host == 0);
    report.saw("1G -> 0", seen);
    Ok(())
}

/// The memory arrives on the node that the device names, and on no other.
pub fn numa(machine: &mut Machine, report: &mut Report) -> Result<()> {
    let before = [machine.guest.node_total(0)?, machine.guest.node_total(1)?];
    let mut seen = machine.resize(GIB)?;
    let after = [machine.guest.node_total(0)?, machine.guest.node_total(1)?];
    let [other, own] = [0, 1].map(|node| change(before[node], after[node]));
    seen.guest_note = format!("node 0 {other}, node 1 {own}");
    seen.claim("node 1 got it", (after[1] - before[1]).abs_diff(GIB) <= 4 * MIB);
    seen.claim("node 0 got none", after[0].abs_diff(before[0]) <= 4 * MIB);
    report.saw("0 -> 1G on node 1", seen);

    let mut seen = machine.resize(0)?;
    let guest = &mut machine.guest;
    let back = wait::until("node 1 to shrink", wait::SHORT, || {
        Ok((guest.node_total(1)? == before[1]).then_some(()))
    });
    seen.claim("node 1 is as before", back.is_ok());
    report.saw("1G -> 0", seen);
    Ok(())
}
