//! The vhost-user side of the device: features, configuration space, memory table, queue.

mod messages;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use vhost_user_backend::{VringState, VringT};
use virtio_mem::controller::MemController;
use virtio_queue::QueueT;
use vm_memory::GuestAddressSpace;

use crate::device_state::blob;
use crate::device_state::transfer::{Channel, SILENCE_MAX, Transfers};
use crate::gate::Gate;
use crate::metrics::Metrics;
use crate::postcopy::Postcopy;
use crate::queue::{self, AtomicMemory, UsableMemory};
use crate::ram_blocks::RamBlocks;
use crate::resize::ResizeWatch;
use crate::vring::{Calls, Vring};
use crate::watchdog::Watchdog;
use crate::worker::Watch;

/// Number of entries a queue may have.
pub const MAX_QUEUE_SIZE: usize = 128;
/// The guest-request queue is the only one.
const NUM_QUEUES: usize = 1;
/// Token of the event that ends the worker; above the crate's own for queues and its exit event.
pub const END_EVENT: u16 = NUM_QUEUES as u16 + 1;
/// Token of the service manager's watchdog.
pub const WATCHDOG_EVENT: u16 = END_EVENT + 1;
/// While a batch of requests goes on, the guest hears of finished ones at least this often.
const MAX_SILENCE: Duration = Duration::from_micros(200);

type Ring = VringState<AtomicMemory>;

/// Answers that are in the ring, and what is still to follow.
#[derive(Default)]
struct Batch {
    /// Since when the guest may not know of the first of them.
    unsignalled: Option<Instant>,
    /// Whether the device has not heard that the last one is there.
    unnoted: bool,
}

/// The back-end of one connection. The device outlives it.
#[derive(Clone)]
pub struct MemBackend {
    shared: Arc<Shared>,
}

struct Shared {
    controller: Arc<MemController>,
    metrics: Arc<Metrics>,
    gate: Arc<Gate>,
    memory: AtomicMemory,
    config_write_logged: AtomicBool,
    ended: AtomicBool,
    calls: Calls,
    /// Guest requests that were taken off the ring.
    served: AtomicU64,
    transfers: Arc<Transfers>,
    blocks: RamBlocks,
    worker: OnceLock<Arc<Watch>>,
    resize: OnceLock<Arc<ResizeWatch>>,
    watchdog: OnceLock<Arc<Watchdog>>,
    postcopy: Postcopy,
    /// Whether PAGEFAULT is offered.
    offers_postcopy: AtomicBool,
    /// Memory that did not arrive was replaced: it is not the guest's any more.
    abandoned: AtomicBool,
}

impl MemBackend {
    /// A back-end for a new connection; `memory` is empty and becomes the front-end's.
    ///
    /// # Errors
    ///
    /// When there is no descriptor to be had.
    pub fn new(
        controller: Arc<MemController>,
        metrics: Arc<Metrics>,
        gate: Arc<Gate>,
        memory: AtomicMemory,
    ) -> io::Result<Self> {
        let postcopy = Postcopy::new(Arc::clone(&controller));
        let shared = Shared {
            controller,
            metrics,
            gate,
            memory,
            config_write_logged: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            calls: Calls::default(),
            served: AtomicU64::new(0),
            transfers: Transfers::new(SILENCE_MAX)?,
            blocks: RamBlocks::default(),
            worker: OnceLock::new(),
            resize: OnceLock::new(),
            watchdog: OnceLock::new(),
            postcopy,
            offers_postcopy: AtomicBool::new(false),
            abandoned: AtomicBool::new(false),
        };
        Ok(Self { shared: Arc::new(shared) })
    }

    /// Offers PAGEFAULT, or does not.
    #[must_use]
    pub fn offer_postcopy(self, offer: bool) -> Self {
        self.shared.offers_postcopy.store(offer, Ordering::Relaxed);
        self
    }

    /// Has the worker of the ring watched, or does not.
    #[must_use]
    pub fn watch_worker(self, watch: Watch) -> Self {
        // There is one connection, and one worker.
        let _ = self.shared.worker.set(Arc::new(watch));
        self
    }

    /// Has what the guest asks for noted, or does not.
    #[must_use]
    pub fn watch_resize(self, watch: Arc<ResizeWatch>) -> Self {
        let _ = self.shared.resize.set(watch);
        self
    }

