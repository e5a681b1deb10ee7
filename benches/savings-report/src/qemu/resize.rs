//! How long a guest takes to grow and to shrink, with QEMU's own device and with the daemon.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use real_guest::guest::Guest;
use real_guest::machine::{Machine, Parts, Setup};
use real_guest::own_device::OwnDevice;
use real_guest::qemu::{self, Accelerator, Device, Qemu};
use real_guest::{options, provision::Kit, wait};
use serde::{Deserialize, Serialize};

use super::Who;
use crate::host;
use crate::units::{GIB, MIB, millis};

/// What the guest has before it grows, and after it shrank.
pub const SMALL: u64 = 512 * MIB;
/// What it grows to.
pub const LARGE: u64 = 4 * GIB;
/// What it writes in between, MiB, and frees.
const WRITTEN: u64 = 1024;
/// The same for both.
const SETUP: Setup =
    Setup { region: 8 * GIB, block: 2 * MIB, node: None, relay: false, driver: true };
/// Grows and shrinks, taking turns.
const CYCLES: usize = 3;
/// How often both are asked for their size.
const POLL: Duration = Duration::from_millis(5);

/// A guest that grew and shrank once. Times are milliseconds, sizes bytes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resized {
    /// With whose device.
    pub who: Who,
    /// From the request until the device was as large as that.
    pub grow: f64,
    /// The same for the way back.
    pub shrink: f64,
    /// What was resident of the region before and after the guest shrank.
    pub resident: [u64; 2],
}

/// Both, over and over, each in a guest of its own that lives on beside the other.
///
/// # Errors
///
/// When a guest or a device does not do what it should.
pub fn compare(kit: &Kit, dir: &Path) -> Result<Vec<Resized>> {
    let daemon = options::built_daemon()?;
    let parts = Parts { kit, accelerator: Accelerator::Tcg, daemon: &daemon };
    let folder = |name: &str| -> Result<_> {
        let dir = dir.join(name);
        fs::create_dir_all(&dir)?;
        Ok(dir)
    };
    let mut own = Own::boot(&parts, &folder("own")?)?;
    let mut machine = Machine::boot(&parts, &SETUP, &folder("daemon")?)?;
    let mut resized = Vec::new();
    for _ in 0..CYCLES {
        resized.push(cycle(&mut own)?);
        resized.push(cycle(&mut machine)?);
    }
    own.qemu.stop();
    machine.stop()?;
    Ok(resized)
}

/// A guest with a virtio-mem device: QEMU's or this project's.
trait Resizable {
    const WHO: Who;
    /// Asks the guest to have so much.
    fn request(&mut self, size: u64) -> Result<()>;
    /// What the device says that the guest has.
    fn plugged(&mut self) -> Result<u64>;
    /// What the host holds for the region.
    fn resident(&self) -> Result<u64>;
    /// The guest itself.
    fn guest(&mut self) -> &mut Guest;
}

impl Resizable for Machine {
    const WHO: Who = Who::Ours;

    fn request(&mut self, size: u64) -> Result<()> {
        self.daemon.api.resize(size)
    }

    fn plugged(&mut self) -> Result<u64> {
        // Not of `GET /v1/device`, which also counts what the host holds: asked this often, and with as
        // much memory touched, that would keep a processor busy that the guest needs.
        Ok(self.daemon.api.blocks()?.plugged.iter().map(|range| range.size).sum())
    }

    fn resident(&self) -> Result<u64> {
        self.qemu.host_held()
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

/// A guest with QEMU's own device.
struct Own {
    qemu: Qemu,
    guest: Guest,
}

impl Own {
    fn boot(parts: &Parts<'_>, dir: &Path) -> Result<Self> {
        let Setup { region, block, .. } = SETUP;
        let device = OwnDevice { ram: qemu::RAM, region, block, requested: 0, incoming: false };
        let qemu = Qemu::start(parts.kit, parts.accelerator, &Device::Own(&device), dir)?;
        let mut guest = Guest::connect(&dir.join("guest.sock"))?;
        guest.wait_ready()?;
        Ok(Self { qemu, guest })
    }
}

impl Resizable for Own {
    const WHO: Who = Who::Qemu;

    fn request(&mut self, size: u64) -> Result<()> {
        OwnDevice::resize(&mut self.qemu.qmp, size)
    }

    fn plugged(&mut self) -> Result<u64> {
        OwnDevice::plugged(&mut self.qemu.qmp)
    }

    fn resident(&self) -> Result<u64> {
        Ok(host::resident(&self.qemu.memory(SETUP.region)?)?)
    }

    fn guest(&mut self) -> &mut Guest {
        &mut self.guest
    }
}

fn cycle<R: Resizable>(what: &mut R) -> Result<Resized> {
    if what.plugged()? != SMALL {
        resize(what, SMALL)?;
    }
    let grow = resize(what, LARGE)?;
    what.guest().dirty_fast(WRITTEN)?;
    what.guest().free()?;
    let before = what.resident()?;
    ensure!(before >= WRITTEN / 2 * MIB, "the guest wrote elsewhere: {before} bytes are resident");
    let shrink = resize(what, SMALL)?;
    let resized = Resized { who: R::WHO, grow, shrink, resident: [before, what.resident()?] };
    eprintln!("{} grew in {grow:.0} ms and shrank in {shrink:.0} ms", R::WHO.name());
    Ok(resized)
}

/// Milliseconds until the device has `size`. Returns when the guest has counted it, too.
fn resize<R: Resizable>(what: &mut R, size: u64) -> Result<f64> {
    host::warm(GIB)?;
    let begin = Instant::now();
    what.request(size)?;
    wait::until_every(POLL, "the guest to change its memory", wait::LONG, || {
        Ok((what.plugged()? == size).then_some(()))
    })?;
    let took = millis(begin.elapsed());
    wait::until("the guest to count its memory", wait::SHORT, || {
        Ok((what.guest().iomem()? == size).then_some(()))
    })?;
    Ok(took)
}
