//! A virtio-mem device (VIRTIO 1.4, section 5.15) whose block state others can rely on.
//!
//! The crate reads in the order of a guest request:
//!
//! - [`device`]: the device model. Pure: no transport, no threads, no memory.
//! - [`ram_discard`]: who may rely on which memory being there, and how they are told of changes.
//! - [`memory`]: guest RAM as the host sees it: backing files, discard, holes.
//! - [`controller`]: the four put together: one request at a time, durable, all or nothing.
//! - [`migration`]: moving memory and device state to another host or a file, on the same manager.
//! - [`sys`]: mappings and ioctls; the only folder with `unsafe`.
//!
//! It opens no sockets and knows no transport; the daemon `vhost-user-mem` is its first user.

#[cfg(test)]
#[path = "../tests/common/huge_page_pool.rs"]
mod huge_page_pool;

pub mod controller;
pub mod device;
pub mod memory;
pub mod migration;
mod printable;
pub mod ram_discard;
mod range;
pub mod sys;

pub use printable::printable;
pub use range::ByteRange;
