//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(
    unsafe_code,
    reason = "signalfd, SO_PEERPIDFD and getgrnam_r, which no crate here wraps; descriptors that are known by \
              number"
)]

pub(crate) mod group;
pub mod inherited;
pub mod peer;
pub mod signals;
