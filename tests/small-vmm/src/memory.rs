//! Guest memory as a VMM owns it: files, mapped and shared with the back-end.
//!
//! A [`Layout`] says which guest-physical ranges exist and which part of which file is behind each;
//! [`GuestRam`] is that layout mapped. One entry of the layout is one entry of the memory table
//! that the back-end gets, so the shapes that a back-end has to cope with (a region split over
//! several entries, a file offset that is not zero, one file behind several ranges, huge pages) are
//! made here.
//!
//! What the host holds is asked of the file (`st_blocks`, `SEEK_DATA`), never of the mapping:
//! reading a hole through a shared mapping allocates it.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use ram_discard::memory::HostMapping;
use rustix::fs::{FallocateFlags, MemfdFlags, SeekFrom, fallocate, memfd_create, seek};
use rustix::io::Errno;
use vm_memory::{
    AtomicAccess, Bytes, FileOffset, GuestAddress, GuestMemoryBackend, GuestMemoryMmap,
    GuestRegionMmap,
};

/// The page size of the guest, and the step of stamps.
pub const PAGE_SIZE: u64 = 4096;

/// What can go wrong with guest memory.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be made, sized or examined.
    #[error("guest memory file: {0}")]
    File(#[from] io::Error),
    /// The layout could not be mapped.
    #[error("cannot map guest memory: {0}")]
    Map(String),
    /// An access left the guest's memory.
    #[error("guest access at {gpa:#x}: {source}")]
    Access {
        /// First address of the access.
        gpa: u64,
        /// What the mapping said.
        source: vm_memory::GuestMemoryError,
    },
    /// No entry of the layout starts at the address.
    #[error("no memory region starts at {0:#x}")]
    NoRegion(u64),
}

/// What becomes of something done with guest memory.
pub type Result<T> = std::result::Result<T, Error>;

/// One range of guest-physical addresses and the part of a file behind it.
#[derive(Clone, Debug)]
pub struct Region {
    /// First guest-physical address.
    pub gpa: u64,
    /// Length in bytes.
    pub size: u64,
    /// The file behind the range.
    pub file: Arc<File>,
    /// Where in the file the range starts.
    pub offset: u64,
}

impl Region {
    /// The guest-physical addresses of the region.
    pub fn range(&self) -> Range<u64> {
        self.gpa..self.gpa + self.size
    }

    /// The file, to be sent to the back-end.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The guest's memory before it is mapped: a list of regions, built step by step.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    regions: Vec<Region>,
}

impl Layout {
    /// A guest without any memory.
    pub fn new() -> Self {
        Self::default()
    }

    /// Boot memory for rings and buffers at 0, and one region for the device.
    pub fn boot_and_device(boot_size: u64, gpa: u64, size: u64) -> Result<Self> {
        Self::new().memfd("boot", 0, boot_size)?.memfd("virtio-mem", gpa, size)
    }

    /// Adds a range with a memfd of its own.
    pub fn memfd(self, name: &str, gpa: u64, size: u64) -> Result<Self> {
        self.memfd_at(name, gpa, size, 0)
    }

    /// Adds a range that starts at `offset` in a memfd of its own; the file has another `offset`
    /// bytes after the range.
    pub fn memfd_at(self, name: &str, gpa: u64, size: u64, offset: u64) -> Result<Self> {
        let file = memfd(name, size + 2 * offset, MemfdFlags::empty())?;
        Ok(self.file(gpa, size, file, offset))
    }

    /// Adds a range backed by huge pages of 2 MiB. Fails when the mapping is made if the host has
    /// none to give.
    pub fn hugetlb(self, name: &str, gpa: u64, size: u64) -> Result<Self> {
        let file = memfd(name, size, MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB)?;
        Ok(self.file(gpa, size, file, 0))
    }

    /// Adds a range backed by a given file.
    pub fn file(mut self, gpa: u64, size: u64, file: impl Into<Arc<File>>, offset: u64) -> Self {
        let file = file.into();
        self.regions.push(Region { gpa, size, file, offset });
        self
    }

    /// Cuts the region that starts at `gpa` into equal pieces, each an entry of its own over the
    /// same file.
    pub fn split(mut self, gpa: u64, pieces: u64) -> Result<Self> {
        let at =
            self.regions.iter().position(|region| region.gpa == gpa).ok_or(Error::NoRegion(gpa))?;
        let whole = self.regions.remove(at);
        let size = whole.size / pieces;
        for piece in 0..pieces {
            let start = piece * size;
            let size = if piece + 1 == pieces { whole.size - start } else { size };
            self = self.file(whole.gpa + start, size, whole.file.clone(), whole.offset + start);
        }
        Ok(self)
    }

    /// The regions, in the order in which they were added.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }
}

/// A memfd of the given size, all of it a hole.
pub fn memfd(name: &str, size: u64, flags: MemfdFlags) -> Result<File> {
    let file =
        File::from(memfd_create(name, MemfdFlags::CLOEXEC | flags).map_err(io::Error::from)?);
    file.set_len(size)?;
    Ok(file)
}

