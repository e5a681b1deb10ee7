//! The bodies of the fuzz targets, each a function of the bytes that the fuzzer makes up.
//!
//! Each reads the bytes as what one hostile party may do, does it, and panics when a promise is
//! broken. They need no fuzzer: `tests/smoke.rs` runs them over the seeds and over random bytes.

pub mod api_bodies;
pub mod discard_channel;
pub mod guest_chains;
pub mod guest_requests;
mod input;
pub mod migration_stream;
pub mod page_channels;
pub mod pager_cloud_hypervisor;
pub mod pager_firecracker;
pub mod pager_restore;
pub mod pager_save;
pub mod postcopy_stream;
pub mod seeds;
pub mod state_file;
pub mod vhost_user_stream;

/// The body of a target.
pub type Body = fn(&[u8]);

/// All targets by name.
pub const TARGETS: [(&str, Body); 13] = [
    ("guest_requests", guest_requests::run),
    ("guest_chains", guest_chains::run),
    ("vhost_user_stream", vhost_user_stream::run),
    ("api_bodies", api_bodies::run),
    ("state_file", state_file::run),
    ("migration_stream", migration_stream::run),
    ("page_channels", page_channels::run),
    ("postcopy_stream", postcopy_stream::run),
    ("discard_channel", discard_channel::run),
    ("pager_firecracker", pager_firecracker::run),
    ("pager_save", pager_save::run),
    ("pager_restore", pager_restore::run),
    ("pager_cloud_hypervisor", pager_cloud_hypervisor::run),
];
