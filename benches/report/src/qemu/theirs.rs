//! A stock QEMU: boots a guest, has it touch memory, moves it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use real_guest::guest::Guest;
use real_guest::options::cache_dir;
use real_guest::own_device::OwnDevice;
use real_guest::provision::{self, Kit};
use real_guest::qemu::{Accelerator, Device, Qemu};
use real_guest::qmp::Qmp;
use real_guest::wait;
use serde_json::{Value, json};

use super::ours::Copy;
use super::{Moved, Route};
use crate::host;
use crate::units::{GIB, MIB, size};

/// What the guest writes, MiB.
const NOISE: u64 = 256;
const RAM: u64 = 256 * MIB;
const REGION: u64 = 8 * GIB;
const PLUGGED: u64 = 512 * MIB;

fn device(incoming: bool) -> OwnDevice {
    OwnDevice { ram: RAM, region: REGION, block: 2 * MIB, requested: PLUGGED, incoming }
}

/// What a comparison is made with.
pub struct Bench {
    kit: Kit,
    dir: PathBuf,
    version: std::cell::OnceCell<String>,
}

impl Bench {
    /// With a QEMU that is found or brought, and files in `dir`.
    pub fn new(dir: &Path) -> Result<Self> {
        let kit = provision::provide(&cache_dir()?, None)?;
        let dir = fs::canonicalize(dir)?.join("qemu");
        Ok(Self { kit, dir, version: std::cell::OnceCell::new() })
    }

    /// The guest in words.
    pub fn guest(&self) -> String {
        format!(
            "region of {}, {} plugged, {} of noise written, {} of boot memory",
            size(REGION),
            size(PLUGGED),
            size(NOISE * MIB),
            size(RAM)
        )
    }

    /// Moves one guest by QEMU, and a copy of its memory by this project.
    pub fn compare(&self, route: Route) -> Result<Vec<Moved>> {
        if self.dir.exists() {
            fs::remove_dir_all(&self.dir)?;
        }
        let (here, there) = (self.dir.join("source"), self.dir.join("destination"));
        fs::create_dir_all(&here)?;
        fs::create_dir_all(&there)?;
        let mut source = self.start(&here, false)?;
        let plugged = prepare(&mut source, &here)?;
        let copy = Copy::of(&source.memory(REGION)?, &source.memory(RAM)?, plugged)?;
        let theirs = self.move_by_qemu(&mut source, &there, route)?;
        source.stop();
        drop(source);
        let mut moved = vec![theirs];
        // This project has one layout for files.
        if route != Route::File {
            moved.push(copy.move_by_us(route, &self.dir)?);
        }
        fs::remove_dir_all(&self.dir)?;
        Ok(moved)
    }

    fn start(&self, dir: &Path, incoming: bool) -> Result<Qemu> {
        let device = device(incoming);
        let mut qemu = Qemu::start(&self.kit, Accelerator::Tcg, &Device::Own(&device), dir)?;
        if self.version.get().is_none() {
            let version = qemu.qmp.execute("query-version", &json!({}))?["qemu"].take();
            let part = |name: &str| version[name].as_u64().unwrap_or(0);
            let text = format!("QEMU {}.{}.{}", part("major"), part("minor"), part("micro"));
            let _ = self.version.set(text);
        }
        Ok(qemu)
    }

    fn move_by_qemu(&self, source: &mut Qemu, there: &Path, route: Route) -> Result<Moved> {
        let mut destination = self.start(there, true)?;
        let held = |qemu: &Qemu| -> Result<u64> {
            Ok(host::held(&qemu.memory(REGION)?)? + host::held(&qemu.memory(RAM)?)?)
        };
        let mapped = route == Route::MappedRam;
        let file = self.dir.join("stream");
        let uri = match route {
            Route::File | Route::MappedRam => format!("file:{}", file.display()),
            Route::Socket => format!("unix:{}", self.dir.join("migration.sock").display()),
        };
        host::warm(2 * (PLUGGED + RAM))?;
        let before = held(source)?;
        if route == Route::Socket {
            destination.qmp.migrate_incoming(&uri, mapped)?;
        }
        let told = source.qmp.migrate(&uri, mapped)?;
        let after = held(source)?;
        if route != Route::Socket {
            destination.qmp.migrate_incoming(&uri, mapped)?;
        }
        destination.qmp.wait_migrated()?;
        let counted = match route {
            Route::Socket => None,
            _ => Some(host::held(&File::open(&file)?)?),
        };
        let moved = Moved {
            who: self.version.get().cloned().unwrap_or_default(),
            route,
            sent: number(&told["ram"], "transferred")?,
            counted,
            normal: number(&told["ram"], "normal")?,
            zero: number(&told["ram"], "duplicate")?,
            setup: number(&told, "setup-time")? as f64,
            total: number(&told, "total-time")? as f64,
            source: [before, after],
            destination: held(&destination)?,
        };
        destination.stop();
        Ok(moved)
    }
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
        Ok((plugged(&mut qemu.qmp)?.1 == PLUGGED && guest.iomem()? == PLUGGED).then_some(()))
    })?;
    guest.dirty(NOISE)?;
    let (start, plugged) = plugged(&mut qemu.qmp)?;
    let ranges = guest.iomem_ranges()?;
    let follow = ranges.windows(2).all(|two| two[0].1 == two[1].0);
    ensure!(
        follow && ranges.first().is_some_and(|range| range.0 == start),
        "what the guest plugged has gaps: {ranges:x?}"
    );
    qemu.qmp.execute("stop", &json!({}))?;
    Ok(plugged)
}

/// Where the region is for the guest, and how much of it is plugged.
fn plugged(qmp: &mut Qmp) -> Result<(u64, u64)> {
    let devices = qmp.execute("query-memory-devices", &json!({}))?;
    let device = &devices[0]["data"];
    Ok((number(device, "memaddr")?, number(device, "size")?))
}
