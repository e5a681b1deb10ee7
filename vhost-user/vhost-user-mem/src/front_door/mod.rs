//! The front door: a relay between the front-end's socket and the vhost-user crate.
//!
//! The crate serves the protocol, but not all of it. The relay reads whole messages from the
//! front-end, answers or refuses what the crate would answer by closing the connection, passes
//! the rest on one at a time, and tells the device what the crate does not tell it:
//!
//! - configuration changes are sent by the [`Notifier`], which the crate cannot do;
//! - messages may come in any number of writes, while the crate wants each body in one;
//! - VHOST_F_LOG_ALL may be cleared, and memory added after SET_LOG_BASE is logged too;
//! - memory is exchanged only while no guest request is being executed;
//! - postcopy (PAGEFAULT) is answered here.
//!
//! The crate acknowledges every message, whatever the front-end asked for. So the relay knows
//! when a message has taken effect, and which one the crate could not handle.

mod channel;
mod dirty_log;
mod error;
mod eventfd;
mod link;
mod memory_table;
mod message;
mod notifier;
mod postcopy;
mod quiesced;
mod relay;
mod requests;
mod rings;
mod session;
#[cfg(test)]
mod tests;

pub use error::RelayError;
pub use message::FrontendRequest;
pub use notifier::Notifier;
pub use relay::{ConnectionEvents, Relay, RelayHandle};
