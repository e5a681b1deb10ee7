//! Mappings of guest memory as a whole.

use std::io;
use std::ptr;

use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap_anonymous};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::queue::Memory;

/// Puts private memory of zeros in the place of all of `memory`. Nothing that is read then comes
/// from the front-end's files, and nothing that is written goes there.
///
/// # Errors
///
/// When the kernel refuses; a part may have been replaced.
pub(crate) fn replace_by_zeros(memory: &Memory) -> io::Result<()> {
    let flags = MapFlags::PRIVATE | MapFlags::FIXED | MapFlags::NORESERVE;
    for region in memory.iter() {
        let (start, len) = (region.as_ptr().cast(), region.len() as usize);
        // SAFETY: this is the whole mapping of a region, which `memory` keeps mapped, and which is
        // unmapped by its address later. It is only accessed by volatile and atomic operations
        // that expect any content at any time.
        unsafe { mmap_anonymous(start, len, ProtFlags::READ | ProtFlags::WRITE, flags) }?;
    }
    Ok(())
}

/// Keeps one missing page from being filled with its neighbours by a huge one.
pub(crate) fn forbid_huge_pages(memory: &Memory) {
    for region in memory.iter() {
        let (start, len) = (region.as_ptr().cast(), region.len() as usize);
        // SAFETY: this is the mapping of a region that `memory` keeps mapped; the advice changes
        // no content.
        if let Err(error) = unsafe { madvise(start, len, Advice::LinuxNoHugepage) } {
            // Without huge pages in the kernel, and on hugetlb, there is nothing to forbid.
            tracing::debug!(%error, "huge pages cannot be forbidden");
        }
    }
}

/// Where the byte at `gpa` is mapped, if a region starts there.
pub(crate) fn start_of(memory: &Memory, gpa: u64) -> Option<u64> {
    let region = memory.iter().find(|region| region.start_addr().0 == gpa)?;
    Some(ptr::NonNull::new(region.as_ptr())?.addr().get() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{Bytes, FileOffset, GuestAddress};

    #[test]
    fn what_is_written_after_a_replacement_does_not_reach_the_file() {
        let fd = rustix::fs::memfd_create("replaced", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(4 << 12).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(1 << 20), 4 << 12, Some(offset))];
        let memory = Memory::from_ranges_with_files(ranges).unwrap();
        memory.write_obj(7u8, GuestAddress(1 << 20)).unwrap();
        replace_by_zeros(&memory).unwrap();
        assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 20)).unwrap(), 0);
        memory.write_obj(9u8, GuestAddress((1 << 20) + 4096)).unwrap();
        let bytes = std::os::unix::fs::FileExt::read_at;
        let mut held = [0; 8192];
        bytes(&file, &mut held, 0).unwrap();
        assert_eq!((held[0], held[4096]), (7, 0));
    }
}
