//! Writing guest memory to a file descriptor without copying it first.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use ram_discard::memory::HostMapping;
use rustix::io::Errno;

/// The most pieces that Linux takes in one call (`IOV_MAX`).
const MAX_PIECES: usize = 1024;

/// What a write that takes several calls asks and tells between them.
pub trait WritePolicy {
    /// Whether to go on; asked before each call.
    ///
    /// # Errors
    ///
    /// Why not; `ECANCELED` when cancelled.
    fn check(&self) -> io::Result<()>;

    /// So many bytes more are written.
    fn wrote(&mut self, bytes: u64);

    /// The receiver has no room now. Waits, at least for a moment; it is tried again then.
    ///
    /// # Errors
    ///
    /// Why it is not waited for any longer.
    fn wait_writable(&mut self) -> io::Result<()>;
}

/// Bytes of our own and ranges of guest memory, in the order in which they are written.
///
/// The kernel reads guest memory by address when it is written, not when it is pushed: for a
/// migration stream, a page's dirty bit is cleared before the page is written, so that whatever
/// the guest changes later is sent again.
#[derive(Debug, Default)]
pub struct GatherWrite {
    segments: Vec<Segment>,
    /// What was pushed as bytes, all in one buffer that keeps its capacity.
    bytes: Vec<u8>,
    /// Keeps the memory of the segments mapped.
    mappings: Vec<Arc<HostMapping>>,
    len: u64,
}

/// A place and a length in bytes, never 0.
#[derive(Clone, Copy, Debug)]
struct Segment {
    place: Place,
    len: usize,
}

#[derive(Clone, Copy, Debug)]
enum Place {
    /// From this offset of `bytes`, which moves when it grows.
    Bytes(usize),
    /// From this address, kept valid by `mappings`.
    Memory(usize),
}

impl GatherWrite {
    /// Nothing to write.
    pub fn new() -> Self {
        Self::default()
    }

    /// Appends a copy of `bytes`.
    pub fn push_bytes(&mut self, bytes: &[u8]) {
        let at = self.bytes.len();
        self.bytes.extend_from_slice(bytes);
        match self.segments.last_mut() {
            Some(Segment { place: Place::Bytes(start), len }) if *start + *len == at => {
                *len += bytes.len();
            }
            _ if bytes.is_empty() => {}
            _ => self.segments.push(Segment { place: Place::Bytes(at), len: bytes.len() }),
        }
        self.len += bytes.len() as u64;
    }

    /// Appends `len` bytes of guest memory from `offset`. Memory that follows the memory pushed
    /// before becomes one piece with it.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn push_memory(&mut self, mapping: &Arc<HostMapping>, offset: u64, len: u64) {
        let (start, size) = mapping.locate(offset, len);
        let at = start.expose_provenance();
        match self.segments.last_mut() {
            Some(Segment { place: Place::Memory(start), len })
                if *start + *len == at
                    && self.mappings.last().is_some_and(|last| Arc::ptr_eq(last, mapping)) =>
            {
                *len += size;
            }
            _ if size == 0 => {}
            _ => {
                // The last one is the one in use, for the check above.
                if !self.mappings.last().is_some_and(|last| Arc::ptr_eq(last, mapping)) {
                    self.mappings.push(Arc::clone(mapping));
                }
                self.segments.push(Segment { place: Place::Memory(at), len: size });
            }
        }
        self.len += len;
    }

    /// What is to be written, bytes.
    pub fn len_bytes(&self) -> u64 {
        self.len
    }

    /// Number of pieces it is made of.
    pub fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.segments.is_empty()
    }

    /// Forgets everything; buffers keep their capacity.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.bytes.clear();
        self.mappings.clear();
        self.len = 0;
    }

    /// Writes everything to a socket or pipe. Where the receiver is slow, a write to a non-blocking
    /// descriptor waits as `policy` does; on a blocking one the kernel waits. A socket that its peer
    /// has closed raises no SIGPIPE; of a pipe, the process should ignore it.
    ///
    /// # Errors
    ///
    /// What `policy` ends it with, `EFAULT` when guest memory is gone (the backing file was truncated),
    /// or why the descriptor refuses. An unknown part is written then: the stream is of no use any
    /// more.
    pub fn write_to(&self, fd: impl AsFd, policy: &mut dyn WritePolicy) -> io::Result<()> {
        let fd = fd.as_fd();
        let mut is_socket = true;
        self.write_all(|pieces, _| {
            loop {
                policy.check()?;
                let written = if is_socket { send(fd, pieces) } else { write(fd, pieces) };
                match written {
                    Ok(written) => {
                        policy.wrote(written as u64);
                        return Ok(written);
                    }
                    Err(error) if Errno::from_io_error(&error) == Some(Errno::NOTSOCK) => {
                        is_socket = false;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        policy.wait_writable()?;
                    }
                    Err(error) => return Err(error),
                }
            }
        })
    }

    /// Writes everything to a file, from `offset` bytes on. The file's own offset does not move.
    ///
    /// # Errors
    ///
    /// `EFAULT` when guest memory is gone, or why the file refuses; an unknown part is written.
    pub fn write_at(&self, fd: impl AsFd, offset: u64) -> io::Result<()> {
        let fd = fd.as_fd();
        self.write_all(|pieces, done| {
            let at = offset.checked_add(done).and_then(|at| libc::off_t::try_from(at).ok());
            let at = at.ok_or(Errno::FBIG)?;
            // SAFETY: as in `write`.
            let written = unsafe {
                libc::pwritev(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int, at)
            };
            check(written)
        })
    }

    /// Copies everything, in order and in pieces of at most `most` bytes, to `take`: for where the kernel
    /// cannot gather it. Guest memory is read by this process then: where its file was
    /// truncated, that raises SIGBUS.
    ///
    /// # Errors
    ///
    /// Those of `take`, which is not called again then.
    pub fn copy_out(
        &self,
        most: usize,
        take: &mut dyn FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut buffer = Vec::with_capacity(most.min(self.len as usize));
        for segment in &self.segments {
            let mut done = 0;
            while done < segment.len {
                if buffer.len() == most {
                    take(&buffer)?;
                    buffer.clear();
                }
                let len = (segment.len - done).min(most - buffer.len());
                self.append(*segment, done, len, &mut buffer);
                done += len;
            }
        }
        if buffer.is_empty() { Ok(()) } else { take(&buffer) }
    }

    fn append(&self, segment: Segment, from: usize, len: usize, to: &mut Vec<u8>) {
        let end = to.len();
        match segment.place {
            Place::Bytes(at) => to.extend_from_slice(&self.bytes[at + from..at + from + len]),
            Place::Memory(address) => {
                let at = address + from;
                let holds = |mapping: &&Arc<HostMapping>| {
                    at.checked_sub(mapping.addr())
                        .is_some_and(|offset| (offset + len) as u64 <= mapping.len())
                };
                let mapping = self.mappings.iter().find(holds).expect("memory stays mapped");
                to.resize(end + len, 0);
                mapping.read((at - mapping.addr()) as u64, &mut to[end..]);
            }
        }
    }

    /// Calls `write` with what is left, at most [`MAX_PIECES`] pieces at a time, and how many bytes
    /// are done, until nothing is left. The pieces are valid for reads during the call.
    fn write_all(
        &self,
        mut write: impl FnMut(&[libc::iovec], u64) -> io::Result<usize>,
    ) -> io::Result<()> {
        let mut pieces = Vec::with_capacity(self.segments.len().min(MAX_PIECES));
        let mut next = 0;
        // Bytes of `segments[next]` that are written.
        let mut skip = 0;
        let mut done = 0;
        while next < self.segments.len() {
            pieces.clear();
            let window = self.segments[next..].iter().take(MAX_PIECES);
            pieces.extend(window.map(|segment| self.piece(*segment)));
            pieces[0].iov_base = pieces[0].iov_base.wrapping_byte_add(skip);
            pieces[0].iov_len -= skip;
            let written = match write(&pieces, done) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                written => written?,
            };
            done += written as u64;
            skip += written;
            while let Some(segment) = self.segments.get(next).filter(|segment| segment.len <= skip)
            {
                skip -= segment.len;
                next += 1;
            }
        }
        Ok(())
    }

    fn piece(&self, segment: Segment) -> libc::iovec {
        let start = match segment.place {
            Place::Bytes(offset) => self.bytes[offset..].as_ptr().cast_mut(),
            Place::Memory(address) => std::ptr::with_exposed_provenance_mut(address),
        };
        libc::iovec { iov_base: start.cast(), iov_len: segment.len }
    }
}

