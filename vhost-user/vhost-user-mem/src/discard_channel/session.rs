//! One connection, from its first message to its end.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Instant;

use ram_discard::MemoryState;
use virtio_mem::controller::{FreezeHolder, MemController};
use virtio_mem::discard_channel::wire::{
    ClientMessage, Farewell, MIN_VERSION, Sections, ServerMessage, VERSION, VERSION_FOLLOW,
};
use virtio_mem::discard_channel::{FrameReader, ReceiveError};

use super::Limits;
use super::hub::Hub;
use super::lease::Lease;
use super::peer::{Peer, Reply};

/// Requests of a client that wait; one more ends its connection.
const REQUESTS_MAX: usize = 16;

/// A connection of a client.
pub(super) struct Session<'a> {
    controller: &'a MemController,
    hub: &'a Hub,
    limits: Limits,
    peer: Arc<Peer>,
    lease: Lease,
}

enum Request {
    Freeze(u64),
    Thaw { id: u64, freeze: u64 },
    Serve(u64),
    GetSizes(u64),
    Follow { id: u64, state: MemoryState, sections: Sections },
}

impl<'a> Session<'a> {
    pub(super) fn new(
        controller: &'a MemController,
        hub: &'a Hub,
        limits: Limits,
        peer: Arc<Peer>,
    ) -> Self {
        let lease = Lease::new(limits.freeze_expiry);
        Self { controller, hub, limits, peer, lease }
    }

    /// Serves the connection until it ends. A freeze of the client ends with it.
    pub(super) fn run(&self) {
        let peer = &self.peer;
        let mut frames = FrameReader::default();
        let version = match self.greet(&mut frames) {
            Ok(version) => version,
            Err(Some((cause, reason))) => return peer.drop_for(cause, reason),
            // It only looked whether the socket is served.
            Err(None) => return,
        };
        if !self.hub.attach(self.controller, peer, version) {
            return;
        }
        tracing::info!(client = peer.id(), "discard-channel client attached");
        let (requests, waiting) = sync_channel(REQUESTS_MAX);
        thread::scope(|scope| {
            // A freeze waits for the change under way, which may wait for this client's answer:
            // they cannot be on one thread.
            let worker = thread::Builder::new()
                .name(format!("discard-{}-req", peer.id()))
                .spawn_scoped(scope, || self.execute(waiting));
            match worker {
                Ok(_) => self.read(&mut frames, requests, version),
                Err(error) => peer.drop_for(Farewell::Ending, format!("no thread: {error}")),
            }
        });
        // Before the thaw, which waits for a change under way that may wait for this client.
        peer.leave();
        self.thaw();
        self.end_serving();
        self.hub.detach(peer);
    }

    /// Waits for the first message and finds a version; `None` when the client left without one.
    fn greet(&self, frames: &mut FrameReader) -> Result<u16, Option<(Farewell, String)>> {
        let deadline = Instant::now() + self.limits.handshake;
        match frames.next_with_fd(self.peer.stream(), deadline) {
            Ok((ClientMessage::Hello { min_version, max_version }, _)) => {
                let newest = max_version.min(VERSION);
                if newest >= min_version.max(MIN_VERSION) {
                    return Ok(newest);
                }
                let reason = format!(
                    "no common version: the client speaks {min_version} to {max_version}, this \
                     server {MIN_VERSION} to {VERSION}; use a client and a daemon of the same release"
                );
                Err(Some((Farewell::Version, reason)))
            }
            Ok(_) => {
                let reason = "its first message is not hello".to_owned();
                Err(Some((Farewell::Protocol, reason)))
            }
            Err(ReceiveError::TimedOut) => {
                Err(Some((Farewell::Silent, "it did not send hello".to_owned())))
            }
            Err(ReceiveError::Closed) => Err(None),
            Err(error) => Err(Some((Farewell::Protocol, error.to_string()))),
        }
    }

    /// Reads until the connection ends or the client breaks the protocol.
    fn read(&self, frames: &mut FrameReader, requests: SyncSender<Request>, version: u16) {
        let peer = &self.peer;
        let enqueue = |request| match requests.try_send(request) {
            Ok(()) => Ok(()),
            Err(TrySendError::Full(_)) => Err(format!("{REQUESTS_MAX} requests wait already")),
            Err(TrySendError::Disconnected(_)) => Err("the worker has ended".to_owned()),
        };
        while !peer.is_gone() {
            let message = match frames.next(peer.stream()) {
                Ok(message) => message,
                Err(ReceiveError::Wire(error)) => {
                    return peer.drop_for(Farewell::Protocol, error.to_string());
                }
                // The client left, was dropped, or the daemon ends.
                Err(_) => break,
            };
            let handled = match message {
                ClientMessage::Ack { event } => peer.reply(event, Reply::Ack),
                ClientMessage::Refuse { event, reason } => peer.reply(event, Reply::Refuse(reason)),
                ClientMessage::Freeze { id } => enqueue(Request::Freeze(id)),
                ClientMessage::Thaw { id, freeze } => enqueue(Request::Thaw { id, freeze }),
                ClientMessage::GetSizes { id } => enqueue(Request::GetSizes(id)),
                // At once: it must not wait behind a request that takes long.
                ClientMessage::Renew { id, freeze } => {
                    peer.answer(&match self.lease.renew(freeze, Instant::now()) {
                        true => ServerMessage::Done { id },
                        false => ended(id, freeze),
                    });
                    Ok(())
                }
                ClientMessage::Follow { .. } | ClientMessage::Serve { .. }
                    if version < VERSION_FOLLOW =>
                {
                    Err(format!("a request of version {VERSION_FOLLOW}, in version {version}"))
                }
                ClientMessage::Follow { id, state, sections } => {
                    enqueue(Request::Follow { id, state, sections })
                }
                ClientMessage::Serve { id } => enqueue(Request::Serve(id)),
                ClientMessage::Hello { .. } => Err("a second hello".to_owned()),
            };
            if let Err(reason) = handled {
                return peer.drop_for(Farewell::Protocol, reason);
            }
        }
        // Wakes the threads that wait for this client, also while the worker waits for the change
        // under way.
        peer.leave();
    }

