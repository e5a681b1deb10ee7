//! Guest RAM mapped into this process.

use std::any::Any;
use std::fmt;
use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{self, MapFlags, ProtFlags};
use vm_memory::GuestRegionMmap;
use vm_memory::bitmap::Bitmap;

/// What [`HostMapping::page_is_zero`] needs ranges to be aligned to, bytes.
pub const ZERO_CHECK_ALIGN: u64 = 64;

/// A range of guest RAM in this process's address space, readable and writable for as long as the
/// value lives.
///
/// The guest and other processes write to it at any time, so what is read may be torn between
/// their writes; migration reads a page again when it was written since.
///
/// Offsets count bytes from the start of the mapping. A range that leaves the mapping is a bug of
/// the caller and panics.
///
/// [`read`](Self::read), [`write`](Self::write), [`fill_zero`](Self::fill_zero) and
/// [`page_is_zero`](Self::page_is_zero) access the memory directly. Two things follow. Reading a
/// hole of the backing file allocates memory for it, so holes are found by the file or the page
/// tables first. And memory that cannot be had (a file truncated by its other owner, an exhausted
/// hugetlb pool) raises SIGBUS; only what the kernel reads by address, as
/// `migration::GatherWrite` has it do, ends with `EFAULT` there. Files sealed with
/// `F_SEAL_SHRINK` cannot be truncated.
pub struct HostMapping {
    start: NonNull<u8>,
    len: usize,
    owner: Owner,
}

enum Owner {
    /// Mapped by us, unmapped on drop.
    Us,
    /// Keeps a mapping made elsewhere alive.
    Other { _keep: Arc<dyn Any + Send + Sync> },
}

// SAFETY: the pointer is not tied to a thread: mappings belong to the process. The owner is Send.
unsafe impl Send for HostMapping {}
// SAFETY: no code outside gets a reference to the memory; all accesses are volatile or atomic and
// tolerate concurrent writes, which the guest makes anyway.
unsafe impl Sync for HostMapping {}

impl HostMapping {
    /// Maps `len` bytes of `file` from `offset`, shared with all others who map it. Takes no memory
    /// until it is touched.
    ///
    /// # Errors
    ///
    /// When the kernel refuses: `len` is 0, `offset` is not a multiple of the page size of the
    /// file, the file is not open for reading and writing, or a seal forbids it.
    pub fn map(file: &File, offset: u64, len: u64) -> io::Result<Self> {
        Self::map_with(file, offset, len, MapFlags::NORESERVE)
    }

    /// Has the kernel set memory of the pool of huge pages aside for a range of `file`, a file of huge pages:
    /// what is allocated there until the file is truncated or goes cannot find the pool empty.
    ///
    /// # Errors
    ///
    /// When the pool does not have as much, or as [`map`](Self::map).
    pub fn reserve(file: &File, offset: u64, len: u64) -> io::Result<()> {
        // What is reserved for a shared mapping is the file's, and stays when the mapping goes.
        Self::map_with(file, offset, len, MapFlags::empty()).map(drop)
    }

    fn map_with(file: &File, offset: u64, len: u64, more: MapFlags) -> io::Result<Self> {
        let len = usize::try_from(len).map_err(|_| io::ErrorKind::OutOfMemory)?;
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::SHARED | more;
        // SAFETY: without a wanted address the kernel takes a free one, so no existing mapping
        // is replaced.
        let start = unsafe { mm::mmap(std::ptr::null_mut(), len, prot, flags, file, offset) }?;
        // A core dump would have the guest in it, and fill every hole of its memory.
        // SAFETY: the advice concerns the mapping that was just made, and changes no content.
        let advised = unsafe { mm::madvise(start, len, mm::Advice::LinuxDontDump) };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // From here on it is unmapped when dropped.
        let mapping = Self { start, len, owner: Owner::Us };
        advised?;
        Ok(mapping)
    }

