//! The daemon with a front-end whose guest does what it is told.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};

pub const ADDR: u64 = 0x1_4000_0000;
pub const BLOCK: u64 = 2 << 20;
const BOOT: u64 = 16 << 20;
const RING: u64 = 0x1000;
const RING_SIZE: u16 = 128;
/// What the driver has under way at a time.
const BATCH: usize = 32;
/// How long the daemon may take to answer.
const PATIENCE: Duration = Duration::from_secs(60);

/// A daemon, a front-end, and the driver of the guest.
pub struct Device {
    pub daemon: Daemon,
    ram: Arc<GuestRam>,
    guest: Option<Guest>,
}

struct Guest {
    frontend: Frontend,
    _channel: BackendChannel,
    driver: MemDriver,
}

impl Device {
    pub fn start(daemon: &Path, region_size: u64) -> Result<Self> {
        let options = DaemonOptions::new(ADDR, region_size).block_size(BLOCK).state_file();
        let daemon = Daemon::start(daemon, options)?;
        let ram = GuestRam::new(Layout::boot_and_device(BOOT, ADDR, region_size)?)?;
        let mut device = Self { daemon, ram: Arc::new(ram), guest: None };
        device.connect()?;
        Ok(device)
    }

    /// A front-end connects, as QEMU does.
    pub fn connect(&mut self) -> Result<()> {
        let frontend = Frontend::connect(&self.daemon.socket())?;
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES)?;
        let channel = BackendChannel::open(&frontend, Behaviour::AckAtOnce)?;
        frontend.set_mem_table(&self.ram)?;
        let mut driver = MemDriver::at(&self.ram, RING, RING_SIZE, true)?;
        driver.set_timeout(PATIENCE);
        frontend.start_ring(0, driver.ring())?;
        self.guest = Some(Guest { frontend, _channel: channel, driver });
        Ok(())
    }

    /// The front-end goes.
    pub fn disconnect(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.frontend.disconnect();
        }
    }

    pub fn resize(&self, bytes: u64) -> Result<()> {
        let answer = self.daemon.api().resize(bytes)?;
        ensure!(answer.is_success(), "the daemon refused: {}", answer.text);
        Ok(())
    }

    /// The guest plugs or unplugs: runs of blocks, the first block and how many each.
    pub fn request(&mut self, kind: RequestType, runs: &[(u64, u16)]) -> Result<()> {
        let guest = self.guest.as_mut().context("no front-end is connected")?;
        let requests: Vec<MemRequest> = runs
            .iter()
            .map(|&(first, blocks)| MemRequest::new(kind, ADDR + first * BLOCK, blocks))
            .collect();
        for batch in requests.chunks(BATCH) {
            for response in guest.driver.execute_batch(batch)? {
                ensure!(response.kind() == ResponseType::Ack, "{kind:?}: {:?}", response.kind());
            }
        }
        Ok(())
    }

    /// The guest uses blocks that it plugged.
    pub fn write(&self, first: u64, blocks: u64) -> Result<()> {
        let range = ADDR + first * BLOCK..ADDR + (first + blocks) * BLOCK;
        Ok(self.ram.write_stamps(range, 1)?)
    }

    /// The guest touches a page of a block.
    pub fn touch(&self, block: u64) -> Result<()> {
        Ok(self.ram.write(ADDR + block * BLOCK, &[1])?)
    }
}
