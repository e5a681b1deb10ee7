//! The device's state on its way to or from another daemon (DEVICE_STATE).
//!
//! [`blob`] is what is sent, [`transfer`] how: in a thread of its own, so that no front-end holds
//! up the connection by what it does with its end of the pipe. See `spec-notes/device-state.md`.

pub mod blob;
pub mod transfer;
