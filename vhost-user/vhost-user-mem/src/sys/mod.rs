//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(
    unsafe_code,
    reason = "mappings that are replaced, one of them by a signal handler; calls of libc that no \
              crate here wraps; each block says why"
)]

pub(crate) mod guest_memory;
pub(crate) mod lost_memory;
pub(crate) mod peer_cred;
