//! userfaultfd(2): write-protection of guest memory that the kernel resolves by itself.
//!
//! Structures and numbers are those of `linux/userfaultfd.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::io::Errno;
use rustix::ioctl::{Opcode, opcode};
use rustix::mm::UserfaultfdFlags;

/// What write-protection in asynchronous mode needs, with the first kernel that has it.
const NEEDED: [(u64, &str); 4] = [
    (1 << 0, "PAGEFAULT_FLAG_WP (Linux 5.7)"),
    (1 << 12, "WP_HUGETLBFS_SHMEM (Linux 5.19)"),
    (1 << 13, "WP_UNPOPULATED (Linux 6.4)"),
    (1 << 15, "WP_ASYNC (Linux 6.7)"),
];

pub(super) const GROUP: u8 = 0xaa;
pub(super) const API: u64 = 0xaa;
const USER_MODE_ONLY: u32 = 1;
pub(super) const REGISTER_MODE_WP: u64 = 1 << 1;
pub(super) const WRITEPROTECT_MODE_WP: u64 = 1 << 0;

const IOC_NEW: Opcode = opcode::none(GROUP, 0x00);
pub(super) const IOC_REGISTER: Opcode = opcode::read_write::<UffdioRegister>(GROUP, 0x00);
pub(super) const IOC_WRITEPROTECT: Opcode = opcode::read_write::<UffdioWriteprotect>(GROUP, 0x06);
pub(super) const IOC_API: Opcode = opcode::read_write::<UffdioApi>(GROUP, 0x3f);

/// The most that is protected in one call, so that a thread that maps memory meanwhile waits for
/// milliseconds, not for seconds.
const PROTECT_CHUNK: u64 = 1 << 30;

#[repr(C)]
#[derive(Default)]
pub(super) struct UffdioApi {
    pub(super) api: u64,
    pub(super) features: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct UffdioRange {
    pub(super) start: u64,
    pub(super) len: u64,
}

#[repr(C)]
pub(super) struct UffdioRegister {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
    pub(super) ioctls: u64,
}

#[repr(C)]
pub(super) struct UffdioWriteprotect {
    pub(super) range: UffdioRange,
    pub(super) mode: u64,
}

/// Write-protection in asynchronous mode: the first write to a protected page lifts the protection
/// of that page and goes on, without waiting and without an event. Which pages were written is what
/// [`Pagemap`](super::pagemap::Pagemap) tells.
///
/// Sees writes through this process's mapping, by whomever: threads, system calls, and the vCPUs
/// of a guest that KVM runs on it. Not those through the mapping of another process, nor by
/// pwrite(2) and its like on the file. Nor DMA into pages that are pinned already (O_DIRECT under
/// way, fixed buffers of io_uring, vfio): to pin for writing lifts the protection, once, and when
/// the page is protected again what still lands there is not told.
///
/// All protection ends when the value is dropped.
#[derive(Debug)]
pub struct AsyncWriteProtect(OwnedFd);

impl AsyncWriteProtect {
    /// Opens it by userfaultfd(2), or by `/dev/userfaultfd` where that is forbidden. Privileges
    /// are not needed: faults in kernel mode, which are not for everybody to handle, are never
    /// handled by us.
    ///
    /// # Errors
    ///
    /// What the kernel lacks, or why it refuses.
    pub fn open() -> io::Result<Self> {
        // What is not there cannot be asked for, and a descriptor can be asked only once.
        let mut api = UffdioApi { api: API, ..UffdioApi::default() };
        // SAFETY: UFFDIO_API takes this structure, which has no addresses.
        unsafe { super::ioctl(open(false)?, IOC_API, &mut api) }?;
        let missing: Vec<_> = NEEDED
            .iter()
            .filter(|(bit, _)| api.features & bit == 0)
            .map(|(_, name)| *name)
            .collect();
        if !missing.is_empty() {
            let what = format!("userfaultfd of this kernel lacks {}", missing.join(", "));
            return Err(io::Error::new(io::ErrorKind::Unsupported, what));
        }
        let fd = open(false)?;
        let features = NEEDED.iter().fold(0, |all, (bit, _)| all | bit);
        let mut api = UffdioApi { api: API, features, ioctls: 0 };
        // SAFETY: as above.
        unsafe { super::ioctl(&fd, IOC_API, &mut api) }?;
        Ok(Self(fd))
    }

    /// Prepares `len` bytes of the mapping from `offset`, whole pages. This alone protects nothing and
    /// costs nothing.
    ///
    /// # Errors
    ///
    /// `EBUSY` when another userfaultfd has the memory, `EPERM` when a seal forbids writing it.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn register(&self, mapping: &HostMapping, offset: u64, len: u64) -> io::Result<()> {
        let start = mapping.locate(offset, len).0.addr() as u64;
        let range = UffdioRange { start, len };
        let mut register = UffdioRegister { range, mode: REGISTER_MODE_WP, ioctls: 0 };
        // SAFETY: UFFDIO_REGISTER takes this structure. Writes to the range still end as they
        // would have, so it does not matter whose memory it is.
        unsafe { super::ioctl(&self.0, IOC_REGISTER, &mut register) }?;
        Ok(())
    }

    /// Protects `range` (bytes of the mapping, whole pages). Where nothing is mapped, the
    /// page tables get a marker, which takes a page of them for each 2 MiB. A
    /// transparent huge page is split, so that writes are told by the page.
    ///
    /// # Errors
    ///
    /// `ENOENT` when the range is not registered, `ENOMEM` when there is none for page tables.
    /// A part may be protected then.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn protect(&self, mapping: &HostMapping, range: ByteRange) -> io::Result<()> {
        for chunk in range.chunks(PROTECT_CHUNK) {
            let start = mapping.locate(chunk.start(), chunk.len()).0.addr() as u64;
            let range = UffdioRange { start, len: chunk.len() };
            let mut protect = UffdioWriteprotect { range, mode: WRITEPROTECT_MODE_WP };
            // SAFETY: UFFDIO_WRITEPROTECT takes this structure; as for `register`.
            unsafe { super::ioctl(&self.0, IOC_WRITEPROTECT, &mut protect) }?;
        }
        Ok(())
    }
}

/// A descriptor that gets the faults of user mode, and with `kernel_faults` also those of system
/// calls and of KVM, for which userfaultfd(2) wants CAP_SYS_PTRACE.
pub(super) fn open(kernel_faults: bool) -> io::Result<OwnedFd> {
    let mut flags = UserfaultfdFlags::CLOEXEC | UserfaultfdFlags::NONBLOCK;
    if !kernel_faults {
        flags |= UserfaultfdFlags::from_bits_retain(USER_MODE_ONLY);
    }
    // SAFETY: the descriptor does nothing by itself.
    let forbidden = match unsafe { rustix::mm::userfaultfd(flags) } {
        Err(errno @ (Errno::PERM | Errno::NOSYS | Errno::ACCESS)) => errno,
        other => return Ok(other?),
    };
    let Ok(device) = File::options().read(true).write(true).open("/dev/userfaultfd") else {
        return Err(io::Error::new(
            io::Error::from(forbidden).kind(),
            format!("neither userfaultfd(2) nor /dev/userfaultfd can be used: {forbidden}"),
        ));
    };
    // SAFETY: USERFAULTFD_IOC_NEW takes flags by value, and the result is checked.
    let fd = unsafe { libc::ioctl(device.as_raw_fd(), IOC_NEW.into(), flags.bits()) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: a new descriptor that is not used elsewhere.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
