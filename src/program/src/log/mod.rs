//! Lines that tell what happens, for which no thread of a program ever waits.
//!
//! - [`Queue`]: bounded, to a thread that alone writes. Lines that do not fit, or that are not taken, are lost,
//!   counted, and told once there is room again.
//! - [`Form`]: how lines look, as text or JSON, on a terminal or in the journal.
//! - [`Limit`]: lines of one [`Kind`] in a row, told one by one at first and then as a count, since guests and peers
//!   cause many of them.
//! - [`Stderr`] and [`Stdout`]: where they go.

mod form;
mod limit;
mod queue;
mod standard;

use clap::ValueEnum;

pub use form::{Form, is_journal};
pub use limit::{FIRST, KINDS, Kind, Limit};
pub use queue::Queue;
pub use standard::{Stderr, Stdout, say};

/// What lines are written as.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// An object a line: timestamp, level, target, and fields, of which message is one.
    Json,
}
