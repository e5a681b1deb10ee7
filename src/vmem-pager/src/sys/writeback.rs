//! Bringing what was written to a file to the disk.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

/// Has the kernel begin to bring a range of a file to the disk, as far as it was written, and does not wait for it. What
/// follows all of it, as fsync(2), has less left to do. Promises nothing.
///
/// # Errors
///
/// When the kernel knows no such thing of this file.
pub fn begin(file: impl AsFd, offset: u64, len: u64) -> io::Result<()> {
    let (Ok(offset), Ok(len)) = (offset.try_into(), len.try_into()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: the descriptor is that of `file`, open while it is borrowed; the call takes no pointer, and changes no
    // byte of the file.
    let result = unsafe { libc::sync_file_range(fd, offset, len, libc::SYNC_FILE_RANGE_WRITE) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    #[test]
    fn a_file_keeps_what_was_written_and_what_is_no_file_is_an_error() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[7; 8192], 0).unwrap();
        begin(&file, 0, 4096).unwrap();
        begin(&file, 4096, 1 << 40).unwrap();
        let mut bytes = [0; 8192];
        file.read_exact_at(&mut bytes, 0).unwrap();
        assert_eq!(bytes, [7; 8192]);
        assert!(begin(&file, u64::MAX, 1).is_err());
        let (pipe, _writer) = io::pipe().unwrap();
        assert!(begin(&pipe, 0, 1).is_err());
    }
}
