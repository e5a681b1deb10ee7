//! What needs `unsafe`: system calls that take memory by address.

#![allow(unsafe_code, reason = "a system call; the block says why it is sound")]

mod pinned;

pub use pinned::Pinned;
