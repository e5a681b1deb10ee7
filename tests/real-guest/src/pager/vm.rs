//! A stock QEMU with its own virtio-mem devices.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use super::pages::memory_of;
use super::verifier::Verifier;
use crate::guest::Guest;
use crate::machine::Parts;
use crate::process;
use crate::qemu::Accelerator;
use crate::qmp::{self, Qmp};
use crate::sizes::{GIB, MIB};
use crate::wait;

/// Memory that the guest boots with.
pub const RAM: u64 = 384 * MIB;
/// What the verifier uses.
pub const VERIFIED_MIB: u64 = 160;
/// Size of a block of virtio-mem.
const BLOCK: u64 = 2 * MIB;

/// A virtio-mem device.
#[derive(Clone, Copy)]
pub struct Region {
    /// Size of the region.
    pub size: u64,
    /// What the guest is asked to plug.
    pub requested: u64,
}

/// What the guest's memory is.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// Shared files in memory.
    Memfd,
    /// QEMU's own.
    Anonymous,
}

/// What a machine is made of; both sides of a migration have the same.
#[derive(Clone, Copy)]
pub struct Shape {
    /// vCPUs.
    pub cpus: u32,
    /// The largest first: some versions of QEMU trip over a small memory backend at address 0.
    pub regions: &'static [Region],
    /// Of all memory.
    pub backend: Backend,
}

impl Shape {
    /// Two devices; shared memory.
    pub const TWO: Self = Self {
        cpus: 2,
        regions: &[
            Region { size: 8 * GIB, requested: 256 * MIB },
            Region { size: 2 * GIB, requested: 128 * MIB },
        ],
        backend: Backend::Memfd,
    };

    /// One; QEMU's own memory.
    pub const ONE: Self = Self {
        cpus: 1,
        regions: &[Region { size: 8 * GIB, requested: 256 * MIB }],
        backend: Backend::Anonymous,
    };
}

/// How a machine begins.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Start {
    /// It boots.
    Boot,
    /// It waits for `migrate-incoming`.
    Incoming,
}

/// A running machine. Killed when dropped.
pub struct Vm {
    child: Child,
    /// The control socket.
    pub qmp: Qmp,
    shape: Shape,
    dir: PathBuf,
}

