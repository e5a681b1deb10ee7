//! State of devices that comes as a package: the source gives the guest away before all pages are sent.

use migration::stream::{Command, Record, read_record};
use vmstate::wire::{WireRead, WireReader};

use crate::error::PagerError;

/// Bytes of a package; QEMU refuses to send larger ones.
pub(super) const PACKAGE_MAX: u64 = 64 << 20;

/// `08`, type and length (be16), and the value of a PING.
const PING_LEN: usize = 9;
const PING_HEAD: [u8; 5] = [0x08, 0, 2, 0, 4];
/// The command by which the guest runs: no data.
const RUN: [u8; 5] = [0x08, 0, 5, 0, 0];
/// Type and section number.
const FOOTER_LEN: usize = 5;
const FOOTER: u8 = 0x7e;
/// More than QEMU sends.
const PINGS_MAX: usize = 8;

/// A package: LISTEN, sections of devices, PINGs, RUN.
#[derive(Debug, Default)]
pub(super) struct Package {
    bytes: Vec<u8>,
    /// Where the sections begin and end.
    start: usize,
    end: usize,
    pings: Vec<u32>,
}

impl Package {
    /// The sections alone, from a package that was taken before.
    pub fn of_state(state: &[u8]) -> Self {
        Self { bytes: state.to_vec(), start: 0, end: state.len(), pings: Vec::new() }
    }

    /// Finds the sections in a package. They have no length, so that what follows them is found from the end.
    ///
    /// # Errors
    ///
    /// When it is not made of these parts.
    pub fn parse(bytes: Vec<u8>) -> Result<Self, PagerError> {
        let failed = |what: &str| PagerError::Protocol(format!("the package of devices {what}"));
        let mut reader = WireReader::new(&bytes[..]);
        if !matches!(read_record(&mut reader), Ok(Record::Command(Command::PostcopyListen))) {
            return Err(failed("does not begin with LISTEN"));
        }
        let start = reader.offset() as usize;
        let Some(mut rest) = bytes[start..].strip_suffix(&RUN) else {
            return Err(failed("does not end with RUN"));
        };
        let mut pings = Vec::new();
        while let Some((before, ping)) = rest.split_at_checked(rest.len().wrapping_sub(PING_LEN)) {
            let Some(value) = ping.strip_prefix(&PING_HEAD).and_then(|value| value.first_chunk())
            else {
                break;
            };
            if pings.len() == PINGS_MAX {
                return Err(failed("has too many PINGs"));
            }
            pings.push(u32::from_be_bytes(*value));
            rest = before;
        }
        pings.reverse();
        let footer = rest.len().checked_sub(FOOTER_LEN).map(|at| rest[at]);
        if footer != Some(FOOTER) {
            return Err(failed("has no section of a device, or one without an end"));
        }
        let end = start + rest.len();
        Ok(Self { bytes, start, end, pings })
    }

    /// The sections of devices.
    pub fn state(&self) -> &[u8] {
        &self.bytes[self.start..self.end]
    }

    /// The PINGs after them, to be answered once the sections are taken over.
    pub fn pings(&self) -> &[u32] {
        &self.pings
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTEN: &[u8] = &[8, 0, 4, 0, 0];
    const SECTION: &[u8] = b"\x04state\x7e\0\0\0\x09";

    fn parse(parts: &[&[u8]]) -> Result<Package, PagerError> {
        Package::parse(parts.concat())
    }

    #[test]
    fn sections_and_pings_are_told_apart() {
        let pings: &[u8] = b"\x08\0\x02\0\x04\0\0\0\x03\x08\0\x02\0\x04\0\0\0\x42";
        let package = parse(&[LISTEN, SECTION, pings, &RUN]).unwrap();
        assert_eq!((package.state(), package.pings()), (SECTION, &[3, 0x42][..]));
        let package = parse(&[LISTEN, SECTION, &RUN]).unwrap();
        assert_eq!((package.state(), package.pings()), (SECTION, &[][..]));
    }

    #[test]
    fn other_packages_are_refused() {
        let ping: &[u8] = b"\x08\0\x02\0\x04\0\0\0\x03";
        let many = ping.repeat(PINGS_MAX + 1);
        let nested: &[u8] = b"\x08\0\x07\0\x04\0\0\0\x10";
        for parts in [
            &[SECTION, &RUN][..],
            &[LISTEN, SECTION],
            &[LISTEN, &RUN],
            &[LISTEN, ping, &RUN],
            &[LISTEN, SECTION, &many, &RUN],
            &[LISTEN, nested, &RUN],
            &[LISTEN],
            &[],
        ] {
            assert!(parse(parts).is_err(), "{parts:x?}");
        }
    }
}
