//! QEMU's `scripts/analyze-migration.py`, out of Debian's source package of QEMU.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use real_guest::provision::configured_mirror;

/// Where a version is looked for, the newest first.
const SUITES: [&str; 3] = ["testing", "sid", "stable"];
/// With what Debian signs its archives, where the package of that name is installed.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
const SCRIPT: &str = "scripts/analyze-migration.py";

/// The script, and which version of QEMU it is of.
pub struct Script {
    pub path: PathBuf,
    pub version: String,
    /// Whether it can read files in the mapped-ram layout. QEMU's can since version 11.
    pub knows_mapped_ram: bool,
}

impl Script {
    /// One that is here already.
    pub fn at(path: &Path, version: &str) -> Result<Self> {
        let text = fs::read_to_string(path)
            .with_context(|| format!("cannot read the script {}", path.display()))?;
        let path = fs::canonicalize(path)?;
        let knows_mapped_ram = text.contains("mapped_ram");
        Ok(Self { path, version: version.to_owned(), knows_mapped_ram })
    }

    /// Brings it into `folder`, from the first of Debian's suites whose source package can be had.
    pub fn fetch(folder: &Path, mirror: Option<&str>) -> Result<Self> {
        let mirror = match mirror {
            Some(mirror) => mirror.to_owned(),
            None => configured_mirror().context("no Debian archive in the apt sources")?,
        };
        let mut failures = Vec::new();
        for suite in SUITES {
            match fetch_from(folder, &mirror, suite) {
                Ok(script) => return Ok(script),
                Err(error) => failures.push(format!("{suite}: {error:#}")),
            }
        }
        bail!("no source package of QEMU at {mirror}: {}", failures.join("; "))
    }
}

fn fetch_from(folder: &Path, mirror: &str, suite: &str) -> Result<Script> {
    let folder = folder.join(suite);
    fs::create_dir_all(folder.join("lists/partial"))?;
    fs::create_dir_all(folder.join("cache/archives/partial"))?;
    let signed =
        if Path::new(KEYRING).exists() { format!("[signed-by={KEYRING}] ") } else { String::new() };
    let sources = format!("deb-src {signed}{mirror} {suite} main\n");
    fs::write(folder.join("sources.list"), sources)?;
    apt_get(&folder, &["update"])?;
    apt_get(&folder, &["source", "--download-only", "qemu"])?;
    let mut names = fs::read_dir(&folder)?.flatten().map(|entry| entry.file_name());
    let archive = names.find(|name| name.to_string_lossy().contains(".orig.tar."));
    let archive = archive.context("the source package has no archive")?;
    let path = folder.join("analyze-migration.py");
    let mut unpack = Command::new("tar");
    unpack.current_dir(&folder).arg("-xf").arg(&archive);
    unpack.args(["--to-stdout", "--wildcards", &format!("*/{SCRIPT}")]);
    unpack.stdout(fs::File::create(&path)?);
    ensure!(unpack.status()?.success(), "no {SCRIPT} in {}", archive.display());
    let version = archive.to_string_lossy();
    let version = version.trim_start_matches("qemu_").split(['+', '.']).take(3);
    Script::at(&path, &version.collect::<Vec<_>>().join("."))
}

/// The host's apt with sources and lists of its own.
fn apt_get(folder: &Path, args: &[&str]) -> Result<()> {
    let mut command = Command::new("apt-get");
    command.current_dir(folder).arg("-qq");
    for (option, path) in [
        ("Dir::Etc::sourcelist", "sources.list"),
        ("Dir::State::lists", "lists"),
        ("Dir::Cache", "cache"),
    ] {
        command.arg("-o").arg(format!("{option}={}", folder.join(path).display()));
    }
    for option in [
        "Dir::Etc::sourceparts=/dev/null",
        "APT::Sandbox::User=root",
        "Acquire::Languages=none",
        "Acquire::Check-Valid-Until=false",
    ] {
        command.args(["-o", option]);
    }
    let output = command.args(args).output().context("there is no apt-get")?;
    let said = String::from_utf8_lossy(&output.stderr);
    let last = said.lines().find(|line| line.starts_with("E:")).unwrap_or("it failed");
    ensure!(output.status.success(), "apt-get {}: {last}", args[0]);
    Ok(())
}