impl Vm {
    /// Starts one; sockets and logs go to `dir`.
    pub fn start(parts: &Parts<'_>, shape: Shape, start: Start, dir: &Path) -> Result<Self> {
        std::fs::create_dir_all(dir)?;
        let mut command = parts.kit.qemu.command();
        let cpus = shape.cpus.to_string();
        command.args(["-machine", "q35", "-smp", cpus.as_str()]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        // What the vCPUs take is told from what the rest of it takes.
        command.args(["-name", "guest,debug-threads=on"]);
        match parts.accelerator {
            // Addresses for regions beyond 1 TiB.
            Accelerator::Tcg => command.args(["-accel", "tcg", "-cpu", "max,phys-bits=46"]),
            Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        };
        command.args(memory(&shape));
        command.arg("-kernel").arg(&parts.kit.kernel).arg("-initrd").arg(&parts.kit.initramfs);
        // A guest that crashes ends QEMU rather than looking right after another boot.
        command.args(["-append", "console=ttyS0 panic=1", "-no-reboot"]);
        let path = |name: &str| dir.join(name).display().to_string();
        command.args(["-chardev", &format!("file,id=console,path={}", path("console.log"))]);
        command.args(["-serial", "chardev:console"]);
        for port in ["guest", "verifier"] {
            let socket = path(&format!("{port}.sock"));
            command
                .args(["-chardev", &format!("socket,id={port},path={socket},server=on,wait=off")]);
            command.args(["-serial", &format!("chardev:{port}")]);
        }
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("qmp.sock"))]);
        // A second one, for the pager.
        command.args(["-qmp", &format!("unix:{},server=on,wait=off", path("pager-qmp.sock"))]);
        if start == Start::Incoming {
            command.args(["-incoming", "defer"]);
        }
        let mut child = process::start(&command, &dir.join("qemu.log"))?;
        let qmp = qmp::wait_for(&dir.join("qmp.sock"), || match child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("QEMU ended with {status}"),
        })?;
        Ok(Self { child, qmp, shape, dir: dir.to_owned() })
    }

    /// Boots a guest that has what is requested and runs the verifier on `mib` MiB.
    pub fn boot(parts: &Parts<'_>, shape: Shape, mib: u64, dir: &Path) -> Result<Self> {
        let mut vm = Self::start(parts, shape, Start::Boot, dir)?;
        let mut guest = vm.guest()?;
        guest.wait_ready()?;
        for (index, region) in shape.regions.iter().enumerate() {
            vm.wait_plugged(index, region.requested)?;
        }
        let all: u64 = shape.regions.iter().map(|region| region.requested).sum();
        wait::until("the guest to add its memory", wait::SHORT, || {
            Ok((guest.iomem()? == all).then_some(()))
        })?;
        guest.run("stty -F /dev/ttyS2 raw -echo")?;
        guest.run(&format!("guest-verifier {mib} /dev/ttyS2 > /dev/null 2>&1 &"))?;
        vm.verifier()?.wait_passes(1)?;
        Ok(vm)
    }

    /// The guest's command loop.
    pub fn guest(&self) -> Result<Guest> {
        Guest::connect(&self.dir.join("guest.sock"))
    }

    /// What the verifier says.
    pub fn verifier(&self) -> Result<Verifier> {
        Verifier::connect(&self.dir.join("verifier.sock"))
    }

    /// What the host holds for its memory, bytes, as far as that is files.
    pub fn resident(&self) -> Result<u64> {
        let mut resident = memory_of(self.process(), RAM)?.metadata()?.blocks() * 512;
        for region in self.shape.regions {
            resident += memory_of(self.process(), region.size)?.metadata()?.blocks() * 512;
        }
        Ok(resident)
    }

    /// The control socket for the pager.
    pub fn pager_qmp(&self) -> PathBuf {
        self.dir.join("pager-qmp.sock")
    }

    /// QEMU's process id.
    pub fn process(&self) -> u32 {
        // Its launcher has become it.
        self.child.id()
    }

    /// Its folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What is plugged of a device, bytes.
    pub fn plugged(&mut self, index: usize) -> Result<u64> {
        let property = json!({ "path": device_path(index), "property": "size" });
        self.qmp.execute("qom-get", &property)?.as_u64().context("the device has no size")
    }

    /// Waits until so much is plugged.
    pub fn wait_plugged(&mut self, index: usize, size: u64) -> Result<()> {
        wait::until("the guest to change its memory", wait::LONG, || {
            Ok((self.plugged(index)? == size).then_some(()))
        })
    }

    /// Asks the guest for so much of a device.
    pub fn resize(&mut self, index: usize, size: u64) -> Result<()> {
        let path = device_path(index);
        let change = json!({ "path": path, "property": "requested-size", "value": size });
        self.qmp.execute("qom-set", &change).map(drop)
    }

    /// Sets capabilities of migration.
    pub fn set_capabilities(&mut self, all: &[(&str, bool)]) -> Result<()> {
        let all = all.iter().map(|(name, on)| json!({ "capability": name, "state": on }));
        let all = json!({ "capabilities": all.collect::<Vec<Value>>() });
        self.qmp.execute("migrate-set-capabilities", &all).map(drop)
    }

    /// How its last migration stands.
    pub fn migration(&mut self) -> Result<Value> {
        self.qmp.execute("query-migrate", &json!({}))
    }

    /// Waits until its last migration has come to this.
    pub fn wait_migration(&mut self, wanted: &str) -> Result<Value> {
        let mut last = Value::Null;
        wait::until(&format!("QEMU's migration to be {wanted}"), wait::SHORT, || {
            last = self.migration()?;
            Ok((last["status"] == wanted).then(|| last.clone()))
        })
        .with_context(|| format!("it is {last}"))
    }

    /// Loads a file of QEMU's or of the pager's, without the pager, and has the guest run.
    pub fn load(&mut self, file: &Path, mapped_ram: bool) -> Result<()> {
        self.qmp.migrate_incoming(&format!("file:{}", file.display()), mapped_ram)?;
        self.qmp.wait_migrated()?;
        if self.qmp.status()? != "running" {
            self.qmp.execute("cont", &json!({}))?;
        }
        Ok(())
    }

    /// Looks at the guest: its verifier takes two more passes and finds nothing wrong, what is plugged is there,
    /// and the kernel does not complain. What it saw, in words.
    pub fn check(&mut self) -> Result<String> {
        ensure!(self.qmp.status()? == "running", "the guest is {}", self.qmp.status()?);
        let seen = self.verifier()?.wait_passes(2)?;
        ensure!(seen.bad == 0, "the verifier found {} wrong pages", seen.bad);
        for (index, region) in self.shape.regions.iter().enumerate() {
            let plugged = self.plugged(index)?;
            ensure!(plugged == region.requested, "device {index} has {plugged} bytes plugged");
        }
        let mut guest = self.guest()?;
        let trouble = guest.trouble()?;
        ensure!(trouble.is_empty(), "dmesg: {}", trouble.join("; "));
        let iomem = guest.iomem()?;
        let all: u64 = self.shape.regions.iter().map(|region| region.requested).sum();
        ensure!(iomem == all, "/proc/iomem has {iomem} bytes of virtio_mem, not {all}");
        Ok(format!("tick {}, pass {}, 0 wrong", seen.tick, seen.pass))
    }

    /// Ends QEMU.
    pub fn stop(mut self) {
        self.qmp.quit();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline && !matches!(self.child.try_wait(), Ok(Some(_))) {
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn device_path(index: usize) -> String {
    format!("/machine/peripheral/vm{index}")
}

fn memory(shape: &Shape) -> Vec<String> {
    let backend = |id: &str, size: u64| match shape.backend {
        Backend::Memfd => format!("memory-backend-memfd,id={id},size={size},share=on"),
        Backend::Anonymous => format!("memory-backend-ram,id={id},size={size},reserve=off"),
    };
    let mut options = Vec::new();
    let mut add = |option: &str, value: String| options.extend([option.to_owned(), value]);
    for (index, region) in shape.regions.iter().enumerate() {
        add("-object", backend(&format!("vmem{index}"), region.size));
    }
    let regions: u64 = shape.regions.iter().map(|region| region.size).sum();
    add("-m", format!("{}M,slots=4,maxmem={}M", RAM / MIB, (8 * GIB + 2 * regions) / MIB));
    add("-object", backend("ram", RAM));
    add("-machine", "memory-backend=ram".to_owned());
    // QEMU places them: where a region of 1 TiB fits depends on its vCPUs.
    for (index, Region { requested, .. }) in shape.regions.iter().enumerate() {
        add(
            "-device",
            format!(
                "virtio-mem-pci,id=vm{index},memdev=vmem{index},block-size={BLOCK},requested-size={requested}"
            ),
        );
    }
    options
}
