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
//!
//! A device with memory behind it, and a request of the guest's:
//!
//! ```
//! use std::{fs::File, sync::Arc};
//! use virtio_mem::controller::{InitialState, MemController};
//! use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
//! use virtio_mem::memory::RamBlock;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (addr, region, block) = (4 << 30, 1 << 30, 2 << 20);
//! # let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC)?);
//! # file.set_len(region)?;
//! // `file`: a memfd of the region's size.
//! let device = VirtioMem::new(Geometry::new(addr, region, block, None)?, region)?;
//! let controller = MemController::new(InitialState::volatile(device));
//! controller.set_memory(vec![Arc::new(RamBlock::new("ram".into(), addr, region, file, 0)?)])?;
//!
//! let plug = Request::Plug(BlockSpan { addr, nb_blocks: 3 });
//! assert_eq!(controller.execute(plug), Response::Ack);
//! assert_eq!(controller.config().plugged_size, 3 * block);
//! assert_eq!(controller.resident_size(), Some(0));
//! # Ok(())
//! # }
//! ```
//!
//! How to embed it in a VMM, migrate and save a guest, and map its memory for DMA is shown in
//! `src/examples/`.

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
