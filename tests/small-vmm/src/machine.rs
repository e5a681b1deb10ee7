//! The machine: guest memory, the connection to the daemon, the guest's driver and its vCPUs, and
//! what it takes to stop all of them for a moment.

mod daemon_link;
mod daemon_postcopy;
mod serves;

use std::ops::Range;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};
use migration::lazy::HandlerFailed;
use migration::{Guest, MigrationError};

use crate::backend_channel::{BackendChannel, Behaviour};
use crate::config::MemConfig;
use crate::driver::{MemDriver, buffers_size};
use crate::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use crate::guest_driver::{GuestDriver, Turn};
use crate::memory::{GuestRam, Layout, PAGE_SIZE};
use crate::protocol::{feature, protocol_feature};
use crate::split_ring::{DeviceWrites, SplitRing};
use crate::vcpu::Vcpus;
use daemon_postcopy::DaemonPostcopy;

/// Size of boot memory, which starts at 0.
pub const BOOT_SIZE: u64 = 16 << 20;
const RING_BASE: u64 = 0x1000;
const RING_SIZE: u16 = 64;
const VCPUS: u64 = 2;
const PROTOCOL_FEATURES: u64 = USUAL_PROTOCOL_FEATURES | protocol_feature::PAGEFAULT;
/// How long a device may take to do what it is asked for.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// What a machine is made of.
#[derive(Clone, Debug)]
pub struct MachineOptions {
    /// The daemon's vhost-user socket.
    pub socket: PathBuf,
    /// The daemon's discard channel. Without it block state cannot be frozen, and no guest leaves.
    pub discard_socket: Option<PathBuf>,
    /// Guest-physical address of the region.
    pub addr: u64,
    /// Its size, bytes.
    pub region_size: u64,
    /// Whether the guest comes from elsewhere: nothing runs before it is there.
    pub incoming: bool,
    /// Whether a guest that came from elsewhere waits for [`Machine::cont`].
    pub paused: bool,
    /// The release whose state the devices send and take; the newest when not given.
    pub compat_level: Option<String>,
}

/// A machine with its guest.
#[derive(Debug)]
pub struct Machine {
    options: MachineOptions,
    ram: Arc<GuestRam>,
    frontend: Frontend,
    channel: Arc<BackendChannel>,
    vcpus: Vcpus,
    /// The driver's ring, for a daemon that comes while the driver waits for an answer.
    ring: SplitRing,
    /// Whether the daemon can wait for pages that it misses.
    pagefault: AtomicBool,
    /// Whether the daemon has the memory table.
    shared: AtomicBool,
    /// Whether the daemon may be gone: what fails then is tried again.
    detached: AtomicBool,
    /// Changes only with `guest` locked.
    running: AtomicBool,
    /// While postcopy lasts for the daemon. Locked before `guest`.
    daemon_postcopy: Mutex<Option<DaemonPostcopy>>,
    /// Locked while the driver makes a request, so that with it the ring is found idle.
    guest: Mutex<GuestState>,
}

#[derive(Debug)]
struct GuestState {
    driver: GuestDriver,
    ring: Ring,
    place: Place,
    /// Whether the guest is to wait when it could run.
    hold: bool,
    /// Whether memory is outstanding while the guest runs, with a daemon that does not wait for it
    /// (PAGEFAULT). It would find a hole where the ring is and fill it: the ring waits.
    memory_outstanding: bool,
    /// Why the device is of no use any more.
    lost: Option<String>,
}

/// Where the guest is. Only one that is here may run here: elsewhere it has other memory by now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// It has not come yet.
    Awaited,
    Here,
    /// Stopped for a migration or a snapshot, whose outcome tells where it is.
    Stopped,
    /// The destination has it, or it was lost on the way.
    Gone,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ring {
    Stopped,
    /// The daemon knows where it is, and does not look at it yet.
    SetUp,
    Running,
}

