//! The VMM process of the demonstration: a guest that is told what to do, one JSON line for each
//! command and each answer.
//!
//! It has boot memory for the ring, the device's region, two vCPUs and a driver. It never decides
//! how much memory it has: that is between the device and the driver.

use std::io::{BufRead, Write};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use serde::{Deserialize, Serialize};

use crate::backend_channel::{BackendChannel, Behaviour};
use crate::driver::MemDriver;
use crate::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use crate::guest_driver::GuestDriver;
use crate::memory::{GuestRam, Layout};
use crate::protocol::feature;
use crate::vcpu::Vcpus;

const BOOT_SIZE: u64 = 16 << 20;
const RING_BASE: u64 = 0x1000;
const RING_SIZE: u16 = 64;
const VCPUS: u64 = 2;
const TIMEOUT: Duration = Duration::from_secs(30);

/// What the guest is told.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Command {
    /// Wait for this requested size and get there.
    Settle {
        /// The size in bytes.
        requested: u64,
    },
    /// Let the vCPUs write this part of the region, and keep writing it.
    Touch {
        /// First byte, from the start of the region.
        offset: u64,
        /// Length in bytes.
        size: u64,
    },
    /// Tell how things are.
    Report {
        /// How many characters the map of the region has.
        cells: u64,
    },
    /// End, after a last look at all that was written.
    Quit,
}

/// What the guest answers.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Report {
    /// Bytes plugged, as the device's configuration says.
    pub plugged: u64,
    /// Bytes that the host holds for the region's memory, by `st_blocks`.
    pub held: u64,
    /// What is where in the region, for [`Command::Report`].
    pub map: Vec<Cell>,
    /// Pages that the vCPUs verified so far.
    pub verified: u64,
}

/// One part of the region.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Cell {
    /// The guest may not use it and the host holds nothing.
    Discarded,
    /// The guest may use it and has not yet.
    Untouched,
    /// The guest may use it and the host holds memory for it.
    Populated,
    /// The host holds memory that the guest may not use.
    Leaked,
}

/// Connects to the daemon, shares memory with it, and does what it is told until it is told to
/// quit.
pub fn run(
    socket: &Path,
    addr: u64,
    region_size: u64,
    commands: impl BufRead,
    mut answers: impl Write,
) -> anyhow::Result<()> {
    let ram = Arc::new(GuestRam::new(Layout::boot_and_device(BOOT_SIZE, addr, region_size)?)?);
    let region = addr..addr + region_size;
    let mut guest = start(socket, &ram)?;
    for line in commands.lines() {
        let command = serde_json::from_str(&line?).context("command")?;
        let mut map = Vec::new();
        match command {
            Command::Settle { requested } => {
                guest.run_to(requested, TIMEOUT)?;
            }
            Command::Touch { offset, size } => {
                let vcpus = guest.vcpus().context("no vCPUs")?;
                vcpus.give(addr + offset..addr + offset + size);
                ensure!(
                    vcpus.wait_written(addr + offset, TIMEOUT),
                    "vCPUs stopped, or are too slow"
                );
            }
            Command::Report { cells } => {
                map = draw(&ram, &region, &guest.plugged_ranges()?, cells)?
            }
            Command::Quit => {
                let (_, _, _, vcpus) = guest.into_parts();
                let work = vcpus.context("no vCPUs")?.stop()?;
                return answer(
                    &mut answers,
                    &Report { verified: work.verified, ..Report::default() },
                );
            }
        }
        let report = Report {
            plugged: guest.config()?.plugged_size,
            held: ram.allocated_bytes(region.clone())?,
            map,
            verified: guest.vcpus().map_or(0, |vcpus| vcpus.work().verified),
        };
        answer(&mut answers, &report)?;
    }
    Ok(())
}

fn start(socket: &Path, ram: &Arc<GuestRam>) -> anyhow::Result<GuestDriver> {
    let frontend = Frontend::connect(socket)?;
    let agreed = frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES)?;
    let channel = BackendChannel::open(&frontend, Behaviour::AckAfterGetConfig)?;
    frontend.set_mem_table(ram)?;
    let event_idx = agreed.features & feature::RING_EVENT_IDX != 0;
    let driver = MemDriver::at(ram, RING_BASE, RING_SIZE, event_idx)?;
    frontend.start_ring(0, driver.ring())?;
    let vcpus = Vcpus::start(ram.clone(), VCPUS);
    Ok(GuestDriver::new(frontend, channel, driver).with_vcpus(vcpus))
}

fn answer(answers: &mut impl Write, report: &Report) -> anyhow::Result<()> {
    serde_json::to_writer(&mut *answers, report)?;
    writeln!(answers)?;
    Ok(answers.flush()?)
}

fn draw(
    ram: &GuestRam,
    region: &Range<u64>,
    plugged: &[Range<u64>],
    cells: u64,
) -> anyhow::Result<Vec<Cell>> {
    let populated = ram.populated_ranges(region.clone())?;
    let step = (region.end - region.start).div_ceil(cells);
    let meets = |ranges: &[Range<u64>], cell: &Range<u64>| {
        ranges.iter().any(|range| range.start < cell.end && cell.start < range.end)
    };
    Ok((0..cells)
        .map(|index| {
            let start = region.start + index * step;
            let cell = start..(start + step).min(region.end);
            match (meets(plugged, &cell), meets(&populated, &cell)) {
                (false, false) => Cell::Discarded,
                (true, false) => Cell::Untouched,
                (true, true) => Cell::Populated,
                (false, true) => Cell::Leaked,
            }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_tells_plugged_from_populated_and_shows_leaks() {
        let ram = GuestRam::new(Layout::new().memfd("ram", 0, 0x10000).unwrap()).unwrap();
        ram.write(0x0000, &[1]).unwrap();
        ram.write(0xf000, &[1]).unwrap();
        let plugged = vec![0..0x8000; 1];
        let map = draw(&ram, &(0..0x10000), &plugged, 4).unwrap();
        assert_eq!(map, [Cell::Populated, Cell::Untouched, Cell::Discarded, Cell::Leaked]);
    }

    #[test]
    fn commands_are_lines_that_a_person_can_type() {
        let text = serde_json::to_string(&Command::Settle { requested: 4096 }).unwrap();
        assert_eq!(text, r#"{"settle":{"requested":4096}}"#);
        assert_eq!(serde_json::to_string(&Command::Quit).unwrap(), r#""quit""#);
    }
}
