//! A daemon, a front-end and a driver, connected.

#![allow(dead_code, reason = "each test file uses its part")]

pub mod discard_channel;
pub mod page_source;
pub mod silent_file;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::driver::{MemDriver, MemRequest, RequestType, Response, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};

pub const ADDR: u64 = 0x1_4000_0000;
pub const BLOCK: u64 = 2 << 20;
pub const REGION: u64 = 1 << 30;
pub const BOOT: u64 = 16 << 20;
/// Where the ring and its buffers are.
pub const RING: u64 = 0x1000;
pub const PATIENCE: Duration = Duration::from_secs(10);

pub struct Rig {
    pub daemon: Daemon,
    pub ram: Arc<GuestRam>,
    pub frontend: Frontend,
    pub channel: Option<BackendChannel>,
    pub driver: MemDriver,
}

pub fn daemon(options: DaemonOptions) -> Daemon {
    Daemon::start(Path::new(env!("CARGO_BIN_EXE_vhost-user-mem")), options).unwrap()
}

pub fn options() -> DaemonOptions {
    DaemonOptions::new(ADDR, REGION).block_size(BLOCK).requested_size(REGION)
}

pub fn ram() -> Arc<GuestRam> {
    Arc::new(GuestRam::new(Layout::boot_and_device(BOOT, ADDR, REGION).unwrap()).unwrap())
}

pub fn rig() -> Rig {
    rig_with(options(), ram())
}

pub fn rig_with(options: DaemonOptions, ram: Arc<GuestRam>) -> Rig {
    let daemon = daemon(options);
    let (frontend, channel, driver) = connect(&daemon, &ram);
    Rig { daemon, ram, frontend, channel: Some(channel), driver }
}

/// Connects a front-end that does what QEMU does, with a fresh ring.
pub fn connect(daemon: &Daemon, ram: &Arc<GuestRam>) -> (Frontend, BackendChannel, MemDriver) {
    let frontend = Frontend::connect(&daemon.socket()).unwrap();
    frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
    let channel = BackendChannel::open(&frontend, Behaviour::AckAtOnce).unwrap();
    frontend.set_mem_table(ram).unwrap();
    let driver = MemDriver::at(ram, RING, 128, true).unwrap();
    frontend.start_ring(0, driver.ring()).unwrap();
    (frontend, channel, driver)
}

pub fn gpa(block: u64) -> u64 {
    ADDR + block * BLOCK
}

impl Rig {
    pub fn plug(&mut self, block: u64, nb_blocks: u16) -> ResponseType {
        self.execute(RequestType::Plug, gpa(block), nb_blocks).kind()
    }

    pub fn unplug(&mut self, block: u64, nb_blocks: u16) -> ResponseType {
        self.execute(RequestType::Unplug, gpa(block), nb_blocks).kind()
    }

    pub fn execute(&mut self, kind: RequestType, addr: u64, nb_blocks: u16) -> Response {
        self.driver.execute(MemRequest::new(kind, addr, nb_blocks)).unwrap()
    }

    /// Bytes the host holds for some blocks.
    pub fn resident(&self, first: u64, end: u64) -> u64 {
        self.ram.resident_bytes(gpa(first)..gpa(end)).unwrap()
    }

    pub fn stamp(&self, first: u64, end: u64) {
        self.ram.write_stamps(gpa(first)..gpa(end), 1).unwrap();
    }

    pub fn assert_stamped(&self, first: u64, end: u64) {
        assert_eq!(self.ram.find_wrong_stamp(gpa(first)..gpa(end), 1).unwrap(), None);
    }

    pub fn plugged_size(&self) -> u64 {
        self.frontend.config().unwrap().plugged_size
    }

    /// Leaves and comes back, with a fresh ring.
    pub fn reconnect(&mut self) {
        self.frontend.disconnect();
        self.channel = None;
        let (frontend, channel, driver) = connect(&self.daemon, &self.ram);
        self.frontend = frontend;
        self.channel = Some(channel);
        self.driver = driver;
    }
}
