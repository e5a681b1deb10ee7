//! Boots a real Linux on a stock QEMU, with the daemon as its virtio-mem device, and proves that
//! what the device says is what the guest sees and what the host pays for.
//!
//! Others who need a stock QEMU with a guest use [`provision`], [`qemu`], [`own_device`] and [`guest`];
//! with the daemon as its device, [`machine`].

pub mod api;
pub mod daemon;
pub mod guest;
pub mod initramfs;
pub mod machine;
pub mod options;
pub mod own_device;
pub mod pager;
pub mod process;
pub mod provision;
pub mod qemu;
pub mod qmp;
pub mod relay;
pub mod report;
pub mod run;
pub mod sizes;
pub mod steps;
pub mod vhost_message;
pub mod wait;