    /// The watchdog that the worker of the ring feeds, if there is one.
    #[must_use]
    pub fn watched_by(self, watchdog: Option<Arc<Watchdog>>) -> Self {
        if let Some(watchdog) = watchdog {
            // There is one connection.
            let _ = self.shared.watchdog.set(watchdog);
        }
        self
    }

    /// Takes device state in files of any file system, or only in memory.
    #[must_use]
    pub fn allow_files(self, allow: bool) -> Self {
        self.shared.transfers.allow_files(allow);
        self
    }

    /// Whether the connection was ended because the worker of its ring has ended.
    pub fn worker_lost(&self) -> bool {
        self.shared.worker.get().is_some_and(|worker| worker.is_lost())
    }

    /// Postcopy on this connection.
    pub fn postcopy(&self) -> &Postcopy {
        &self.shared.postcopy
    }

    /// POSTCOPY_LISTEN: see [`Postcopy::listen`].
    ///
    /// # Errors
    ///
    /// When it comes out of order, or block state cannot be frozen.
    pub fn postcopy_listen(&self) -> io::Result<()> {
        self.shared.postcopy.listen(&self.shared.memory.memory())
    }

    /// The connection has ended, perhaps with memory that will never arrive: no thread waits for it
    /// any more, and no request is served from what is there instead.
    ///
    /// # Errors
    ///
    /// When a thread may still wait.
    pub fn abandon_postcopy(&self) -> io::Result<()> {
        if !self.shared.postcopy.is_listening() {
            return Ok(());
        }
        self.end();
        // Seen by a thread that reads anything from memory that was replaced.
        self.shared.abandoned.store(true, Ordering::SeqCst);
        self.shared.postcopy.abandon()
    }

    /// The connection has ended: a transfer of device state that goes on fails.
    pub fn end_transfers(&self) {
        self.shared.transfers.end();
    }

    /// The connection has ended: no request is served any more, and no thread waits to signal one. A
    /// guest that makes requests without end, or a front-end without room for a signal, would
    /// otherwise keep the worker from ending with it.
    pub fn end(&self) {
        self.shared.ended.store(true, Ordering::Release);
        self.shared.calls.end();
    }

    /// Serves the queue until it is empty, then once more if something came in between.
    fn serve(&self, vring: &Vring) {
        let mut batch = Batch::default();
        loop {
            let mut served = false;
            while self.serve_one(vring, &mut batch) {
                served = true;
            }
            let _inside = self.shared.gate.enter();
            self.signal(vring, &mut batch);
            let mut ring = vring.get_mut();
            if !self.is_running(&ring) {
                return;
            }
            // A ring that says there is more, but gives nothing, is broken by its driver: waiting
            // for the next kick is all that can be done without spinning.
            match ring.enable_notification() {
                Ok(true) if served => {
                    let _ = ring.disable_notification();
                }
                Ok(_) => return,
                Err(error) => {
                    tracing::debug!(%error, "cannot ask for notifications");
                    return;
                }
            }
        }
    }

    /// Serves one request, if there is one. The gate is passed for each, so that a ring can be
    /// stopped, or memory change, between any two.
    fn serve_one(&self, vring: &Vring, batch: &mut Batch) -> bool {
        let Shared { controller, metrics, gate, memory, .. } = &*self.shared;
        let _inside = gate.enter();
        let memory = memory.memory();
        let usable = UsableMemory::new(&memory, controller);
        let mut ring = vring.get_mut();
        // The crate calls for a ring that was enabled, which may be stopped again by now.
        if !self.is_running(&ring) {
            return false;
        }
        if vring.is_new() {
            let signal = vring.resume(&mut ring);
            drop(ring);
            if signal {
                self.signal_start(vring);
            }
            ring = vring.get_mut();
        }
        let Some(chain) = ring.get_queue_mut().pop_descriptor_chain(&usable) else {
            return false;
        };
        drop(ring);
        self.shared.served.fetch_add(1, Ordering::Relaxed);
        if let Some(watchdog) = self.shared.watchdog.get() {
            watchdog.progress();
        }
        let started = Instant::now();
        let head = chain.head_index();
        let framed = queue::parse(chain, controller);
        if self.is_abandoned() {
            // Any part of it may be zeros that the guest never wrote.
            return false;
        }
        // Before the next one is executed, which may be the same again.
        self.note_answered(batch);
        let (len, finished) = match &framed {
            None => {
                metrics.malformed();
                tracing::debug!(head, "chain returned unused: its framing or buffers are wrong");
                (0, Instant::now())
            }
            Some(framed) => {
                let response = controller.execute(framed.request);
                let len = framed.answer(controller, response);
                let finished = Instant::now();
                metrics.request(framed.request, response, finished - started);
                if let Some(resize) = self.shared.resize.get() {
                    resize.answered(framed.request, response, finished);
                }
                tracing::trace!(request = ?framed.request, ?response);
                (len, finished)
            }
        };
        let used = vring.get_mut().get_queue_mut().add_used(&*memory, head, len);
        if let Err(error) = used {
            tracing::debug!(head, %error, "chain cannot be returned");
            return true;
        }
        if self.is_abandoned() {
            // The guest may not have got the answer.
            return false;
        }
        batch.unnoted = true;
        let since = *batch.unsignalled.get_or_insert(started);
        if finished - since > MAX_SILENCE {
            self.signal(vring, batch);
        }
        true
    }

