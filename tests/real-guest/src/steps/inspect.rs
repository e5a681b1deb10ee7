//! What `vmemctl inspect` reads in the files of a stock QEMU is what QEMU and the guest say.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde::Deserialize;
use serde_json::Value;

use crate::guest::Guest;
use crate::machine::Parts;
use crate::own_device::{MemoryDevice, OwnDevice};
use crate::qemu::{Device, Qemu};
use crate::qmp::Qmp;
use crate::report::Report;
use crate::sizes::{GIB, MIB, human};
use crate::wait;

const PAGE: u64 = 4096;
const NOISE: u64 = 48;

/// Whole memory blocks of the guest first: what it has is then exactly what is plugged.
const DEVICE: OwnDevice = OwnDevice {
    ram: 256 * MIB,
    region: GIB,
    block: 2 * MIB,
    requested: 256 * MIB,
    incoming: false,
};
/// Then a part of one.
const SHRUNK: u64 = 160 * MIB;

/// Saves a guest with QEMU's own virtio-mem-pci in both layouts, and looks into the files.
pub fn run(parts: &Parts<'_>, dir: &Path, report: &mut Report) -> Result<()> {
    let mut qemu = Qemu::start(parts.kit, parts.accelerator, &Device::Own(&DEVICE), dir)?;
    let mut guest = Guest::connect(&dir.join("guest.sock"))?;
    guest.wait_ready()?;
    wait_plugged(&mut qemu.qmp, DEVICE.requested)?;
    wait::until("the guest to add its memory", wait::SHORT, || {
        Ok((guest.iomem()? == DEVICE.requested).then_some(()))
    })?;
    guest.dirty(NOISE)?;
    let mut look = Look { parts, dir, qmp: &mut qemu.qmp, guest: &mut guest, report };
    look.compare("plain, 256M", false)?;
    look.guest.free()?;
    OwnDevice::resize(look.qmp, SHRUNK)?;
    wait_plugged(look.qmp, SHRUNK)?;
    look.compare("mapped-ram, shrunk to 160M", true)?;
    qemu.stop();
    Ok(())
}

fn wait_plugged(qmp: &mut Qmp, size: u64) -> Result<()> {
    wait::until("the guest to change its memory", wait::LONG, || {
        Ok((OwnDevice::plugged(qmp)? == size).then_some(()))
    })
}

/// What `vmemctl inspect --json` says, as far as it is compared.
#[derive(Deserialize)]
struct Seen {
    layout: String,
    ram_blocks: Vec<Block>,
    virtio_mem: Vec<Plugged>,
    sections: Vec<Value>,
    description: Option<Value>,
    warnings: Vec<String>,
    error: Option<String>,
}

#[derive(Deserialize)]
struct Block {
    id: String,
    size: u64,
    normal: u64,
    zero: u64,
    absent: u64,
}

#[derive(Deserialize)]
struct Plugged {
    addr: u64,
    region_size: u64,
    block_size: u64,
    node: u64,
    plugged_size: u64,
    usable_region_size: Option<u64>,
    requested_size: Option<u64>,
    ram_block: Option<String>,
    plugged: Vec<Range>,
}

#[derive(Deserialize)]
struct Range {
    offset: u64,
    size: u64,
}

/// Both sides of the comparison.
struct Look<'a> {
    parts: &'a Parts<'a>,
    dir: &'a Path,
    qmp: &'a mut Qmp,
    guest: &'a mut Guest,
    report: &'a mut Report,
}

impl Look<'_> {
    fn compare(&mut self, stage: &str, mapped: bool) -> Result<()> {
        let iomem = self.guest.iomem_ranges()?;
        let file = self.dir.join(if mapped { "mapped.mig" } else { "plain.mig" });
        let saved = self.qmp.save(&file, mapped)?;
        let device = OwnDevice::state(self.qmp)?;
        let held = fs::metadata(&file)?.blocks() * 512;
        let seen = self.inspect(&file)?;
        fs::remove_file(&file)?;
        let [vmem] = &seen.virtio_mem[..] else {
            let found = seen.virtio_mem.len();
            self.report.failed(stage, format!("{found} virtio-mem devices in the file"));
            return Ok(());
        };

        let mut claims = Claims::default();
        claims.equal("layout", seen.layout.as_str(), if mapped { "mapped-ram" } else { "plain" });
        claims.equal("warnings", &seen.warnings[..], &[]);
        claims.equal("error", seen.error.as_ref(), None);
        claims.that("there is a description", seen.description.is_some());
        claims.that("there are devices", seen.sections.len() > 10);
        claims.device(vmem, &device);
        claims.ranges(vmem, &iomem);
        claims.blocks(&seen.ram_blocks, vmem, mapped);
        claims.pages(&seen.ram_blocks, &saved["ram"], mapped);

        let guest = format!("iomem {}", human(iomem.iter().map(|(start, end)| end - start).sum()));
        let counts = |of: fn(&Block) -> u64| seen.ram_blocks.iter().map(of).sum::<u64>();
        let api = format!(
            "QMP: {}; file: {} in {} range{}, {} normal, {} zero pages",
            human(device.size),
            human(vmem.plugged_size),
            vmem.plugged.len(),
            if vmem.plugged.len() == 1 { "" } else { "s" },
            counts(|block| block.normal),
            counts(|block| block.zero),
        );
        self.report.add(stage, guest, api, human(held), claims.problems);
        Ok(())
    }

    fn inspect(&self, file: &Path) -> Result<Seen> {
        let client = self.parts.client();
        let output = Command::new(&client)
            .args(["inspect", "--json"])
            .arg(file)
            .output()
            .with_context(|| format!("cannot start {}", client.display()))?;
        let errors = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "vmemctl inspect: {}, {errors}", output.status);
        Ok(serde_json::from_slice(&output.stdout)?)
    }
}

