//! What the programs of this project share, and what is of no guest: sizes and times as people
//! write them, sockets to listen on, signals, the service manager.

pub mod duration;
pub mod listener;
pub mod service_manager;
pub mod size;
mod sys;

pub use sys::{inherited, peer, signals};
