//! Users by name.

use std::ffi::{CStr, CString, c_char};
use std::io;
use std::ptr;

/// Bytes for what the system keeps of a user; more are tried when it says so.
const SPACE: usize = 16 << 10;
const SPACE_MAX: usize = 16 << 20;
/// Groups of a user, at most.
const GROUPS_MAX: usize = 1 << 16;

/// A user as the system knows it.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) uid: u32,
    /// Its own group.
    pub(crate) gid: u32,
    /// All of its groups.
    pub(crate) groups: Vec<u32>,
}

/// The user with this name or number; `None` when there is none. A number need not be one of a user that the
/// system knows: its group has the same number then.
///
/// # Errors
///
/// When the system cannot say.
pub(crate) fn find(name: &str) -> io::Result<Option<User>> {
    let text = CString::new(name)?;
    if let Some(user) = look(|entry, space, len, found| {
        // SAFETY: the name ends with a zero; the rest is as `look` says.
        unsafe { libc::getpwnam_r(text.as_ptr(), entry, space, len, found) }
    })? {
        return Ok(Some(user));
    }
    let Ok(uid) = name.parse() else { return Ok(None) };
    let known = look(|entry, space, len, found| {
        // SAFETY: as `look` says.
        unsafe { libc::getpwuid_r(uid, entry, space, len, found) }
    })?;
    Ok(Some(known.unwrap_or(User { uid, gid: uid, groups: vec![uid] })))
}

/// Calls `ask` with an entry to fill, the space for what that points to, its length in bytes, and where to put the entry's
/// address: all writable.
fn look(
    mut ask: impl FnMut(*mut libc::passwd, *mut c_char, usize, *mut *mut libc::passwd) -> i32,
) -> io::Result<Option<User>> {
    let mut space = vec![0 as c_char; SPACE];
    loop {
        // SAFETY: a structure of numbers and pointers, for which zeros are valid.
        let mut entry: libc::passwd = unsafe { std::mem::zeroed() };
        let mut found = ptr::null_mut();
        match ask(&raw mut entry, space.as_mut_ptr(), space.len(), &raw mut found) {
            0 if found.is_null() => return Ok(None),
            // What says that there is none, on some systems.
            libc::ENOENT | libc::ESRCH => return Ok(None),
            0 => {
                // SAFETY: found, the name is a text in `space` that ends with a zero.
                let name = unsafe { CStr::from_ptr(entry.pw_name) };
                let (uid, gid) = (entry.pw_uid, entry.pw_gid);
                return Ok(Some(User { uid, gid, groups: groups_of(name, gid)? }));
            }
            libc::ERANGE if space.len() < SPACE_MAX => space.resize(4 * space.len(), 0),
            libc::EINTR => {}
            error => return Err(io::Error::from_raw_os_error(error)),
        }
    }
}

fn groups_of(name: &CStr, gid: u32) -> io::Result<Vec<u32>> {
    let mut groups = vec![0; 64];
    loop {
        let mut count = i32::try_from(groups.len()).unwrap_or(i32::MAX);
        // SAFETY: the name ends with a zero, and there is room for `count` groups.
        let done =
            unsafe { libc::getgrouplist(name.as_ptr(), gid, groups.as_mut_ptr(), &raw mut count) };
        if done >= 0 {
            groups.truncate(usize::try_from(count).unwrap_or(0));
            return Ok(groups);
        }
        if groups.len() >= GROUPS_MAX {
            return Err(io::Error::other("the user is in too many groups"));
        }
        groups.resize(4 * groups.len(), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn users_are_found_by_name_and_by_number() {
        let root = find("root").unwrap().unwrap();
        assert_eq!((root.uid, root.gid), (0, 0));
        assert!(root.groups.contains(&0));
        assert_eq!(find("0").unwrap(), Some(root));
        assert_eq!(find("no such user").unwrap(), None);
        let stranger = User { uid: 3_000_000, gid: 3_000_000, groups: vec![3_000_000] };
        assert_eq!(find("3000000").unwrap(), Some(stranger));
        assert!(find("a\0b").is_err());
    }
}
