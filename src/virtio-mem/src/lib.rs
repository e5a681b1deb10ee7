//! A virtio-mem device (VIRTIO 1.4, section 5.15) whose block state others can rely on.
//!
//! ```text
//!   guest request ---> controller -----------------------------> state store (durable)
//!                        |  judged and applied by                    ^
//!                        v                                           | committed before the guest is answered
//!                      device: block bitmap                          |
//!                        |                                           |
//!                        v                                           |
//!                      RamDiscardManager ---> region_memory: discards the file
//!                        |              +---> other listeners, which may refuse a plug
//!                        v
//!                      discard_channel: the same manager, for another process
//! ```
//!
//! - [`device`]: the device model. Pure: no transport, no threads, no memory.
//! - [`region_memory`]: the memory behind the region, as the VMM's memory table has it now.
//! - [`controller`]: device, manager and memory put together: one request at a time, durable, all or nothing.
//! - [`discard_channel`]: the RamDiscardManager of a device in another process.
//! - [`sections`]: what is sent of a device when it migrates.
//!
//! It opens no sockets and knows no transport; the daemon `vhost-user-mem` is its first user.
//!
//! A device with memory behind it, and a request of the guest's:
//!
//! ```
//! use std::{fs::File, sync::Arc};
//! use ram_discard::memory::RamBlock;
//! use virtio_mem::controller::{InitialState, MemController};
//! use virtio_mem::device::{BlockSpan, Geometry, Request, Response, VirtioMem};
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
//! The folder `examples` shows how to embed it in a VMM and how to map its memory for DMA; those of the crate
//! `migration`, how to move and save a guest.

pub mod controller;
pub mod device;
pub mod discard_channel;
pub mod region_memory;
pub mod sections;
mod sys;
