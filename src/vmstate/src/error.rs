//! Why state is not saved or loaded.

use std::error::Error;
use std::fmt;

use thiserror::Error;

use crate::wire::WireError;

/// Why a hook or a device refuses, in its own words.
pub type Reason = Box<dyn Error + Send + Sync>;

/// Where in the state of a VM something is.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Id string of the device's section; empty when it was not loaded by a registry.
    pub device: String,
    /// Name of the section, structure or subsection.
    pub section: &'static str,
    /// Name of the field, unless it is about the section as a whole.
    pub field: Option<&'static str>,
    /// Bytes from the start of the stream on load, of the section on save.
    pub offset: u64,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.device.is_empty() {
            write!(f, "{}: ", self.device)?;
        }
        write!(f, "{}", self.section)?;
        if let Some(field) = self.field {
            write!(f, ", field {field}")?;
        }
        write!(f, " at byte {:#x}", self.offset)
    }
}

/// Why state is not saved or loaded. A refused load has changed nothing.
#[derive(Debug, Error)]
#[error("{place}: {problem}")]
pub struct VmStateError {
    /// Where it went wrong.
    pub place: Place,
    /// What went wrong.
    #[source]
    pub problem: Problem,
}

/// What is wrong with a field, a section, or the device it is for.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Problem {
    /// The value could not be read.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// The two sides' devices differ in what never changes.
    #[error("{found} in the stream, {expected} here")]
    Immutable {
        /// In the stream.
        found: String,
        /// What this device has.
        expected: String,
    },
    /// The stream contradicts itself.
    #[error("{found} in the stream, but the rest of the state makes it {expected}")]
    Derived {
        /// In the stream.
        found: String,
        /// What it must be.
        expected: String,
    },
    /// A byte that is neither false nor true.
    #[error("a truth value is 0 or 1, not {0}")]
    NotBool(u8),
    /// A byte that says neither that a structure is there nor that it is not.
    #[error("{0:#x} where 0x30 (absent) or 0x31 (present) was expected")]
    NotMark(u8),
    /// More elements or bits than are possible.
    #[error("{count} elements, at most {limit} are possible")]
    TooMany {
        /// What the state says.
        count: u64,
        /// What is possible.
        limit: u64,
    },
    /// A bitmap has bits set behind its end.
    #[error("bit {bit} is set, past the end of a bitmap of {bits} bits")]
    BitsBeyond {
        /// The lowest such bit.
        bit: u64,
        /// Bits of the bitmap.
        bits: u64,
    },
    /// The device holds another number of elements than it says: it is broken.
    #[error("{held} elements are held instead of {count}")]
    Length {
        /// What is there.
        held: usize,
        /// What should be there.
        count: u64,
    },
    /// Too new or too old.
    #[error("version {found}; {minimum} to {maximum} are understood")]
    Version {
        /// In the stream.
        found: u32,
        /// The oldest version that is understood.
        minimum: u32,
        /// The newest.
        maximum: u32,
    },
    /// A subsection that this release does not know.
    #[error("unknown subsection {0:?}")]
    UnknownSubsection(String),
    /// A subsection that came before.
    #[error("it comes twice")]
    Twice,
    /// A hook refuses.
    #[error("{hook}: {reason}")]
    Hook {
        /// Which.
        hook: &'static str,
        /// Why.
        reason: Reason,
    },
    /// The device refuses the state as a whole, or cannot tell its own.
    #[error("{0}")]
    Device(Reason),
}
