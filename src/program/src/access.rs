//! Who may connect to a program's sockets, as a command line says it.

use crate::size::parse_size;
use crate::sys::group;

/// Permission bits in octal.
///
/// # Errors
///
/// The rule, when the text is not that.
pub fn parse_mode(text: &str) -> Result<u32, &'static str> {
    let rule = "not permission bits in octal, from 0 to 0777";
    let digits = text.strip_prefix("0o").unwrap_or(text);
    let is_octal = !digits.is_empty() && digits.bytes().all(|digit| (b'0'..=b'7').contains(&digit));
    let mode = u32::from_str_radix(digits, 8).ok().filter(|&mode| is_octal && mode <= 0o777);
    mode.ok_or(rule)
}

/// The id of a group: of a name wherever the system keeps its groups, or a number.
///
/// # Errors
///
/// When there is no such group, or the system cannot say.
pub fn find_group(text: &str) -> Result<u32, String> {
    // A name may consist of digits, too.
    match group::id_of(text) {
        Ok(Some(id)) => Ok(id),
        Ok(None) => group_number(text).ok_or_else(|| "there is no such group".to_owned()),
        Err(error) => Err(format!("cannot look for the group: {error}")),
    }
}

/// The id of a group that is given as a number.
pub fn group_number(text: &str) -> Option<u32> {
    parse_size(text).ok().and_then(|number| number.try_into().ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_are_octal_and_permissions_alone() {
        for (text, mode) in [("0600", 0o600), ("660", 0o660), ("0o777", 0o777), ("0", 0)] {
            assert_eq!(parse_mode(text), Ok(mode), "{text}");
        }
        for text in ["", "0800", "+7", "1777", "-1", "0x10", "rw", "7 "] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn groups_have_names_and_numbers() {
        assert_eq!(find_group("root"), Ok(0));
        assert_eq!(find_group("54321"), Ok(54321));
        assert_eq!(find_group("no-such-group"), Err("there is no such group".to_owned()));
        assert_eq!(find_group("4294967296"), Err("there is no such group".to_owned()));
    }
}
