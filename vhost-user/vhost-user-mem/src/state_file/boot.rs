//! Which start of the host a file was written in.

use std::io;

/// Where Linux says it: a UUID that is new at each start.
const PATH: &str = "/proc/sys/kernel/random/boot_id";

/// One start of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// That of this host.
    ///
    /// # Errors
    ///
    /// When the host does not say.
    pub fn of_host() -> io::Result<Self> {
        let failed = |reason: &dyn std::fmt::Display| {
            io::Error::other(format!("cannot tell starts of the host apart by {PATH}: {reason}"))
        };
        let text = std::fs::read_to_string(PATH).map_err(|error| failed(&error))?;
        parse(text.trim()).map(Self).ok_or_else(|| failed(&"not a UUID"))
    }
}

fn parse(text: &str) -> Option<[u8; 16]> {
    let digits: String = text.chars().filter(|char| *char != '-').collect();
    let is_id = digits.len() == 32 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    let id = u128::from_str_radix(&digits, 16).ok().filter(|_| is_id)?;
    Some(id.to_be_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_host_says_which_start_it_is() {
        assert_eq!(BootId::of_host().unwrap(), BootId::of_host().unwrap());
        assert_ne!(BootId::of_host().unwrap().0, [0; 16]);
    }

    #[test]
    fn only_a_uuid_is_one() {
        let id = parse("00112233-4455-6677-8899-aabbccddeeff").unwrap();
        assert_eq!(id[..3], [0, 0x11, 0x22]);
        for text in ["", "0011", "+0112233-4455-6677-8899-aabbccddeeff", "x"] {
            assert_eq!(parse(text), None, "{text}");
        }
    }
}
