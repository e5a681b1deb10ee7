//! userfaultfd(2): faults of guest memory that are resolved here.
//!
//! Two kinds: a page is *missing* (postcopy, lazy restore), or it is *protected* and about to be
//! written (background snapshot). The thread that faults waits until it is resolved. All protection ends,
//! and all threads that wait continue as if nothing had been asked for, when the last descriptor is closed:
//! missing pages are zeros then. So the value must live as long as the memory is not complete.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};

use super::userfaultfd::{
    API, GROUP, IOC_API, IOC_REGISTER, IOC_WRITEPROTECT, REGISTER_MODE_WP, UffdioApi, UffdioRange,
    UffdioRegister, UffdioWriteprotect, WRITEPROTECT_MODE_WP, open,
};

pub(super) const REGISTER_MODE_MISSING: u64 = 1 << 0;
pub(super) const EVENT_PAGEFAULT: u8 = 0x12;
pub(super) const PAGEFAULT_FLAG_WP: u64 = 1 << 1;

const FEATURE_WP: (u64, &str) = (1 << 0, "PAGEFAULT_FLAG_WP (Linux 5.7)");
pub(super) const FEATURE_MISSING_HUGETLBFS: (u64, &str) =
    (1 << 4, "MISSING_HUGETLBFS (Linux 4.11)");
pub(super) const FEATURE_MISSING_SHMEM: (u64, &str) = (1 << 5, "MISSING_SHMEM (Linux 4.11)");
const FEATURE_THREAD_ID: (u64, &str) = (1 << 8, "THREAD_ID (Linux 4.14)");
const FEATURE_WP_SHMEM: (u64, &str) = (1 << 12, "WP_HUGETLBFS_SHMEM (Linux 5.19)");

pub(super) const IOC_UNREGISTER: Opcode = opcode::read::<UffdioRange>(GROUP, 0x01);
pub(super) const IOC_WAKE: Opcode = opcode::read::<UffdioRange>(GROUP, 0x02);
pub(super) const IOC_COPY: Opcode = opcode::read_write::<UffdioCopy>(GROUP, 0x03);
pub(super) const IOC_ZEROPAGE: Opcode = opcode::read_write::<UffdioZeropage>(GROUP, 0x04);

#[repr(C)]
pub(super) struct UffdioCopy {
    pub(super) dst: u64,
    pub(super) src: u64,
    pub(super) len: u64,
    pub(super) mode: u64,
    pub(super) copy: i64,
}

#[repr(C)]
pub(super) struct UffdioZeropage {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) zeropage: i64,
}

/// `struct uffd_msg` of a page fault.
#[repr(C)]
#[derive(Clone, Copy, Default)]
pub(super) struct UffdMsg {
    event: u8,
    _reserved: [u8; 7],
    flags: u64,
    pub(super) address: u64,
    pub(super) thread: u32,
    _padding: u32,
}

/// What faults are wanted for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FaultKind {
    /// Of pages that are not there.
    Missing,
    /// Of writes to protected pages.
    WriteProtected,
}

/// A fault: a thread waits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// Which of the mappings, in the order in which they were registered.
    pub mapping: usize,
    /// Where, bytes from the start of the mapping.
    pub offset: u64,
    /// Whether it is a write to a protected page.
    pub write_protected: bool,
    /// The thread that waits.
    pub thread: u32,
}

/// How a page could not be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Placed {
    /// All of it was, and the threads that waited for it continue.
    Done,
    /// So many bytes were; then there was a page already. No thread was woken for that one.
    Exists(u64),
}

/// Pages could not be placed, or not all of them.
#[derive(Debug)]
pub struct NotPlaced {
    /// So many bytes were, and the threads that waited for them continue.
    pub done: u64,
    /// Why the rest was not.
    pub error: io::Error,
}

/// The faults of one or several mappings.
#[derive(Debug)]
pub struct PageFaults {
    fd: OwnedFd,
    kind: FaultKind,
    /// In the order in which they were registered, and their addresses.
    mappings: Vec<Arc<HostMapping>>,
}

