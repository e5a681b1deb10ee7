//! What the end of a connection means, and for whom.

use std::io;

use migration::MigrationError;
use migration::stream::FormatError;
use rustix::io::Errno;
use vmstate::wire::WireError;

use super::figures::Figures;
use crate::error::PagerError;
use crate::run::Run;

/// Where a restore is.
#[derive(Clone, Copy, Debug)]
pub(super) enum Stage<'a> {
    /// The guest is not at the destination yet.
    Loading,
    /// The guest is at the destination once this has heard so, and needs the rest of its memory.
    Postcopy(&'a Figures),
}

/// Makes errors of a connection's, which say what became of the guest.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lost<'a> {
    pub run: &'a Run,
    pub stage: Stage<'a>,
}

impl Lost<'_> {
    /// A read or write failed.
    pub fn io(&self, what: &str, error: io::Error) -> PagerError {
        if let Err(ended) = self.run.check(what) {
            return ended;
        }
        if error.kind() == io::ErrorKind::TimedOut {
            let what = format!("QEMU neither reads nor says anything: {what}; {}", self.guest());
            return PagerError::TimedOut { what, after: self.run.silence() };
        }
        match Errno::from_io_error(&error) {
            Some(Errno::CANCELED) => PagerError::Interrupted,
            _ => PagerError::Peer(format!(
                "QEMU closed the connection: {what} ({error}); {}",
                self.guest()
            )),
        }
    }

    /// QEMU ended the connection.
    pub fn closed(&self, what: &str) -> PagerError {
        match self.run.check(what) {
            Err(ended) => ended,
            Ok(()) => {
                PagerError::Peer(format!("QEMU closed the connection: {what}; {}", self.guest()))
            }
        }
    }

    /// A message could not be read.
    pub fn format(&self, what: &str, error: FormatError) -> PagerError {
        match error {
            FormatError::Wire(WireError::Io { source, .. }) => self.io(what, source),
            FormatError::Wire(WireError::Truncated { .. }) => self.closed(what),
            other => PagerError::Protocol(format!(
                "QEMU sent what is not a message of its return path: {other}; {}",
                self.guest()
            )),
        }
    }

    /// The engine could not read what QEMU said.
    pub fn engine(&self, what: &str, error: MigrationError) -> PagerError {
        match error {
            MigrationError::Format(error) => self.format(what, error),
            MigrationError::Cancelled => self.io(what, Errno::CANCELED.into()),
            other => PagerError::Protocol(format!("{other}; {}", self.guest())),
        }
    }

    /// What became of the guest.
    pub fn guest(&self) -> &'static str {
        match self.stage {
            Stage::Loading => {
                "no guest was started; QEMU's own report says why (query-migrate, its log)"
            }
            Stage::Postcopy(figures) if !figures.is_running() => {
                "it has not said that the guest can run: if query-migrate says postcopy-paused, run this \
                 again with --recover; otherwise no guest was started, and its own report says why (is its \
                 capability postcopy-ram set?)"
            }
            Stage::Postcopy(_) => {
                "the guest is at the destination without all of its memory, and goes on once the rest \
                 is sent: run this again with --recover"
            }
        }
    }
}
