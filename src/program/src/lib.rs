//! What the programs of this project share, and what is of no guest: sizes and times as people
//! write them, sockets to listen on and who may connect, signals, the service manager, the log, metrics of
//! a process.
//!
//! ```text
//!   command line ──> size, duration ────┐
//!   systemd ───────> service_manager ───┤
//!   clients ───────> listener, access ──┼──> vhost-user-mem, vmemctl, vmem-pager ──> log, metrics
//!   signals ───────> signals ───────────┘
//! ```
//!
//! ```
//! use program::duration::parse_duration;
//! use program::size::{format_size, parse_size};
//!
//! assert_eq!(parse_size("0x40000000"), parse_size("1G"));
//! assert_eq!(format_size(3 << 29), "1.5 GiB");
//! assert_eq!(parse_duration("2m").unwrap().as_secs(), 120);
//! assert!(parse_size("1.5 apples").is_err());
//! ```

pub mod access;
pub mod duration;
pub mod listener;
pub mod log;
pub mod metrics;
pub mod service_manager;
pub mod size;
mod sys;

pub use sys::{inherited, peer, signals};
