//! Mappings of guest memory as a whole.

use std::io;
use std::os::fd::OwnedFd;
use std::ptr;

use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags, madvise, mmap};
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::queue::Memory;

/// A file of zeros, to be mapped in the place of guest memory. Made before there is a need: then
/// there may be no descriptor left.
///
/// # Errors
///
/// When there is no descriptor to be had.
pub(crate) fn zeros() -> io::Result<OwnedFd> {
    Ok(memfd_create("zeros", MemfdFlags::CLOEXEC)?)
}

/// Puts the file of [`zeros`] in the place of all of `memory`. Nothing that is read then comes from
/// the front-end's files, and nothing that is written goes there. Unlike for private memory, the
/// kernel reserves nothing for it, which it might refuse for as much as a guest has.
///
/// # Errors
///
/// When the kernel refuses; a part may have been replaced.
pub(crate) fn replace_by_zeros(memory: &Memory, zeros: &OwnedFd) -> io::Result<()> {
    let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
    ftruncate(zeros, memory.iter().map(GuestMemoryRegion::len).max().unwrap_or(0))?;
    for region in memory.iter() {
        let (start, len) = (region.as_ptr().cast(), region.len() as usize);
        // SAFETY: this is the whole mapping of a region, which `memory` keeps mapped, and which is
        // unmapped by its address later. It is only accessed by volatile and atomic operations
        // that expect any content at any time.
        unsafe { mmap(start, len, ProtFlags::READ | ProtFlags::WRITE, flags, zeros, 0) }?;
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

/// Kinds of mappings in `/proc/self/coredump_filter` that are shared: anonymous ones, which those of
/// a memfd count as, of files, of huge pages, and of persistent memory.
const SHARED_KINDS: u32 = 1 << 1 | 1 << 3 | 1 << 6 | 1 << 8;

/// Leaves shared mappings out of core dumps of this process, also those that are not
/// [marked](keep_out_of_core_dumps) yet: the guest's memory is none of a dump's reader's business,
/// and is often larger than the disk.
///
/// # Errors
///
/// When the kernel has no core dumps, or refuses.
pub(crate) fn limit_core_dumps() -> io::Result<()> {
    const PATH: &str = "/proc/self/coredump_filter";
    let text = std::fs::read_to_string(PATH)?;
    let filter = u32::from_str_radix(text.trim(), 16).map_err(io::Error::other)?;
    std::fs::write(PATH, format!("{:#x}", filter & !SHARED_KINDS))
}

/// Marks all mappings of what is shared as not to be dumped: guest memory, dirty log, bitmap. Some
/// are made by crates that do not say where, so the kernel is asked.
pub(crate) fn keep_out_of_core_dumps() {
    let marked = || -> io::Result<()> {
        for mapping in super::lost_memory::shared_mappings()? {
            let start = ptr::without_provenance_mut(mapping.start);
            // SAFETY: the advice changes no content, whatever is mapped there by now.
            let advised = unsafe { madvise(start, mapping.len(), Advice::LinuxDontDump) };
            match advised {
                // Unmapped since.
                Ok(()) | Err(Errno::NOMEM) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    };
    if let Err(error) = marked() {
        tracing::warn!(%error, "a core dump may have the guest's memory in it");
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
        let fd = memfd_create("replaced", MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(4 << 12).unwrap();
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let ranges = [(GuestAddress(1 << 20), 4 << 12, Some(offset))];
        let memory = Memory::from_ranges_with_files(ranges).unwrap();
        memory.write_obj(7u8, GuestAddress(1 << 20)).unwrap();
        replace_by_zeros(&memory, &zeros().unwrap()).unwrap();
        // By a file, whatever the system has left for memory that is reserved.
        let start = format!("{:x}-", start_of(&memory, 1 << 20).unwrap());
        let maps = std::fs::read_to_string("/proc/self/maps").unwrap();
        let mapping = maps.lines().find(|line| line.trim_start_matches('0').starts_with(&start));
        assert!(mapping.is_some_and(|line| line.contains("/memfd:zeros")), "{mapping:?}");
        assert_eq!(memory.read_obj::<u8>(GuestAddress(1 << 20)).unwrap(), 0);
        memory.write_obj(9u8, GuestAddress((1 << 20) + 4096)).unwrap();
        let bytes = std::os::unix::fs::FileExt::read_at;
        let mut held = [0; 8192];
        bytes(&file, &mut held, 0).unwrap();
        assert_eq!((held[0], held[4096]), (7, 0));
    }
}