    /// Uses the mapping of a VMM that keeps its guest memory in vm-memory. The region stays mapped
    /// while this value lives. Writes made through here are not marked in a bitmap that the region
    /// carries.
    ///
    /// # Panics
    ///
    /// When the region has no address.
    pub fn from_region<B: Bitmap + Send + Sync + 'static>(region: Arc<GuestRegionMmap<B>>) -> Self {
        let start = NonNull::new(region.as_ptr()).expect("a mapped region has an address");
        let len = region.size();
        Self { start, len, owner: Owner::Other { _keep: region } }
    }

    /// Uses a mapping made elsewhere.
    ///
    /// # Safety
    ///
    /// Until `owner` is dropped, the `len` bytes from `start` must stay mapped for reading and
    /// writing, and must be memory that no Rust reference points to.
    pub unsafe fn from_raw(
        start: NonNull<u8>,
        len: usize,
        owner: Arc<dyn Any + Send + Sync>,
    ) -> Self {
        Self { start, len, owner: Owner::Other { _keep: owner } }
    }

    /// Length in bytes.
    #[expect(clippy::len_without_is_empty, reason = "a mapping is never empty")]
    pub fn len(&self) -> u64 {
        self.len as u64
    }

    /// Address in this process, for system calls that take memory by address. Valid while the
    /// value lives.
    pub fn addr(&self) -> usize {
        self.start.as_ptr().addr()
    }

    /// Whether all of the range reads as zero. Stops early at the first 64 bytes that do not,
    /// else runs at the memory's bandwidth.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping, or its address or length is not a multiple of
    /// [`ZERO_CHECK_ALIGN`].
    pub fn page_is_zero(&self, offset: u64, len: u64) -> bool {
        let (start, len) = self.locate(offset, len);
        let align = ZERO_CHECK_ALIGN as usize;
        assert!(start.addr().is_multiple_of(align) && len.is_multiple_of(align), "unaligned range");
        // SAFETY: `locate` checked that the range is mapped, the line above that it is aligned to
        // and made of lines of 64 bytes.
        unsafe { zero::is_zero(start, len) }
    }

    /// Copies from guest memory into `to`.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn read(&self, offset: u64, to: &mut [u8]) {
        let (from, len) = self.locate(offset, to.len() as u64);
        // SAFETY: `from` has `len` mapped bytes, `to` has as many and, being a Rust slice, is not
        // guest memory, so the two do not overlap.
        unsafe { copy_volatile(from, to.as_mut_ptr(), len) }
    }

    /// Copies `from` into guest memory.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn write(&self, offset: u64, from: &[u8]) {
        let (to, len) = self.locate(offset, from.len() as u64);
        // SAFETY: as in `read`, the other way round.
        unsafe { copy_volatile(from.as_ptr(), to, len) }
    }

    /// Writes zeroes, which allocates memory where there is none: to empty memory, discard it.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn fill_zero(&self, offset: u64, len: u64) {
        const ZEROES: [u8; 4096] = [0; 4096];
        let mut done = 0;
        while done < len {
            let step = (len - done).min(ZEROES.len() as u64);
            self.write(offset + done, &ZEROES[..step as usize]);
            done += step;
        }
    }

    /// Takes the bits of `mask` out of the word at `offset`, atomically, and returns which were
    /// set. The word is little-endian, as in the log that vhost-user back-ends write.
    ///
    /// # Panics
    ///
    /// When the word leaves the mapping or its address is not a multiple of 8.
    pub fn take_bits(&self, offset: u64, mask: u64) -> u64 {
        let word = self.word(offset);
        // Most words of a log are empty; looking first keeps their cache lines shared.
        if word.load(Ordering::Relaxed) & mask.to_le() == 0 {
            return 0;
        }
        u64::from_le(word.fetch_and(!mask.to_le(), Ordering::AcqRel)) & mask
    }

    /// Sets the bits of `mask` in the word at `offset`, atomically, for
    /// [`take_bits`](Self::take_bits) to take. What was written before is seen by who took them.
    ///
    /// # Panics
    ///
    /// When the word leaves the mapping or its address is not a multiple of 8.
    pub fn set_bits(&self, offset: u64, mask: u64) {
        self.word(offset).fetch_or(mask.to_le(), Ordering::Release);
    }

    fn word(&self, offset: u64) -> &AtomicU64 {
        let (start, _) = self.locate(offset, size_of::<u64>() as u64);
        assert!(start.addr().is_multiple_of(align_of::<AtomicU64>()), "unaligned word");
        // SAFETY: the word is mapped while `self` lives and aligned, and all who write to it do so
        // atomically.
        unsafe { AtomicU64::from_ptr(start.cast()) }
    }

    /// Address and length of a range of the mapping, for a system call. The memory is shared with a running
    /// guest: no reference to it may be made.
    ///
    /// # Panics
    ///
    /// When the range leaves the mapping.
    pub fn locate(&self, offset: u64, len: u64) -> (*mut u8, usize) {
        let inside = offset.checked_add(len).is_some_and(|end| end <= self.len());
        assert!(inside, "{len:#x} bytes at {offset:#x} leave a mapping of {:#x} bytes", self.len);
        // Both fit, being no larger than `self.len`.
        (self.start.as_ptr().wrapping_add(offset as usize), len as usize)
    }
}

