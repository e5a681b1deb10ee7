//! What the run needs and the repository does not hold: a recent QEMU, a kernel, a busybox.
//!
//! Everything is kept in a cache folder, so that only the first run fetches anything.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};

use crate::initramfs;
use crate::pager::verifier;

/// The device of QEMU 10.2 and newer that speaks for any vhost-user back-end.
pub const FRONT_END: &str = "vhost-user-test-device-pci";

const QEMU: &str = "qemu-system-x86_64";

/// All that is needed to boot a guest.
pub struct Kit {
    /// Where QEMU is.
    pub qemu: QemuBinary,
    /// The bzImage.
    pub kernel: PathBuf,
    /// busybox, the driver and the command loop.
    pub initramfs: PathBuf,
}

/// A QEMU that can be run.
pub enum QemuBinary {
    /// The one of this host.
    Host,
    /// The one of an unpacked Debian, run with the libraries and the firmware beside it.
    Unpacked(PathBuf),
}

impl QemuBinary {
    /// The start of a QEMU command line.
    pub fn command(&self) -> Command {
        match self {
            Self::Host => Command::new(QEMU),
            Self::Unpacked(root) => {
                // The binary's own dynamic loader spares a chroot and all its mounts.
                let libraries = root.join("usr/lib/x86_64-linux-gnu");
                let mut command = Command::new(root.join("lib64/ld-linux-x86-64.so.2"));
                command.arg("--library-path").arg(&libraries);
                command.arg(root.join("usr/bin").join(QEMU));
                command.env("QEMU_MODULE_DIR", libraries.join("qemu"));
                for firmware in ["qemu", "seabios"] {
                    command.arg("-L").arg(root.join("usr/share").join(firmware));
                }
                command
            }
        }
    }

    fn has_front_end(&self) -> bool {
        let listed = self.command().args(["-device", "help"]).stderr(Stdio::null()).output();
        listed.is_ok_and(|listed| {
            String::from_utf8_lossy(&listed.stdout).contains(&format!("\"{FRONT_END}\""))
        })
    }
}

/// Finds or fetches everything, into `cache`.
pub fn provide(cache: &Path, mirror: Option<&str>) -> Result<Kit> {
    fs::create_dir_all(cache).with_context(|| format!("cannot create {}", cache.display()))?;
    let (qemu, packages) = if QemuBinary::Host.has_front_end() {
        (QemuBinary::Host, Packages { root: None })
    } else {
        let root = unpacked_debian(cache, mirror)?;
        (QemuBinary::Unpacked(root.clone()), Packages { root: Some(root) })
    };
    ensure!(qemu.has_front_end(), "no QEMU with {FRONT_END} (10.2 or newer) to be had");

    let boot = cache.join("boot");
    if !boot.exists() {
        step("fetching a kernel and busybox");
        let partial = cache.join("boot.partial");
        forget(&partial)?;
        fs::create_dir_all(&partial)?;
        packages.fetch_boot_files(&partial)?;
        fs::rename(&partial, &boot)?;
    }
    // Written anew each time: it carries the command loop of this very source tree.
    let initramfs = boot.join("initramfs.cpio");
    let verifier = verifier::build(&boot.join("guest-verifier"))?;
    let (busybox, module) = (boot.join("busybox"), boot.join("virtio_mem.ko"));
    initramfs::write(&initramfs, &busybox, &module, &[("bin/guest-verifier", &verifier)])?;
    Ok(Kit { qemu, kernel: boot.join("vmlinuz"), initramfs })
}

/// A minimal Debian testing with QEMU in it, never booted and never entered but by its own apt.
fn unpacked_debian(cache: &Path, mirror: Option<&str>) -> Result<PathBuf> {
    let root = cache.join("rootfs");
    if root.exists() {
        return Ok(root);
    }
    ensure!(
        rustix::process::geteuid().is_root(),
        "this host has no QEMU with {FRONT_END}, and bringing one with debootstrap needs root"
    );
    if Command::new("debootstrap").arg("--version").output().is_err() {
        run(Command::new("apt-get").args(["install", "-y", "debootstrap"]))?;
    }
    let mirror = match mirror {
        Some(mirror) => mirror.to_owned(),
        None => configured_mirror().context("no Debian mirror in the apt sources; use --mirror")?,
    };
    step("bringing QEMU with debootstrap (about a minute, once)");
    let partial = cache.join("rootfs.partial");
    forget(&partial)?;
    run(Command::new("debootstrap")
        .args(["--variant=minbase", "--include=qemu-system-x86,busybox-static", "testing"])
        .arg(&partial)
        .arg(mirror))?;
    fs::rename(&partial, &root)?;
    Ok(root)
}

/// The first Debian archive that this host's own apt uses.
pub fn configured_mirror() -> Option<String> {
    let mut files = vec![PathBuf::from("/etc/apt/sources.list")];
    if let Ok(parts) = fs::read_dir("/etc/apt/sources.list.d") {
        files.extend(parts.flatten().map(|part| part.path()));
    }
    files
        .iter()
        .filter(|file| file.extension().is_some_and(|kind| kind == "list" || kind == "sources"))
        .filter_map(|file| fs::read_to_string(file).ok())
        .flat_map(|text| text.lines().filter_map(archive_of).collect::<Vec<_>>())
        .next()
}

