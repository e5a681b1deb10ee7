//! A guest that is connected to a back-end in another process, and where the two run.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};
use small_vmm::daemon::{Daemon, DaemonOptions};
use small_vmm::driver::{MemDriver, MemRequest, RequestType, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout};

const DAEMON: &str = env!("CARGO_BIN_EXE_vhost-user-mem");

pub const ADDR: u64 = 1 << 32;
pub const BLOCK: u64 = 2 << 20;
const BOOT: u64 = 16 << 20;
const RING: u64 = 0x1000;

/// A guest connected to a back-end.
pub struct Guest {
    pub driver: MemDriver,
    _frontend: Frontend,
}

impl Guest {
    pub fn connect(socket: &Path, ram: &Arc<GuestRam>) -> anyhow::Result<Self> {
        let frontend = Frontend::connect(socket)?;
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES)?;
        frontend.set_mem_table(ram)?;
        let driver = MemDriver::at(ram, RING, 128, true)?;
        frontend.start_ring(0, driver.ring())?;
        Ok(Self { driver, _frontend: frontend })
    }

    /// A request about the first block.
    pub fn execute(&mut self, kind: RequestType) {
        let response = self.driver.execute(MemRequest::new(kind, ADDR, 1)).unwrap();
        assert_eq!(response.kind(), ResponseType::Ack);
    }

    pub fn plug_and_unplug(&mut self) {
        self.execute(RequestType::Plug);
        self.execute(RequestType::Unplug);
    }
}

pub fn ram(region: u64) -> anyhow::Result<Arc<GuestRam>> {
    Ok(Arc::new(GuestRam::new(Layout::boot_and_device(BOOT, ADDR, region)?)?))
}

pub fn start(options: DaemonOptions) -> anyhow::Result<Daemon> {
    Ok(Daemon::start(Path::new(DAEMON), options.block_size(BLOCK))?)
}

/// How long each of some goes took, ascending.
pub fn samples(count: usize, mut work: impl FnMut()) -> Vec<Duration> {
    let mut times: Vec<Duration> = (0..count)
        .map(|_| {
            let start = Instant::now();
            work();
            start.elapsed()
        })
        .collect();
    times.sort();
    times
}

/// Runs `work` with a name and the CPUs of the driver and of the back-end. Left to the scheduler,
/// the two sides share a CPU or not as it happens, which makes more of a difference than anything a
/// back-end does.
pub fn on_cpus(work: impl Fn(&str, usize, usize) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let all = sched_getaffinity(None)?;
    let mut cpus = (0..CpuSet::MAX_CPU).filter(|&cpu| all.is_set(cpu));
    let first = cpus.next().context("no CPU")?;
    work("both sides on one CPU", first, first)?;
    if let Some(second) = cpus.next() {
        work("driver and back-end on a CPU each", first, second)?;
    }
    Ok(sched_setaffinity(None, &all)?)
}

/// From now on, this thread and what it starts run on one CPU.
pub fn stay_on(cpu: usize) -> rustix::io::Result<()> {
    let mut set = CpuSet::new();
    set.set(cpu);
    sched_setaffinity(None, &set)
}
