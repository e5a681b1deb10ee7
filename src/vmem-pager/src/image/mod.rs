//! An image: one file in QEMU's mapped-ram layout.
//!
//! [`writer`] writes it while pages arrive in any order; [`reader`] reads it, and what QEMU itself wrote.
//! The layout is drawn in `spec-notes/stream.md`.

pub mod pages;
pub mod reader;
mod write_out;
pub mod writer;

pub(crate) use reader::is_zero;
pub use reader::{Discards, GuestImage, ImageBlock, PageReader};
