//! What is proven, in an order that lets neighbours share a boot.

mod crash;
mod geometry;
mod grow_shrink;
mod migration;
mod reboot;

use anyhow::Result;

use crate::machine::{Machine, Setup};
use crate::report::Report;
use crate::sizes::{GIB, MIB};

/// One thing to prove.
pub struct Step {
    /// Its name on the command line.
    pub name: &'static str,
    /// The machine that it wants, with nothing plugged.
    pub setup: Setup,
    /// Adds rows to the report; an error means that the machine is of no use any more.
    pub run: fn(&mut Machine, &mut Report) -> Result<()>,
}

const COMMON: Setup = Setup { region: 8 * GIB, block: 2 * MIB, node: None, relay: false };

/// All steps.
pub const ALL: [Step; 7] = [
    Step { name: "grow-shrink", setup: COMMON, run: grow_shrink::run },
    Step { name: "migration", setup: COMMON, run: migration::run },
    Step { name: "reboot", setup: COMMON, run: reboot::run },
    Step { name: "crash", setup: Setup { relay: true, ..COMMON }, run: crash::run },
    Step {
        name: "large-blocks",
        setup: Setup { block: 128 * MIB, ..COMMON },
        run: geometry::up_and_down,
    },
    Step {
        name: "large-region",
        setup: Setup { region: 64 * GIB, ..COMMON },
        run: geometry::up_and_down,
    },
    Step { name: "numa", setup: Setup { node: Some(1), ..COMMON }, run: geometry::numa },
];
