//! KVM's dirty log.
//!
//! Structures and numbers are those of `linux/kvm.h`.

use std::io;
use std::os::fd::{AsFd, AsRawFd};

use ram_discard::GpaRange;
use rustix::ioctl::{Opcode, opcode};

const GROUP: u8 = 0xae;
const IOC_CHECK_EXTENSION: Opcode = opcode::none(GROUP, 0x03);
const IOC_GET_DIRTY_LOG: Opcode = opcode::write::<KvmDirtyLogArg>(GROUP, 0x42);
const IOC_SET_USER_MEMORY_REGION: Opcode = opcode::write::<KvmUserspaceMemoryRegion>(GROUP, 0x46);
const IOC_ENABLE_CAP: Opcode = opcode::write::<KvmEnableCap>(GROUP, 0xa3);
const IOC_CLEAR_DIRTY_LOG: Opcode = opcode::read_write::<KvmClearDirtyLog>(GROUP, 0xc0);

const CAP_MANUAL_DIRTY_LOG_PROTECT2: u32 = 168;
const DIRTY_LOG_MANUAL_PROTECT_ENABLE: u64 = 1 << 0;
const MEM_LOG_DIRTY_PAGES: u32 = 1 << 0;

#[repr(C)]
struct KvmDirtyLogArg {
    slot: u32,
    padding: u32,
    bitmap: u64,
}

#[repr(C)]
struct KvmClearDirtyLog {
    slot: u32,
    num_pages: u32,
    first_page: u64,
    bitmap: u64,
}

#[repr(C)]
struct KvmUserspaceMemoryRegion {
    slot: u32,
    flags: u32,
    guest_phys_addr: u64,
    memory_size: u64,
    userspace_addr: u64,
}

#[repr(C)]
struct KvmEnableCap {
    cap: u32,
    flags: u32,
    args: [u64; 4],
    pad: [u8; 64],
}

/// A memory slot of a VM, as the VMM set it.
#[derive(Clone, Debug)]
pub struct KvmSlot {
    id: u32,
    flags: u32,
    guest_range: GpaRange,
    userspace_addr: u64,
    /// The unit of the log, bytes: a page of the host, whatever the guest's pages are.
    page_size: u64,
}

impl KvmSlot {
    /// The slot `id` (address space in the upper 16 bits), that maps `guest_range` (guest-physical)
    /// to `userspace_addr`, with `flags` other than that for logging.
    ///
    /// # Panics
    ///
    /// When the range is not made of whole pages of the host.
    ///
    /// # Safety
    ///
    /// For as long as the value or a clone of it lives, the VM it is used with has this slot, with
    /// exactly these values: KVM writes a log of the slot's real size, and a slot that is set with
    /// another address opens the memory there to the guest.
    pub unsafe fn new(id: u32, flags: u32, guest_range: GpaRange, userspace_addr: u64) -> Self {
        let page_size = rustix::param::page_size() as u64;
        let whole =
            [guest_range.start(), guest_range.len()].iter().all(|n| n.is_multiple_of(page_size));
        assert!(whole, "slot {id} is not made of whole pages: {guest_range}");
        Self { id, flags: flags & !MEM_LOG_DIRTY_PAGES, guest_range, userspace_addr, page_size }
    }

    /// The guest-physical range.
    pub fn guest_range(&self) -> GpaRange {
        self.guest_range
    }

    /// Bytes that one bit of the log stands for: a page of the host.
    pub fn page_size(&self) -> u64 {
        self.page_size
    }

    /// Number of pages of the host, the unit of the log.
    pub fn nr_pages(&self) -> u64 {
        self.guest_range.len() / self.page_size
    }

    /// Number of words in the slot's log.
    pub fn nr_words(&self) -> usize {
        usize::try_from(self.nr_pages().div_ceil(64)).expect("a log fits in memory")
    }

