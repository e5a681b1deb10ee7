//! What needs `unsafe`: words that are shared with another process.
//!
//! This is the only folder of the crate with `unsafe` code.

#![allow(unsafe_code, reason = "mappings; each block says why it is sound")]

mod shared_words;

pub use shared_words::{ReadOnlyWords, SharedWords};
