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
//! - [`Outgoing`] and [`Incoming`] are the two ends of a migration: what is sent when, and who has the guest.
//!   A VMM implements [`Guest`] for them, and [`Devices`] or fills a [`DeviceRegistry`], with the crate `vmstate`.
//! - [`ram`]: the RAM blocks of a VM, turned into pages on the stream and back.
//! - [`dirty`] finds written pages, and [`page_bitmap`] holds them.
//! - [`postcopy`] sends the rest after the guest has left, onto memory that arrives on demand ([`lazy`]).
//! - [`snapshot`] writes a guest to a file and back, and [`inspect`] tells what is in a file without loading it.
//! - [`stream`]: the bytes of QEMU's migration stream.
//! - [`Progress`] tells how far it is, and cancels it.
//!
//! It knows no device: what is discarded it learns from any `RamDiscardManager`, and device state is bytes to it.
//! Sockets are opened by its users, and handed in as a [`Channel`].
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

pub mod dirty;
pub mod inspect;
pub mod lazy;
pub mod page_bitmap;
pub mod postcopy;
pub mod ram;
pub mod snapshot;
pub mod stream;
#[doc(hidden)] // For benches, which hold the engine against bare system calls.
pub mod sys;

mod bandwidth;
mod channel;
mod devices;
mod error;
mod file_reader;
mod framing;
mod handler;
mod loader;
mod precopy;
mod progress;
#[cfg(test)]
pub(crate) mod test_support;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;

pub use bandwidth::{Bandwidth, TokenBucket};
pub use channel::{BufferSink, Channel, GatherWrite, Sink};
pub use devices::{DevicePhase, DeviceRegistry, DeviceSection, Devices, NoDevices, RegistryError};
pub use error::MigrationError;
pub use handler::{LoadHandler, PostcopySave, SaveHandler};
pub use precopy::{
    AtMaxRounds, Guest, GuestAfter, Incoming, Outgoing, OutgoingError, Parameters,
    ThrottleParameters,
};
pub use progress::{Counters, MigrationInfo, Progress, Status};
