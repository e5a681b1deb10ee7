//! What kind of file a front-end has sent, found out without asking its file system.
//!
//! A front-end may serve the file system itself (FUSE), or hold leases on its files: a question
//! that goes there may never be answered, and a thread that waits for the answer can not even be
//! killed. The kernel answers the ones below itself.

use std::os::fd::AsFd;

use rustix::fs::fcntl_get_seals;
use rustix::net::sockopt;
use rustix::pipe::fcntl_getpipe_size;

/// Why a file is refused.
pub const NOT_MEMORY: &str = "a file that is neither a memfd nor on tmpfs or hugetlbfs: its file \
     system may keep the daemon waiting for good; --allow-file-memory takes it all the same";

/// What waits for whom at a descriptor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FileKind {
    /// A memfd, or a file on tmpfs or hugetlbfs: only such have seals.
    Memory,
    /// One end of a pipe.
    Pipe,
    /// A socket.
    Socket,
    /// Anything else, of any file system.
    Other,
}

impl FileKind {
    /// The kind of `file`.
    pub fn of(file: impl AsFd) -> Self {
        if fcntl_get_seals(&file).is_ok() {
            Self::Memory
        } else if fcntl_getpipe_size(&file).is_ok() {
            Self::Pipe
        } else if sockopt::socket_type(&file).is_ok() {
            Self::Socket
        } else {
            Self::Other
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};
    use std::fs::File;
    use std::os::unix::net::UnixStream;

    #[test]
    fn memory_pipes_and_sockets_are_told_from_other_files() {
        let memfd = memfd_create("shared", MemfdFlags::CLOEXEC).unwrap();
        assert_eq!(FileKind::of(memfd), FileKind::Memory);
        let huge = memfd_create("shared", MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB).unwrap();
        assert_eq!(FileKind::of(huge), FileKind::Memory);
        let tmpfs = tempfile::tempfile_in("/dev/shm").unwrap();
        assert_eq!(FileKind::of(tmpfs), FileKind::Memory);
        let (reader, writer) = std::io::pipe().unwrap();
        assert_eq!((FileKind::of(reader), FileKind::of(writer)), (FileKind::Pipe, FileKind::Pipe));
        assert_eq!(FileKind::of(UnixStream::pair().unwrap().0), FileKind::Socket);
        for path in ["/dev/zero", "/proc/self/maps", "/"] {
            assert_eq!(FileKind::of(File::open(path).unwrap()), FileKind::Other, "{path}");
        }
    }
}
