//! userfaultfd(2) across processes: faults of one that another resolves.
//!
//! A vhost-user back-end opens a userfaultfd for its own mappings of guest memory
//! ([`OfferedFaults`]) and hands a copy to the VMM ([`ClientFaults`]), which sees the back-end's
//! faults by the back-end's addresses. Both map the same file, so a page that the VMM places in its
//! own memory is there for the back-end too, which only has to be woken.
//!
//! A process that holds a copy may register and fill any memory of the process that opened it, for as
//! long as that lives, and nothing takes this back. A copy is for a process that is trusted with this one.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::{FdFlags, fcntl_dupfd_cloexec, fcntl_setfd};

use super::page_faults::{
    FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM, IOC_COPY, IOC_UNREGISTER, IOC_WAKE,
    IOC_ZEROPAGE, Placed, REGISTER_MODE_MISSING, UffdioCopy, UffdioZeropage, handshake, messages,
};
use super::userfaultfd::{IOC_REGISTER, UffdioRange, UffdioRegister, open};

/// What the kernel calls the file of a userfaultfd.
const USERFAULTFD: &[u8] = b"anon_inode:[userfaultfd]";

/// A userfaultfd for mappings of this process. Faults of system calls are not for it: those on
/// registered memory fail with `EFAULT`. For that, no privilege is needed.
#[derive(Debug)]
pub struct OfferedFaults(OwnedFd);

impl OfferedFaults {
    /// Opens it.
    ///
    /// # Errors
    ///
    /// What the kernel lacks, or why it refuses: a sandbox may forbid the system call.
    pub fn open() -> io::Result<Self> {
        handshake(&[FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM], || open(false)).map(Self)
    }

    /// As [`open`](Self::open), and each removal of memory waits until its event was read.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn open_with_removals() -> io::Result<Self> {
        let removals = (1 << 3, "EVENT_REMOVE (Linux 4.11)");
        let needed = [FEATURE_MISSING_HUGETLBFS, FEATURE_MISSING_SHMEM, removals];
        handshake(&needed, || open(false)).map(Self)
    }

    /// A copy for the process that resolves the faults.
    ///
    /// # Errors
    ///
    /// When there are no descriptors.
    pub fn copy(&self) -> io::Result<OwnedFd> {
        Ok(fcntl_dupfd_cloexec(&self.0, 0)?)
    }

    /// Has a thread that misses a page in `len` bytes from `address` (whole pages) wait for the other
    /// process.
    ///
    /// # Errors
    ///
    /// `EBUSY` when another userfaultfd has the memory, `ENOMEM` when the process has too many
    /// mappings, `EINVAL` when nothing is mapped there or it is of a kind that cannot.
    pub fn register(&self, address: u64, len: u64) -> io::Result<()> {
        let range = UffdioRange { start: address, len };
        let mut register = UffdioRegister { range, mode: REGISTER_MODE_MISSING, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes this structure. Accesses to the range wait and then go on,
        // so memory safety does not depend on whose memory it is.
        unsafe { super::ioctl(&self.0, IOC_REGISTER, &mut register) }?;
        Ok(())
    }

    /// Lets faults in the range be the kernel's again. Threads that wait continue, and get a page of
    /// zeros where there still is none. Parts that were not registered are left alone.
    ///
    /// # Errors
    ///
    /// `EINVAL` when nothing is mapped there.
    pub fn unregister(&self, address: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start: address, len };
        // SAFETY: UFFDIO_UNREGISTER takes this structure; as for `register`.
        unsafe { super::ioctl(&self.0, IOC_UNREGISTER, &mut range) }?;
        Ok(())
    }

    /// Lets threads continue that wait in the range, whatever is mapped there by now.
    ///
    /// # Errors
    ///
    /// `EINVAL` when these are no whole pages.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        wake(self.0.as_fd(), address, len)
    }
}

/// A fault of the other process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ClientFault {
    /// Where, in that process; not rounded down to a page on all kernels.
    pub address: u64,
    /// The thread that waits; 0 unless the process asked for that feature.
    pub thread: u32,
}

/// A userfaultfd that another process opened for its mappings.
#[derive(Debug)]
pub struct ClientFaults(OwnedFd);