/// The guest's memory, mapped.
#[derive(Debug)]
pub struct GuestRam {
    regions: Vec<Region>,
    /// In the same order.
    mapped: Vec<Arc<GuestRegionMmap>>,
    memory: GuestMemoryMmap,
}

impl GuestRam {
    /// Maps every region of the layout, shared.
    pub fn new(layout: Layout) -> Result<Self> {
        let mut regions = layout.regions;
        regions.sort_by_key(|region| region.gpa);
        let map = |region: &Region| {
            let file = FileOffset::from_arc(region.file.clone(), region.offset);
            GuestRegionMmap::from_range(GuestAddress(region.gpa), region.size as usize, Some(file))
                .map(Arc::new)
                .map_err(|error| Error::Map(error.to_string()))
        };
        let mapped = regions.iter().map(map).collect::<Result<Vec<_>>>()?;
        let memory = GuestMemoryMmap::from_arc_regions(mapped.clone())
            .map_err(|error| Error::Map(error.to_string()))?;
        Ok(Self { regions, mapped, memory })
    }

    /// The regions, ascending.
    pub fn regions(&self) -> &[Region] {
        &self.regions
    }

    /// The region that starts at `gpa`.
    pub fn region(&self, gpa: u64) -> Result<&Region> {
        self.regions.iter().find(|region| region.gpa == gpa).ok_or(Error::NoRegion(gpa))
    }

    /// Where the region that starts at `gpa` is mapped in this process: where vCPUs write it, so
    /// that is where writes are to be tracked.
    pub fn mapping(&self, gpa: u64) -> Result<Arc<HostMapping>> {
        let at = self.regions.iter().position(|region| region.gpa == gpa);
        let region = at.and_then(|at| self.mapped.get(at)).ok_or(Error::NoRegion(gpa))?;
        Ok(Arc::new(HostMapping::from_region(region.clone())))
    }

    /// Where `gpa` is mapped in this process: what vhost-user calls a user address.
    pub fn user_addr(&self, gpa: u64) -> Result<u64> {
        let host = self
            .memory
            .get_host_address(GuestAddress(gpa))
            .map_err(|source| Error::Access { gpa, source })?;
        Ok(host.addr() as u64)
    }

    /// Writes bytes as the guest's CPU would.
    pub fn write(&self, gpa: u64, bytes: &[u8]) -> Result<()> {
        self.memory
            .write_slice(bytes, GuestAddress(gpa))
            .map_err(|source| Error::Access { gpa, source })
    }

    /// Reads bytes as the guest's CPU would. A page that is a hole gets allocated by this.
    pub fn read(&self, gpa: u64, bytes: &mut [u8]) -> Result<()> {
        self.memory
            .read_slice(bytes, GuestAddress(gpa))
            .map_err(|source| Error::Access { gpa, source })
    }

