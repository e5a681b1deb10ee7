//! A stock QEMU: boots a guest, has it touch memory, moves it.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::thread;

use anyhow::{Context, Result, ensure};
use real_guest::guest::Guest;
use real_guest::own_device::OwnDevice;
use real_guest::provision::Kit;
use real_guest::qemu::{Accelerator, Device, Qemu};
use real_guest::qmp::Qmp;
use real_guest::wait;
use serde_json::{Value, json};

use super::ours::Copy;
use super::{Moved, Resident, Route, Who};
use crate::host;
use crate::units::{GIB, MIB, size};

/// What the guest writes, MiB.
const NOISE: u64 = 512;
const RAM: u64 = GIB;
const REGION: u64 = 64 * GIB;
const PLUGGED: u64 = GIB;

fn device(incoming: bool) -> OwnDevice {
    OwnDevice { ram: RAM, region: REGION, block: 2 * MIB, requested: PLUGGED, incoming }
}

/// The guest in words.
pub fn guest() -> String {
    format!(
        "region of {}, {} plugged, {} written, {} of boot memory",
        size(REGION),
        size(PLUGGED),
        size(NOISE * MIB),
        size(RAM)
    )
}

/// A guest that has written to its memory, and stands still.
pub struct Source<'a> {
    kit: &'a Kit,
    dir: PathBuf,
    qemu: Qemu,
    plugged: u64,
}

impl<'a> Source<'a> {
    /// Boots it; files go to `dir`.
    ///
    /// # Errors
    ///
    /// When it does not boot, or does not use its memory from the start of the region on.
    pub fn boot(kit: &'a Kit, dir: &Path) -> Result<Self> {
        let mut qemu = start(kit, dir, "source", false)?;
        let plugged = prepare(&mut qemu, &dir.join("source"))?;
        Ok(Self { kit, dir: dir.to_owned(), qemu, plugged })
    }

    /// A copy of its memory.
    ///
    /// # Errors
    ///
    /// When there is no memory for it.
    pub fn copy(&self) -> Result<Copy> {
        Copy::of(&self.qemu.memory(REGION)?, &self.qemu.memory(RAM)?, self.plugged)
    }

    /// Moves it to another QEMU.
    ///
    /// # Errors
    ///
    /// When it does not get there.
    pub fn move_by_qemu(&mut self, route: Route) -> Result<Moved> {
        let mut destination = start(self.kit, &self.dir, "destination", true)?;
        let mapped = route == Route::MappedRam;
        let file = self.dir.join("stream");
        let uri = match route {
            Route::File | Route::MappedRam => format!("file:{}", file.display()),
            Route::Socket => format!("unix:{}", self.dir.join("migration.sock").display()),
        };
        host::warm(2 * (PLUGGED + RAM))?;
        let before = resident(&self.qemu)?;
        if route == Route::Socket {
            destination.qmp.migrate_incoming(&uri, mapped)?;
        }
        let told = self.qemu.qmp.migrate(&uri, mapped)?;
        let after = resident(&self.qemu)?;
        if route != Route::Socket {
            destination.qmp.migrate_incoming(&uri, mapped)?;
        }
        destination.qmp.wait_migrated()?;
        let there = resident(&destination)?;
        destination.stop();
        let counted = match route {
            Route::File => fs::metadata(&file)?.len(),
            Route::MappedRam => host::resident(&File::open(&file)?)?,
            Route::Socket => self.count()?,
        };
        Ok(Moved {
            who: Who::Qemu,
            route,
            sent: number(&told["ram"], "transferred")?,
            counted,
            normal: number(&told["ram"], "normal")?,
            zero: number(&told["ram"], "duplicate")?,
            setup: number(&told, "setup-time")? as f64,
            total: number(&told, "total-time")? as f64,
            downtime: told["downtime"].as_f64(),
            source: [before, after],
            destination: there,
        })
    }

    /// Sends the same guest once more, to a thread that only counts bytes. The kernel does not
    /// count what QEMU receives from sockets (`rchar` has reads only), and a relay in between that counts
    /// would slow down what is timed.
    fn count(&mut self) -> Result<u64> {
        let path = self.dir.join("count.sock");
        let listener = UnixListener::bind(&path)?;
        let counting = thread::spawn(move || -> Result<u64> {
            let (mut stream, _) = listener.accept()?;
            let mut bytes = vec![0; MIB as usize];
            let mut count = 0;
            loop {
                match stream.read(&mut bytes)? {
                    0 => return Ok(count),
                    read => count += read as u64,
                }
            }
        });
        // What has migrated has to run before it may migrate again.
        self.qemu.qmp.execute("cont", &json!({}))?;
        self.qemu.qmp.execute("stop", &json!({}))?;
        self.qemu.qmp.migrate(&format!("unix:{}", path.display()), false)?;
        counting.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Ends it; which QEMU it was.
    pub fn stop(mut self) -> String {
        let version = version(&mut self.qemu.qmp);
        self.qemu.stop();
        version
    }
}

/// Which QEMU it is.
pub fn version(qmp: &mut Qmp) -> String {
    let asked = qmp.execute("query-version", &json!({}));
    let version = asked.map(|mut answer| answer["qemu"].take()).unwrap_or_default();
    let part = |name: &str| version[name].as_u64().unwrap_or(0);
    format!("QEMU {}.{}.{}", part("major"), part("minor"), part("micro"))
}

fn start(kit: &Kit, dir: &Path, name: &str, incoming: bool) -> Result<Qemu> {
    let dir = dir.join(name);
    fs::create_dir_all(&dir)?;
    Qemu::start(kit, Accelerator::Tcg, &Device::Own(&device(incoming)), &dir)
}

fn resident(qemu: &Qemu) -> Result<Resident> {
    Ok(Resident {
        region: host::resident(&qemu.memory(REGION)?)?,
        boot: host::resident(&qemu.memory(RAM)?)?,
    })
}

fn number(value: &Value, name: &str) -> Result<u64> {
    value[name].as_u64().with_context(|| format!("QEMU says no {name}"))
}

/// Has the guest add its memory and write to it, and stops it; how much is plugged, from the start
/// of the region on.
fn prepare(qemu: &mut Qemu, dir: &Path) -> Result<u64> {
    let mut guest = Guest::connect(&dir.join("guest.sock"))?;
    guest.wait_ready()?;
    wait::until("the guest to plug its memory", wait::LONG, || {
        let plugged = OwnDevice::plugged(&mut qemu.qmp)? == PLUGGED;
        Ok((plugged && guest.iomem()? == PLUGGED).then_some(()))
    })?;
    guest.dirty_fast(NOISE)?;
    let device = OwnDevice::state(&mut qemu.qmp)?;
    let ranges = guest.iomem_ranges()?;
    let follow = ranges.windows(2).all(|two| two[0].1 == two[1].0);
    ensure!(
        follow && ranges.first().is_some_and(|range| range.0 == device.memaddr),
        "what the guest plugged has gaps: {ranges:x?}"
    );
    qemu.qmp.execute("stop", &json!({}))?;
    Ok(device.size)
}
