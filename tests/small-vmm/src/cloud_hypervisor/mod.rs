//! A Cloud Hypervisor, as an offload daemon meets it: the sending and the receiving end of its local migration.
//!
//! Both behave as the stock one does (54.0-dev at ae44c2971), which checks little, and each has switches, its
//! `Trap`s, for what peers do that are wrong, or slow, or end. [`guest`] is the VM that is sent, [`source`] is
//! `send-migration` with `local=on`, [`receiver`] is `receive-migration`, and [`faults`] is how a receiver
//! with `memory_mode=postcopy` asks for pages. The codecs of [`frames`] are our own, so that wrong messages can be sent.

pub mod faults;
pub mod frames;
pub mod guest;
pub mod receiver;
pub mod source;

pub use frames::Command;
pub use guest::{Guest, content};
