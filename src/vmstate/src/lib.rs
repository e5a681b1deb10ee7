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
//! together by `migration::devices::DeviceRegistry`; this crate knows no stream.
//!
//! | element | bytes |
//! | --- | --- |
//! | field | its value; there only if its version is not above that of the section |
//! | subsection | u8 5, u8 length of the name, name, be32 version, fields, subsections |

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
