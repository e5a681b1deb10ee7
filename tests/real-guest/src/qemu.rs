//! A running QEMU whose virtio-mem device is the daemon, or its own.

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use crate::initramfs;
use crate::machine::Setup;
use crate::own_device::OwnDevice;
use crate::process;
use crate::provision::{FRONT_END, Kit};
use crate::qmp::{self, Qmp};
use crate::sizes::{GIB, MIB};

/// Where the region starts for the guest: above all memory that firmware tables call RAM.
pub const REGION_ADDR: u64 = 5 * GIB;

/// Memory that a guest with the daemon boots with.
pub const RAM: u64 = GIB;

/// How the guest's instructions are run.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Accelerator {
    /// Translated: works everywhere.
    Tcg,
    /// By the processor: only after a guest has been seen to boot with it.
    Kvm,
}

/// The virtio-mem device of a guest.
pub enum Device<'a> {
    /// There is none.
    None,
    /// The daemon.
    Daemon(&'a Setup),
    /// QEMU's own.
    Own(&'a OwnDevice),
}

/// The process, its control socket and the file behind the region.
pub struct Qemu {
    child: Child,
    /// The control socket.
    pub qmp: Qmp,
    backing: Option<File>,
}

impl Qemu {
    /// Starts a guest.
    pub fn start(
        kit: &Kit,
        accelerator: Accelerator,
        device: &Device<'_>,
        dir: &Path,
    ) -> Result<Self> {
        let setup = match device {
            Device::Daemon(setup) => Some(*setup),
            Device::None | Device::Own(_) => None,
        };
        let backing = setup.map(|_| Backing::create()).transpose()?;
        let mut command = kit.qemu.command();
        command.args(["-machine", "q35", "-smp", "2"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
        match accelerator {
            Accelerator::Tcg => command.args(["-accel", "tcg", "-cpu", "max"]),
            Accelerator::Kvm => command.args(["-accel", "kvm", "-cpu", "host"]),
        };
        // The largest memory backend goes first: some versions trip over a small one at address 0.
        if let (Some(setup), Some(backing)) = (setup, &backing) {
            command.args(region_options(setup, &backing.path, dir));
        }
        match device {
            Device::Own(device) => command.args(device.options()),
            Device::None | Device::Daemon(_) => command.args(memory_options(setup)),
        };
        command.arg("-kernel").arg(&kit.kernel).arg("-initrd").arg(&kit.initramfs);
        // The DIMM below is only there to share the range: ACPI must not hand it to the guest.
        let driver = match setup {
            Some(Setup { driver: false, .. }) => initramfs::NO_DRIVER,
            _ => "",
        };
        let append = format!("console=ttyS0 acpi_no_memhotplug {driver}");
        command.args(["-append", append.trim_end()]);
        let path = |name: &str| dir.join(name).display().to_string();
        command.args(["-chardev", &format!("file,id=console,path={}", path("console.log"))]);
        command.args(["-serial", "chardev:console"]);
        let port = path("guest.sock");
        command.args(["-chardev", &format!("socket,id=port,path={port},server=on,wait=off")]);
        command.args(["-serial", "chardev:port"]);
        let control = path("qmp.sock");
        command.args(["-qmp", &format!("unix:{control},server=on,wait=off")]);

        let mut child = process::start(&command, &dir.join("qemu.log"))?;
        let qmp = qmp::wait_for(Path::new(&control), || match child.try_wait()? {
            None => Ok(()),
            Some(status) => bail!("QEMU ended with {status}"),
        })?;
        // QEMU has the file open by now. Without a name it cannot outlive the run.
        Ok(Self { child, qmp, backing: backing.map(Backing::into_file) })
    }

    /// Bytes that the host holds for the region.
    pub fn host_held(&self) -> Result<u64> {
        match &self.backing {
            Some(file) => Ok(file.metadata()?.blocks() * 512),
            None => Ok(0),
        }
    }

    /// The file behind the region.
    pub fn region_memory(&self) -> Result<File> {
        let file = self.backing.as_ref().context("the guest has no region of the daemon's")?;
        Ok(file.try_clone()?)
    }

    /// The shared memory of this size, while it runs.
    pub fn memory(&self, size: u64) -> Result<File> {
        for entry in fs::read_dir(format!("/proc/{}/fd", self.child.id()))? {
            let path = entry?.path();
            let is_memfd = fs::read_link(&path)
                .is_ok_and(|target| target.starts_with("/memfd:memory-backend-memfd (deleted)"));
            if is_memfd && fs::metadata(&path)?.len() == size {
                return Ok(File::open(&path)?);
            }
        }
        bail!("QEMU has no memfd of {size} bytes")
    }

    /// Ends QEMU.
    pub fn stop(&mut self) {
        self.qmp.quit();
        let deadline = Instant::now() + Duration::from_secs(5);
        while Instant::now() < deadline {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn region_options(setup: &Setup, file: &Path, dir: &Path) -> Vec<String> {
    let Setup { region, node, .. } = *setup;
    let socket = setup.front_end_socket(dir);
    let node = node.map(|node| format!(",node={node}")).unwrap_or_default();
    [
        "-object".to_owned(),
        format!("memory-backend-file,id=region,size={region},share=on,mem-path={}", file.display()),
        "-device".to_owned(),
        format!("pc-dimm,id=dimm,memdev=region,addr={REGION_ADDR:#x}{node}"),
        "-chardev".to_owned(),
        format!("socket,id=vmem,path={}", socket.display()),
        "-device".to_owned(),
        format!("{FRONT_END},chardev=vmem,virtio-id=24,num_vqs=1,config_size=56,vq_size=128"),
    ]
    .into()
}

fn memory_options(setup: Option<&Setup>) -> Vec<String> {
    let backend =
        |id: &str, size: u64| format!("memory-backend-memfd,id={id},size={size},share=on");
    let mut options = Vec::new();
    let mut add = |option: &str, value: String| options.extend([option.to_owned(), value]);
    // Room for the region at its place, which need not be where QEMU would put it.
    let maximum = RAM + 8 * GIB + setup.map_or(0, |setup| setup.region);
    add("-m", format!("{}M,slots=2,maxmem={}M", RAM / MIB, maximum / MIB));
    if setup.is_some_and(|setup| setup.node.is_some()) {
        let second = RAM / 4;
        add("-object", backend("ram0", RAM - second));
        add("-object", backend("ram1", second));
        add("-numa", "node,nodeid=0,cpus=0-1,memdev=ram0".to_owned());
        add("-numa", "node,nodeid=1,memdev=ram1".to_owned());
    } else {
        add("-object", backend("ram", RAM));
        add("-machine", "memory-backend=ram".to_owned());
    }
    options
}

/// The sparse file behind the region, in memory.
struct Backing {
    path: PathBuf,
    file: File,
}

impl Backing {
    fn create() -> Result<Self> {
        let path = PathBuf::from(format!("/dev/shm/real-guest-{}", std::process::id()));
        let file = OpenOptions::new().read(true).write(true).create_new(true).open(&path);
        let file = file.with_context(|| format!("cannot create {}", path.display()))?;
        Ok(Self { path, file })
    }

    fn into_file(self) -> File {
        self.file.try_clone().expect("a descriptor is to be had")
    }
}

impl Drop for Backing {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}
