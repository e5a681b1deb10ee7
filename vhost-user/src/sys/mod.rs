//! What needs `unsafe`. This is the only folder of the package with such code.

#![allow(unsafe_code, reason = "a signal handler that mends mappings; each block says why")]

pub(crate) mod lost_memory;