/// What is not so.
#[derive(Default)]
struct Claims {
    problems: Vec<String>,
}

impl Claims {
    fn that(&mut self, claim: &str, holds: bool) {
        if !holds {
            self.problems.push(format!("not so: {claim}"));
        }
    }

    fn equal<T: PartialEq + std::fmt::Debug>(&mut self, what: &str, seen: T, expected: T) {
        if seen != expected {
            self.problems.push(format!("{what}: {seen:?} in the file, expected {expected:?}"));
        }
    }

    /// The device is the one that QEMU has.
    fn device(&mut self, seen: &Plugged, expected: &MemoryDevice) {
        self.equal("address", seen.addr, expected.memaddr);
        self.equal("region size", seen.region_size, expected.max_size);
        self.equal("block size", seen.block_size, expected.block_size);
        self.equal("node", seen.node, expected.node);
        self.equal("plugged size", seen.plugged_size, expected.size);
        self.equal("requested size", seen.requested_size, Some(expected.requested_size));
        let usable = seen.usable_region_size.unwrap_or(0);
        let end = seen.plugged.last().map_or(0, |range| range.offset + range.size);
        self.that("plugged memory is usable", end <= usable && usable <= expected.max_size);
    }

    /// The ranges are what QEMU has, and where the guest has memory.
    fn ranges(&mut self, seen: &Plugged, iomem: &[(u64, u64)]) {
        let sum: u64 = seen.plugged.iter().map(|range| range.size).sum();
        self.equal("sum of the ranges", sum, seen.plugged_size);
        let maximal =
            seen.plugged.windows(2).all(|two| two[0].offset + two[0].size < two[1].offset);
        self.that("ranges are maximal and ascend", maximal);
        let inside = seen.plugged.iter().all(|range| {
            let start = seen.addr + range.offset;
            let within = |(from, to): &(u64, u64)| *from <= start && start + range.size <= *to;
            iomem.iter().any(within)
        });
        self.that("the guest has memory where it is plugged", inside);
    }

    fn blocks(&mut self, seen: &[Block], device: &Plugged, mapped: bool) {
        let size = |name: &str| {
            let block = seen.iter().find(|block| block.id.rsplit('/').next() == Some(name));
            block.map(|block| block.size)
        };
        self.equal("size of the boot memory", size("ram"), Some(DEVICE.ram));
        self.equal("size of the region", size(OwnDevice::MEMORY), Some(DEVICE.region));
        for Block { id, size, normal, zero, absent } in seen {
            let all = normal + zero + absent;
            self.equal(&format!("pages of {id}"), all, size / PAGE);
        }
        let block = seen.iter().find(|block| Some(&block.id) == device.ram_block.as_ref());
        let sent = block.map(|block| block.normal + block.zero).unwrap_or(0);
        self.that("the device's block is found", block.is_some());
        let plugged = device.plugged_size / PAGE;
        if mapped {
            self.that("no page of discarded memory is in the file", sent <= plugged);
        } else {
            self.equal("pages of the region that were sent", sent, plugged);
            let noise = block.is_some_and(|block| block.normal >= (NOISE / 2) * MIB / PAGE);
            self.that("what the guest wrote is in the file", noise);
        }
    }

    /// QEMU counts the same pages: it was stopped, so that none was sent twice.
    fn pages(&mut self, seen: &[Block], counted: &Value, mapped: bool) {
        let sum = |of: fn(&Block) -> u64| seen.iter().map(of).sum::<u64>();
        let count = |name: &str| counted[name].as_u64().unwrap_or(u64::MAX);
        self.equal("bytes of all blocks", sum(|block| block.size), count("total"));
        self.equal("normal pages", sum(|block| block.normal), count("normal"));
        let zero = if mapped { 0 } else { count("duplicate") };
        self.equal("pages of zeros", sum(|block| block.zero), zero);
    }
}
