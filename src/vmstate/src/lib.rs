//! Device state as it goes over the wire: QEMU's VMState.
//!
//! A [`VmState`] says once, for saving and for loading, what of a state is sent: its [`Field`]s in
//! order, big-endian and without tags, then its subsections. A field has a role:
//!
//! | role | saved | on load |
//! | --- | --- | --- |
//! | mutable | yes | restored |
//! | immutable | yes | compared; a difference is an error with both values |
//! | derived | yes, or not at all | dropped or compared, and recomputed by `post_load` |
//! | unused | zeros | passed over |
//! | not sent | no | stays as it is |
//!
//! State is loaded into a value of its own, made from what the device is now. The device takes it
//! over when all devices' state was read and checked; that of an early section at once, since memory
//! cannot come without it. A load that is refused changes nothing.
//!
//! A description says nothing of a member that was forgotten: [`Members`] does.
//!
//! What a section has in it may hang on a property; a [`CompatLevel`] sets properties to what an
//! older release had, so that it understands what a newer one sends. The sections of a VM are held
//! together by `migration::DeviceRegistry`; this crate knows no stream.
//!
//! | element | bytes |
//! | --- | --- |
//! | field | its value; there only if its version is not above that of the section |
//! | subsection | u8 5, u8 length of the name, name, be32 version, fields, subsections |
//!
//! ```text
//!   device --snapshot--> State --VmState::save--> bytes ... bytes --VmState::load--> State --take_over--> device
//!                                    ^                               |
//!                                    +---- one description of both --+
//! ```
//!
//! ```
//! use vmstate::wire::WireReader;
//! use vmstate::{Access, Field, Properties, VmState};
//!
//! struct Disk { sectors: u64, sector: u64 }
//!
//! static DISK: VmState<Disk> = VmState::new("disk", 1, &[
//!     Field::u64("sectors", Access::Immutable(|s| s.sectors)),
//!     Field::u64("sector", Access::Mutable(|s| s.sector, |s, sector| s.sector = sector)),
//! ]);
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let (properties, mut bytes) = (Properties::default(), Vec::new());
//! DISK.save(&mut Disk { sectors: 100, sector: 7 }, &properties, &mut bytes)?;
//!
//! let mut there = Disk { sectors: 100, sector: 0 };
//! DISK.load(&mut there, 1, &properties, &mut WireReader::new(&bytes[..]))?;
//! assert_eq!(there.sector, 7);
//!
//! // A disk of another size does not become this one.
//! let mut smaller = Disk { sectors: 50, sector: 0 };
//! let error = DISK.load(&mut smaller, 1, &properties, &mut WireReader::new(&bytes[..])).unwrap_err();
//! assert!(error.to_string().contains("sectors"), "{error}");
//! # Ok(())
//! # }
//! ```

mod access;
mod describe;
mod description;
mod error;
mod load;
mod members;
mod nested;
mod printable;
mod properties;
mod save;
mod section;
#[cfg(test)]
mod tests;
mod validate;
pub mod wire;

pub use access::{Access, Count, SliceAccess};
pub use description::{Field, Hook, Priority, VersionHook, VmState};
pub use error::{Place, Problem, Reason, VmStateError};
pub use members::Members;
pub use nested::{Nested, OptionalStruct, Struct, StructArray};
pub use printable::printable;
pub use properties::{CompatLevel, Properties, Property, PropertyError};
pub use section::{Described, StagedState, StateSection, VmStateDevice};
pub use validate::{Flaw, NAME_MAX};
