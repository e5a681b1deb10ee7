//! The last dirty log of the front-end.

use std::os::fd::OwnedFd;

use rustix::fs::{FileType, fstat};

use super::error::RelayError;
use super::message::{FrontendRequest, Message, u64_at};

/// SET_LOG_BASE as it came, kept because the crate forgets it for memory that is added later.
#[derive(Debug)]
pub(super) struct DirtyLog {
    pub(super) body: Vec<u8>,
    pub(super) fd: OwnedFd,
    /// Memory was added that does not write to the log yet.
    pub(super) stale: bool,
}

impl DirtyLog {
    /// Takes the log out of a SET_LOG_BASE message.
    pub(super) fn new(message: Message) -> Result<Self, RelayError> {
        let request = FrontendRequest::SET_LOG_BASE;
        let Message { body, mut fds, .. } = message;
        let Some(fd) = fds.pop() else {
            return Err(RelayError::Fds { request, count: 0 });
        };
        let (size, offset) = (u64_at(&body, 0), u64_at(&body, 8));
        let page_size = rustix::param::page_size() as u64;
        if size == 0 || !offset.is_multiple_of(page_size) {
            let reason =
                format!("a log of {size} bytes at {offset:#x}: the offset is to be a page's");
            return Err(RelayError::Value { request, reason });
        }
        let stat = fstat(&fd).map_err(|e| RelayError::io("cannot look at the dirty log", e))?;
        // A page that the file does not have would kill the daemon at the first mark.
        let end = size.checked_add(offset);
        let regular = FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if regular && end.is_none_or(|end| end > u64::try_from(stat.st_size).unwrap_or(0)) {
            let reason = format!("a log that ends past its file of {} bytes", stat.st_size);
            return Err(RelayError::Value { request, reason });
        }
        Ok(Self { body, fd, stale: false })
    }
}
