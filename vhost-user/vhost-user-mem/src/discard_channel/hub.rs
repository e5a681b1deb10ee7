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

use std::collections::hash_map::RandomState;
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::ops::Range;
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use ram_discard::{RamDiscardListener, Section};
use virtio_mem::controller::{DeviceObserver, MemController};
use virtio_mem::device::Geometry;
use virtio_mem::discard_channel::bitmap::BitmapWriter;
use virtio_mem::discard_channel::wire::{Farewell, SECTIONS_MAX, Sections, ServerMessage, Welcome};

use super::budget::Budget;
use super::peer::{Peer, Reply};
use crate::metrics::Metrics;

/// All clients and their bitmap.
pub(super) struct Hub {
    geometry: Geometry,
    /// For how long clients may keep a change waiting.
    patience: Duration,
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
    pending: Vec<Section>,
    /// In the order in which they came.
    peers: Vec<Arc<Peer>>,
    /// Number of the client that has the guest served while memory arrives: nothing is populated that it does not
    /// acknowledge.
    serves: Option<u64>,
    budget: Budget,
    metrics: Arc<Metrics>,
}

struct HubListener(Arc<Hub>);

impl Hub {
    /// Listens to a device, and takes over what is plugged.
    pub(super) fn listen(
        controller: &MemController,
        metrics: Arc<Metrics>,
        patience: Duration,
    ) -> io::Result<Arc<Self>> {
        let geometry = *controller.geometry();
        let inner = Inner {
            block_size: geometry.block_size(),
            bitmap: BitmapWriter::new(&geometry)?,
            event: 0,
            pending: Vec::new(),
            peers: Vec::new(),
            serves: None,
            budget: Budget::new(patience, Instant::now()),
            metrics: Arc::clone(&metrics),
        };
        let hub = Arc::new(Self { geometry, patience, metrics, inner: Mutex::new(inner) });
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

    /// Welcomes a client, with which `version` is spoken, between two changes: it gets all events after what the bitmap shows.
    pub(super) fn attach(
        &self,
        controller: &MemController,
        peer: &Arc<Peer>,
        version: u16,
    ) -> bool {
        let _no_change_under_way = controller.manager().begin();
        let mut inner = self.inner.lock();
        inner.settle();
        let welcome = Welcome {
            version,
            generation: RandomState::new().build_hasher().finish(),
            geometry: self.geometry,
            bitmap_size: inner.bitmap.file_size(),
            event: inner.event,
            patience_ms: u32::try_from(self.patience.as_millis()).unwrap_or(u32::MAX),
        };
        let welcomed = peer.welcome(welcome, inner.bitmap.file());
        if welcomed {
            inner.peers.push(Arc::clone(peer));
        }
        welcomed
    }

    /// Has the bitmap show all that is committed; the number of the last event. Only while no change
    /// can be under way, as while block state is frozen.
    pub(super) fn settle(&self) -> u64 {
        let mut inner = self.inner.lock();
        inner.settle();
        inner.bitmap.event()
    }

    /// From here on nothing is populated that this client does not acknowledge, until memory has arrived or
    /// [`end_serving`](Self::end_serving) is called. False when another client has said that before.
    pub(super) fn serve_for(&self, peer: &Peer) -> bool {
        *self.inner.lock().serves.get_or_insert(peer.id()) == peer.id()
    }

    /// Whether this client has the guest served while memory arrives.
    pub(super) fn serves_for(&self, peer: &Peer) -> bool {
        self.inner.lock().serves == Some(peer.id())
    }

    /// This client has the guest served no more.
    pub(super) fn end_serving(&self, peer: &Peer) {
        self.inner.lock().serves.take_if(|serves| *serves == peer.id());
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

    fn notify_populate(&mut self, section: Section) -> Result<(), String> {
        self.notify_populate_all(&[section]).map_err(|(_, reason)| reason)
    }

    fn notify_discard(&mut self, section: Section) {
        self.notify_discard_all(&[section]);
    }

    fn notify_populate_all(&mut self, sections: &[Section]) -> Result<(), (Section, String)> {
        self.0.inner.lock().populate(sections)
    }

    fn notify_discard_all(&mut self, sections: &[Section]) {
        self.0.inner.lock().discard(sections);
    }

    fn notify_change_ended(&mut self) {
        self.0.inner.lock().budget.end(Instant::now());
    }
}

impl DeviceObserver for Hub {
    /// What was populated is committed now. A discard is committed before it is announced, so
    /// there is nothing to do for it here.
    fn plugged_size(&self, _size: u64) {
        self.inner.lock().settle();
    }

    fn memory_arrived(&self) {
        self.inner.lock().serves = None;
    }
}

impl Inner {
    /// Populates sections: all, or in the end none.
    fn populate(&mut self, sections: &[Section]) -> Result<(), (Section, String)> {
        for (event, part) in sections.chunks(SECTIONS_MAX).enumerate() {
            if let Err(reason) = self.populate_event(part) {
                let before: Vec<_> =
                    sections[..event * SECTIONS_MAX].iter().rev().copied().collect();
                self.discard(&before);
                return Err((part[0], reason));
            }
        }
        Ok(())
    }

    fn populate_event(&mut self, sections: &[Section]) -> Result<(), String> {
        let peers = self.peers.clone();
        let mut accepted = Vec::new();
        let mut refused = None;
        let answers = self.tell(peers, |event| ServerMessage::Populate {
            event,
            sections: Sections::from_slice(sections),
        });
        for (peer, reply) in answers {
            match reply {
                Reply::Ack => accepted.push(peer),
                Reply::Refuse(reason) => {
                    refused.get_or_insert_with(|| format!("client {}: {reason}", peer.id()));
                }
            }
        }
        if let Some(id) = self.serves
            && refused.is_none()
            && !accepted.iter().any(|peer| peer.id() == id)
        {
            // What brings the memory would take the blocks for discarded ones.
            refused = Some(format!("client {id} has left, and memory arrives"));
        }
        let Some(reason) = refused else {
            self.pending.extend(sections);
            return Ok(());
        };
        // The one that refuses has cleaned up after itself.
        let reversed: Vec<_> = sections.iter().rev().copied().collect();
        self.tell_discard(accepted, &reversed);
        self.show(&[]);
        Err(reason)
    }

    fn discard(&mut self, sections: &[Section]) {
        for sections in sections.chunks(SECTIONS_MAX) {
            let peers = self.peers.clone();
            self.tell_discard(peers, sections);
            for section in sections {
                // A populate that is rolled back is among what is pending: the last one, when many
                // are.
                if self.pending.pop_if(|last| last == section).is_none() {
                    let parts = self.pending.iter().flat_map(|pending| pending.subtract(*section));
                    self.pending = parts.flatten().collect();
                }
            }
            let changes: Vec<_> =
                sections.iter().map(|&section| (self.blocks(section), false)).collect();
            self.show(&changes);
        }
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

    fn tell_discard(&mut self, mut peers: Vec<Arc<Peer>>, sections: &[Section]) {
        peers.reverse();
        self.tell(peers, |event| ServerMessage::Discard {
            event,
            sections: Sections::from_slice(sections),
        });
    }

    /// Sends an event to clients, one after the other, and then waits for all of them: the wait is
    /// as long as that for the slowest. Returns the clients that answered. Those that have not when
    /// the budget is used up are dropped, and with them those that used most of it.
    fn tell(
        &mut self,
        peers: Vec<Arc<Peer>>,
        message: impl Fn(u64) -> ServerMessage,
    ) -> Vec<(Arc<Peer>, Reply)> {
        let begin = Instant::now();
        let idle = self.budget.begin(begin);
        if !idle.is_zero() {
            self.peers.iter().for_each(|peer| peer.forgive(idle));
        }
        if self.budget.is_nearly_spent() {
            self.next_round(false);
        }
        self.event += 1;
        let message = message(self.event);
        let deadline = begin + self.budget.left();
        let told: Vec<_> =
            peers.into_iter().filter(|peer| peer.tell(self.event, &message)).collect();
        let answers = told.into_iter().filter_map(|peer| {
            let reply = peer.outcome(deadline)?;
            Some((peer, reply))
        });
        let mut answers: Vec<_> = answers.collect();
        let end = Instant::now();
        let took = end.saturating_duration_since(begin);
        self.metrics.waited_for_discard_clients(took);
        self.budget.spend(took);
        if end >= deadline {
            self.next_round(true);
            answers.retain(|(peer, _)| !peer.is_gone());
        }
        answers
    }

    /// Drops the clients that used up a good part of the budget, so that the others need not pay for
    /// them. `one_is_dropped` when one is already; otherwise at least the one that used most is: so
    /// there are not more rounds than clients.
    fn next_round(&mut self, one_is_dropped: bool) {
        let share = self.budget.next_round();
        let peers = self.peers.iter().filter(|peer| !peer.is_gone());
        let mut used: Vec<_> = peers.map(|peer| (peer.kept_waiting(), peer)).collect();
        used.sort_by_key(|(kept_waiting, _)| std::cmp::Reverse(*kept_waiting));
        for (index, (kept_waiting, peer)) in used.into_iter().enumerate() {
            if kept_waiting > share || (index == 0 && !one_is_dropped) {
                let reason = format!("it kept the guest waiting for {kept_waiting:.1?}");
                peer.drop_for(Farewell::Silent, reason);
            }
        }
    }

    fn blocks(&self, section: Section) -> Range<usize> {
        let index = |at: u64| usize::try_from(at / self.block_size).expect("a block has an index");
        index(section.start())..index(section.end())
    }
}
