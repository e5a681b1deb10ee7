//! What the daemon may do: which system calls, by thread, and which files.
//!
//! A call that is needed and not listed ends the daemon with a line that names it and the thread. `CONTRIBUTING.md`
//! says how to find such calls before that.

use std::io;
use std::path::Path;

use program::listener;
use sandbox::{Policy, Reach, Thread};

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

/// Everything that threads without a list of their own do: those that accept front-ends, serve their messages, and
/// load device state.
const PROCESS: &[&str] = &[
    // Front-ends, discard-channel clients, clients of the API, the service manager.
    "accept",
    "accept4",
    "bind",
    "connect",
    "listen",
    "socket:unix",
    "socketpair:unix",
    // Guest memory: what is resident, discarded and taken; memory in the place of what was lost; the bitmap for
    // clients.
    "cachestat",
    "fallocate",
    "fstatfs",
    "ftruncate",
    "memfd_create",
    // The state file, and one that takes its place. Sockets and their locks are removed.
    "fchmod",
    "fchown",
    "fdatasync",
    "flock",
    "fsync",
    "getdents64",
    "link",
    "linkat",
    "readlink",
    "readlinkat",
    "rename",
    "renameat",
    "renameat2",
    "unlink",
    "unlinkat",
];

/// With --postcopy: faults of this process are given to the front-end.
const POSTCOPY: &[&str] = &["userfaultfd", "ioctl:userfaultfd"];

/// With --postcopy, too: the daemon executes itself, and what is started anew comes to where it was. Which file is
/// executed is Landlock's to say: this one. Code is loaded from its libraries.
const ANEW: &[&str] = &[
    "access",
    "arch_prctl",
    "execve",
    "faccessat",
    "faccessat2",
    "mmap",
    "mprotect",
    "prlimit64",
    "riscv_flush_icache",
    "signalfd4",
];

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
        // Memory, and the state file.
        calls: &["cachestat", "fallocate", "fdatasync", "fstatfs"],
    },
];

/// Which system calls are made.
pub(crate) fn policy(config: &Config) -> Policy {
    let mut process = vec![PROCESS];
    if config.postcopy {
        process.extend([POSTCOPY, ANEW]);
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
    // procfs makes files anew when memory is short, and a rule for one of them would be lost. Of other processes nothing
    // is shown that is not shown to all: Landlock counts as tracing.
    reach = reach
        .service_manager()
        .read(Path::new("/proc"))
        // glibc counts processors.
        .read(Path::new("/sys/devices/system/cpu"));
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
