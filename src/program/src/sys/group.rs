//! Groups by name.

use std::ffi::{CString, c_char};
use std::io;
use std::ptr;

/// Bytes for the members of a group, of which none is looked at; more are tried when it says so.
const SPACE: usize = 16 << 10;
const SPACE_MAX: usize = 16 << 20;

/// The id of the group with this name, wherever the system keeps its groups; `None` when there is
/// none.
///
/// # Errors
///
/// When the system cannot say.
pub(crate) fn id_of(name: &str) -> io::Result<Option<u32>> {
    let name = CString::new(name)?;
    let mut space = vec![0 as c_char; SPACE];
    loop {
        // SAFETY: a structure of numbers and pointers, for which zeros are valid.
        let mut group: libc::group = unsafe { std::mem::zeroed() };
        let mut found = ptr::null_mut();
        // SAFETY: the name ends with a zero, `group` and `found` are writable, and `space` has
        // the length that is given. What `group` points to then is within `space`.
        let error = unsafe {
            let (at, len) = (space.as_mut_ptr(), space.len());
            libc::getgrnam_r(name.as_ptr(), &raw mut group, at, len, &raw mut found)
        };
        match error {
            0 if found.is_null() => return Ok(None),
            0 => return Ok(Some(group.gr_gid)),
            libc::ERANGE if space.len() < SPACE_MAX => space.resize(4 * space.len(), 0),
            libc::EINTR => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_group_is_found_by_its_name() {
        assert_eq!(id_of("root").unwrap(), Some(0));
        assert_eq!(id_of("no such group").unwrap(), None);
        assert!(id_of("a\0b").is_err());
    }
}
