//! What the daemon may do: which system calls, by thread, and which files.
//!
//! A call that is needed and not listed ends the daemon with a line that names it and the thread. `CONTRIBUTING.md`
//! says how to find such calls before that.

use std::io;
use std::path::Path;

use program::listener;
use sandbox::{EXECUTES_ITSELF, GUEST_MEMORY, Policy, Reach, Thread, UNIX_SOCKETS, WHOLE_FILES};

use crate::args::Config;

/// The thread that writes the log.
pub(crate) const LOG: &str = "log";
/// The threads that wait for signals, and that end the daemon then.
pub(crate) const SIGNALS: &str = "signals";
/// The thread that tells front-ends of a change of the configuration.
pub(crate) const CONFIG_CHANGE: &str = "config-change";
/// The threads of the management API.
pub(crate) const MANAGEMENT: &str = "management";
/// The threads of the discard channel.
pub(crate) const DISCARD_CHANNEL: &str = "discard-channel";
/// The thread that tells of resizes.
pub(crate) const RESIZE: &str = "resize";
/// The thread that discards what the guest has in unplugged memory.
pub(crate) const SWEEP: &str = "sweep";
/// The thread that serves the queue of the guest.
pub(crate) const WORKER: &str = "worker";

/// What only the daemon does of it: a state file that takes the place of another has its owner.
const STATE_FILE: &[&str] = &["fchown"];

/// Everything that threads without a list of their own do: those that accept front-ends, serve their messages, and
/// load device state. Clients of the discard channel and of the API are served, and the service manager is told. Guest
/// memory: what is resident, discarded and taken; memory in the place of what was lost; the bitmap for clients. The
/// state file, and one that takes its place; sockets and their locks are removed.
const PROCESS: [&[&str]; 4] = [UNIX_SOCKETS, GUEST_MEMORY, WHOLE_FILES, STATE_FILE];

/// Faults of this process are given to the front-end.
const FAULTS: &[&str] = &["userfaultfd", "ioctl:userfaultfd"];

/// With --postcopy: faults; and the daemon executes itself, and what is started anew comes to where it was.
const POSTCOPY: [&[&str]; 2] = [FAULTS, EXECUTES_ITSELF];

/// Threads with less than that.
const THREADS: &[Thread] = &[
    // The log may go to a socket.
    Thread { name: LOG, opens_files: false, calls: &["connect", "socket:unix"] },
    Thread {
        name: SIGNALS,
        opens_files: false,
        // The service manager is told, and sockets are removed.
        calls: &["connect", "socket:unix", "unlink", "unlinkat"],
    },
    Thread { name: CONFIG_CHANGE, opens_files: false, calls: &[] },
    Thread {
        name: MANAGEMENT,
        // Metrics of the process.
        opens_files: true,
        calls: &[
            "accept",
            "accept4",
            // Resizes and resets.
            "cachestat",
            "fallocate",
            "fdatasync",
            "fstatfs",
            // With --postcopy: what is waited for follows what is plugged.
            "ioctl:userfaultfd",
            // Metrics.
            "getdents64",
            "readlink",
            "readlinkat",
            // The end: the socket and its lock are removed.
            "unlink",
            "unlinkat",
        ],
    },
    Thread {
        name: DISCARD_CHANNEL,
        // The bitmap once more, for a client that may only read it.
        opens_files: true,
        calls: &[
            "accept",
            "accept4",
            "fallocate",
            "fdatasync",
            "ftruncate",
            // A reset that a freeze put off.
            "ioctl:userfaultfd",
            "memfd_create",
            "unlink",
            "unlinkat",
        ],
    },
    Thread { name: RESIZE, opens_files: false, calls: &[] },
    Thread { name: SWEEP, opens_files: false, calls: &["cachestat", "fallocate"] },
    Thread {
        name: WORKER,
        opens_files: false,
        // Memory, and the state file; with --postcopy, what is waited for follows what is plugged.
        calls: &["cachestat", "fallocate", "fdatasync", "fstatfs", "ioctl:userfaultfd"],
    },
];

/// Which system calls are made.
pub(crate) fn policy(config: &Config) -> Policy {
    let mut process = PROCESS.to_vec();
    if config.postcopy {
        process.extend(POSTCOPY);
    }
    Policy { program: "vhost-user-mem", process, threads: THREADS }
}

/// Which files are opened or removed once everything is open and bound that the command line names.
///
/// # Errors
///
/// When the state file has no path, or this process cannot find out what it is made of.
pub(crate) fn reach(config: &Config) -> io::Result<Reach> {
    // What the service manager has bound, or keeps, stays at the end.
    let mut reach =
        listener::removed_at_the_end().iter().fold(Reach::new(), |reach, path| reach.remove(path));
    reach = reach.service_manager().runtime();
    if let Some(path) = &config.state_file {
        // A load of device state puts another file in its place.
        reach = reach.replace(&std::fs::canonicalize(path)?);
    }
    if config.postcopy {
        // What the size of a block is by default.
        let huge_pages = Path::new("/sys/kernel/mm/transparent_hugepage");
        reach = reach.read(huge_pages).execute_itself()?;
    }
    Ok(reach)
}

#[cfg(test)]
mod tests;