impl PageFaults {
    /// Opens it. Faults in kernel mode (system calls of the VMM, vCPUs of KVM) are handled where
    /// that is permitted: with CAP_SYS_PTRACE, with `vm.unprivileged_userfaultfd`, or by
    /// `/dev/userfaultfd`.
    ///
    /// # Errors
    ///
    /// What the kernel lacks, or why it refuses.
    pub fn open(kind: FaultKind) -> io::Result<Self> {
        let needed = match kind {
            FaultKind::Missing => {
                &[FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM, FEATURE_THREAD_ID][..]
            }
            FaultKind::WriteProtected => &[FEATURE_WP, FEATURE_WP_SHMEM, FEATURE_THREAD_ID][..],
        };
        let fd = handshake(needed, || open(true))?;
        Ok(Self { fd, kind, mappings: Vec::new() })
    }

    /// Adds a mapping, none of which is registered yet; its number in [`Fault`]s.
    pub fn add(&mut self, mapping: Arc<HostMapping>) -> usize {
        self.mappings.push(mapping);
        self.mappings.len() - 1
    }

    /// Has faults in `range` (bytes of the mapping, whole pages) wait for us.
    ///
    /// # Errors
    ///
    /// `EBUSY` when another userfaultfd has the memory, `ENOMEM` when the process has too many
    /// mappings, `EINVAL` when the memory is of a kind that cannot.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn register(&self, mapping: usize, range: ByteRange) -> io::Result<()> {
        let range = self.address(mapping, range);
        let mode = match self.kind {
            FaultKind::Missing => REGISTER_MODE_MISSING,
            FaultKind::WriteProtected => REGISTER_MODE_WP,
        };
        let mut register = UffdioRegister { range, mode, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes this structure. Accesses to the range wait for us, and
        // then go on as they would have, so memory safety does not depend on it.
        unsafe { super::ioctl(&self.fd, IOC_REGISTER, &mut register) }?;
        Ok(())
    }