impl fmt::Debug for HostMapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "HostMapping({:#x}, {:#x} bytes)", self.addr(), self.len)
    }
}

impl Drop for HostMapping {
    fn drop(&mut self) {
        match self.owner {
            Owner::Us => {
                // SAFETY: the range is exactly what `map` got, and it cannot be used any more:
                // code that uses it by address keeps this value alive.
                let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), self.len) };
            }
            Owner::Other { .. } => {}
        }
    }
}

/// Copies `len` bytes by volatile accesses, words where `from` and `to` can be aligned together.
///
/// # Safety
///
/// `from` and `to` are valid for `len` bytes and do not overlap.
unsafe fn copy_volatile(from: *const u8, to: *mut u8, len: usize) {
    const WORD: usize = size_of::<u64>();
    let same_phase = from.addr() % WORD == to.addr() % WORD;
    let head = if same_phase { from.addr().wrapping_neg() % WORD } else { len }.min(len);
    let words = (len - head) / WORD;
    let bytes = (0..head).chain(head + words * WORD..len);
    for at in bytes {
        // SAFETY: `at` is less than `len`, and bytes are always aligned.
        unsafe { to.add(at).write_volatile(from.add(at).read_volatile()) }
    }
    for word in 0..words {
        let at = head + word * WORD;
        // SAFETY: `at + WORD` is at most `len`; `head` takes both pointers to a multiple of the
        // word size, since their phases are equal when there are words.
        unsafe {
            to.add(at).cast::<u64>().write_volatile(from.add(at).cast::<u64>().read_volatile());
        }
    }
}

