//! `vmem-pager`: saves and restores guests of stock VMMs, by the migration protocols that they have.
//!
//! ```text
//!            migrate (QEMU), offload (Cloud Hypervisor)
//!   VMM ───────────────────────────────────────────────> save ──┐
//!                                                               │  image: mapped-ram, holes where
//!   VMM <─────────────────────────────────────────────── restore ┘  memory is absent or discarded
//!    │    state at once, then pages: those that are touched,
//!    │    those that were touched last time, all others
//!    └──> page faults: postcopy requests (QEMU), fault connection (Cloud Hypervisor),
//!         userfaultfd (Firecracker)
//! ```
//!
//! - [`cli`]: the command line, and what is told while it runs.
//! - [`qemu`]: the two ends of QEMU's migration: [`save`](qemu::save) is the destination of
//!   `migrate`, [`restore`](qemu::restore) a source of postcopy.
//! - [`cloud_hypervisor`]: Cloud Hypervisor's local migration, in both roles.
//! - [`firecracker`]: the page-fault handler of Firecracker's snapshots.
//! - [`qmp`]: QEMU's control socket.
//! - [`image`]: the file that a guest is saved to and restored from.
//! - [`working_set`]: the order in which a guest touches its memory.
//! - [`run`]: the end of a run: a signal, a time that has passed. [`socket`]: where VMMs are met.
//! - [`metrics`]: what scrapers are told.
//! - [`confinement`]: which system calls the pager makes, and what it reaches.
//!
//! ```
//! use clap::Parser;
//! use vmem_pager::cli::args::{Args, Command, Vmm};
//!
//! let words = "vmem-pager restore --vmm qemu --socket vm.sock --image guest.img --bandwidth 64M";
//! let Command::Restore(args) = Args::try_parse_from(words.split(' '))?.command else { unreachable!() };
//! assert_eq!((args.common.vmm, args.bandwidth), (Vmm::Qemu, Some(64 << 20)));
//! # Ok::<(), clap::Error>(())
//! ```

#![deny(clippy::print_stdout, clippy::print_stderr)]

#[cfg(test)]
#[path = "../../../tests/common/huge_page_pool.rs"]
mod huge_page_pool;

pub mod cli;
pub mod cloud_hypervisor;
pub mod confinement;
pub mod error;
pub mod firecracker;
pub mod image;
pub mod metrics;
pub mod qemu;
pub mod qmp;
pub mod run;
pub mod socket;
mod sys;
pub mod working_set;

pub use error::PagerError;
