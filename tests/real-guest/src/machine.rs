//! One guest with its daemon: what every step works on.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::daemon::{self, Daemon};
use crate::guest::Guest;
use crate::options::PAGER;
use crate::process;
use crate::provision::Kit;
use crate::qemu::{Accelerator, Device, Qemu};
use crate::relay;
use crate::report::Observation;
use crate::sizes::human;
use crate::wait;

/// The geometry of a device. Steps of the same setup share a boot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Setup {
    /// Size of the region.
    pub region: u64,
    /// Size of a block.
    pub block: u64,
    /// NUMA node of the region; the guest then has two nodes.
    pub node: Option<u16>,
    /// Whether a relay stands in for what QEMU cannot do: reconnect.
    pub relay: bool,
    /// Whether the guest loads its driver when it boots.
    pub driver: bool,
}

impl Setup {
    /// Where the daemon listens.
    pub fn vhost_socket(dir: &Path) -> PathBuf {
        dir.join("vhost.sock")
    }

    /// Where QEMU connects.
    pub fn front_end_socket(&self, dir: &Path) -> PathBuf {
        if self.relay { dir.join("relay.sock") } else { Self::vhost_socket(dir) }
    }
}

/// What every machine of a run is made of.
pub struct Parts<'a> {
    /// QEMU and what it boots.
    pub kit: &'a Kit,
    /// How the guest is run.
    pub accelerator: Accelerator,
    /// The daemon's program.
    pub daemon: &'a Path,
}

impl Parts<'_> {
    /// The client's program, which is built and installed with the daemon's.
    pub fn client(&self) -> PathBuf {
        self.daemon.with_file_name("vmemctl")
    }

    /// The pager's program, which lies beside them, or else beside this one.
    pub fn pager(&self) -> PathBuf {
        let beside = self.daemon.with_file_name(PAGER);
        match std::env::current_exe() {
            Ok(own) if !beside.exists() => own.with_file_name(PAGER),
            _ => beside,
        }
    }
}

/// A booted guest with a connected daemon.
pub struct Machine {
    /// What it was made with.
    pub setup: Setup,
    /// The guest.
    pub guest: Guest,
    /// QEMU.
    pub qemu: Qemu,
    /// The daemon.
    pub daemon: Daemon,
    /// MemTotal with nothing plugged.
    pub base: u64,
    dir: PathBuf,
}

impl Machine {
    /// Boots a guest whose device has nothing plugged; logs and sockets go to `dir`.
    pub fn boot(parts: &Parts, setup: &Setup, dir: &Path) -> Result<Self> {
        let daemon = Daemon::start(parts.daemon, setup, dir)?;
        if setup.relay {
            relay::start(&setup.front_end_socket(dir), &Setup::vhost_socket(dir))?;
        }
        let qemu = Qemu::start(parts.kit, parts.accelerator, &Device::Daemon(setup), dir)?;
        let guest = Guest::connect(&dir.join("guest.sock"))?;
        let mut machine = Self { setup: *setup, guest, qemu, daemon, base: 0, dir: dir.to_owned() };
        machine.guest.wait_ready()?;
        machine.base = machine.guest.mem_total()?;
        let device = machine.daemon.api.device()?;
        ensure!(device.connected, "the guest runs, but the API knows no front-end");
        ensure!(
            (device.addr, device.region_size, device.block_size, device.node_id)
                == (crate::qemu::REGION_ADDR, setup.region, setup.block, setup.node),
            "the API describes another device: {device:?}"
        );
        Ok(machine)
    }

    /// Asks for `size` and waits until the guest has done it.
    pub fn resize(&mut self, size: u64) -> Result<Observation> {
        self.daemon.api.resize(size)?;
        self.settle(size)
    }

    /// Waits until the guest has `size`.
    pub fn settle(&mut self, size: u64) -> Result<Observation> {
        self.settle_within(size, wait::LONG)
    }

    /// Waits until the guest has `size`, with a bound of its own.
    pub fn settle_within(&mut self, size: u64, bound: std::time::Duration) -> Result<Observation> {
        let api = &self.daemon.api;
        let mut plugged = 0;
        wait::until("the guest to change its memory", bound, || {
            plugged = api.device()?.plugged_size;
            Ok((plugged == size).then_some(()))
        })
        .with_context(|| format!("plugged {} of {}", human(plugged), human(size)))?;
        // The request is answered before the guest has added the memory, or after it has taken it.
        let (guest, base) = (&mut self.guest, self.base);
        wait::until("the guest to count its memory", wait::SHORT, || {
            let counted = guest.mem_total()?.abs_diff(base + size) <= Observation::SLACK;
            Ok((counted && guest.iomem()? == size).then_some(()))
        })
        .ok();
        let mut seen = self.observe()?;
        seen.expect_size(size);
        Ok(seen)
    }

    /// The client of the daemon's API, which is built and installed with the daemon, to be started with these words.
    pub fn client(&self, words: &[&str]) -> Command {
        let mut command = Command::new(self.daemon.program().with_file_name("vmemctl"));
        command.arg("--api-socket").arg(self.daemon.api.socket()).args(words);
        command
    }

    /// Looks at the guest, the API and the host at once.
    pub fn observe(&mut self) -> Result<Observation> {
        let device = self.daemon.api.device()?;
        let blocks = self.daemon.api.blocks()?;
        let mut seen = Observation {
            base: self.base,
            mem_total: self.guest.mem_total()?,
            iomem: self.guest.iomem()?,
            host: self.qemu.host_held()?,
            device,
            guest_note: String::new(),
            api_note: String::new(),
            problems: Vec::new(),
        };
        seen.expect_blocks(&blocks);
        for line in self.guest.trouble()? {
            seen.problem(format!("dmesg: {line}"));
        }
        Ok(seen)
    }

    /// Brings a machine that another step has used back to nothing plugged.
    pub fn empty(&mut self) -> Result<()> {
        self.guest.free()?;
        self.daemon.api.migration(false)?;
        self.resize(0).map(drop)
    }

    /// Ends the guest and then the daemon.
    pub fn stop(mut self) -> Result<()> {
        self.qemu.stop();
        self.daemon.stop()
    }

    /// What the guest and the daemon said last, for a person who looks for the reason of a failure.
    pub fn last_words(&mut self) -> String {
        let status = self.qemu.qmp.status().unwrap_or_else(|error| error.to_string());
        let log = self.guest.dmesg().unwrap_or_else(|error| format!("{error:#}"));
        let lines: Vec<&str> = log.lines().collect();
        let log = lines[lines.len().saturating_sub(40)..].join("\n");
        format!("QEMU: {status}\n--- dmesg of the guest ---\n{log}\n{}", logs(&self.dir))
    }
}

/// The ends of the logs that are files.
pub fn logs(dir: &Path) -> String {
    [("console.log", 15), ("qemu.log", 15), (daemon::LOG, 40)]
        .map(|(log, lines)| process::tail(&dir.join(log), lines))
        .join("\n")
}