/// The zero check, in the widest loads that the processor has.
mod zero {
    /// Whether `len` bytes from `start` are zero.
    ///
    /// # Safety
    ///
    /// `start` is valid for reads of `len` bytes; both are multiples of 64.
    pub(super) unsafe fn is_zero(start: *const u8, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        // Most pages with content have some in their first line.
        // SAFETY: the first line is part of the range.
        if unsafe { !words(start, super::ZERO_CHECK_ALIGN as usize) } {
            return false;
        }
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has AVX2; the range is the caller's.
            return unsafe { avx2(start, len) };
        }
        // SAFETY: the range is the caller's.
        unsafe { words(start, len) }
    }

    /// # Safety
    ///
    /// As [`is_zero`].
    unsafe fn words(start: *const u8, len: usize) -> bool {
        let start = start.cast::<u64>();
        (0..len / 64).all(|line| {
            // SAFETY: eight words of a line of the range, aligned as the range is.
            let or =
                (0..8).fold(0, |or, i| or | unsafe { start.add(line * 8 + i).read_volatile() });
            or == 0
        })
    }

    /// # Safety
    ///
    /// As [`is_zero`], on a processor with AVX2.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    unsafe fn avx2(start: *const u8, len: usize) -> bool {
        use std::arch::x86_64::{
            __m256i, _mm256_or_si256, _mm256_setzero_si256, _mm256_testz_si256,
        };
        // So many vectors are looked at together; the compiler unrolls a number that it knows.
        const STEP: usize = 8;
        let start = start.cast::<__m256i>();
        let vectors = len / size_of::<__m256i>();
        let whole = vectors / STEP * STEP;
        for step in (0..whole).step_by(STEP) {
            let mut or = _mm256_setzero_si256();
            for i in step..step + STEP {
                // SAFETY: `i` is below `whole`, so the vector lies in the caller's range, which is valid
                // for reads and aligned to more than a vector.
                or = _mm256_or_si256(or, unsafe { start.add(i).read_volatile() });
            }
            if _mm256_testz_si256(or, or) == 0 {
                return false;
            }
        }
        let mut or = _mm256_setzero_si256();
        for i in whole..vectors {
            // SAFETY: `i` is below `vectors`, so the vector lies in the caller's range, which is valid
            // for reads and aligned to more than a vector.
            or = _mm256_or_si256(or, unsafe { start.add(i).read_volatile() });
        }
        _mm256_testz_si256(or, or) != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::os::unix::fs::{FileExt, MetadataExt};
    use vm_memory::{FileOffset, GuestAddress, MmapRegion};

    const PAGE: u64 = 4096;

    fn memfd(size: u64) -> File {
        let flags = rustix::fs::MemfdFlags::CLOEXEC;
        let file = File::from(rustix::fs::memfd_create("mapping-test", flags).unwrap());
        file.set_len(size).unwrap();
        file
    }

    #[test]
    fn huge_pages_that_are_set_aside_stay_with_their_file() {
        const HUGE: u64 = 2 << 20;
        let pool = crate::huge_page_pool::Pool::with_free(HUGE, 2).expect("a pool of huge pages");
        let file = || {
            let flags = rustix::fs::MemfdFlags::CLOEXEC | rustix::fs::MemfdFlags::HUGETLB;
            let file = File::from(rustix::fs::memfd_create("mapping-test", flags).unwrap());
            file.set_len(3 * HUGE).unwrap();
            file
        };
        let (one, other) = (file(), file());
        assert!(HostMapping::reserve(&one, 0, 3 * HUGE).is_err());
        HostMapping::reserve(&one, HUGE, 2 * HUGE).unwrap();
        // Again it costs nothing, and the other file finds nothing.
        HostMapping::reserve(&one, 2 * HUGE, HUGE).unwrap();
        assert!(HostMapping::reserve(&other, 0, HUGE).is_err());
        let mapping = HostMapping::map(&one, 0, 3 * HUGE).unwrap();
        mapping.write(2 * HUGE - 1, &[1, 2]);
        drop((mapping, one));
        HostMapping::reserve(&other, 0, 2 * HUGE).unwrap();
        drop((other, pool));
    }

    #[test]
    fn guest_memory_is_not_in_core_dumps() {
        let mapping = HostMapping::map(&memfd(8 * PAGE), 0, 8 * PAGE).unwrap();
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let start = format!("{:x}-", mapping.addr());
        let ours = smaps.lines().skip_while(|line| !line.starts_with(&start));
        let flags = ours.into_iter().find_map(|line| line.strip_prefix("VmFlags:")).unwrap();
        assert!(flags.split(' ').any(|flag| flag == "dd"), "{flags}");
    }

    #[test]
    fn maps_the_asked_part_of_the_file() {
        let file = memfd(8 * PAGE);
        let mapping = HostMapping::map(&file, 2 * PAGE, 4 * PAGE).unwrap();
        assert_eq!(mapping.len(), 4 * PAGE);
        mapping.write(PAGE + 1, b"guest");
        let mut bytes = [0; 5];
        file.read_exact_at(&mut bytes, 3 * PAGE + 1).unwrap();
        assert_eq!(&bytes, b"guest");
        mapping.fill_zero(PAGE, PAGE);
        file.read_exact_at(&mut bytes, 3 * PAGE + 1).unwrap();
        assert_eq!(bytes, [0; 5]);
        assert_eq!(file.metadata().unwrap().blocks() * 512, PAGE);
    }

    #[test]
    fn what_cannot_be_mapped_is_an_error() {
        let file = memfd(PAGE);
        assert!(HostMapping::map(&file, 0, 0).is_err());
        assert!(HostMapping::map(&file, 1, PAGE).is_err());
        assert!(HostMapping::map(&file, 0, u64::MAX).is_err());
        let read_only = File::open("/dev/zero").unwrap();
        assert!(HostMapping::map(&read_only, 0, PAGE).is_err());
    }

    #[test]
    #[should_panic(expected = "leave a mapping")]
    fn a_range_outside_the_mapping_panics() {
        HostMapping::map(&memfd(PAGE), 0, PAGE).unwrap().read(PAGE - 1, &mut [0; 2]);
    }

    #[test]
    #[should_panic(expected = "leave a mapping")]
    fn a_range_that_wraps_panics() {
        HostMapping::map(&memfd(PAGE), 0, PAGE).unwrap().page_is_zero(u64::MAX - 63, 64);
    }

    #[test]
    fn a_region_of_vm_memory_stays_mapped() {
        let file = memfd(4 * PAGE);
        let offset = FileOffset::new(file.try_clone().unwrap(), 0);
        let region: MmapRegion = MmapRegion::from_file(offset, 4 * PAGE as usize).unwrap();
        let region = Arc::new(GuestRegionMmap::new(region, GuestAddress(1 << 30)).unwrap());
        let mapping = HostMapping::from_region(Arc::clone(&region));
        drop(region);
        mapping.write(3 * PAGE, &[7]);
        let mut byte = [0];
        file.read_exact_at(&mut byte, 3 * PAGE).unwrap();
        assert_eq!(byte, [7]);
    }

    #[test]
    fn one_bit_anywhere_in_a_page_is_not_zero() {
        let file = memfd(3 * PAGE);
        let mapping = HostMapping::map(&file, 0, 3 * PAGE).unwrap();
        mapping.write(PAGE - 1, &[1]);
        mapping.write(2 * PAGE, &[1]);
        assert!(mapping.page_is_zero(PAGE, PAGE));
        assert!(mapping.page_is_zero(PAGE, 0));
        for at in 0..PAGE {
            mapping.write(PAGE + at, &[0x80]);
            assert!(!mapping.page_is_zero(PAGE, PAGE));
            // SAFETY: the page is mapped and aligned.
            assert!(unsafe { !zero::is_zero(mapping.locate(PAGE, PAGE).0, 4096) });
            let line = at / 64 * 64;
            assert!(!mapping.page_is_zero(PAGE + line, 64));
            mapping.write(PAGE + at, &[0]);
        }
        assert!(mapping.page_is_zero(PAGE, PAGE));
        // Lengths that are no whole number of steps.
        for len in (64..PAGE).step_by(64) {
            assert!(mapping.page_is_zero(PAGE, len));
            mapping.write(PAGE + len - 1, &[1]);
            assert!(!mapping.page_is_zero(PAGE, len));
            assert!(mapping.page_is_zero(PAGE, len - 64));
            mapping.write(PAGE + len - 1, &[0]);
        }
    }

    proptest! {
        #[test]
        fn copies_agree_with_a_slice(
            writes in prop::collection::vec((0u64..4096, prop::collection::vec(any::<u8>(), 0..300)), 1..8),
            window in (0usize..4396, 0usize..4396),
        ) {
            let mapping = HostMapping::map(&memfd(2 * PAGE), 0, 2 * PAGE).unwrap();
            let mut model = vec![0; 2 * PAGE as usize];
            for (at, bytes) in &writes {
                mapping.write(*at, bytes);
                model[*at as usize..][..bytes.len()].copy_from_slice(bytes);
            }
            let window = window.0.min(window.1)..window.0.max(window.1);
            let mut read = vec![0xee; window.len()];
            mapping.read(window.start as u64, &mut read);
            prop_assert_eq!(&read, &model[window]);
        }
    }
}
