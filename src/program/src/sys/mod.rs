//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(unsafe_code, reason = "signalfd, which no crate here wraps")]

pub mod signals;
