//! Descriptors that came with the start.

use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::inherited;

/// There is one set of them.
static TAKEN: AtomicBool = AtomicBool::new(false);

/// Descriptors that the service manager has passed, by name (`LISTEN_FDS`, `LISTEN_FDNAMES`). What
/// nothing asks for stays open until the process ends, and is inherited by no child.
#[derive(Debug, Default)]
pub struct Passed(Vec<(String, RawFd)>);

impl Passed {
    /// What was passed to this process. To be called before this process opens anything itself that
    /// could have one of these numbers; later calls get nothing.
    ///
    /// # Errors
    ///
    /// When the variables are not what a service manager sets, or a descriptor is not there.
    pub fn from_env() -> io::Result<Self> {
        if TAKEN.swap(true, Ordering::SeqCst) {
            return Ok(Self::default());
        }
        let passed = sd_notify::listen_fds_with_names().map_err(|error| {
            let reason = format!("LISTEN_FDS, LISTEN_FDNAMES: {error}");
            io::Error::new(error.kind(), reason)
        })?;
        Ok(Self(passed.map(|(fd, name)| (name, fd)).collect()))
    }

    /// Takes the first descriptor of this name, if there is one.
    ///
    /// # Errors
    ///
    /// When it is not open.
    pub fn take(&mut self, name: &str) -> io::Result<Option<OwnedFd>> {
        let Some(at) = self.0.iter().position(|(known, _)| known == name) else { return Ok(None) };
        inherited::take(self.0.remove(at).1).map(Some)
    }

    /// Takes everything, with the names.
    ///
    /// # Errors
    ///
    /// When one of them is not open.
    pub fn take_all(self) -> io::Result<Vec<(String, OwnedFd)>> {
        self.0.into_iter().map(|(name, fd)| Ok((name, inherited::take(fd)?))).collect()
    }

    /// Leaves the descriptor of this number to its other user.
    pub fn leave(&mut self, number: RawFd) {
        self.0.retain(|(_, fd)| *fd != number);
    }

    /// The names of what was not taken.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}
