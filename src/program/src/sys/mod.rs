//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(unsafe_code, reason = "signalfd, SO_PEERPIDFD and inherited descriptors")]

pub mod inherited;
pub mod peer;
pub mod signals;
