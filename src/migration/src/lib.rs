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
//! A guest with 4 MiB of RAM, of which it has written one page, and no devices:
//!
//! ```
//! use std::{error::Error, fs::File, os::unix::fs::FileExt, os::unix::net::UnixStream, sync::Arc, thread};
//! use migration::dirty::NeverWritten;
//! use migration::ram::{BlockOptions, ListOptions, MigrationBlock, RamBlocks, RamLoad, RamSave};
//! use migration::stream::Configuration;
//! use migration::{Channel, Guest, Incoming, NoDevices, Outgoing, Parameters, Progress};
//! use ram_discard::memory::RamBlock;
//!
//! type Failure = Box<dyn Error + Send + Sync>;
//!
//! // A VMM stops its vCPUs here, and lets them run.
//! struct Vcpus;
//! impl Guest for Vcpus {
//!     fn stop(&self) -> Result<(), String> { Ok(()) }
//!     fn run(&self) -> Result<(), String> { Ok(()) }
//! }
//!
//! fn ram(file: &File) -> Result<RamBlocks, Failure> {
//!     let block = RamBlock::new("ram".into(), 0, 4 << 20, file.try_clone()?, 0)?;
//!     let mut blocks = RamBlocks::new();
//!     blocks.register(Arc::new(MigrationBlock::map(Arc::new(block), BlockOptions::migratable())?))?;
//!     Ok(blocks)
//! }
//!
//! # fn memfd() -> Result<File, Failure> {
//! #     let file = File::from(rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC)?);
//! #     file.set_len(4 << 20)?;
//! #     Ok(file)
//! # }
//! # fn main() -> Result<(), Failure> {
//! # let (here, there) = (memfd()?, memfd()?);
//! // `here` and `there`: memfds of 4 MiB.
//! here.write_all_at(&[7; 4096], 1 << 20)?;
//! let (near, far) = UnixStream::pair()?;
//! let blocks = Arc::new(ram(&there)?);
//! let destination = thread::spawn(move || {
//!     let progress = Arc::new(Progress::new());
//!     let channel = Channel::new(far, Arc::clone(&progress)).expect("a socket");
//!     let ram = RamLoad::new(blocks, ListOptions::default(), Arc::clone(&progress));
//!     let (configuration, handlers) = (Configuration::new("example"), vec![Box::new(ram) as _]);
//!     let (guest, devices) = (&Vcpus, &mut NoDevices);
//!     Incoming { configuration, guest, handlers, devices, postcopy: None, progress }.run(channel)
//! });
//!
//! let progress = Arc::new(Progress::new());
//! let channel = Channel::new(near, Arc::clone(&progress))?;
//! // Nothing writes this guest's memory while it moves.
//! let tracker = |_: &MigrationBlock| Box::new(NeverWritten) as _;
//! let ram = RamSave::new(&ram(&here)?, ListOptions::default(), Arc::clone(&progress), tracker)?;
//! let (parameters, handlers) = (Parameters::new(Configuration::new("example")), vec![Box::new(ram) as _]);
//! let (guest, devices, seen) = (&Vcpus, &mut NoDevices, Arc::clone(&progress));
//! Outgoing { parameters, guest, handlers, devices, postcopy: None, progress }.run(channel)?;
//! destination.join().expect("no panic")?;
//!
//! let mut page = [0; 4096];
//! there.read_exact_at(&mut page, 1 << 20)?;
//! assert_eq!(page, [7; 4096]);
//! // The rest was never touched, so that it was neither read nor sent.
//! assert_eq!((seen.snapshot().normal, seen.snapshot().holes), (1, 1023));
//! # Ok(())
//! # }
//! ```
//!
//! The folder `examples` has the same with a virtio-mem device, and a snapshot.

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
mod events;
mod file_reader;
mod framing;
mod handler;
mod keep_alive;
mod loader;
mod precopy;
mod progress;
mod steering;
#[cfg(test)]
pub(crate) mod test_support;
#[cfg(any(test, feature = "test-utils"))]
pub mod test_utils;

pub use bandwidth::{Bandwidth, TokenBucket};
#[cfg(feature = "tls")]
pub use channel::tls::{TlsClient, TlsError, TlsServer};
pub use channel::{BufferSink, Channel, GatherWrite, Interrupt, Ready, Sink, Transport};
pub use devices::{DevicePhase, DeviceRegistry, DeviceSection, Devices, NoDevices, RegistryError};
pub use error::MigrationError;
pub use events::{Event, Events};
pub use handler::{LoadHandler, PostcopySave, SaveHandler};
pub use keep_alive::keep_alive;
pub use precopy::{
    AtMaxRounds, Guest, GuestAfter, Incoming, Outgoing, OutgoingError, Parameters,
    ThrottleParameters,
};
pub use progress::{Counters, MigrationInfo, Progress, Status};
pub use steering::{ParameterChange, SteeringError};