    /// Reads `len` bytes into a vector.
    pub fn read_vec(&self, gpa: u64, len: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes)?;
        Ok(bytes)
    }

    /// Atomic store, for what both sides of a ring look at.
    pub fn store<T: AtomicAccess>(&self, gpa: u64, value: T) -> Result<()> {
        self.memory
            .store(value, GuestAddress(gpa), Ordering::SeqCst)
            .map_err(|source| Error::Access { gpa, source })
    }

    /// Atomic load, for what both sides of a ring look at.
    pub fn load<T: AtomicAccess>(&self, gpa: u64) -> Result<T> {
        self.memory
            .load(GuestAddress(gpa), Ordering::SeqCst)
            .map_err(|source| Error::Access { gpa, source })
    }

    /// Writes [`stamp`] into the first and the last eight bytes of every page of the range.
    pub fn write_stamps(&self, range: Range<u64>, generation: u64) -> Result<()> {
        for page in range.step_by(PAGE_SIZE as usize) {
            let stamp = stamp(page, generation).to_le_bytes();
            self.write(page, &stamp)?;
            self.write(page + PAGE_SIZE - 8, &stamp)?;
        }
        Ok(())
    }

    /// The first page of the range that does not hold the stamps of [`GuestRam::write_stamps`].
    pub fn find_wrong_stamp(&self, range: Range<u64>, generation: u64) -> Result<Option<u64>> {
        for page in range.step_by(PAGE_SIZE as usize) {
            let wanted = stamp(page, generation).to_le_bytes();
            if self.read_vec(page, 8)? != wanted
                || self.read_vec(page + PAGE_SIZE - 8, 8)? != wanted
            {
                return Ok(Some(page));
            }
        }
        Ok(None)
    }

    /// Bytes that the host holds for the files behind the range, by `st_blocks`. Counts whole
    /// files, each once, so it is exact for ranges that have a file to themselves.
    pub fn allocated_bytes(&self, range: Range<u64>) -> Result<u64> {
        let mut counted: Vec<(u64, u64)> = Vec::new();
        let mut bytes = 0;
        for region in self.overlapping(&range) {
            let stat = rustix::fs::fstat(&region.file).map_err(io::Error::from)?;
            if !counted.contains(&(stat.st_dev, stat.st_ino)) {
                counted.push((stat.st_dev, stat.st_ino));
                bytes += u64::try_from(stat.st_blocks).unwrap_or(0) * 512;
            }
        }
        Ok(bytes)
    }

    /// The parts of the range that the host holds memory for, ascending, by `SEEK_DATA` and
    /// `SEEK_HOLE`.
    pub fn resident_ranges(&self, range: Range<u64>) -> Result<Vec<Range<u64>>> {
        let mut found: Vec<Range<u64>> = Vec::new();
        for region in self.overlapping(&range) {
            let start = range.start.max(region.gpa) - region.gpa + region.offset;
            let end = range.end.min(region.gpa + region.size) - region.gpa + region.offset;
            for data in data_ranges(&region.file, start..end)? {
                let data =
                    data.start - region.offset + region.gpa..data.end - region.offset + region.gpa;
                match found.last_mut() {
                    Some(last) if last.end == data.start => last.end = data.end,
                    _ => found.push(data),
                }
            }
        }
        Ok(found)
    }

    /// Bytes of the range that the host holds memory for, by `SEEK_DATA`.
    pub fn resident_bytes(&self, range: Range<u64>) -> Result<u64> {
        Ok(self.resident_ranges(range)?.iter().map(|data| data.end - data.start).sum())
    }

    /// Gives the memory of the range back to the host, as a VMM would at start.
    pub fn punch(&self, range: Range<u64>) -> Result<()> {
        for region in self.overlapping(&range) {
            let start = range.start.max(region.gpa);
            let len = range.end.min(region.gpa + region.size) - start;
            let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            fallocate(&region.file, flags, start - region.gpa + region.offset, len)
                .map_err(io::Error::from)?;
        }
        Ok(())
    }

    fn overlapping(&self, range: &Range<u64>) -> impl Iterator<Item = &Region> {
        let range = range.clone();
        self.regions
            .iter()
            .filter(move |region| region.gpa < range.end && range.start < region.gpa + region.size)
    }
}

/// What a page holds after a write of the given generation: differs between pages and between
/// generations, and is never zero.
pub fn stamp(page: u64, generation: u64) -> u64 {
    (page ^ generation.rotate_left(48)) | 1
}

/// The parts of a range of a file that the host holds memory for, ascending.
pub fn data_ranges(file: &File, range: Range<u64>) -> Result<Vec<Range<u64>>> {
    let mut found = Vec::new();
    let mut at = range.start;
    while at < range.end {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) if data < range.end => data,
            Ok(_) | Err(Errno::NXIO) => break,
            Err(error) => return Err(io::Error::from(error).into()),
        };
        let hole = seek(file, SeekFrom::Hole(data)).map_err(io::Error::from)?.min(range.end);
        found.push(data..hole);
        at = hole;
    }
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn split_region_with_offset_keeps_addresses_and_offsets_in_step() {
        let layout = Layout::new()
            .memfd_at("ram", 4 * MIB, 8 * MIB, MIB)
            .unwrap()
            .split(4 * MIB, 4)
            .unwrap();
        let ram = GuestRam::new(layout).unwrap();
        let entries: Vec<_> =
            ram.regions().iter().map(|r| (r.gpa / MIB, r.size / MIB, r.offset / MIB)).collect();
        assert_eq!(entries, [(4, 2, 1), (6, 2, 3), (8, 2, 5), (10, 2, 7)]);

        // An access across two entries lands in the file without a gap.
        ram.write(6 * MIB - 2, &[1, 2, 3, 4]).unwrap();
        assert_eq!(ram.read_vec(6 * MIB - 2, 4).unwrap(), [1, 2, 3, 4]);
        assert_eq!(ram.allocated_bytes(4 * MIB..12 * MIB).unwrap(), 2 * PAGE_SIZE);
    }

    #[test]
    fn resident_ranges_merge_across_entries_and_punch_removes_them() {
        let layout = Layout::new().memfd("ram", 0, 4 * MIB).unwrap().split(0, 2).unwrap();
        let ram = GuestRam::new(layout).unwrap();
        ram.write_stamps(MIB..3 * MIB, 7).unwrap();
        let resident = ram.resident_ranges(0..4 * MIB).unwrap();
        assert_eq!(resident, vec![MIB..3 * MIB; 1]);
        assert_eq!(ram.find_wrong_stamp(MIB..3 * MIB, 7).unwrap(), None);
        assert_eq!(ram.find_wrong_stamp(MIB..3 * MIB, 8).unwrap(), Some(MIB));
        ram.punch(0..2 * MIB).unwrap();
        assert_eq!(ram.resident_bytes(0..4 * MIB).unwrap(), MIB);
    }
}