/// The archive named by one line of either apt format; security archives have no suite to boot.
fn archive_of(line: &str) -> Option<String> {
    let mut words = line.split_whitespace();
    matches!(words.next(), Some("deb" | "URIs:")).then_some(())?;
    let address = words.find(|word| word.contains("://"))?.trim_end_matches('/');
    address.ends_with("/debian").then(|| address.to_owned())
}

/// A package manager: the host's, or that of an unpacked Debian.
struct Packages {
    root: Option<PathBuf>,
}

impl Packages {
    /// A command that runs in `dir` (as the package manager's system sees it).
    fn command(&self, dir: &str) -> Command {
        let mut command = match &self.root {
            Some(root) => {
                let mut command = Command::new("chroot");
                command.arg(root).arg("sh");
                command
            }
            None => Command::new("sh"),
        };
        command.args(["-c", "cd \"$0\" && exec \"$@\"", dir]);
        command
    }

    fn apt_get(&self, dir: &str) -> Command {
        let mut command = self.command(dir);
        // A rootfs of a while ago may meet a release file of a while ago: signed all the same.
        command.args(["apt-get", "-q", "-o", "APT::Sandbox::User=root"]);
        command.args(["-o", "Acquire::Check-Valid-Until=false"]);
        command
    }

    fn fetch_boot_files(&self, target: &Path) -> Result<()> {
        let (outside, inside) = match &self.root {
            Some(root) => (root.join("var/tmp/real-guest"), "/var/tmp/real-guest".to_owned()),
            None => {
                let here = target.join("packages");
                let name = here.to_str().context("the cache folder's name is not UTF-8")?;
                (here.clone(), name.to_owned())
            }
        };
        forget(&outside)?;
        fs::create_dir_all(&outside)?;
        if self.download(&inside).is_err() {
            // The lists may be older than what the mirror still keeps.
            run(self.apt_get(&inside).arg("update"))?;
            self.download(&inside)?;
        }
        for package in fs::read_dir(&outside)? {
            let name = package?.file_name();
            run(self.command(&inside).args(["dpkg-deb", "-x"]).arg(name).arg("tree"))?;
        }
        let busybox = target.join("busybox");
        fs::copy(find(&outside, "busybox")?, &busybox)?;
        fs::copy(find(&outside, "vmlinuz")?, target.join("vmlinuz"))?;
        let module = find(&outside, "virtio_mem.ko")?;
        fs::write(target.join("virtio_mem.ko"), unpacked(&busybox, &module)?)?;
        forget(&outside)
    }

    fn download(&self, dir: &str) -> Result<()> {
        let packages = self.kernel_packages()?;
        run(self.apt_get(dir).arg("download").arg("busybox-static").args(packages))
    }

    /// The packages behind `linux-image-cloud-amd64` that hold files (their split varies).
    fn kernel_packages(&self) -> Result<Vec<String>> {
        let listed = self
            .command("/")
            .args(["apt-cache", "depends", "--recurse", "--important", "linux-image-cloud-amd64"])
            .output()?;
        let packages: Vec<String> = String::from_utf8_lossy(&listed.stdout)
            .lines()
            .filter(|name| {
                ["linux-image-", "linux-binary-", "linux-modules-"].iter().any(|kind| {
                    let version = name.strip_prefix(kind).unwrap_or_default();
                    version.starts_with(|c: char| c.is_ascii_digit())
                })
            })
            .map(str::to_owned)
            .collect();
        ensure!(!packages.is_empty(), "apt knows no linux-image-cloud-amd64");
        Ok(packages)
    }
}

/// The bytes of a kernel module, whichever way it is packed.
fn unpacked(busybox: &Path, module: &Path) -> Result<Vec<u8>> {
    let tool = match module.extension().and_then(|kind| kind.to_str()) {
        Some("ko") => return Ok(fs::read(module)?),
        Some("xz") => "unxz",
        Some("gz") => "gunzip",
        _ => bail!("{} is packed in an unknown way", module.display()),
    };
    let output = Command::new(busybox).args([tool, "-c"]).arg(module).output()?;
    ensure!(output.status.success(), "cannot unpack {}", module.display());
    Ok(output.stdout)
}

/// The first regular file below `dir` whose name starts with `prefix`.
fn find(dir: &Path, prefix: &str) -> Result<PathBuf> {
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let entry = entry?;
            let kind = entry.file_type()?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if kind.is_dir() {
                folders.push(entry.path());
            } else if kind.is_file() && name.starts_with(prefix) && !name.ends_with(".deb") {
                return Ok(entry.path());
            }
        }
    }
    bail!("no {prefix} in the fetched packages")
}

fn forget(dir: &Path) -> Result<()> {
    match fs::remove_dir_all(dir) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", dir.display()))
        }
        _ => Ok(()),
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    ensure!(
        output.status.success(),
        "{command:?} failed with {}:\n{}{}",
        output.status,
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(())
}

fn step(text: &str) {
    eprintln!("real-guest: {text}");
}

#[cfg(test)]
mod tests {
    use super::archive_of;

    #[test]
    fn both_apt_formats_name_an_archive() {
        let list = "deb [signed-by=/k.gpg] http://mirror.example/debian/ stable main";
        assert_eq!(archive_of(list).as_deref(), Some("http://mirror.example/debian"));
        let sources = "URIs: http://mirror.example/debian";
        assert_eq!(archive_of(sources).as_deref(), Some("http://mirror.example/debian"));
        assert_eq!(archive_of("URIs: http://mirror.example/debian-security"), None);
        assert_eq!(archive_of("# deb http://mirror.example/debian stable main"), None);
    }
}
