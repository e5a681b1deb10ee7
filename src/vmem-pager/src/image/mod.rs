//! An image: one file in QEMU's mapped-ram layout.
//!
//! [`writer`] writes it while pages arrive in any order. The layout is drawn in `spec-notes/stream.md`.

pub mod pages;
pub mod writer;
