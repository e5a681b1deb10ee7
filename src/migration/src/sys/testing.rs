//! What tests do to guest memory that no crate wraps safely.

use std::fs::File;
use std::io::Read;
use std::os::fd::AsRawFd;

use ram_discard::memory::HostMapping;

/// A page that is pinned, as a device that reads guest memory pins it.
pub(crate) struct Pinned(std::io::PipeReader);

impl Pinned {
    /// Pins the page at `offset`.
    pub(crate) fn page(mapping: &HostMapping, offset: u64) -> Self {
        let (reader, writer) = std::io::pipe().unwrap();
        let (start, len) = mapping.locate(offset, 4096);
        let iov = libc::iovec { iov_base: start.cast(), iov_len: len };
        // SAFETY: the one entry of the vector is mapped memory, of which the pipe holds the page.
        let spliced = unsafe { libc::vmsplice(writer.as_raw_fd(), &raw const iov, 1, 0) };
        assert_eq!(spliced, 4096);
        Self(reader)
    }

    /// What the page holds now.
    pub(crate) fn read(mut self) -> Vec<u8> {
        let mut bytes = vec![0; 4096];
        self.0.read_exact(&mut bytes).unwrap();
        bytes
    }
}

/// Has the kernel write a page of `file` into the mapping.
pub(crate) fn read_from_file(mapping: &HostMapping, offset: u64, file: &File, from: u64) {
    let (start, len) = mapping.locate(offset, 4096);
    // SAFETY: the range is mapped for writing.
    let read = unsafe { libc::pread(file.as_raw_fd(), start.cast(), len, from.cast_signed()) };
    assert_eq!(read, 4096);
}
