//! Words of memory shared between processes.
//!
//! Every access is atomic, so that another process may write at any time. Two types, since a
//! page that is mapped for reading only allows less: on it, only relaxed loads are defined.

use std::fs::File;
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::mm::{self, MapFlags, ProtFlags};

/// The first words of a file, mapped for reading and writing, shared with all who map it.
///
/// The file must keep its size while this value lives (`F_SEAL_SHRINK`), or accesses raise SIGBUS.
#[derive(Debug)]
pub struct SharedWords(Mapping);

/// The first words of a file that others write, mapped for reading only.
///
/// The file must keep its size while this value lives (`F_SEAL_SHRINK`), or accesses raise SIGBUS.
#[derive(Debug)]
pub struct ReadOnlyWords(Mapping);

#[derive(Debug)]
struct Mapping {
    start: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the mapping belongs to the process, not to a thread.
unsafe impl Send for Mapping {}
// SAFETY: all that is reached through it is atomic.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, words: usize, prot: ProtFlags) -> io::Result<Self> {
        let len = words.checked_mul(size_of::<u64>()).ok_or(io::ErrorKind::OutOfMemory)?;
        // SAFETY: without a wanted address the kernel takes a free one, so no existing mapping is
        // replaced.
        let start =
            unsafe { mm::mmap(std::ptr::null_mut(), len, prot, MapFlags::SHARED, file, 0) }?;
        // SAFETY: the advice concerns the mapping that was just made, and changes no content.
        let advised = unsafe { mm::madvise(start, len, mm::Advice::LinuxDontDump) };
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        // From here on it is unmapped when dropped.
        let mapping = Self { start, words };
        advised?;
        Ok(mapping)
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        let len = self.words * size_of::<u64>();
        // SAFETY: the range is exactly what `new` got, and what borrows from it has ended.
        let _ = unsafe { mm::munmap(self.start.as_ptr().cast(), len) };
    }
}

impl SharedWords {
    /// Maps the first `words` words of `file`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses: no words, or a file not open for reading and writing.
    pub fn map(file: &File, words: usize) -> io::Result<Self> {
        Mapping::new(file, words, ProtFlags::READ | ProtFlags::WRITE).map(Self)
    }

    /// The words.
    pub fn words(&self) -> &[AtomicU64] {
        let Mapping { start, words } = self.0;
        // SAFETY: `start` is page-aligned and has `words` words mapped for reading and writing
        // until `self` is dropped. Any bits are an `AtomicU64`, and nothing accesses them in a way
        // that is not atomic: this type and `ReadOnlyWords` do not, and to other processes the
        // rules of a shared mapping apply.
        unsafe { std::slice::from_raw_parts(start.as_ptr(), words) }
    }
}

impl ReadOnlyWords {
    /// Maps the first `words` words of `file`.
    ///
    /// # Errors
    ///
    /// When the kernel refuses: no words, or a file not open for reading.
    pub fn map(file: &File, words: usize) -> io::Result<Self> {
        Mapping::new(file, words, ProtFlags::READ).map(Self)
    }

    /// A word, loaded relaxed; order it with fences.
    ///
    /// # Panics
    ///
    /// When there is no such word.
    pub fn load(&self, index: usize) -> u64 {
        assert!(index < self.0.words, "word {index} of {}", self.0.words);
        // SAFETY: the word is mapped for reading until `self` is dropped, and aligned. A relaxed
        // load of eight bytes is defined on read-only memory (`std::sync::atomic`, "Atomic
        // accesses to read-only memory") where words have eight bytes.
        unsafe { self.0.start.add(index).as_ref() }.load(Ordering::Relaxed)
    }
}

#[cfg(not(target_pointer_width = "64"))]
compile_error!("relaxed loads of eight bytes on read-only memory need a 64-bit target");

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn memfd(words: u64) -> File {
        let file = File::from(memfd_create("words-test", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(words * 8).unwrap();
        file
    }

    #[test]
    fn what_one_mapping_writes_the_other_reads() {
        let file = memfd(600);
        let shared = SharedWords::map(&file, 600).unwrap();
        let read_only = ReadOnlyWords::map(&file, 600).unwrap();
        shared.words()[599].store(7, Ordering::Relaxed);
        assert_eq!((read_only.load(599), read_only.load(0)), (7, 0));
    }

    #[test]
    fn no_words_cannot_be_mapped() {
        assert!(SharedWords::map(&memfd(1), 0).is_err());
        assert!(ReadOnlyWords::map(&memfd(1), usize::MAX).is_err());
    }

    #[test]
    #[should_panic(expected = "word 1 of 1")]
    fn a_word_outside_the_mapping_panics() {
        ReadOnlyWords::map(&memfd(1), 1).unwrap().load(1);
    }
}
