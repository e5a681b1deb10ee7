//! `vmem-pager` with a stock QEMU that has virtio-mem devices of its own.
//!
//! [`vm`] is such a QEMU, [`verifier`] the program in its guest that notices every wrong page, [`program`] the
//! pager under test, [`pages`] compares images with memory; the steps are beside them.

pub mod pages;
pub mod program;
pub mod restore;
pub mod save;
pub mod verifier;
pub mod vm;
