//! What ends a command early.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use management_api::{Problem, Resize};
use migration::inspect::InspectError;
use program::size::format_size;
use serde_json::{Value, json};
use thiserror::Error;
use vmem_pager::PagerError;
use vmstate::printable;

use super::{Console, status};

/// What ends a command early.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum Failure {
    /// The socket is not served.
    #[error("cannot reach the daemon at {}: {source}", path.display())]
    Unreachable {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The daemon refused.
    #[error("{}: {}", printable(&.0.title), printable(&.0.detail))]
    Refused(Problem),
    /// What answers does not speak as it should.
    #[error("{0}")]
    Protocol(String),
    /// The guest was not done in time.
    #[error("timed out after {} s: plugged {} of the requested {}{}", waited.as_secs(),
        format_size(*plugged_size), format_size(*requested_size), what_of(*left_at, obstacle))]
    TimedOut {
        /// How long was waited.
        waited: Duration,
        /// How far it got.
        plugged_size: u64,
        /// What it was to be.
        requested_size: u64,
        /// What the guest was asked for last, of a resize in steps that did not come to its end.
        left_at: Option<u64>,
        /// What stood in the way, if that is known.
        obstacle: Option<Obstacle>,
    },
    /// Another client asked for another size meanwhile.
    #[error("superseded: the requested size is now {}, no longer {} (plugged: {})",
        format_size(*requested_size), format_size(*wanted), format_size(*plugged_size))]
    Superseded {
        /// What this command asked for.
        wanted: u64,
        /// What is asked for now.
        requested_size: u64,
        /// What is plugged.
        plugged_size: u64,
    },
    /// `doctor` has found what must be changed.
    #[error("{problems} problem{}, {warnings} warning{}", plural(*problems), plural(*warnings))]
    Unfit {
        /// What must be changed.
        problems: usize,
        /// What may have to be.
        warnings: usize,
    },
    /// A file cannot be written.
    #[error("cannot write {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Unreadable {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// A file is no migration stream, or a damaged one.
    #[error("{}: {source}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<InspectError>,
    },
    /// A snapshot of Firecracker's cannot be read.
    #[error(transparent)]
    Snapshot(#[from] PagerError),
    /// A state file of Firecracker's alone.
    #[error(
        "{}: a state file of Firecracker, which has no memory in it; give its memory file with --memory-file FILE",
        .0.display()
    )]
    NoMemory(PathBuf),
    /// The page cannot be served there.
    #[error("cannot listen on {address}: {source}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// Output cannot be written.
    #[error("cannot write the output: {0}")]
    Output(io::Error),
    /// The system denied what every program needs.
    #[error("cannot start: {0}")]
    Runtime(io::Error),
}

/// What stands in a guest's way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Obstacle {
    /// As the daemon says it.
    Told(Box<Resize>),
    /// As far as it is seen from here.
    Seen(&'static str),
}

impl fmt::Display for Obstacle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Told(resize) => f.write_str(&status::resize(resize)),
            Self::Seen(what) => f.write_str(what),
        }
    }
}

fn plural(number: usize) -> &'static str {
    if number == 1 { "" } else { "s" }
}

fn what_of(left_at: Option<u64>, obstacle: &Option<Obstacle>) -> String {
    let left = left_at.map(|size| format!("; the guest is asked for {}", format_size(size)));
    let obstacle = obstacle.as_ref().map(|obstacle| format!("; {obstacle}"));
    left.into_iter().chain(obstacle).collect()
}

impl Failure {
    /// The exit status of the program.
    pub fn exit_status(&self) -> u8 {
        match self {
            Self::TimedOut { .. } => 3,
            // The reader of the output has seen enough.
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => 0,
            _ => 1,
        }
    }

    /// Prints it as one line.
    pub fn report(&self, console: &mut Console<'_>) {
        match self {
            Self::Output(error) if error.kind() == io::ErrorKind::BrokenPipe => {}
            _ if console.json => console.complain(&self.json().to_string()),
            _ => console.complain(&format!("vmemctl: {self}")),
        }
    }

    fn json(&self) -> Value {
        let mut object = json!({ "error": self.to_string() });
        match self {
            Self::Refused(problem) => object["problem"] = json!(problem),
            Self::TimedOut { plugged_size, requested_size, left_at, obstacle, .. } => {
                object["plugged_size"] = json!(plugged_size);
                object["requested_size"] = json!(left_at.unwrap_or(*requested_size));
                if let Some(Obstacle::Told(resize)) = obstacle {
                    object["resize"] = json!(resize);
                }
            }
            Self::Superseded { plugged_size, requested_size, .. } => {
                object["plugged_size"] = json!(plugged_size);
                object["requested_size"] = json!(requested_size);
            }
            _ => {}
        }
        object
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_of_the_daemon_reaches_the_terminal_escaped() {
        let refused = Failure::Refused(Problem::new(409, "Conflict", "no\n\u{1b}[31mred"));
        assert_eq!(refused.to_string(), r"Conflict: no\n\u{1b}[31mred");
    }
}
