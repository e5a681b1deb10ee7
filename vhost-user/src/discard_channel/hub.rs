//! The device's listener: tells all clients, and keeps the bitmap that they share.
//!
//! The order of a change, with the steps of the controller's table:
//!
//! | | populate | discard |
//! | --- | --- | --- |
//! | 1 | clients are told, and answer | state is committed |
//! | 2 | state is committed | clients are told, and answer |
//! | 3 | the bitmap shows it | the bitmap shows it |
//! | 4 | the guest is answered | the memory goes, the guest is answered |
//!
//! So the bitmap never shows what a client was not told, and a client knows better than the
//! bitmap only of the change that is under way.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use parking_lot::Mutex;
use virtio_mem::ByteRange;
use virtio_mem::controller::{DeviceObserver, MemController};
use virtio_mem::device::Geometry;
use virtio_mem::ram_discard::RamDiscardListener;
use virtio_mem::ram_discard::channel::bitmap::BitmapWriter;
use virtio_mem::ram_discard::channel::wire::{ServerMessage, VERSION, Welcome};

use super::PATIENCE;
use super::peer::{Peer, Reply};
use crate::metrics::Metrics;

/// All clients and their bitmap.
pub(super) struct Hub {
    geometry: Geometry,
    metrics: Arc<Metrics>,
    /// Taken within the device's locks, never around them.
    inner: Mutex<Inner>,
}

struct Inner {
    block_size: u64,
    bitmap: BitmapWriter,
    /// Number of the last event.
    event: u64,
    /// What was populated and is not yet committed.
    pending: Vec<ByteRange>,
    /// In the order in which they came.
    peers: Vec<Arc<Peer>>,
}

struct HubListener(Arc<Hub>);

impl Hub {
    /// Listens to a device, and takes over what is plugged.
    pub(super) fn listen(
        controller: &MemController,
        metrics: Arc<Metrics>,
    ) -> io::Result<Arc<Self>> {
        let geometry = *controller.geometry();
        let inner = Inner {
            block_size: geometry.block_size(),
            bitmap: BitmapWriter::new(&geometry)?,
            event: 0,
            pending: Vec::new(),
            peers: Vec::new(),
        };
        let hub = Arc::new(Self { geometry, metrics, inner: Mutex::new(inner) });
        controller.observe(Arc::clone(&hub) as Arc<dyn DeviceObserver>);
        if geometry.region_size() != 0 {
            let listener = Box::new(HubListener(Arc::clone(&hub)));
            controller.listen(listener).map_err(io::Error::other)?;
            hub.inner.lock().settle();
        }
        Ok(hub)
    }

    pub(super) fn metrics(&self) -> &Arc<Metrics> {
        &self.metrics
    }

    /// Welcomes a client between two changes: it gets all events after what the bitmap shows.
    pub(super) fn attach(&self, controller: &MemController, peer: &Arc<Peer>) -> bool {
        let _no_change_under_way = controller.manager().begin();
        let mut inner = self.inner.lock();
        inner.settle();
        let welcome = Welcome {
            version: VERSION,
            geometry: self.geometry,
            bitmap_size: inner.bitmap.file_size(),
            event: inner.event,
            patience_ms: u32::try_from(PATIENCE.as_millis()).unwrap_or(u32::MAX),
        };
        let welcomed = peer.welcome(welcome, inner.bitmap.file());
        if welcomed {
            inner.peers.push(Arc::clone(peer));
        }
        welcomed
    }

    /// Has the bitmap show all that is committed. Only while no change can be under way, as while
    /// somebody holds block state frozen.
    pub(super) fn settle(&self) {
        self.inner.lock().settle();
    }

    /// Forgets a client.
    pub(super) fn detach(&self, peer: &Peer) {
        self.inner.lock().peers.retain(|other| other.id() != peer.id());
    }
}

impl RamDiscardListener for HubListener {
    fn name(&self) -> &str {
        "discard channel"
    }

    fn notify_populate(&mut self, section: ByteRange) -> Result<(), String> {
        self.0.inner.lock().populate(section)
    }

    fn notify_discard(&mut self, section: ByteRange) {
        self.0.inner.lock().discard(section);
    }
}

impl DeviceObserver for Hub {
    /// What was populated is committed now. A discard is committed before it is announced, so
    /// there is nothing to do for it here.
    fn plugged_size(&self, _size: u64) {
        self.inner.lock().settle();
    }
}

impl Inner {
    fn populate(&mut self, section: ByteRange) -> Result<(), String> {
        let peers = self.peers.clone();
        let mut accepted = Vec::new();
        let mut refused = None;
        let answers =
            self.tell(peers, |event| ServerMessage::Populate { event, section }).into_iter();
        for (peer, reply) in answers {
            match reply {
                Reply::Ack => accepted.push(peer),
                Reply::Refuse(reason) => {
                    refused.get_or_insert_with(|| format!("client {}: {reason}", peer.id()));
                }
            }
        }
        let Some(reason) = refused else {
            self.pending.push(section);
            return Ok(());
        };
        // The one that refuses has cleaned up after itself.
        self.tell_discard(accepted, section);
        self.show(&[]);
        Err(reason)
    }

    fn discard(&mut self, section: ByteRange) {
        let peers = self.peers.clone();
        self.tell_discard(peers, section);
        // A populate that is rolled back is among what is pending: the last one, when many are.
        if self.pending.pop_if(|last| *last == section).is_none() {
            let parts = self.pending.iter().flat_map(|populated| populated.subtract(section));
            self.pending = parts.flatten().collect();
        }
        self.show(&[(self.blocks(section), false)]);
    }

    /// Has the bitmap show what was populated.
    fn settle(&mut self) {
        let pending = std::mem::take(&mut self.pending);
        let changes: Vec<_> =
            pending.into_iter().map(|section| (self.blocks(section), true)).collect();
        if !changes.is_empty() {
            self.show(&changes);
        }
    }

    fn show(&mut self, changes: &[(Range<usize>, bool)]) {
        // With something pending, the bitmap does not show all events before this one.
        let shown = if self.pending.is_empty() { self.event } else { self.bitmap.event() };
        self.bitmap.update(shown, changes);
    }

    fn tell_discard(&mut self, mut peers: Vec<Arc<Peer>>, section: ByteRange) {
        peers.reverse();
        self.tell(peers, |event| ServerMessage::Discard { event, section });
    }

    /// Sends an event to clients, one after the other, and then waits for all of them: the wait is
    /// as long as that for the slowest. Gives back who answered.
    fn tell(
        &mut self,
        peers: Vec<Arc<Peer>>,
        message: impl Fn(u64) -> ServerMessage,
    ) -> Vec<(Arc<Peer>, Reply)> {
        self.event += 1;
        let message = message(self.event);
        let told: Vec<_> =
            peers.into_iter().filter(|peer| peer.tell(self.event, &message)).collect();
        let answers = told.into_iter().filter_map(|peer| {
            let reply = peer.outcome()?;
            Some((peer, reply))
        });
        answers.collect()
    }

    fn blocks(&self, section: ByteRange) -> Range<usize> {
        let index = |at: u64| usize::try_from(at / self.block_size).expect("a block has an index");
        index(section.start())..index(section.end())
    }
}
