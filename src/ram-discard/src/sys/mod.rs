//! What needs `unsafe`: mappings of guest memory.
//!
//! This is the only folder of the crate with `unsafe` code. Guest memory is shared with a running
//! guest, so it is never a Rust slice: it is read and written by volatile or atomic accesses, or
//! handed to the kernel by address.

#![allow(unsafe_code, reason = "system calls and mappings; each block says why it is sound")]

#[cfg(test)]
mod leases;
pub(crate) mod mapping;
pub(crate) mod page_cache;

pub use mapping::HostMapping;