    /// Lets faults in `range` be the kernel's again. Threads that wait continue.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn unregister(&self, mapping: usize, range: ByteRange) -> io::Result<()> {
        let mut range = self.address(mapping, range);
        // SAFETY: UFFDIO_UNREGISTER takes this structure; as for `register`.
        unsafe { super::ioctl(&self.fd, IOC_UNREGISTER, &mut range) }?;
        Ok(())
    }

    /// The faults that are waiting, no more than a few at once; none when there are none.
    ///
    /// # Errors
    ///
    /// When they cannot be read.
    pub fn read(&self, faults: &mut Vec<Fault>) -> io::Result<()> {
        messages(self.fd.as_fd(), |message| {
            if let Some((mapping, offset)) = self.find(message.address) {
                let write_protected = message.flags & PAGEFAULT_FLAG_WP != 0;
                faults.push(Fault { mapping, offset, write_protected, thread: message.thread });
            }
        })
    }

    /// Places `bytes`, whole pages, at `offset` of the mapping, and lets threads continue that wait
    /// for them.
    ///
    /// # Errors
    ///
    /// `ENOSPC` or `ENOMEM` when there is no memory, `ENOENT` when the range is not registered.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn place(&self, mapping: usize, offset: u64, bytes: &[u8]) -> Result<Placed, NotPlaced> {
        self.resolve(mapping, offset, bytes.len() as u64, |dst, done| {
            let src = bytes[done as usize..].as_ptr().expose_provenance() as u64;
            let mut copy = UffdioCopy { dst: dst.start, src, len: dst.len, mode: 0, copy: 0 };
            // SAFETY: the kernel reads `len` bytes at `src`, which `bytes` has, and writes to
            // memory of the mapping that was not there before.
            let result = unsafe { super::ioctl(&self.fd, IOC_COPY, &mut copy) };
            (result, copy.copy)
        })
    }

    /// Places pages of zeros. Not possible on hugetlb, where zeros must be [`place`](Self::place)d.
    ///
    /// # Errors
    ///
    /// As for [`place`](Self::place).
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn place_zeros(&self, mapping: usize, range: ByteRange) -> Result<Placed, NotPlaced> {
        self.resolve(mapping, range.start(), range.len(), |dst, _| {
            let mut zeropage = UffdioZeropage { range: dst, mode: 0, zeropage: 0 };
            // SAFETY: the kernel writes to memory of the mapping that was not there before.
            let result = unsafe { super::ioctl(&self.fd, IOC_ZEROPAGE, &mut zeropage) };
            (result, zeropage.zeropage)
        })
    }

    /// Lets threads continue that wait for pages of `range`; they fault again where nothing is there.
    ///
    /// # Errors
    ///
    /// When the range is not registered.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn wake(&self, mapping: usize, range: ByteRange) -> io::Result<()> {
        let mut range = self.address(mapping, range);
        // SAFETY: UFFDIO_WAKE takes this structure.
        unsafe { super::ioctl(&self.fd, IOC_WAKE, &mut range) }?;
        Ok(())
    }

    /// Protects `range` from being written, or lets it be written again and threads continue that
    /// wait for that.
    ///
    /// # Errors
    ///
    /// `ENOENT` when the range is not registered, `ENOMEM` when there is none for page tables.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn protect(&self, mapping: usize, range: ByteRange, protect: bool) -> io::Result<()> {
        let range = self.address(mapping, range);
        let mode = if protect { WRITEPROTECT_MODE_WP } else { 0 };
        loop {
            let range = UffdioRange { start: range.start, len: range.len };
            let mut write_protect = UffdioWriteprotect { range, mode };
            // SAFETY: UFFDIO_WRITEPROTECT takes this structure; as for `register`.
            match unsafe { super::ioctl(&self.fd, IOC_WRITEPROTECT, &mut write_protect) } {
                // The address space is changing; it is not known how far it got.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                done => return done.map(|_| ()),
            }
        }
    }

    /// Calls `step` with what is left until all is done.
    fn resolve(
        &self,
        mapping: usize,
        offset: u64,
        len: u64,
        mut step: impl FnMut(UffdioRange, u64) -> (io::Result<u32>, i64),
    ) -> Result<Placed, NotPlaced> {
        let mut done = 0;
        while let Some(range) = ByteRange::new(offset + done, len - done) {
            let (result, moved) = step(self.address(mapping, range), done);
            let error = match result {
                Ok(_) => return Ok(Placed::Done),
                Err(error) => error,
            };
            match error.raw_os_error() {
                // Either some was moved, or the address space is changing.
                Some(libc::EAGAIN) => done += u64::try_from(moved).unwrap_or(0),
                Some(libc::EEXIST) => return Ok(Placed::Exists(done)),
                _ => return Err(NotPlaced { done, error }),
            }
        }
        Ok(Placed::Done)
    }

    fn address(&self, mapping: usize, range: ByteRange) -> UffdioRange {
        let start = self.mappings[mapping].locate(range.start(), range.len()).0.addr() as u64;
        UffdioRange { start, len: range.len() }
    }

    fn find(&self, address: u64) -> Option<(usize, u64)> {
        self.mappings.iter().enumerate().find_map(|(index, mapping)| {
            let offset = address.checked_sub(mapping.addr() as u64)?;
            (offset < mapping.len()).then_some((index, offset))
        })
    }
}

impl AsFd for PageFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A descriptor of `open` that has the `needed` features.
pub(super) fn handshake(
    needed: &[(u64, &str)],
    open: impl Fn() -> io::Result<OwnedFd>,
) -> io::Result<OwnedFd> {
    // What is not there cannot be asked for, and a descriptor can be asked only once.
    let mut api = UffdioApi { api: API, ..UffdioApi::default() };
    // SAFETY: UFFDIO_API takes this structure, which has no addresses.
    unsafe { super::ioctl(open()?, IOC_API, &mut api) }?;
    let lacking = needed.iter().filter(|(bit, _)| api.features & bit == 0);
    let lacking: Vec<_> = lacking.map(|(_, name)| *name).collect();
    if !lacking.is_empty() {
        let what = format!("userfaultfd of this kernel lacks {}", lacking.join(", "));
        return Err(io::Error::new(io::ErrorKind::Unsupported, what));
    }
    let fd = open()?;
    let features = needed.iter().fold(0, |all, (bit, _)| all | bit);
    let mut api = UffdioApi { api: API, features, ioctls: 0 };
    // SAFETY: as above.
    unsafe { super::ioctl(&fd, IOC_API, &mut api) }?;
    Ok(fd)
}

