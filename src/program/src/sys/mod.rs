//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(
    unsafe_code,
    reason = "signalfd and SO_PEERPIDFD, which no crate here wraps; descriptors that are known by \
              number"
)]

pub mod inherited;
pub mod peer;
pub mod signals;
