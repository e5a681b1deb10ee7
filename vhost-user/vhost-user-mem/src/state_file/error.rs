//! Why a file is refused.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why a state file cannot be used. It is left as it was.
#[derive(Debug, Error)]
pub enum StateFileError {
    /// A system call failed.
    #[error("{path}: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why. Told with the path, so not as a source, which would be told again.
        error: io::Error,
    },
    /// It cannot be locked against other daemons.
    #[error("{path} cannot be locked: {error}; keep it on a file system with flock(2)")]
    NotLocked {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another daemon uses it.
    #[error("{0} is in use by another process")]
    InUse(PathBuf),
    /// Not a regular file.
    #[error("{0} is not a regular file")]
    NotAFile(PathBuf),
    /// Not one of ours, or its head is damaged.
    #[error("{path} is not a state file, or damaged: {what}")]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Written by a newer release.
    #[error("{path} has version {found}; this program knows versions up to {known}")]
    Newer {
        /// The file.
        path: PathBuf,
        /// Its version.
        found: u32,
        /// The newest version known.
        known: u32,
    },
    /// The device has another geometry.
    #[error("{path} is of a device with {field} {found}, not {expected}")]
    Geometry {
        /// The file.
        path: PathBuf,
        /// What differs.
        field: &'static str,
        /// In the file.
        found: String,
        /// Asked for.
        expected: String,
    },
}