impl ClientFaults {
    /// Takes the descriptor that came from the other process, which may be any.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when it is not a userfaultfd; or when it cannot be set not to block.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        // The kernel's own name of it, which no file has. Nothing is asked of the descriptor itself,
        // since a file system in user space would not have to answer.
        let name = rustix::fs::readlink(format!("/proc/self/fd/{}", fd.as_raw_fd()), Vec::new())?;
        if name.to_bytes() != USERFAULTFD {
            let what = format!("{name:?} where a userfaultfd was expected");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, what));
        }
        rustix::io::ioctl_fionbio(&fd, true)?;
        fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
        Ok(Self(fd))
    }

    /// The faults that are waiting, no more than a few at once; none when there are none.
    ///
    /// # Errors
    ///
    /// When they cannot be read: the other process never finished opening it.
    pub fn read(&self, faults: &mut Vec<ClientFault>) -> io::Result<()> {
        // The other process shares this flag and may have lifted it.
        rustix::io::ioctl_fionbio(&self.0, true)?;
        messages(self.0.as_fd(), |message| {
            faults.push(ClientFault { address: message.address, thread: message.thread });
        })
    }

    /// Lets threads continue that wait in `len` bytes from `address` (whole pages). They fault again if
    /// nothing is there.
    ///
    /// # Errors
    ///
    /// `EINVAL` when these are no whole pages.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        wake(self.0.as_fd(), address, len)
    }

    /// Places a page of zeros, `len` bytes, where the other process misses one, and lets its threads
    /// continue that wait for it. It is then in the file, for all processes that map it.
    ///
    /// # Errors
    ///
    /// `ENOENT` when the other process has not registered the range, `ESRCH` when it has ended,
    /// `ENOSPC` or `ENOMEM` when there is no memory; `EAGAIN` while its address space changes, which
    /// may last until events of it were [`read`](Self::read).
    pub fn place_zeros(&self, address: u64, len: u64) -> io::Result<Placed> {
        let range = || UffdioRange { start: address, len };
        let mut zeropage = UffdioZeropage { range: range(), mode: 0, zeropage: 0 };
        // SAFETY: UFFDIO_ZEROPAGE takes this structure. It puts zeros where a process misses a page,
        // which is what the kernel would do if faults had not been asked for.
        let zeroed = unsafe { super::ioctl(&self.0, IOC_ZEROPAGE, &mut zeropage) };
        let placed = match zeroed {
            // Not possible on hugetlb.
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => self.copy_zeros(range()),
            other => other.map(|_| ()),
        };
        match placed {
            Ok(()) => Ok(Placed::Done),
            Err(error) if error.raw_os_error() == Some(libc::EEXIST) => Ok(Placed::Exists(0)),
            Err(error) => Err(error),
        }
    }

    fn copy_zeros(&self, range: UffdioRange) -> io::Result<()> {
        let zeros = vec![0u8; usize::try_from(range.len).map_err(io::Error::other)?];
        let src = zeros.as_ptr().expose_provenance() as u64;
        let mut copy = UffdioCopy { dst: range.start, src, len: range.len, mode: 0, copy: 0 };
        // SAFETY: the kernel reads `len` bytes at `src`, which `zeros` has; as above.
        unsafe { super::ioctl(&self.0, IOC_COPY, &mut copy) }?;
        Ok(())
    }
}

impl From<ClientFaults> for OwnedFd {
    fn from(faults: ClientFaults) -> Self {
        faults.0
    }
}

impl AsFd for ClientFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

fn wake(fd: BorrowedFd<'_>, address: u64, len: u64) -> io::Result<()> {
    let mut range = UffdioRange { start: address, len };
    // SAFETY: UFFDIO_WAKE takes this structure.
    unsafe { super::ioctl(fd, IOC_WAKE, &mut range) }?;
    Ok(())
}

/// A client that is told of what it removes, for tests.
#[cfg(test)]
pub(crate) mod removals {
    use ram_discard::memory::HostMapping;

