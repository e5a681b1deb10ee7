//! How a migration to another host failed, and where the guest is then.

use std::fmt;

use thiserror::Error;

use crate::error::MigrationError;

/// Where the guest is after a migration that failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GuestAfter {
    /// It runs here, with all of its memory.
    RunsHere,
    /// It is stopped here, with all of its memory: it could not be let run, which may be tried again.
    StoppedHere,
    /// It has left: the destination has it, or it is lost. What is here is old, and must not run.
    Gone,
}

impl fmt::Display for GuestAfter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::RunsHere => "the guest runs here",
            Self::StoppedHere => "the guest is stopped here, and can be let run",
            Self::Gone => "the guest has left, and must not run here again",
        })
    }
}

/// A migration to another host failed.
#[derive(Debug, Error)]
#[error("{error}; {guest}")]
pub struct OutgoingError {
    /// Why.
    pub error: MigrationError,
    /// Where the guest is.
    pub guest: GuestAfter,
}