impl Machine {
    /// Connects to the daemon and shares memory with it. The guest runs, unless it is to come from
    /// elsewhere.
    pub fn start(options: MachineOptions) -> anyhow::Result<Arc<Self>> {
        let layout = Layout::boot_and_device(BOOT_SIZE, options.addr, options.region_size)?;
        let ram = Arc::new(GuestRam::new(layout)?);
        let frontend = Frontend::connect(&options.socket)?;
        let agreed = frontend.negotiate(USUAL_FEATURES, PROTOCOL_FEATURES)?;
        let channel = Arc::new(BackendChannel::open(&frontend, Behaviour::AckAfterGetConfig)?);
        let pagefault = agreed.protocol & protocol_feature::PAGEFAULT != 0;
        // Memory that may arrive in postcopy is shared when it is known how it comes.
        let shared = !(options.incoming && pagefault);
        if shared {
            frontend.set_mem_table(&ram)?;
        }
        let event_idx = agreed.features & feature::RING_EVENT_IDX != 0;
        let driver = MemDriver::at(&ram, RING_BASE, RING_SIZE, event_idx)?;
        let ring = driver.ring().view()?;
        let vcpus = Vcpus::start(ram.clone(), VCPUS);
        vcpus.pause();
        let driver =
            GuestDriver::new(frontend.clone(), channel.clone(), driver).with_vcpus(vcpus.clone());
        let (incoming, hold) = (options.incoming, options.paused);
        let place = if incoming { Place::Awaited } else { Place::Here };
        let guest = GuestState {
            driver,
            ring: Ring::Stopped,
            place,
            hold,
            memory_outstanding: false,
            lost: None,
        };
        let guest = Mutex::new(guest);
        let (detached, running) = (AtomicBool::new(false), AtomicBool::new(false));
        let machine = Arc::new(Self {
            options,
            ram,
            frontend,
            channel,
            vcpus,
            ring,
            pagefault: AtomicBool::new(pagefault),
            shared: AtomicBool::new(shared),
            detached,
            running,
            daemon_postcopy: Mutex::default(),
            guest,
        });
        let weak = Arc::downgrade(&machine);
        thread::Builder::new().name("guest-driver".to_owned()).spawn(move || drive(&weak))?;
        if !incoming {
            machine.set_up_ring()?;
            machine.cont()?;
        }
        Ok(machine)
    }

    /// Where the queue and its buffers are, guest-physical.
    pub fn queue_memory() -> Range<u64> {
        let buffers = (RING_BASE + SplitRing::footprint(RING_SIZE)).next_multiple_of(PAGE_SIZE);
        RING_BASE..buffers + buffers_size(RING_SIZE)
    }

    /// What it is made of.
    pub fn options(&self) -> &MachineOptions {
        &self.options
    }

