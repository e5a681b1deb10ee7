//! QEMU's migration protocol, version 3, with an unmodified QEMU on the other side.
//!
//! Drawn byte by byte in `spec-notes/pager-qemu-save.md` and `spec-notes/pager-qemu-restore.md`.

pub mod restore;
pub mod save;
