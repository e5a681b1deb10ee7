//! Two hosts, the guest on one of them, and what all actors share.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::Duration;

use tempfile::TempDir;

use super::host::{ADDR, BLOCK, Host, REGION};
use super::journal::Journal;
use crate::machine::{Machine, MachineOptions};

/// How long a request of the guest may take, with a daemon that is killed and restarted meanwhile.
const REQUEST_BOUND: Duration = Duration::from_secs(60);
/// So that precopy can come to an end.
pub(super) const PAGES_PER_SECOND: u64 = 4000;

pub(super) struct World {
    pub(super) journal: Journal,
    pub(super) seed: u64,
    pub(super) hosts: [Host; 2],
    guest: Mutex<(usize, Arc<Machine>)>,
    /// Held for reading by all who disturb; who writes it has quiet.
    pub(super) disturbing: RwLock<()>,
    /// Held for writing while the guest moves, or its daemon is not there.
    pub(super) settled: RwLock<()>,
    /// Held while the API changes something.
    pub(super) api_changes: Mutex<()>,
    /// The largest size that was requested since the sizes were looked at last.
    requested: AtomicU64,
    /// Grows whenever sizes may jump: a reset, a guest that moved.
    epoch: AtomicU64,
    /// Whether a system reset may still come: it is put off while block state is frozen.
    reset_pending: AtomicBool,
    /// Blocks that the guest may have written since they were plugged; all others are zeros.
    pub(super) used: Mutex<BTreeSet<u64>>,
    dir: TempDir,
    files: AtomicU64,
}

impl World {
    pub(super) fn new(binary: &Path, seed: u64, journal: Journal) -> anyhow::Result<Self> {
        let hosts = [Host::start("A", binary)?, Host::start("B", binary)?];
        let machine = start_machine(&hosts[0], false)?;
        Ok(Self {
            journal,
            seed,
            hosts,
            guest: Mutex::new((0, machine)),
            disturbing: RwLock::default(),
            settled: RwLock::default(),
            api_changes: Mutex::default(),
            requested: AtomicU64::new(0),
            epoch: AtomicU64::new(0),
            reset_pending: AtomicBool::new(false),
            used: Mutex::default(),
            dir: tempfile::Builder::new().prefix("soak-").tempdir()?,
            files: AtomicU64::new(0),
        })
    }

    /// Where the guest is, and its machine.
    pub(super) fn guest(&self) -> (usize, Arc<Machine>) {
        let guest = lock(&self.guest);
        (guest.0, Arc::clone(&guest.1))
    }

    pub(super) fn machine(&self) -> Arc<Machine> {
        self.guest().1
    }

    /// The host that has the guest.
    pub(super) fn host(&self) -> &Host {
        &self.hosts[self.guest().0]
    }

    /// A machine on a host, which waits for the guest.
    pub(super) fn waiting_machine(&self, host: usize) -> anyhow::Result<Arc<Machine>> {
        start_machine(&self.hosts[host], true)
    }

    /// The guest is on this host now; the other machine is none any more.
    pub(super) fn move_guest(&self, host: usize, machine: Arc<Machine>) {
        let old = std::mem::replace(&mut *lock(&self.guest), (host, machine));
        retire(&old.1);
        self.begin_epoch();
        // What it wrote before is not known by block.
        lock(&self.used).extend(0..REGION / BLOCK);
    }

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::SeqCst)
    }

    pub(super) fn begin_epoch(&self) {
        self.epoch.fetch_add(1, Ordering::SeqCst);
    }

    /// That the device is about to be reset, or will be once block state is not frozen.
    pub(super) fn will_reset(&self) {
        self.reset_pending.store(true, Ordering::SeqCst);
    }

    /// Whether a reset that was put off may still come.
    pub(super) fn may_reset(&self) -> bool {
        self.reset_pending.load(Ordering::SeqCst)
    }

    /// Whether sizes may have jumped by a reset, now that block state is `frozen` or not.
    pub(super) fn may_have_reset(&self, frozen: bool) -> bool {
        match frozen {
            true => self.may_reset(),
            false => self.reset_pending.swap(false, Ordering::SeqCst),
        }
    }

    /// That `size` is about to be requested.
    pub(super) fn will_request(&self, size: u64) {
        self.requested.fetch_max(size, Ordering::SeqCst);
    }

    /// The largest size requested since the last call.
    pub(super) fn take_requested(&self) -> u64 {
        self.requested.swap(0, Ordering::SeqCst)
    }

    pub(super) fn path(&self, name: &str) -> PathBuf {
        let number = self.files.fetch_add(1, Ordering::Relaxed);
        self.dir.path().join(format!("{name}-{number}"))
    }
}

fn start_machine(host: &Host, incoming: bool) -> anyhow::Result<Arc<Machine>> {
    let machine = Machine::start(MachineOptions {
        socket: host.socket(),
        discard_socket: Some(host.discard_socket()),
        addr: ADDR,
        region_size: REGION,
        incoming,
        paused: false,
        compat_level: None,
    })?;
    machine.vcpus().limit(Some(PAGES_PER_SECOND));
    machine.with_driver(|driver| driver.driver_mut().set_timeout(REQUEST_BOUND));
    Ok(machine)
}

/// Ends the connection of a machine without a guest, so that another front-end is served.
pub(super) fn retire(machine: &Machine) {
    machine.detach();
    machine.vcpus().pause();
    machine.frontend().connection().shutdown();
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
