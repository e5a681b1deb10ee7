//! The discard channel: the RamDiscardManager of a device in another process.
//!
//! The device's process (the server) gives each client a read-only mapping of the block bitmap,
//! sends it every populate and discard in order, and waits for its answers; a client can freeze
//! block state. `spec-notes/discard-channel.md` draws the wire and says who waits for whom.
//!
//! - [`wire`]: the messages as bytes. Pure.
//! - [`bitmap`]: the bitmap in shared memory, written on one side, read on the other, never torn.
//! - [`RemoteRamDiscardManager`]: the client, over a stream that its owner connected.
//!
//! The server is part of the daemon; what it shares with the client is here.

pub mod bitmap;
mod client;
mod frames;
pub mod wire;

pub use client::{AttachError, DeviceSizes, RemoteRamDiscardManager};
pub use frames::{FrameReader, ReceiveError, send, send_with_fd};