/// Calls `each` with the page faults that can be read without waiting, a few at most.
pub(super) fn messages(fd: BorrowedFd<'_>, each: impl FnMut(&UffdMsg)) -> io::Result<()> {
    const AT_ONCE: usize = 32;
    const { assert!(size_of::<UffdMsg>() == 32) };
    let mut messages = [UffdMsg::default(); AT_ONCE];
    // SAFETY: `messages` is valid for writes of its size, and any bytes make a UffdMsg.
    let bytes = unsafe {
        std::slice::from_raw_parts_mut(messages.as_mut_ptr().cast::<u8>(), size_of_val(&messages))
    };
    let read = match rustix::io::retry_on_intr(|| rustix::io::read(fd, &mut *bytes)) {
        // Not of a userfaultfd, which has a message or would block.
        Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
        Ok(read) => read,
        Err(Errno::AGAIN) => return Ok(()),
        Err(errno) => return Err(errno.into()),
    };
    let read = messages[..read / size_of::<UffdMsg>()].iter();
    read.filter(|message| message.event == EVENT_PAGEFAULT).for_each(each);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::wait_until;
    use rustix::fs::MemfdFlags;
    use std::fs::File;
    use std::thread;

    const PAGE: u64 = 4096;

    fn mapped(pages: u64) -> Arc<HostMapping> {
        let file = File::from(rustix::fs::memfd_create("faults", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(pages * PAGE).unwrap();
        Arc::new(HostMapping::map(&file, 0, pages * PAGE).unwrap())
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::from_bounds(start * PAGE, end * PAGE).unwrap()
    }

    fn wait_for_fault(faults: &PageFaults) -> Fault {
        let mut found = Vec::new();
        wait_until(|| {
            faults.read(&mut found).unwrap();
            !found.is_empty()
        });
        found[0]
    }

    #[test]
    fn a_read_of_nothing_is_an_error_and_no_end_of_the_faults() {
        let (reader, writer) = io::pipe().unwrap();
        drop(writer);
        let error = messages(reader.as_fd(), |_| unreachable!("there is none")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn who_misses_a_page_waits_until_it_is_placed() {
        let (other, mapping) = (mapped(4), mapped(16));
        let mut faults = PageFaults::open(FaultKind::Missing).unwrap();
        faults.add(other);
        let index = faults.add(Arc::clone(&mapping));
        faults.register(index, range(4, 12)).unwrap();
        let reader = thread::spawn(move || {
            let mut bytes = [0; 8];
            mapping.read(5 * PAGE + 16, &mut bytes);
            bytes
        });
        let fault = wait_for_fault(&faults);
        assert_eq!((fault.mapping, fault.offset / PAGE, fault.write_protected), (1, 5, false));
        assert_eq!(faults.place(1, 4 * PAGE, &[7; 3 * 4096]).unwrap(), Placed::Done);
        assert_eq!(reader.join().unwrap(), [7; 8]);
        // What is there is not replaced.
        let placed = faults.place(1, 6 * PAGE, &[8; 2 * 4096]).unwrap();
        assert_eq!(placed, Placed::Exists(0));
        assert_eq!(faults.place_zeros(1, range(7, 9)).unwrap(), Placed::Done);
        assert!(faults.place(1, 0, &[8; 4096]).is_err(), "not registered");
    }

    #[test]
    fn who_writes_a_protected_page_waits_until_it_is_saved() {
        let mapping = mapped(8);
        mapping.write(0, &[1; 4 * 4096]);
        let mut faults = PageFaults::open(FaultKind::WriteProtected).unwrap();
        let index = faults.add(Arc::clone(&mapping));
        faults.register(index, range(0, 8)).unwrap();
        faults.protect(index, range(0, 4), true).unwrap();
        // What is not protected is written without waiting.
        mapping.write(5 * PAGE, &[9]);
        let writing = Arc::clone(&mapping);
        let writer = thread::spawn(move || writing.write(2 * PAGE, &[9]));
        let fault = wait_for_fault(&faults);
        assert_eq!((fault.offset / PAGE, fault.write_protected), (2, true));
        let mut before = [0; 1];
        mapping.read(2 * PAGE, &mut before);
        assert_eq!(before, [1]);
        faults.protect(index, range(2, 3), false).unwrap();
        writer.join().unwrap();
        mapping.read(2 * PAGE, &mut before);
        assert_eq!(before, [9]);
    }
}
