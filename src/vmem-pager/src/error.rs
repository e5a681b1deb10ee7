//! Why a save or a restore failed.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use migration::MigrationError;
use migration::stream::FormatError;
use thiserror::Error;
use vmstate::printable;
use vmstate::wire::WireError;

/// Why a save or a restore failed.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum PagerError {
    /// The command line asks for what there is not.
    #[error("{0}")]
    Usage(String),
    /// A wait took longer than it may.
    #[error("timed out after {} s: {what}", after.as_secs())]
    TimedOut {
        /// What was waited for, as "QEMU has not connected to PATH".
        what: String,
        /// How long.
        after: Duration,
    },
    /// A signal ended the run.
    #[error("interrupted by a signal")]
    Interrupted,
    /// The socket cannot be served, or not be connected to.
    #[error("{action} {socket}: {source}")]
    Socket {
        /// As "cannot connect to".
        action: &'static str,
        /// As it was given.
        socket: String,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read or written.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// As "write".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// This process cannot be confined.
    #[error(transparent)]
    Sandbox(sandbox::SandboxError),
    /// An image is not one that could be restored.
    #[error("{}: {what}", path.display())]
    Image {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        what: String,
    },
    /// The VMM sent what its protocol does not allow.
    #[error("{0}")]
    Protocol(String),
    /// The VMM's side ended or failed.
    #[error("{0}")]
    Peer(String),
    /// The VMM's guest cannot have its memory.
    #[error("{source}; {outcome}")]
    Unserved {
        /// What became of the VMM, as "Firecracker was ended".
        outcome: String,
        /// Why.
        source: Box<PagerError>,
    },
    /// The process that served the guest ended with a failure, which it has told.
    #[error("the process that served the guest ended with status {0}")]
    Worker(u8),
    /// What QEMU answered on its control socket, word for word.
    #[error("QEMU refused {command}: {}: {}", printable(class), printable(desc))]
    Qmp {
        /// The command.
        command: String,
        /// QEMU's class of the error.
        class: String,
        /// QEMU's description of it.
        desc: String,
    },
    /// The control socket is not usable.
    #[error("QMP: {0}")]
    QmpChannel(String),
    /// The system denied what every run needs.
    #[error("cannot {action}: {source}")]
    System {
        /// As "start a thread".
        action: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The bytes of a stream are not what they should be.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] MigrationError),
}

impl PagerError {
    /// The exit status of the program.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::Usage(_) => 2,
            Self::TimedOut { .. } => 3,
            Self::Worker(status) => *status,
            Self::Unserved { source, .. } => source.exit_status(),
            _ => 1,
        }
    }

    /// Of a file.
    pub fn file(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let path = path.to_owned();
        move |source| Self::File { action, path, source }
    }

    /// Of the system.
    pub fn system(action: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::System { action, source }
    }
}

impl From<WireError> for PagerError {
    fn from(error: WireError) -> Self {
        Self::Format(error.into())
    }
}
