//! The command line.

use std::env;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use clap::builder::PossibleValuesParser;
use tempfile::TempDir;

use crate::steps;

/// Boots a real Linux guest on a stock QEMU against the daemon and proves each step.
#[derive(Parser)]
pub struct Options {
    /// The daemon's program, with vmemctl and vmem-pager beside it; built from this workspace when not given
    #[arg(long, value_name = "PATH")]
    daemon: Option<PathBuf>,
    /// Folder for sockets and logs; a new one in the temporary folder when not given
    #[arg(long, value_name = "DIR")]
    work_dir: Option<PathBuf>,
    /// Run only this step (may be given several times)
    #[arg(long = "step", value_name = "NAME",
          value_parser = PossibleValuesParser::new(steps::ALL.map(|step| step.name)))]
    pub steps: Vec<String>,
    /// Keep the working folder
    #[arg(long)]
    keep: bool,
    /// Use KVM if a guest is seen to boot with it
    #[arg(long)]
    pub kvm: bool,
    /// Debian archive to fetch QEMU from; the host's own when not given
    #[arg(long, value_name = "URL")]
    pub mirror: Option<String>,
}

/// The pager's program.
pub const PAGER: &str = "vmem-pager";

/// Where fetched things are kept.
pub fn cache_dir() -> Result<PathBuf> {
    let base = match env::var_os("XDG_CACHE_HOME").filter(|base| !base.is_empty()) {
        Some(base) => PathBuf::from(base),
        None => env::home_dir().context("no home folder; set XDG_CACHE_HOME")?.join(".cache"),
    };
    Ok(base.join("vhost-user-mem-real-guest"))
}

impl Options {
    /// The daemon to test.
    pub fn daemon(&self) -> Result<PathBuf> {
        match &self.daemon {
            Some(daemon) => {
                let daemon = fs::canonicalize(daemon)
                    .with_context(|| format!("no daemon at {}", daemon.display()))?;
                // A daemon that is installed by itself is tested with the pager of this workspace.
                if !daemon.with_file_name(PAGER).exists() {
                    built_daemon()?;
                }
                Ok(daemon)
            }
            None => built_daemon(),
        }
    }

    /// The working folder, removed at the end unless it is to be kept.
    pub fn work_folder(&self) -> Result<WorkFolder> {
        if let Some(dir) = &self.work_dir {
            fs::create_dir_all(dir)?;
            return Ok(WorkFolder::Kept(fs::canonicalize(dir)?));
        }
        let folder = tempfile::Builder::new().prefix("real-guest-").tempdir()?;
        Ok(if self.keep { WorkFolder::Kept(folder.keep()) } else { WorkFolder::Temporary(folder) })
    }
}

/// Where sockets and logs go.
pub enum WorkFolder {
    /// Stays.
    Kept(PathBuf),
    /// Goes.
    Temporary(TempDir),
}

impl WorkFolder {
    /// Its path.
    pub fn path(&self) -> &Path {
        match self {
            Self::Kept(path) => path,
            Self::Temporary(folder) => folder.path(),
        }
    }

    /// Removes it, or says where it is.
    pub fn close(self) -> Result<()> {
        match self {
            Self::Kept(path) => eprintln!("real-guest: logs are in {}", path.display()),
            Self::Temporary(folder) => folder.close()?,
        }
        Ok(())
    }
}

/// Builds the daemon, with `vmemctl` and `vmem-pager` beside it, the way this program was built, so that one
/// command is enough.
pub fn built_daemon() -> Result<PathBuf> {
    let own = env::current_exe()?;
    let folder = own.parent().context("this program lies nowhere")?;
    let (Some(target), Some(profile)) = (folder.parent(), folder.file_name()) else {
        bail!("cannot tell where to build the daemon; use --daemon");
    };
    let cargo = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.current_dir(env!("CARGO_MANIFEST_DIR")).args(["build", "--bins"]);
    for package in ["vhost-user-mem", "vmemctl", "vmem-pager"] {
        build.args(["--package", package]);
    }
    build.arg("--target-dir").arg(target);
    if profile == "release" {
        build.arg("--release");
    }
    ensure!(build.status()?.success(), "the daemon does not build");
    Ok(folder.join("vhost-user-mem"))
}
