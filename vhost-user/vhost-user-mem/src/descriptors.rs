//! How many file descriptors there are.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors that are not for memory regions: sockets of all kinds, rings, the log.
const RESERVED: u64 = 256;
/// The crate and the device have one each for a region.
const EACH: u64 = 2;
/// Regions that every front-end needs.
const SLOTS_MIN: u64 = 8;

/// Allows this process as many as the system lets it have: the usual soft limit of 1024 is one for
/// programs that use `select`.
pub fn raise_limit() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::warn!(%error, "cannot raise the limit of open files");
    }
}

/// Regions of memory that there are descriptors for.
pub fn memory_slots() -> u64 {
    slots(getrlimit(Resource::Nofile).current)
}

fn slots(limit: Option<u64>) -> u64 {
    limit.map_or(u64::MAX, |limit| (limit.saturating_sub(RESERVED) / EACH).max(SLOTS_MIN))
}

#[cfg(test)]
mod tests {
    use super::slots;

    #[test]
    fn slots_follow_the_limit() {
        assert_eq!(slots(None), u64::MAX);
        assert_eq!([1024, 700, 256, 0].map(|limit| slots(Some(limit))), [384, 222, 8, 8]);
    }
}
