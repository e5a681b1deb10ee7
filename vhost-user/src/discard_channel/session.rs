//! One connection, from its first message to its end.

use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::Instant;

use virtio_mem::controller::{FreezeHolder, MemController};
use virtio_mem::ram_discard::channel::wire::{ClientMessage, Farewell, ServerMessage, VERSION};
use virtio_mem::ram_discard::channel::{FrameReader, ReceiveError};

use super::HANDSHAKE;
use super::hub::Hub;
use super::peer::{Peer, Reply};

/// Requests of a client that wait; one more ends its connection.
const REQUESTS_MAX: usize = 16;

/// A connection of a client.
pub(super) struct Session<'a> {
    pub(super) id: u64,
    pub(super) controller: &'a MemController,
    pub(super) hub: &'a Hub,
}

enum Request {
    Freeze(u64),
    Thaw(u64),
    GetSizes(u64),
}

impl Session<'_> {
    /// Serves the connection until it ends. A freeze of the client ends with it.
    pub(super) fn run(&self, stream: UnixStream) {
        let peer = Arc::new(Peer::new(self.id, stream, Arc::clone(self.hub.metrics())));
        let mut frames = FrameReader::default();
        match greet(&peer, &mut frames) {
            Ok(()) => {}
            Err(Some((cause, reason))) => return peer.drop_for(cause, reason),
            // Somebody who only looked.
            Err(None) => return,
        }
        if !self.hub.attach(self.controller, &peer) {
            return;
        }
        tracing::info!(client = self.id, "discard-channel client attached");
        let (requests, waiting) = sync_channel(REQUESTS_MAX);
        thread::scope(|scope| {
            // A freeze waits for the change under way, which may wait for this client's answer:
            // they cannot be on one thread.
            let worker = thread::Builder::new()
                .name(format!("discard-{}-req", self.id))
                .spawn_scoped(scope, || self.execute(&peer, waiting));
            match worker {
                Ok(_) => self.read(&peer, &mut frames, requests),
                Err(error) => peer.drop_for(Farewell::Ending, format!("no thread: {error}")),
            }
        });
        // Before the thaw, which waits for a change under way that may wait for this client.
        peer.leave();
        if let Err(error) = self.controller.thaw(FreezeHolder::Client(self.id)) {
            tracing::error!(%error, "cannot save that migration changed");
        }
        self.hub.detach(&peer);
    }

    /// Reads until the connection ends or the client breaks the protocol.
    fn read(&self, peer: &Peer, frames: &mut FrameReader, requests: SyncSender<Request>) {
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
                ClientMessage::Thaw { id } => enqueue(Request::Thaw(id)),
                ClientMessage::GetSizes { id } => enqueue(Request::GetSizes(id)),
                ClientMessage::Hello { .. } => Err("a second hello".to_owned()),
            };
            if let Err(reason) = handled {
                return peer.drop_for(Farewell::Protocol, reason);
            }
        }
        // Wakes who waits for this client, also while the worker waits for the change under way.
        peer.leave();
    }

    /// Does what the client asks, in order, until it has gone.
    fn execute(&self, peer: &Peer, requests: Receiver<Request>) {
        for request in requests {
            let answer = match request {
                Request::Freeze(id) => {
                    match self.controller.freeze(FreezeHolder::Client(self.id)) {
                        Ok(()) => {
                            self.hub.settle();
                            ServerMessage::Done { id }
                        }
                        Err(error) => ServerMessage::Failed { id, reason: error.to_string() },
                    }
                }
                Request::Thaw(id) => {
                    if let Err(error) = self.controller.thaw(FreezeHolder::Client(self.id)) {
                        // The freeze has ended all the same.
                        tracing::error!(%error, "cannot save that migration changed");
                    }
                    ServerMessage::Done { id }
                }
                Request::GetSizes(id) => {
                    let config = self.controller.config();
                    ServerMessage::Sizes {
                        id,
                        usable_region_size: config.usable_region_size,
                        plugged_size: config.plugged_size,
                        requested_size: config.requested_size,
                    }
                }
            };
            if !peer.answer(&answer) {
                return;
            }
        }
    }
}

/// Waits for the first message and finds a version; `None` when the client left without one.
fn greet(peer: &Peer, frames: &mut FrameReader) -> Result<(), Option<(Farewell, String)>> {
    let hello = frames.next_with_fd(peer.stream(), Instant::now() + HANDSHAKE);
    match hello {
        Ok((ClientMessage::Hello { min_version, max_version }, _)) => {
            if (min_version..=max_version).contains(&VERSION) {
                return Ok(());
            }
            let reason = format!("no common version: {min_version} to {max_version} are offered");
            Err(Some((Farewell::Version, reason)))
        }
        Ok(_) => Err(Some((Farewell::Protocol, "its first message is no hello".to_owned()))),
        Err(ReceiveError::TimedOut) => Err(Some((Farewell::Silent, "it said no hello".to_owned()))),
        Err(ReceiveError::Closed) => Err(None),
        Err(error) => Err(Some((Farewell::Protocol, error.to_string()))),
    }
}
