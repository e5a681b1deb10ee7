//! A small VMM, for tests and for a demonstration: the front-end of a vhost-user memory device.
//!
//! It owns guest memory ([`memory`]), speaks vhost-user ([`connection`], [`frontend`],
//! [`backend_channel`], [`device_state`]), and has a guest inside that drives the device's queue ([`split_ring`],
//! [`driver`], [`guest_driver`]) and uses the memory it gets ([`vcpu`]). The daemon is a separate
//! process ([`daemon`]), managed through its API ([`api`]). The codecs are our own, so that wrong
//! messages can be sent and replies be seen as they are.
//!
//! [`machine`] puts these together; [`migration`] moves a machine's guest to another one, and
//! [`guest`] is the process that does what it is told. [`soak`] does all of it at once, at random.
//! [`dma`] is a user of the guest's memory beside the guest.
//!
//! [`cloud_hypervisor`] is another VMM, as a pager meets it: both ends of its local migration, with switches for what
//! goes wrong. [`firecracker`] is a third one: its memory, as a page-fault handler fills it.

pub mod api;
pub mod backend_channel;
pub mod cloud_hypervisor;
pub mod config;
pub mod connection;
pub mod daemon;
pub mod demo;
pub mod device_state;
pub mod dma;
pub mod driver;
pub mod firecracker;
pub mod frontend;
pub mod guest;
pub mod guest_driver;
pub mod machine;
pub mod memory;
pub mod migration;
pub mod process;
pub mod protocol;
pub mod relay;
pub mod soak;
pub mod split_ring;
mod sys;
pub mod vcpu;
