//! What needs `unsafe`: system calls that no crate wraps safely.
//!
//! This is the only folder of the crate with `unsafe` code.

#![allow(unsafe_code, reason = "system calls; each block says why it is sound")]

pub mod unread;
pub mod writeback;