    /// Removes the first `len` bytes of a mapping from the page tables. The file keeps them.
    pub(crate) fn forget(mapping: &HostMapping, len: u64) {
        let address = mapping.locate(0, len).0;
        let len = usize::try_from(len).unwrap();
        // SAFETY: the range is inside the mapping, which is shared: its bytes are those of the file
        // before and after.
        unsafe {
            rustix::mm::madvise(address.cast(), len, rustix::mm::Advice::LinuxDontNeed).unwrap();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_support::wait_until;
    use std::fs::File;
    use std::sync::Arc;
    use std::thread;

    use ram_discard::memory::HostMapping;

    const PAGE: u64 = 4096;

    fn mapped(file: &File) -> Arc<HostMapping> {
        Arc::new(HostMapping::map(file, 0, 8 * PAGE).unwrap())
    }

    fn file() -> File {
        let fd = rustix::fs::memfd_create("faults", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(8 * PAGE).unwrap();
        file
    }

    fn read(mapping: &Arc<HostMapping>, page: u64) -> thread::JoinHandle<u8> {
        let mapping = Arc::clone(mapping);
        thread::spawn(move || {
            let mut byte = [0];
            mapping.read(page * PAGE, &mut byte);
            byte[0]
        })
    }

    fn wait_for_fault(client: &ClientFaults) -> u64 {
        let mut found = Vec::new();
        wait_until(|| {
            client.read(&mut found).unwrap();
            !found.is_empty()
        });
        found[0].address / PAGE * PAGE
    }

    #[test]
    fn the_holder_of_a_copy_resolves_faults_by_the_address_of_the_other() {
        let file = file();
        let (theirs, ours) = (mapped(&file), mapped(&file));
        let offered = OfferedFaults::open().unwrap();
        let base = theirs.addr() as u64;
        offered.register(base, 4 * PAGE).unwrap();
        let client = ClientFaults::new(offered.copy().unwrap()).unwrap();

        // A page that comes into the file by another mapping only needs a wake.
        let reader = read(&theirs, 1);
        assert_eq!(wait_for_fault(&client), base + PAGE);
        ours.write(PAGE, &[7]);
        client.wake(base + PAGE, PAGE).unwrap();
        assert_eq!(reader.join().unwrap(), 7);
        assert_eq!(client.place_zeros(base + PAGE, PAGE).unwrap(), Placed::Exists(0));

        let reader = read(&theirs, 2);
        let address = wait_for_fault(&client);
        assert_eq!(client.place_zeros(address, PAGE).unwrap(), Placed::Done);
        assert_eq!(reader.join().unwrap(), 0);

        // What is not registered is the kernel's.
        assert_eq!(read(&theirs, 5).join().unwrap(), 0);
        let error = client.place_zeros(base + 6 * PAGE, PAGE).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));

        let reader = read(&theirs, 3);
        wait_for_fault(&client);
        offered.unregister(base, 8 * PAGE).unwrap();
        assert_eq!(reader.join().unwrap(), 0);
    }

    #[test]
    fn a_page_is_not_placed_while_an_event_of_the_other_is_unread() {
        let file = file();
        let theirs = mapped(&file);
        let offered = OfferedFaults::open_with_removals().unwrap();
        let base = theirs.addr() as u64;
        offered.register(base, 8 * PAGE).unwrap();
        let client = ClientFaults::new(offered.copy().unwrap()).unwrap();
        let changing = Arc::clone(&theirs);
        let changer = thread::spawn(move || removals::forget(&changing, PAGE));
        let mut refused = None;
        wait_until(|| {
            refused = client.place_zeros(base + PAGE, PAGE).err();
            refused.is_some()
        });
        let refused = refused.unwrap();
        assert_eq!(refused.raw_os_error(), Some(libc::EAGAIN));
        assert!(!changer.is_finished());
        let mut found = Vec::new();
        client.read(&mut found).unwrap();
        assert_eq!(found, []);
        changer.join().unwrap();
        assert_eq!(client.place_zeros(base + 2 * PAGE, PAGE).unwrap(), Placed::Done);
    }

    #[test]
    fn a_descriptor_of_another_kind_is_refused() {
        let (pipe, _write) = io::pipe().unwrap();
        let name =
            rustix::fs::memfd_create("anon_inode:[userfaultfd]", rustix::fs::MemfdFlags::CLOEXEC);
        let null = File::open("/dev/null").unwrap();
        for other in
            [pipe.into(), name.unwrap(), null.into(), OwnedFd::from(tempfile::tempfile().unwrap())]
        {
            let error = ClientFaults::new(other).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains("where a userfaultfd was expected"), "{error}");
        }
    }
}
