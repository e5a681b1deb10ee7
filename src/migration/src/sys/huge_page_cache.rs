//! Whether a file on hugetlbfs has a page, which nothing tells: there are no holes and no cachestat(2), and
//! mincore(2) tells of page tables only.
//!
//! UFFDIO_COPY answers EEXIST where the file has a page, and also where it has none and the pool is
//! empty. The first is a fault of what comes, the second passes.

use std::fs::File;
use std::io;
use std::sync::Arc;

use ram_discard::FileRange;
use ram_discard::memory::HostMapping;
use rustix::ioctl::{Opcode, opcode};

use super::page_faults::handshake;
use super::userfaultfd::{GROUP, IOC_REGISTER, UffdioRange, UffdioRegister, open};

const FEATURE_MINOR_HUGETLBFS: (u64, &str) = (1 << 9, "MINOR_HUGETLBFS (Linux 5.13)");
const REGISTER_MODE_MINOR: u64 = 1 << 2;
const IOC_CONTINUE: Opcode = opcode::read_write::<UffdioContinue>(GROUP, 0x07);

#[repr(C)]
struct UffdioContinue {
    range: UffdioRange,
    mode: u64,
    mapped: i64,
}

/// Whether `file` has the huge page of `page`, one whole page of it, by mapping what is there where
/// nothing else looks.
///
/// # Errors
///
/// When it cannot be found out, as by a kernel before 5.13.
pub(crate) fn has_page(file: &File, page: FileRange) -> io::Result<bool> {
    let mapping = Arc::new(HostMapping::map(file, page.start(), page.len())?);
    let fd = handshake(&[FEATURE_MINOR_HUGETLBFS], || open(true))?;
    let range = || UffdioRange { start: mapping.addr() as u64, len: page.len() };
    let mut register = UffdioRegister { range: range(), mode: REGISTER_MODE_MINOR, ioctls: 0 };
    // SAFETY: UFFDIO_REGISTER takes this structure. No access is made to the mapping, which is ours alone.
    unsafe { super::ioctl(&fd, IOC_REGISTER, &mut register) }?;
    loop {
        let mut goes_on = UffdioContinue { range: range(), mode: 0, mapped: 0 };
        // SAFETY: UFFDIO_CONTINUE takes this structure, and maps a page of the file into the mapping.
        let Err(error) = (unsafe { super::ioctl(&fd, IOC_CONTINUE, &mut goes_on) }) else {
            return Ok(true);
        };
        match error.raw_os_error() {
            Some(libc::EEXIST) => return Ok(true),
            Some(libc::EFAULT) => return Ok(false),
            // The address space is changing.
            Some(libc::EAGAIN) => {}
            _ => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::huge_page_pool::Pool;
    use std::os::unix::fs::FileExt;

    const HUGE: u64 = 2 << 20;

    #[test]
    fn a_page_that_is_there_is_told_from_one_that_is_not_and_none_is_allocated() {
        let pool = match Pool::with_free(HUGE, 1) {
            Ok(pool) => pool,
            Err(error) => return eprintln!("skipped: hugetlb: {error}"),
        };
        let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::HUGETLB;
        let file = File::from(rustix::fs::memfd_create("huge", flags).unwrap());
        file.set_len(4 * HUGE).unwrap();
        let page = |index: u64| FileRange::new(index * HUGE, HUGE).unwrap();
        let there = |index| has_page(&file, page(index)).unwrap();
        assert_eq!([0, 1, 2, 3].map(there), [false; 4]);
        assert_eq!(pool.free(), 1);
        // Zeros are a page, too, and so is one that no mapping of this process has.
        let (offset, len) = (page(2).start(), page(2).len());
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), offset, len).unwrap();
        assert_eq!([0, 1, 2, 3].map(there), [false, false, true, false]);
        assert_eq!(pool.free(), 0);
        let mut byte = [1];
        file.read_exact_at(&mut byte, offset).unwrap();
        assert_eq!(byte, [0]);
    }
}
