//! What the programs of this project share, and what is of no guest: sizes and times as people
//! write them, sockets to listen on, signals.

pub mod duration;
pub mod listener;
pub mod size;
mod sys;

pub use sys::signals;
