//! What a process gives up for good: its user, what it could gain, and capabilities.

use std::io;

use rustix::io::Errno;
use rustix::process::{Gid, Resource, Rlimit, Uid, geteuid, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set,
    remove_capability_from_bounding_set, set_capabilities, set_no_new_privs, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::SandboxError;
use crate::sys::user;

/// Capabilities that a kernel may have, as bits of a set.
const CAPABILITIES: u32 = 64;

/// Becomes a user, with its groups. There is one thread.
pub(crate) fn become_user(name: &str) -> Result<(), SandboxError> {
    let wrong = |reason: String| SandboxError::User { user: name.to_owned(), reason };
    let found = user::find(name).map_err(|error| wrong(error.to_string()))?;
    let user = found.ok_or_else(|| wrong("there is no such user".to_owned()))?;
    if geteuid().as_raw() == user.uid {
        return Ok(());
    }
    let (uid, gid) = (Uid::from_raw(user.uid), Gid::from_raw(user.gid));
    let groups: Vec<_> = user.groups.into_iter().map(Gid::from_raw).collect();
    set_thread_groups(&groups)
        .and_then(|()| set_thread_res_gid(gid, gid, gid))
        .and_then(|()| set_thread_res_uid(uid, uid, uid))
        .map_err(|errno| match errno {
            Errno::PERM => wrong("only root can become another user".to_owned()),
            errno => wrong(errno.to_string()),
        })
}

/// Has neither this process nor what it executes gain privileges, and leaves no core dump: it would have the
/// guest's memory in it.
pub(crate) fn give_up_gains() -> Result<(), SandboxError> {
    set_no_new_privs(true).map_err(SandboxError::failed("give up new privileges"))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) })
        .map_err(SandboxError::failed("forbid core dumps"))
}

/// Drops the capabilities of the calling thread, and those that it could inherit or gain.
pub(crate) fn drop_capabilities() -> io::Result<()> {
    match clear_ambient_capability_set() {
        Ok(()) | Err(Errno::INVAL) => {}
        Err(errno) => return Err(errno.into()),
    }
    for bit in 0..CAPABILITIES {
        match remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << bit)) {
            Ok(()) => {}
            // Past the last that this kernel has; or it takes a privilege, and none can be gained either way.
            Err(Errno::INVAL | Errno::PERM) => break,
            Err(errno) => return Err(errno.into()),
        }
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(io::Error::from)
}
