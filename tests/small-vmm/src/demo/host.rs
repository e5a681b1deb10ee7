//! A daemon with its VMM, as the parts of the demonstration need it.

use std::env;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, ensure};

use super::{ADDR, MIB};
use crate::daemon::{Daemon, DaemonOptions};
use crate::guest::Command;
use crate::memory::PAGE_SIZE;
use crate::process::{Vmm, VmmOptions};

/// A bound for what must come.
pub(super) const TIMEOUT: Duration = Duration::from_secs(60);

/// What a guest has, bytes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Sizes {
    pub(super) region: u64,
    pub(super) plugged: u64,
    pub(super) touched: u64,
}

impl Sizes {
    /// Never written, with written memory on both sides: too small for the host to tell it from
    /// memory that is to come, so faults there have to be answered.
    pub(super) const GAP: u64 = MIB;

    /// In the sizes of everyday for a region of 8 GiB, for others in proportion.
    pub(super) fn of_region(region: u64) -> Self {
        let touched = (region / 8 * 3 / 10).next_multiple_of(3 * MIB);
        Self { region, plugged: region / 8, touched }
    }

    /// Where the guest writes, as offset and size: at both ends of what is plugged, the upper part
    /// with a [`GAP`](Self::GAP).
    fn written(self) -> [(u64, u64); 3] {
        let third = self.touched / 3;
        let upper = self.plugged - third;
        [(0, third), (upper - Self::GAP - third, third), (upper, third)]
    }

    /// Where the gap is.
    pub(super) fn gap(self) -> (u64, u64) {
        (self.plugged - self.touched / 3 - Self::GAP, Self::GAP)
    }
}

/// By how much a guest with so much plugged grows; whole blocks.
pub(super) fn step(plugged: u64) -> u64 {
    (plugged / 8).next_multiple_of(2 * MIB)
}

pub(super) struct Host {
    /// Ends before its daemon does.
    pub(super) vmm: Vmm,
    pub(super) daemon: Daemon,
}

impl Host {
    /// With a guest that writes a quarter of its memory a second.
    pub(super) fn with_guest(daemon: &Path, sizes: Sizes) -> anyhow::Result<Self> {
        let Sizes { region, plugged, touched } = sizes;
        let options = VmmOptions {
            addr: ADDR,
            region_size: region,
            incoming: false,
            paused: false,
            compat_level: None,
        };
        let with = daemon_options(&options).requested_size(plugged);
        let mut host = Self::start(daemon, with, &options)?;
        host.vmm.tell(Command::Settle { requested: plugged })?;
        for (offset, size) in sizes.written() {
            host.vmm.tell(Command::Touch { offset, size })?;
        }
        host.vmm.tell(Command::Pace { pages: Some(touched / PAGE_SIZE / 4) })?;
        Ok(host)
    }

    /// That waits for a guest, which may have to wait as well.
    pub(super) fn waiting(daemon: &Path, sizes: Sizes, paused: bool) -> anyhow::Result<Self> {
        let options = incoming(sizes, paused);
        Self::start(daemon, daemon_options(&options), &options)
    }

    /// That waits for a guest which may come before its memory, with a daemon that waits for that.
    pub(super) fn waiting_in_postcopy(daemon: &Path, sizes: Sizes) -> anyhow::Result<Self> {
        let options = incoming(sizes, false);
        Self::start(daemon, daemon_options(&options).arg("--postcopy"), &options)
    }

    fn start(
        daemon: &Path,
        daemon_options: DaemonOptions,
        options: &VmmOptions,
    ) -> anyhow::Result<Self> {
        let daemon = Daemon::start(daemon, daemon_options)?;
        let vmm = Vmm::start(&env::current_exe()?, &daemon, options)?;
        Ok(Self { vmm, daemon })
    }

    /// What the host holds for its region, bytes.
    pub(super) fn resident(&mut self) -> anyhow::Result<u64> {
        Ok(self.vmm.report()?.resident)
    }

    /// The guest, which only looked at its memory so far, writes it again, and its device works.
    pub(super) fn go_on(&mut self, sizes: Sizes) -> anyhow::Result<()> {
        self.vmm.tell(Command::ReadOnly { on: false })?;
        self.vmm.verify(2 * sizes.touched / PAGE_SIZE, TIMEOUT).context("the guest")?;
        let more = sizes.plugged + step(sizes.plugged);
        ensure!(self.daemon.api().resize(more)?.is_success(), "the daemon refuses to resize");
        self.vmm.tell(Command::Settle { requested: more }).context("the device")?;
        Ok(())
    }

    /// Ends both; what was wrong with that.
    pub(super) fn end(mut self) -> anyhow::Result<Vec<String>> {
        self.vmm.quit()?;
        let status = self.daemon.terminate(Duration::from_secs(2))?;
        Ok(match status.success() {
            true => Vec::new(),
            false => vec![format!("a daemon ended with {status}: {}", self.daemon.stderr())],
        })
    }
}

fn incoming(sizes: Sizes, paused: bool) -> VmmOptions {
    VmmOptions { addr: ADDR, region_size: sizes.region, incoming: true, paused, compat_level: None }
}

fn daemon_options(options: &VmmOptions) -> DaemonOptions {
    DaemonOptions::new(options.addr, options.region_size).discard_socket()
}