/// Sends the pieces without SIGPIPE; how many bytes.
fn send(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: pointers and lengths only, of which zero is a null pointer and nothing.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = pieces.as_ptr().cast_mut();
    message.msg_iovlen = pieces.len() as _;
    // SAFETY: `pieces` are valid for reads, see `write_all`, and sendmsg(2) does not write through
    // them; their number is no more than IOV_MAX. There is no name and no control data.
    check(unsafe { libc::sendmsg(fd.as_raw_fd(), &message, libc::MSG_NOSIGNAL) })
}

/// Writes the pieces to what is not a socket; how many bytes.
fn write(fd: BorrowedFd<'_>, pieces: &[libc::iovec]) -> io::Result<usize> {
    // SAFETY: `pieces` are valid for reads, see `write_all`; their number is no more than IOV_MAX
    // and so fits.
    check(unsafe { libc::writev(fd.as_raw_fd(), pieces.as_ptr(), pieces.len() as libc::c_int) })
}

fn check(written: libc::ssize_t) -> io::Result<usize> {
    usize::try_from(written).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
pub(crate) mod testing {
    use std::mem::MaybeUninit;
    use std::ptr::null_mut;

    /// Whether a SIGPIPE was raised on this thread while `writes` ran. It is taken, and ends nothing.
    pub(crate) fn raises_sigpipe(writes: impl FnOnce()) -> bool {
        let mut sigpipe = MaybeUninit::<libc::sigset_t>::uninit();
        // SAFETY: the pointer is to room for a set, which sigemptyset(3) initializes.
        unsafe { libc::sigemptyset(sigpipe.as_mut_ptr()) };
        // SAFETY: initialized right above.
        let mut sigpipe = unsafe { sigpipe.assume_init() };
        // SAFETY: an initialized set, and the number of a signal.
        unsafe { libc::sigaddset(&mut sigpipe, libc::SIGPIPE) };
        // SAFETY: an initialized set; the mask is this thread's, and no code here handles SIGPIPE.
        unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &sigpipe, null_mut()) };
        writes();
        let no_wait = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: an initialized set and time; what is said of the signal is not asked for.
        let raised = unsafe { libc::sigtimedwait(&sigpipe, null_mut(), &no_wait) };
        // SAFETY: as above; none is outstanding that would be handled now.
        unsafe { libc::pthread_sigmask(libc::SIG_UNBLOCK, &sigpipe, null_mut()) };
        raised == libc::SIGPIPE
    }
}

#[cfg(test)]
mod tests;