    /// Switches logging on or off. Switching it on again starts with an empty log.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    pub fn set_logging(&self, vm: impl AsFd, on: bool) -> io::Result<()> {
        let mut region = KvmUserspaceMemoryRegion {
            slot: self.id,
            flags: self.flags | if on { MEM_LOG_DIRTY_PAGES } else { 0 },
            guest_phys_addr: self.guest_range.start(),
            memory_size: self.guest_range.len(),
            userspace_addr: self.userspace_addr,
        };
        // SAFETY: KVM_SET_USER_MEMORY_REGION takes this structure. By the promise given at `new`
        // the slot exists with the same memory, so that the guest gets at nothing new.
        unsafe { super::ioctl(vm, IOC_SET_USER_MEMORY_REGION, &mut region) }?;
        Ok(())
    }

    /// Reads the log: one bit for each page of the slot, page 0 in the lowest bit of word 0. Without
    /// `enable_manual_protect`, this also clears it.
    ///
    /// # Errors
    ///
    /// When KVM refuses, as it does while logging is off.
    ///
    /// # Panics
    ///
    /// When `log` has not [`nr_words`](Self::nr_words) words.
    pub fn dirty_log(&self, vm: impl AsFd, log: &mut [u64]) -> io::Result<()> {
        assert_eq!(log.len(), self.nr_words(), "a log of another size");
        let bitmap = log.as_mut_ptr().expose_provenance() as u64;
        let mut arg = KvmDirtyLogArg { slot: self.id, padding: 0, bitmap };
        // SAFETY: KVM_GET_DIRTY_LOG takes this structure and writes one bit for each page of the
        // slot, rounded up to words, which is the size of `log` by the promise given at `new`.
        unsafe { super::ioctl(vm, IOC_GET_DIRTY_LOG, &mut arg) }?;
        Ok(())
    }

    /// Clears the pages whose bits are set in `bits` (from page `word * 64` on), so that the next
    /// writes to them are logged.
    ///
    /// # Errors
    ///
    /// When KVM refuses.
    ///
    /// # Panics
    ///
    /// When `bits` leave the slot.
    pub fn clear_dirty_log(&self, vm: impl AsFd, word: usize, bits: &[u64]) -> io::Result<()> {
        let first_page = word as u64 * 64;
        assert!(word + bits.len() <= self.nr_words(), "a log of another size");
        // KVM takes a multiple of 64 or what is left of the slot.
        let pages = (bits.len() as u64 * 64).min(self.nr_pages() - first_page);
        let mut arg = KvmClearDirtyLog {
            slot: self.id,
            num_pages: u32::try_from(pages).map_err(|_| io::ErrorKind::InvalidInput)?,
            first_page,
            bitmap: bits.as_ptr().expose_provenance() as u64,
        };
        // SAFETY: KVM_CLEAR_DIRTY_LOG takes this structure and reads one bit for each of
        // `num_pages`, which `bits` has.
        unsafe { super::ioctl(vm, IOC_CLEAR_DIRTY_LOG, &mut arg) }?;
        Ok(())
    }
}

/// Has reading the log no longer clear it, so that a page is write-protected shortly before it is
/// sent and not all of them at once. To be called before logging starts. False when KVM cannot.
///
/// The log still starts empty: `KVM_DIRTY_LOG_INITIALLY_SET` would report every discarded page
/// once.
///
/// # Errors
///
/// When KVM refuses.
pub fn enable_manual_protect(vm: impl AsFd) -> io::Result<bool> {
    let fd = vm.as_fd().as_raw_fd();
    // SAFETY: KVM_CHECK_EXTENSION takes a number by value.
    let has = unsafe {
        libc::ioctl(
            fd,
            IOC_CHECK_EXTENSION.into(),
            libc::c_ulong::from(CAP_MANUAL_DIRTY_LOG_PROTECT2),
        )
    };
    if has < 0 {
        return Err(io::Error::last_os_error());
    }
    if has == 0 {
        return Ok(false);
    }
    let args = [DIRTY_LOG_MANUAL_PROTECT_ENABLE, 0, 0, 0];
    let mut cap = KvmEnableCap { cap: CAP_MANUAL_DIRTY_LOG_PROTECT2, flags: 0, args, pad: [0; 64] };
    // SAFETY: KVM_ENABLE_CAP takes this structure, which has no addresses.
    unsafe { super::ioctl(vm, IOC_ENABLE_CAP, &mut cap) }?;
    Ok(true)
}

#[cfg(test)]
mod tests;
