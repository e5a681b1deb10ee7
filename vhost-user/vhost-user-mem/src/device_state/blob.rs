//! The state as bytes: two sections of VMState in a frame.
//!
//! | bytes | what |
//! | --- | --- |
//! | 8 | magic, "VMEMDEVS" |
//! | be32 | version of the frame, 1 |
//! | be32 | number of sections, 2 |
//! | per section: u8, bytes | length of the name, name |
//! | be32, be64, bytes | version of the section, length of its fields, fields |
//! | be32 | CRC-32 (IEEE) of everything before |
//!
//! The sections are those of `virtio_mem::sections`, in order.

use thiserror::Error;
use virtio_mem::controller::MemController;
use virtio_mem::device::{DeviceState, Geometry};
use virtio_mem::sections::{EARLY, NORMAL, VirtioMemState, properties};
use vmstate::wire::{WireError, WireRead, WireReader, WireWrite};
use vmstate::{VmState, VmStateError};

const MAGIC: &[u8; 8] = b"VMEMDEVS";
const VERSION: u32 = 1;
/// Everything but the bitmap, generously.
const FRAME_MAX: u64 = 4096;

/// Why saved state is refused.
#[derive(Debug, Error)]
pub enum BlobError {
    /// Something else was sent.
    #[error("it does not start as the state of a virtio-mem device")]
    Magic,
    /// Another version of the frame.
    #[error("version {found}; only {VERSION} is understood")]
    Version {
        /// The version sent.
        found: u32,
    },
    /// Another number of sections.
    #[error("{found} sections instead of {}", SECTIONS.len())]
    Sections {
        /// The number sent.
        found: u32,
    },
    /// Another section.
    #[error("section {found:?} instead of {expected:?}")]
    Section {
        /// The section sent.
        found: String,
        /// The section that was to come.
        expected: &'static str,
    },
    /// A section of another length than it says.
    #[error("section {section:?} has {found} bytes, and says {stated}")]
    Length {
        /// The section.
        section: &'static str,
        /// Its length.
        found: u64,
        /// The length it says.
        stated: u64,
    },
    /// A section is refused.
    #[error(transparent)]
    State(#[from] VmStateError),
    /// It ends too early.
    #[error(transparent)]
    Wire(#[from] WireError),
    /// It was changed on its way.
    #[error("its checksum is wrong")]
    Checksum,
    /// Bytes follow its end.
    #[error("bytes follow its end")]
    Trailing,
    /// More than any state of this device.
    #[error("it is longer than {limit} bytes")]
    TooLong {
        /// The most that is read, bytes.
        limit: u64,
    },
}

/// A section and its name in the frame.
const SECTIONS: [(&str, &VmState<VirtioMemState>); 2] =
    [("virtio-mem-device-early", &EARLY), ("virtio-mem", &NORMAL)];
/// The version that is saved of either.
const SECTION_VERSION: u32 = 1;

/// The most bytes that a state of this geometry has.
pub fn limit(geometry: &Geometry) -> u64 {
    (geometry.nr_blocks() as u64).div_ceil(64) * 8 + FRAME_MAX
}

/// The device's state, of one moment.
///
/// # Errors
///
/// When it cannot be told.
pub fn encode(controller: &MemController) -> Result<Vec<u8>, VmStateError> {
    let mut state = VirtioMemState::of(controller);
    let mut out = MAGIC.to_vec();
    out.put_be32(VERSION);
    out.put_be32(SECTIONS.len() as u32);
    for (name, vmstate) in SECTIONS {
        let mut fields = Vec::new();
        vmstate.save(&mut state, &properties(), &mut fields)?;
        out.put_name(name);
        out.put_be32(SECTION_VERSION);
        out.put_be64(fields.len() as u64);
        out.put(&fields);
    }
    let sum = crc32fast::hash(&out);
    out.put_be32(sum);
    Ok(out)
}

/// Checks a state against the device, and gives what [`MemController::load_state`] takes. More
/// bytes than [`limit`] are refused, for a reason that names what differs if the geometry does.
///
/// # Errors
///
/// The first thing that is wrong.
pub fn decode(controller: &MemController, bytes: &[u8]) -> Result<DeviceState, BlobError> {
    let limit = limit(controller.geometry());
    let mut state = VirtioMemState::of(controller);
    let read = read_sections(&mut WireReader::new(bytes), &mut state);
    match read {
        Err(error @ (BlobError::State(_) | BlobError::Magic)) => return Err(error),
        _ if bytes.len() as u64 > limit => return Err(BlobError::TooLong { limit }),
        read => {
            let end = usize::try_from(read?).unwrap_or(usize::MAX);
            let (framed, rest) = bytes.split_at_checked(end).ok_or(BlobError::Trailing)?;
            let (sum, rest) = rest.split_first_chunk().ok_or_else(|| {
                let (offset, what) = (bytes.len() as u64, "the checksum");
                BlobError::Wire(WireError::Truncated { offset, what })
            })?;
            if u32::from_be_bytes(*sum) != crc32fast::hash(framed) {
                return Err(BlobError::Checksum);
            }
            if !rest.is_empty() {
                return Err(BlobError::Trailing);
            }
        }
    }
    Ok(state.into_device())
}

/// Reads all but the checksum, and says where that starts.
fn read_sections(
    reader: &mut WireReader<&[u8]>,
    state: &mut VirtioMemState,
) -> Result<u64, BlobError> {
    let mut magic = [0; MAGIC.len()];
    reader.read_exact(&mut magic, "the magic of the state")?;
    if magic != *MAGIC {
        return Err(BlobError::Magic);
    }
    let found = reader.be32("the version of the state")?;
    if found != VERSION {
        return Err(BlobError::Version { found });
    }
    let found = reader.be32("the number of sections")?;
    if found as usize != SECTIONS.len() {
        return Err(BlobError::Sections { found });
    }
    for (expected, vmstate) in SECTIONS {
        let found = reader.name("the name of a section")?;
        if found != expected {
            return Err(BlobError::Section { found, expected });
        }
        let version = reader.be32("the version of a section")?;
        let stated = reader.be64("the length of a section")?;
        let start = reader.offset();
        vmstate.load(state, version, &properties(), reader)?;
        let found = reader.offset() - start;
        if found != stated {
            return Err(BlobError::Length { section: expected, found, stated });
        }
    }
    Ok(reader.offset())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use virtio_mem::controller::InitialState;
    use virtio_mem::device::VirtioMem;

    const BLOCK: u64 = 1 << 20;
    const ADDR: u64 = 1 << 32;

    fn controller(nr: u64, plugged: Vec<u64>) -> MemController {
        let geometry = Geometry::new(ADDR, nr * BLOCK, BLOCK, None).unwrap();
        let state =
            DeviceState { requested_size: 3 * BLOCK, usable_region_size: nr * BLOCK, plugged };
        MemController::new(InitialState::volatile(VirtioMem::restore(geometry, state).unwrap()))
    }

    fn sample() -> MemController {
        controller(100, vec![0b1011, 1 << 35])
    }

    fn empty() -> MemController {
        controller(100, vec![0, 0])
    }

    #[test]
    fn the_frame_has_these_bytes() {
        let bytes = encode(&sample()).unwrap();
        #[rustfmt::skip]
        let expected: &[&[u8]] = &[
            b"VMEMDEVS",
            &[0, 0, 0, 1, 0, 0, 0, 2],
            b"\x17virtio-mem-device-early",
            &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 52],
            &[0, 0, 0, 1, 0, 0, 0, 0],          // addr
            &[0, 0, 0, 0, 0x06, 0x40, 0, 0],    // region_size
            &[0, 0, 0, 0, 0, 0x10, 0, 0],       // block_size
            &[0, 0, 0, 0],                      // node
            &[0, 0, 0, 0, 0, 0x40, 0, 0],       // size
            &[0, 0, 0, 0, 0, 0, 0, 0b1011],
            &[0, 0, 0, 8, 0, 0, 0, 0],
            b"\x0avirtio-mem",
            &[0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0, 16],
            &[0, 0, 0, 0, 0x06, 0x40, 0, 0],    // usable_region_size
            &[0, 0, 0, 0, 0, 0x30, 0, 0],       // requested_size
        ];
        let expected = expected.concat();
        assert_eq!(bytes[..bytes.len() - 4], expected);
        assert_eq!(bytes[expected.len()..], crc32fast::hash(&expected).to_be_bytes());
        assert_eq!(decode(&empty(), &bytes).unwrap(), sample().save_state());
    }

    #[test]
    fn another_geometry_is_named_however_long_the_state_is() {
        for nr in [50, 101, 1 << 20] {
            let words = usize::try_from(nr).unwrap().div_ceil(64);
            let mut bytes = encode(&controller(nr, vec![0; words])).unwrap();
            bytes.truncate(usize::try_from(limit(empty().geometry())).unwrap() + 1);
            let error = decode(&empty(), &bytes).unwrap_err().to_string();
            let expected = format!(
                "field region_size at byte 0x3c: {} in the stream, 104857600 here",
                nr * BLOCK
            );
            assert!(error.ends_with(&expected), "{error}");
        }
    }

    #[test]
    fn what_is_too_long_is_refused() {
        let mut bytes = encode(&sample()).unwrap();
        bytes.push(0);
        assert!(matches!(decode(&empty(), &bytes), Err(BlobError::Trailing)));
        bytes.resize(8192, 0);
        assert!(matches!(decode(&empty(), &bytes), Err(BlobError::TooLong { .. })));
    }

    proptest! {
        #[test]
        fn what_is_cut_or_changed_is_refused(at: prop::sample::Index, bits in 1u8..) {
            let mut bytes = encode(&sample()).unwrap();
            let at = at.index(bytes.len());
            prop_assert!(decode(&empty(), &bytes[..at]).is_err());
            bytes[at] ^= bits;
            prop_assert!(decode(&empty(), &bytes).is_err());
        }

        #[test]
        fn any_bytes_are_refused(bytes: Vec<u8>) {
            prop_assert!(decode(&empty(), &bytes).is_err());
        }
    }
}
