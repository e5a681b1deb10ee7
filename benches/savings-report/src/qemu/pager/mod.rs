//! `vmem-pager` beside what a stock QEMU does itself: the same guest, from and to files.

mod bare;
mod exchange;
mod images;
mod process;
mod restore;
mod save;
mod tables;

use std::path::Path;

use anyhow::Result;
use real_guest::machine::Parts;
use real_guest::options::built_daemon;
use real_guest::pager::vm::{Backend, RAM, Region, Shape};
use real_guest::provision::Kit;
use real_guest::qemu::Accelerator;
use serde::{Deserialize, Serialize};

use super::theirs;
use crate::units::{GIB, MIB, size, time};
use exchange::Exchange;
use images::Images;
use restore::{Restored, Way};
use save::{Saved, Saver};
#[cfg(test)]
pub use tables::sample;
pub use tables::{NOTE, tables};

/// How often everything is done.
const RUNS: usize = 3;
/// What the guest is asked to plug, and what the program in it verifies, MiB.
const PLUGGED: u64 = 512 * MIB;
const VERIFIED: u64 = 300;

const fn region(size: u64) -> Region {
    Region { size, requested: PLUGGED }
}

/// The region that everything is compared on, and those on which only the restore is looked at.
static REGION: [Region; 1] = [region(8 * GIB)];
static REGIONS: [[Region; 1]; 3] = [[region(64 * GIB)], [region(512 * GIB)], [region(1024 * GIB)]];

fn shape(regions: &'static [Region]) -> Shape {
    Shape { cpus: 1, regions, backend: Backend::Memfd }
}

/// All that was measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Paged {
    /// Which QEMU.
    pub qemu: String,
    /// The guest in words.
    pub guest: String,
    /// Restores on the region that everything is compared on.
    pub restored: Vec<Restored>,
    /// Lazy restores on larger regions: bytes of the region.
    pub larger: Vec<(u64, Restored)>,
    /// Requests and their answers.
    pub exchanged: Vec<Exchange>,
    /// Saves.
    pub saved: Vec<Saved>,
}

/// Measures, with files in `dir`.
///
/// # Errors
///
/// When something does not come to its end, or a guest finds a wrong page.
pub fn measure(kit: &Kit, dir: &Path) -> Result<Paged> {
    let daemon = built_daemon()?;
    let parts = Parts { kit, accelerator: Accelerator::Tcg, daemon: &daemon };
    let guest = format!(
        "region of {}, {} plugged, {} of boot memory, of which {VERIFIED} MiB are verified all the time",
        size(REGION[0].size),
        size(PLUGGED),
        size(RAM),
    );
    let (mut restored, mut larger) = (Vec::new(), Vec::new());
    let (mut exchanged, mut saved) = (Vec::new(), Vec::new());
    let qemu;
    {
        let mut saver = Saver::boot(&parts, shape(&REGION), &dir.join("save"))?;
        let images = Images::make(&mut saver, dir)?;
        for run in 1..=RUNS {
            for who in save::Who::ALL {
                let one = saver.save(who)?;
                eprintln!("{} ({run} of {RUNS}): {}", who.name(), time(one.total));
                saved.push(one);
            }
        }
        qemu = theirs::version(&mut saver.vm.qmp);
        saver.stop();
        restore::record(&parts, shape(&REGION), &images, dir)?;
        for run in 1..=RUNS {
            for way in Way::ALL {
                let one = restore::restore(&parts, shape(&REGION), &images, way, dir)?;
                eprintln!(
                    "{} ({run} of {RUNS}): the guest runs after {}",
                    way.name(),
                    time(one.runs)
                );
                restored.push(one);
            }
            exchanged.extend(exchange::both(&parts, &images.ours, dir)?);
        }
        images.remove()?;
    }
    for regions in &REGIONS {
        let mut saver = Saver::boot(&parts, shape(regions), &dir.join("save"))?;
        let images = Images::ours(&mut saver, dir)?;
        saver.stop();
        for run in 1..=RUNS {
            let one = restore::restore(&parts, shape(regions), &images, Way::Lazy, dir)?;
            let (region, runs) = (regions[0].size, time(one.runs));
            eprintln!("region of {} ({run} of {RUNS}): the guest runs after {runs}", size(region));
            larger.push((region, one));
        }
        images.remove()?;
    }
    Ok(Paged { qemu, guest, restored, larger, exchanged, saved })
}
