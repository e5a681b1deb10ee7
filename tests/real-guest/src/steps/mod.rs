//! What is proven, in an order that lets neighbours share a boot.

mod crash;
mod geometry;
mod grow_shrink;
mod inspect;
mod migration;
mod reasons;
mod reboot;
mod snapshot;

use std::path::Path;

use anyhow::Result;

use crate::machine::{Machine, Parts, Setup};
use crate::pager;
use crate::report::Report;
use crate::sizes::{GIB, MIB};

/// One thing to prove.
pub struct Step {
    /// Its name on the command line.
    pub name: &'static str,
    /// On what, and how. Adds rows to the report; an error means that the guest is of no use any
    /// more.
    pub proof: Proof,
}

/// On what a step runs.
pub enum Proof {
    /// A guest with a daemon, with nothing plugged; steps of the same setup share it.
    Machine(Setup, fn(&mut Machine, &mut Report) -> Result<()>),
    /// A guest of the step's own, without a daemon; logs and sockets go to the folder.
    Own(fn(&Parts<'_>, &Path, &mut Report) -> Result<()>),
}

const COMMON: Setup =
    Setup { region: 8 * GIB, block: 2 * MIB, node: None, relay: false, driver: true };

/// All steps.
pub const ALL: [Step; 12] = [
    Step { name: "grow-shrink", proof: Proof::Machine(COMMON, grow_shrink::run) },
    Step { name: "migration", proof: Proof::Machine(COMMON, migration::run) },
    Step { name: "snapshot", proof: Proof::Machine(COMMON, snapshot::run) },
    Step { name: "reboot", proof: Proof::Machine(COMMON, reboot::run) },
    Step {
        name: "reasons",
        proof: Proof::Machine(Setup { driver: false, ..COMMON }, reasons::run),
    },
    Step { name: "crash", proof: Proof::Machine(Setup { relay: true, ..COMMON }, crash::run) },
    Step {
        name: "large-blocks",
        proof: Proof::Machine(Setup { block: 128 * MIB, ..COMMON }, geometry::up_and_down),
    },
    Step {
        name: "large-region",
        proof: Proof::Machine(Setup { region: 64 * GIB, ..COMMON }, geometry::up_and_down),
    },
    Step { name: "numa", proof: Proof::Machine(Setup { node: Some(1), ..COMMON }, geometry::numa) },
    Step { name: "inspect", proof: Proof::Own(inspect::run) },
    Step { name: "pager-save", proof: Proof::Own(pager::save::run) },
    Step { name: "pager-restore", proof: Proof::Own(pager::restore::run) },
];
