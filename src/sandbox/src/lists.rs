//! Lists of system calls that several programs have in theirs, by what they are for.

/// Unix sockets: served, and connected to.
pub const UNIX_SOCKETS: &[&str] =
    &["accept", "accept4", "bind", "connect", "listen", "socket:unix", "socketpair:unix"];

/// Memory of guests in files: made, measured, discarded and taken.
pub const GUEST_MEMORY: &[&str] =
    &["cachestat", "fallocate", "fstatfs", "ftruncate", "memfd_create"];

/// Files that have their names once they are whole; sockets and locks that are removed.
pub const WHOLE_FILES: &[&str] = &[
    "fchmod",
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

/// A program that executes itself, to where its sandbox is complete again. Which file is executed is Landlock's to
/// say: [`Reach::execute_itself`](crate::Reach::execute_itself). Code is loaded from its libraries.
pub const EXECUTES_ITSELF: &[&str] = &[
    "access",
    "arch_prctl",
    "execve",
    "faccessat",
    "faccessat2",
    "mmap",
    "mprotect",
    "prlimit64",
    "signalfd4",
];