    /// The guest's memory.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// The connection to the daemon.
    pub fn frontend(&self) -> &Frontend {
        &self.frontend
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// Which memory the daemon writes, as the guest's driver knows it.
    pub fn device_writes(&self) -> DeviceWrites {
        self.ring.device_writes().clone()
    }

    /// Whether the guest runs here.
    pub fn is_running(&self) -> bool {
        self.running.load(Ordering::SeqCst)
    }

    /// Why the device is of no use any more.
    pub fn lost(&self) -> Option<String> {
        self.guest().lost.clone()
    }

    /// Does something with the driver between two requests.
    pub fn with_driver<T>(&self, action: impl FnOnce(&mut GuestDriver) -> T) -> T {
        action(&mut self.guest().driver)
    }

    /// Waits until `requested` is asked for and plugged.
    pub fn settle(&self, requested: u64) -> anyhow::Result<MemConfig> {
        let start = Instant::now();
        loop {
            if let Some(lost) = self.lost() {
                bail!("the device is lost: {lost}");
            }
            let config = self.frontend.config()?;
            let plugged = config.plugged_size;
            if config.requested_size == requested && plugged == requested {
                // The driver has the answer to its last request when it is settled as well.
                drop(self.guest());
                return Ok(config);
            }
            ensure!(
                start.elapsed() < TIMEOUT,
                "{requested:#x} wanted, {:#x} requested and {plugged:#x} plugged after {TIMEOUT:?}",
                config.requested_size
            );
            thread::sleep(Duration::from_millis(2));
        }
    }

    /// Lets the guest run, also one that was to wait.
    ///
    /// # Errors
    ///
    /// When the guest is not here: it would run with memory that is old, or in two places.
    pub fn cont(&self) -> anyhow::Result<()> {
        let mut guest = self.guest();
        match guest.place {
            Place::Here => {}
            Place::Awaited => {
                bail!("no guest has come yet: continue it when the migration is over")
            }
            Place::Stopped => bail!(
                "the guest is stopped for a migration or a snapshot, and continues by itself \
                 if it stays here"
            ),
            Place::Gone => bail!("the guest has left, and must not run here again"),
        }
        guest.hold = false;
        self.start_guest(&mut guest);
        Ok(())
    }

    /// The guest has left: what is here of it is old.
    pub fn guest_left(&self) {
        self.guest().place = Place::Gone;
    }

    /// Has the machine wait for a guest.
    ///
    /// # Errors
    ///
    /// When it was not started for that, or a guest is here, even one that is to wait.
    pub fn await_guest(&self) -> anyhow::Result<()> {
        let mut guest = self.guest();
        let free = matches!(guest.place, Place::Awaited | Place::Gone);
        ensure!(self.options.incoming && free, "a guest is here already: start a VMM for another");
        guest.place = Place::Awaited;
        Ok(())
    }

    /// Whether it still waits for a guest.
    pub fn awaits_guest(&self) -> bool {
        self.guest().place == Place::Awaited
    }

    /// Resets the guest, which has nothing plugged then; `reset` has the device reset meanwhile.
    pub fn reboot(&self, reset: impl FnOnce() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let mut guest = self.guest();
        ensure!(self.is_running(), "the guest does not run here");
        self.vcpus.pause();
        self.frontend.get_vring_base(0)?;
        guest.ring = Ring::Stopped;
        self.running.store(false, Ordering::SeqCst);
        reset()?;
        let region = self.options.addr..self.options.addr + self.options.region_size;
        self.vcpus.take(region);
        guest.driver.reboot()?;
        self.start_guest(&mut guest);
        Ok(())
    }

    fn guest(&self) -> MutexGuard<'_, GuestState> {
        self.guest.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A guest goes on without its device when the daemon is gone, as it would on real hardware.
    fn start_guest(&self, guest: &mut GuestState) {
        if self.is_running() {
            return;
        }
        if !guest.memory_outstanding {
            self.start_device(guest);
        }
        self.running.store(true, Ordering::SeqCst);
        self.vcpus.resume();
    }
}

impl Guest for Machine {
    fn stop(&self) -> Result<(), String> {
        let mut guest = self.guest();
        if !self.is_running() {
            return Err("it does not run here".to_owned());
        }
        self.vcpus.pause();
        let index = guest.driver.driver().ring().next_avail();
        let stopped = match self.frontend.get_vring_base(0) {
            Ok(base) if base == index => Ok(()),
            Ok(base) => Err(format!("the ring stopped at {base}, the driver is at {index}")),
            Err(error) => Err(format!("the daemon does not stop the ring: {error}")),
        };
        guest.ring = Ring::Stopped;
        self.running.store(false, Ordering::SeqCst);
        match stopped {
            Ok(()) => guest.place = Place::Stopped,
            Err(_) => self.start_guest(&mut guest),
        }
        stopped
    }

    fn run(&self) -> Result<(), String> {
        self.serve_while_memory_arrives();
        let mut guest = self.guest();
        guest.place = Place::Here;
        if !guest.hold {
            self.start_guest(&mut guest);
        }
        Ok(())
    }

    fn throttle(&self, percent: u8) {
        self.vcpus.throttle(percent);
    }
}

impl HandlerFailed for Machine {
    fn handler_failed(&self, error: &MigrationError) {
        eprintln!("small-vmm: the guest stops, its memory is lost: {error}");
        self.vcpus.halt();
    }
}

fn lose(guest: &mut GuestState, reason: &str) {
    if guest.lost.is_none() {
        eprintln!("small-vmm: the guest goes on without its device: {reason}");
        guest.lost = Some(reason.to_owned());
    }
}

/// The driver's thread: one step at a time while the guest runs, as Linux's workqueue does.
fn drive(machine: &Weak<Machine>) {
    while let Some(machine) = machine.upgrade() {
        let mut guest = machine.guest();
        let idle = !machine.is_running() || guest.memory_outstanding || guest.lost.is_some();
        if idle || machine.detached.load(Ordering::SeqCst) {
            drop(guest);
            thread::sleep(Duration::from_millis(2));
            continue;
        }
        match guest.driver.turn() {
            Ok(Turn::GoOn) => {}
            Ok(Turn::Settled(_) | Turn::Busy(_)) => {
                let (seen, rest) = (guest.driver.seen_changes(), guest.driver.retry_after());
                drop(guest);
                machine.channel.wait_beyond(seen, rest);
            }
            Err(_) if machine.detached.load(Ordering::SeqCst) => {}
            Err(error) => lose(&mut guest, &error.to_string()),
        }
    }
}