    /// Does what the client asks, in order, until it has gone, and ends a freeze that it does not
    /// renew.
    fn execute(&self, requests: Receiver<Request>) {
        loop {
            let request = match self.lease.left(Instant::now()) {
                None => requests.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(left) => requests.recv_timeout(left),
            };
            // Also while requests keep coming.
            self.expire();
            let answer = match request {
                Ok(request) => self.answer(request),
                Err(RecvTimeoutError::Timeout) => continue,
                Err(RecvTimeoutError::Disconnected) => return,
            };
            if !self.peer.answer(&answer) {
                return;
            }
        }
    }

    fn answer(&self, request: Request) -> ServerMessage {
        match request {
            Request::Freeze(id) => {
                match self.controller.freeze(FreezeHolder::Client(self.peer.id())) {
                    Ok(()) => ServerMessage::Frozen {
                        id,
                        event: self.hub.settle(),
                        freeze: self.lease.begin(Instant::now()),
                        expiry_ms: u32::try_from(self.limits.freeze_expiry.as_millis())
                            .unwrap_or(u32::MAX)
                            .max(1),
                    },
                    Err(error) => ServerMessage::Failed { id, reason: error.to_string() },
                }
            }
            Request::Thaw { id, freeze } => {
                if self.lease.end(freeze) {
                    self.thaw();
                    ServerMessage::Done { id }
                } else {
                    ended(id, freeze)
                }
            }
            Request::Serve(id) => match self.serve() {
                Ok(()) => ServerMessage::Done { id },
                Err(reason) => ServerMessage::Failed { id, reason },
            },
            Request::GetSizes(id) => {
                let config = self.controller.config();
                ServerMessage::Sizes {
                    id,
                    usable_region_size: config.usable_region_size,
                    plugged_size: config.plugged_size,
                    requested_size: config.requested_size,
                }
            }
            // The clients are told as of any change, this one, too.
            Request::Follow { id, state, sections } => {
                match self.controller.follow_source_all(&sections, state) {
                    Ok(()) => ServerMessage::Done { id },
                    Err(error) => ServerMessage::Failed { id, reason: error.to_string() },
                }
            }
        }
    }

    /// Ends a freeze that was not renewed in time. The client is told first, so that it knows before a
    /// block can change.
    fn expire(&self) {
        let Some(freeze) = self.lease.expire(Instant::now()) else { return };
        let client = self.peer.id();
        tracing::warn!(
            client,
            freeze,
            "a discard-channel client did not renew its freeze: thawing"
        );
        self.hub.metrics().discard_freeze_expired();
        self.peer.answer(&ServerMessage::Thawed { freeze });
        self.thaw();
    }

    /// Has the guest be served while its memory arrives.
    fn serve(&self) -> Result<(), String> {
        // First, so that nothing is populated without this client.
        if !self.hub.serve_for(&self.peer) {
            return Err("another client has the guest served while memory arrives".to_owned());
        }
        let served = self.controller.serve_while_incoming();
        // Where it ends meanwhile, there is nothing to be served for any more.
        if !self.controller.memory_arrives() {
            self.hub.end_serving(&self.peer);
            return Err("no memory arrives here: POSTCOPY_LISTEN comes first".to_owned());
        }
        if let Err(error) = served {
            // The freeze has ended all the same.
            tracing::error!(%error, "cannot save that the guest is served");
        }
        Ok(())
    }

    /// What brings the memory knows no more of block state: the guest waits until all has arrived.
    fn end_serving(&self) {
        if !self.hub.serves_for(&self.peer) {
            return;
        }
        let client = self.peer.id();
        match self.controller.freeze_while_incoming() {
            // Not before: until it is frozen, what would be populated is refused without this client.
            Ok(()) => self.hub.end_serving(&self.peer),
            Err(error) => tracing::error!(client, %error, "cannot freeze block state"),
        }
        tracing::warn!(
            client,
            "a discard-channel client left while memory arrives: no block is plugged until all has"
        );
    }

    fn thaw(&self) {
        if let Err(error) = self.controller.thaw(FreezeHolder::Client(self.peer.id())) {
            // The freeze has ended all the same.
            tracing::error!(%error, "cannot save that migration changed");
        }
    }
}

fn ended(id: u64, freeze: u64) -> ServerMessage {
    ServerMessage::Failed { id, reason: format!("freeze {freeze} has ended, or never was") }
}