    /// Tells the guest of used buffers, if there are new ones and it wants to know. What is noted
    /// of them is noted after that, since the guest need not wait for it.
    fn signal(&self, vring: &Vring, batch: &mut Batch) {
        if batch.unsignalled.take().is_some()
            && self.wants_signal(vring)
            && let Err(error) = vring.signal(&self.shared.calls)
        {
            tracing::debug!(%error, "cannot signal the guest");
        }
        self.note_answered(batch);
    }

    /// Has the device note that the last request was answered.
    fn note_answered(&self, batch: &mut Batch) {
        if std::mem::take(&mut batch.unnoted) {
            self.shared.controller.answered();
        }
    }

    /// Whether a ring is started and enabled, so that it may be read and written.
    fn is_running(&self, ring: &Ring) -> bool {
        ring.is_enabled() && ring.get_queue().ready() && !self.shared.ended.load(Ordering::Acquire)
    }

    fn is_abandoned(&self) -> bool {
        self.shared.abandoned.load(Ordering::SeqCst)
    }

    /// Signals a ring that has started, for an interrupt that may have been lost before.
    fn signal_start(&self, vring: &Vring) {
        let by_index = vring.get_ref().get_queue().event_idx_enabled();
        if (by_index || self.wants_interrupts(&vring.get_ref()))
            && let Err(error) = vring.signal(&self.shared.calls)
        {
            tracing::debug!(%error, "cannot signal the guest");
        }
    }

    /// Whether the ring runs and the guest wants to hear of used buffers. The crate answers for
    /// EVENT_IDX only.
    fn wants_signal(&self, vring: &Vring) -> bool {
        let mut ring = vring.get_mut();
        if !self.is_running(&ring) {
            return false;
        }
        if ring.get_queue().event_idx_enabled() {
            return ring.needs_notification().unwrap_or(true);
        }
        self.wants_interrupts(&ring)
    }

    /// What the driver's flag says, which counts without EVENT_IDX.
    fn wants_interrupts(&self, ring: &Ring) -> bool {
        const VRING_AVAIL_F_NO_INTERRUPT: u16 = 1;
        let flags: Result<u16, _> = vm_memory::Bytes::read_obj(
            &*self.shared.memory.memory(),
            vm_memory::GuestAddress(ring.get_queue().avail_ring()),
        );
        flags.map_or(true, |flags| u16::from_le(flags) & VRING_AVAIL_F_NO_INTERRUPT == 0)
    }
}

impl Shared {
    /// Loads device state. `served` requests had been made when the front-end asked for it: a
    /// guest that has made one since does not know of what comes.
    fn load(&self, channel: &mut Channel, served: u64) -> anyhow::Result<()> {
        let bytes = channel.read_to_end(blob::limit(self.controller.geometry()))?;
        let state = blob::decode(&self.controller, &bytes)?;
        self.gate.close();
        let loaded = if !channel.is_wanted() {
            Err(anyhow::anyhow!("the connection ended"))
        } else if self.served.load(Ordering::Relaxed) != served {
            Err(anyhow::anyhow!("the guest made requests meanwhile"))
        } else {
            self.controller.load_state(state).map_err(Into::into)
        };
        self.gate.open();
        loaded
    }
}
