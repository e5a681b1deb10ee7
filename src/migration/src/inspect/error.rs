//! Why reading ended early, and what is odd about what was read.

use std::fmt;
use std::io;

use thiserror::Error;
use vmstate::wire::WireError;

use crate::stream::FormatError;

/// Why a file could not be read to its end.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum InspectError {
    /// The file cannot be read at all.
    #[error("cannot read the file: {0}")]
    Io(#[from] io::Error),
    /// It is no migration stream, or a damaged one.
    #[error(transparent)]
    Format(FormatError),
    /// Sections of devices have no length, and nothing says what is in this one.
    #[error(
        "section {idstr:?} (instance {instance_id}) at byte {offset:#x}: {}, so nothing tells \
         where it ends",
        if *.described { "the description does not have it" } else { "the file has no description" }
    )]
    Undescribed {
        /// Bytes from the start of the file, of the section.
        offset: u64,
        /// Its id string.
        idstr: String,
        /// Its instance.
        instance_id: u32,
        /// Whether there is a description of other sections.
        described: bool,
    },
    /// A section goes on that never began.
    #[error(
        "byte {offset:#x}: section {section_id} continues without a start, or is not iterative"
    )]
    UnknownSection {
        /// Bytes from the start of the file.
        offset: u64,
        /// Its number.
        section_id: u32,
    },
    /// A section is not as it is described.
    #[error("byte {offset:#x}: {what} of {name:?} is not as described")]
    Mismatch {
        /// Bytes from the start of the file.
        offset: u64,
        /// What differs.
        what: &'static str,
        /// Name of the field or structure.
        name: String,
    },
    /// A page is of a block that the list does not have.
    #[error("byte {offset:#x}: a page of RAM block {id:?}, which the list of blocks does not have")]
    UnknownBlock {
        /// Bytes from the start of the file.
        offset: u64,
        /// Id of the block.
        id: String,
    },
    /// Something that QEMU can write, and this does not read.
    #[error("byte {offset:#x}: {what} are not supported")]
    Unsupported {
        /// Bytes from the start of the file.
        offset: u64,
        /// What.
        what: &'static str,
    },
    /// More than is held at once.
    #[error("byte {offset:#x}: more than {limit} {what}")]
    TooMany {
        /// Bytes from the start of the file.
        offset: u64,
        /// Of what.
        what: &'static str,
        /// The limit.
        limit: u64,
    },
}

impl From<FormatError> for InspectError {
    fn from(error: FormatError) -> Self {
        match error {
            FormatError::Unsupported { offset, what } => Self::Unsupported { offset, what },
            error => Self::Format(error),
        }
    }
}

impl From<WireError> for InspectError {
    fn from(error: WireError) -> Self {
        Self::Format(error.into())
    }
}

/// What is odd about a file that could be read. Sizes and offsets are in bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Warning {
    /// Pages lie in memory that is discarded: they should not have been sent, and a destination
    /// that loads them has memory that must not be used.
    DiscardedPages {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// Id of its RAM block.
        block: String,
        /// Pages with content.
        normal: u64,
        /// Pages of zeros.
        zero: u64,
        /// The first of them, from the start of the block.
        first: u64,
    },
    /// The plugged size is not that of the plugged blocks.
    PluggedSize {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// What the device says.
        size: u64,
        /// What the bitmap adds up to.
        counted: u64,
    },
    /// Blocks beyond the region are marked as plugged.
    BeyondRegion {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// How many.
        blocks: u64,
    },
    /// Blocks beyond the usable region are plugged.
    BeyondUsable {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// End of the last plugged block.
        end: u64,
        /// The usable region.
        usable: u64,
    },
    /// The bitmap has another size than the geometry asks for.
    BitmapSize {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// Its size.
        found: u64,
        /// What it should be.
        expected: u64,
    },
    /// A size or address breaks a rule.
    Rule {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// What.
        what: &'static str,
        /// Its value.
        value: u64,
        /// The rule.
        rule: &'static str,
    },
    /// No RAM block, or more than one, could be the device's.
    NoBlock {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
        /// What the size of its block should be.
        region_size: u64,
    },
    /// A virtio-mem device without an early section: its blocks are not read.
    NoEarlySection {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
    },
    /// The sizes that follow RAM could not be found in QEMU's state of the device.
    NoSizes {
        /// Path of the device, "virtio-mem" when it has none.
        device: String,
    },
    /// A package was passed over: without a description its sections cannot be told apart.
    PackageSkipped {
        /// Where it starts.
        offset: u64,
        /// Its length.
        len: u64,
    },
    /// A package does not end where one of its records does.
    PackageEnd {
        /// Where it should end.
        offset: u64,
    },
    /// Bytes follow the end of the stream.
    Trailing {
        /// Where they start.
        offset: u64,
        /// How many they are.
        len: u64,
    },
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DiscardedPages { device, block, normal, zero, first } => write!(
                f,
                "{device}: {normal} normal and {zero} zero pages of block {block:?} lie in \
                 discarded memory, the first at {first:#x}"
            ),
            Self::PluggedSize { device, size, counted } => {
                write!(f, "{device}: size is {size:#x}, but the plugged blocks are {counted:#x}")
            }
            Self::BeyondRegion { device, blocks } => {
                write!(f, "{device}: {blocks} blocks beyond the region are marked as plugged")
            }
            Self::BeyondUsable { device, end, usable } => {
                write!(f, "{device}: plugged up to {end:#x}, but usable is only {usable:#x}")
            }
            Self::BitmapSize { device, found, expected } => {
                write!(f, "{device}: a bitmap of {found} bytes, where {expected} are needed")
            }
            Self::Rule { device, what, value, rule } => {
                write!(f, "{device}: {what} {value:#x} is not {rule}")
            }
            Self::NoBlock { device, region_size } => {
                write!(f, "{device}: no single RAM block of {region_size:#x} bytes can be its own")
            }
            Self::NoEarlySection { device } => {
                write!(
                    f,
                    "{device}: a virtio-mem without an early section; its blocks are not read"
                )
            }
            Self::NoSizes { device } => {
                write!(f, "{device}: the usable and the requested size were not found")
            }
            Self::PackageSkipped { offset, len } => {
                write!(f, "a package of {len} bytes at {offset:#x} is passed over: no description")
            }
            Self::PackageEnd { offset } => {
                write!(f, "the package that should end at {offset:#x} ends elsewhere")
            }
            Self::Trailing { offset, len } => {
                write!(f, "{len} bytes follow the end of the stream at {offset:#x}")
            }
        }
    }
}
