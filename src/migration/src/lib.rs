//! Moving a VM's memory and device state: cost follows the memory that is really used.
//!
//! ```text
//!            what to send                             how                          where to
//!   RamDiscardManager: the mask --+
//!   file: its holes --------------+--> ram: pages <--> stream: records --> precopy, postcopy: a channel
//!   dirty: pages written since ---+                                    +-> snapshot: a file
//!                                      devices: sections of state
//! ```
//!
//! - [`stream`]: the bytes of QEMU's migration stream.
//! - [`dirty`] finds written pages, [`page_bitmap`] holds them, and [`ram`] turns pages into bytes and back.
//! - [`precopy`] decides what is sent when and who has the guest, [`postcopy`] sends the rest after it has left,
//!   onto memory that arrives on demand ([`lazy`]), and [`snapshot`] writes a guest to a file and back.
//! - [`devices`]: the sections of a VM's devices, described with the crate `vmstate`.
//! - [`inspect`] tells what is in a file without loading it.
//!
//! It knows no device: what is discarded it learns from any `RamDiscardManager`, and device state is bytes to it.
//! Sockets are opened by its users, and handed in as a [`channel::Channel`].
//!
//! The bytes of a page of zeros, as they are sent, and what reads them:
//!
//! ```
//! use migration::page_bitmap::PageBitmap;
//!
//! // Pages 0 to 511 are to be sent, and a discarded block of 256 pages is not.
//! let mut pages = PageBitmap::new(512);
//! pages.set_range(0..512);
//! pages.clear_range(256..512);
//! assert_eq!(pages.count(), 256);
//! ```
//!
//! The folder `examples` has a whole migration and a snapshot.

#[cfg(test)]
#[path = "../../../tests/common/huge_page_pool.rs"]
mod huge_page_pool;

pub mod bandwidth;
pub mod channel;
pub mod devices;
pub mod dirty;
pub mod handler;
pub mod inspect;
pub mod lazy;
pub mod page_bitmap;
pub mod postcopy;
pub mod precopy;
pub mod progress;
pub mod ram;
pub mod snapshot;
pub mod stream;
#[doc(hidden)] // For benches, which hold the engine against bare system calls.
pub mod sys;

mod error;
mod file_reader;
mod framing;
mod loader;
#[cfg(test)]
pub(crate) mod test_support;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;

pub use error::MigrationError;
pub use framing::make_findable;
