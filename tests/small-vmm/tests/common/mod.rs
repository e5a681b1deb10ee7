//! Two hosts: each with a daemon and a VMM, as processes.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod postcopy;
pub mod relay;

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::guest::Command;
use small_vmm::migration::{Links, MigrateOptions, MigrationReport};
use small_vmm::process::{Vmm, VmmOptions, find_daemon};

pub const MIB: u64 = 1 << 20;
pub const ADDR: u64 = 4 << 30;
pub const BLOCK: u64 = 2 * MIB;
pub const REGION: u64 = 256 * MIB;
pub const PLUGGED: u64 = 64 * MIB;
pub const TOUCHED: u64 = 16 * MIB;
pub const PAGE: u64 = 4096;
/// A bound for what must come; nothing takes that long unless it is broken.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// A daemon with its VMM.
pub struct Host {
    /// Ends before its daemon does.
    pub vmm: Vmm,
    pub daemon: Daemon,
}

pub fn small_vmm() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_small-vmm"))
}

pub fn daemon_binary() -> &'static Path {
    static BINARY: OnceLock<PathBuf> = OnceLock::new();
    BINARY.get_or_init(|| find_daemon(small_vmm()).unwrap())
}

/// Waits for something that comes, unless it is broken.
pub fn wait_until(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < PATIENCE, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A migration without limits.
pub fn to_address(to: &str) -> MigrateOptions {
    let to = to.to_owned();
    MigrateOptions {
        to,
        max_bandwidth: None,
        downtime_limit: None,
        discard_aware: true,
        elastic: true,
        postcopy: None,
        links: Links::default(),
    }
}

impl Host {
    /// A host whose guest has plugged and written memory, and keeps writing it.
    pub fn with_guest() -> Self {
        Self::with_guest_of(None)
    }

    /// The same, with devices that send and take the state of an older release.
    pub fn with_guest_of(compat_level: Option<&'static str>) -> Self {
        let (incoming, paused) = (false, false);
        let options =
            VmmOptions { addr: ADDR, region_size: REGION, incoming, paused, compat_level };
        let mut host = Self::start(PLUGGED, &options);
        host.vmm.tell(Command::Settle { requested: PLUGGED }).unwrap();
        // At both ends of what is plugged, with a hole between.
        for offset in [0, PLUGGED - TOUCHED / 2] {
            host.vmm.tell(Command::Touch { offset, size: TOUCHED / 2 }).unwrap();
        }
        host.vmm.tell(Command::Pace { pages: Some(5_000) }).unwrap();
        host
    }

    /// A host that waits for a guest.
    pub fn waiting() -> Self {
        Self::waiting_at(ADDR, REGION)
    }

    /// A host that waits for a guest, with devices of an older release.
    pub fn waiting_of(compat_level: Option<&'static str>) -> Self {
        let (incoming, paused) = (true, false);
        let options =
            VmmOptions { addr: ADDR, region_size: REGION, incoming, paused, compat_level };
        Self::start(0, &options)
    }

    /// A host that waits for a guest, with its region elsewhere or of another size.
    pub fn waiting_at(addr: u64, region_size: u64) -> Self {
        let options =
            VmmOptions { addr, region_size, incoming: true, paused: false, compat_level: None };
        Self::start(0, &options)
    }

    /// A host that waits for a guest, which is to wait there.
    pub fn paused() -> Self {
        let options = VmmOptions {
            addr: ADDR,
            region_size: REGION,
            incoming: true,
            paused: true,
            compat_level: None,
        };
        Self::start(0, &options)
    }

    /// A host that waits for a guest, whose daemon can wait for pages.
    pub fn waiting_with_pagefault() -> Self {
        Self::with_pagefault(false)
    }

    /// The same, where the guest is to wait.
    pub fn paused_with_pagefault() -> Self {
        Self::with_pagefault(true)
    }

    fn with_pagefault(paused: bool) -> Self {
        let (addr, region_size) = (ADDR, REGION);
        let (incoming, compat_level) = (true, None);
        let options = VmmOptions { addr, region_size, incoming, paused, compat_level };
        Self::start_daemon(Self::daemon(&options).arg("--postcopy"), &options)
    }

    fn daemon(options: &VmmOptions) -> DaemonOptions {
        DaemonOptions::new(options.addr, options.region_size)
            .block_size(BLOCK)
            .discard_socket()
            .state_file()
    }

    fn start(requested_size: u64, options: &VmmOptions) -> Self {
        Self::start_daemon(Self::daemon(options).requested_size(requested_size), options)
    }

    fn start_daemon(daemon: DaemonOptions, options: &VmmOptions) -> Self {
        let daemon = Daemon::start(daemon_binary(), daemon).unwrap();
        let vmm = Vmm::start(small_vmm(), &daemon, options).unwrap();
        Self { vmm, daemon }
    }

    /// Starts its VMM, which has ended, to wait for a guest.
    pub fn restart_vmm(&mut self) {
        let options = VmmOptions {
            addr: ADDR,
            region_size: REGION,
            incoming: true,
            paused: false,
            compat_level: None,
        };
        // One that was killed has left it.
        let _ = std::fs::remove_file(self.daemon.socket().with_file_name("migrate.sock"));
        self.vmm = Vmm::start(small_vmm(), &self.daemon, &options).unwrap();
    }

    /// Has it wait for a guest, on a socket beside those of its daemon.
    pub fn listen(&mut self) -> String {
        let path = self.daemon.socket().with_file_name("migrate.sock");
        self.vmm.wait_for_guest(&format!("unix:{}", path.display()), true).unwrap()
    }

    /// Begins to send the guest away.
    pub fn migrate(&mut self, to: &str) {
        self.migrate_at(to, None);
    }

    /// Begins to send the guest away, not faster than that.
    pub fn migrate_at(&mut self, to: &str, max_bandwidth: Option<u64>) {
        // The guest writes faster than any limit here: it is stopped after one round.
        let downtime_limit = max_bandwidth.map(|_| 60_000);
        self.begin(MigrateOptions { max_bandwidth, downtime_limit, ..to_address(to) });
    }

    /// Begins a migration as it is asked for.
    pub fn begin(&mut self, options: MigrateOptions) {
        self.vmm.tell(Command::Migrate(options)).unwrap();
    }

    /// Waits for the end of a migration.
    pub fn outcome(&mut self) -> MigrationReport {
        self.vmm.wait_migration(PATIENCE).unwrap()
    }

    /// The guest runs here, with all of its memory, and its device does what it asks for.
    pub fn assert_guest_works(&mut self) {
        self.assert_guest_runs();
        let requested = self.vmm.report().unwrap().plugged;
        for requested in [requested + BLOCK, requested] {
            assert!(self.daemon.api().resize(requested).unwrap().is_success());
            self.vmm.tell(Command::Settle { requested }).unwrap();
        }
    }

    /// The guest runs here, with all of its memory.
    pub fn assert_guest_runs(&mut self) {
        let report = self.vmm.verify(2 * TOUCHED / PAGE, PATIENCE).unwrap();
        assert!(report.running && report.healthy, "{report:?}");
    }

    /// The guest does not run here.
    pub fn assert_no_guest(&mut self) {
        let before = self.vmm.report().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        let after = self.vmm.report().unwrap();
        assert!(!after.running);
        assert_eq!((before.written, before.verified), (after.written, after.verified));
    }
}
