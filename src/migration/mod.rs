//! Moving a VM's memory and device state: cost follows the memory that is really used.
//!
//! Data flows one way: [`wire`] and [`stream`] are the bytes, [`dirty`] finds written pages,
//! [`ram`] turns pages into bytes and back, [`precopy`] decides what is sent when and who has the
//! guest, [`postcopy`] sends the rest after it has left, on memory that arrives on demand
//! ([`lazy`]), and [`snapshot`] writes a guest to a file and back. [`vmstate`] is how devices are
//! saved, [`virtio_mem`] among them. [`inspect`] tells what is in a file without loading it.

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
pub mod virtio_mem;
pub mod vmstate;
pub mod wire;

mod error;
mod file_reader;
mod framing;
mod loader;
#[cfg(test)]
pub(crate) mod test_support;

pub use error::MigrationError;
