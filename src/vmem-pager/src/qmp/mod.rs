//! QEMU's control socket (QMP): commands with their answers, and events.
//!
//! Every wait has a bound, and QEMU's errors are handed on word for word. One client, one thread: QEMU may
//! not answer while its main thread waits for a page, so that the thread that serves pages must not wait
//! for an answer here.

mod client;
pub mod migration;

pub use client::{Event, Qmp};
