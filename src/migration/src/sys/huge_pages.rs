//! Transparent huge pages of a mapping, which are forbidden for a while.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::sync::Arc;

use ram_discard::ByteRange;
use ram_discard::memory::HostMapping;
use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

/// Has the kernel fill missing pages of a mapping one by one, for as long as the value lives. A
/// huge page fills its neighbours, too: in older kernels also those in a range beside it whose
/// faults a userfaultfd waits for.
///
/// Afterwards huge pages are allowed as they were before, by madvise or by the file's own setting.
/// Where neither did they stay forbidden: the kernel takes that back only from who asks for them.
#[derive(Debug)]
pub struct NoHugePages {
    mapping: Arc<HostMapping>,
    /// Where there may be huge pages otherwise, bytes of the mapping.
    allowed: Vec<ByteRange>,
}

impl NoHugePages {
    /// Forbids them in all of `mapping`. What is there stays. Nothing to do in a kernel without
    /// them.
    ///
    /// # Errors
    ///
    /// When the kernel refuses.
    pub fn of(mapping: Arc<HostMapping>) -> io::Result<Self> {
        let whole = ByteRange::new(mapping.addr() as u64, mapping.len());
        let smaps = File::open("/proc/self/smaps");
        let allowed = smaps.and_then(|smaps| allowed(BufReader::new(smaps), whole));
        let allowed = allowed.unwrap_or_else(|error| {
            tracing::debug!(%error, "cannot see where there may be huge pages");
            Vec::new()
        });
        let forbidden = Self { mapping, allowed };
        match forbidden.advise(0, forbidden.mapping.len(), Advice::LinuxNoHugepage) {
            Ok(()) | Err(Errno::INVAL) => Ok(forbidden),
            Err(errno) => Err(errno.into()),
        }
    }

    fn advise(&self, offset: u64, len: u64, advice: Advice) -> Result<(), Errno> {
        let (start, len) = self.mapping.locate(offset, len);
        // SAFETY: the range is mapped for as long as `mapping` lives; the advice changes no
        // content.
        unsafe { madvise(start.cast(), len, advice) }
    }
}

impl Drop for NoHugePages {
    fn drop(&mut self) {
        for range in &self.allowed {
            let allowed = self.advise(range.start(), range.len(), Advice::LinuxHugepage);
            if let Err(error) = allowed {
                tracing::debug!(%error, "huge pages stay forbidden");
            }
        }
    }
}

/// The parts of `whole` (addresses) in which there may be huge pages, bytes from its start.
fn allowed(smaps: impl BufRead, whole: Option<ByteRange>) -> io::Result<Vec<ByteRange>> {
    let mut ranges = Vec::new();
    let Some(whole) = whole else { return Ok(ranges) };
    let (mut part, mut eligible) = (None, false);
    // Not as lines, since names of files need not be UTF-8.
    for line in smaps.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        let mut words = line.split_ascii_whitespace();
        match words.next() {
            Some("THPeligible:") => eligible = words.next() == Some("1"),
            // The last line of each mapping.
            Some("VmFlags:") if eligible || words.any(|flag| flag == "hg") => {
                ranges.extend(part.take());
            }
            Some(word) => {
                if let Some((start, end)) = addresses(word) {
                    if start >= whole.end() {
                        break;
                    }
                    let mapped = ByteRange::from_bounds(start, end);
                    let inside = mapped.and_then(|mapped| mapped.intersection(whole));
                    part = inside.and_then(|inside| inside.in_part(whole.start()));
                    eligible = false;
                }
            }
            None => {}
        }
    }
    Ok(ranges)
}

/// The addresses that the first line of a mapping begins with.
fn addresses(word: &str) -> Option<(u64, u64)> {
    let (start, end) = word.split_once('-')?;
    Some((u64::from_str_radix(start, 16).ok()?, u64::from_str_radix(end, 16).ok()?))
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// The flags of each part that the kernel knows of a mapping, as smaps shows them.
    pub(crate) fn flags(mapping: &HostMapping) -> Vec<String> {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let (start, mut inside) = (mapping.addr() as u64, false);
        let mut flags = Vec::new();
        for line in smaps.lines() {
            let (word, rest) = line.split_once(' ').unwrap_or_default();
            match (word, addresses(word)) {
                (_, Some((at, _))) => inside = (start..start + mapping.len()).contains(&at),
                ("VmFlags:", _) if inside => flags.push(format!(" {rest} ")),
                _ => {}
            }
        }
        flags
    }

    /// Asks the kernel for huge pages in all of a mapping.
    pub(crate) fn ask_for_huge_pages(mapping: &HostMapping) {
        let (start, len) = mapping.locate(0, mapping.len());
        // SAFETY: the whole of the mapping; as in `advise`.
        unsafe { madvise(start.cast(), len, Advice::LinuxHugepage) }.unwrap();
    }

    /// Whether the kernel has huge pages that could be forbidden.
    pub(crate) fn has_huge_pages() -> bool {
        std::path::Path::new("/sys/kernel/mm/transparent_hugepage").exists()
    }
}

#[cfg(test)]
mod tests {
    use super::testing::{flags, has_huge_pages};
    use super::*;
    use rustix::fs::MemfdFlags;

    #[test]
    fn what_may_have_huge_pages_is_found_by_flag_and_by_file() {
        let smaps = b"1000-5000 rw-s 00000000 00:01 7 /memfd:\xff (deleted)\nSize: 16 kB\n\
            THPeligible:           1\nVmFlags: rd wr sh nh\n\
            5000-6000 rw-s 00004000 00:01 7 /a-b\nTHPeligible:    0\nVmFlags: rd wr sh hg \n\
            6000-7000 rw-s 00005000 00:01 7 /a-b\nTHPeligible:    0\nVmFlags: rd wr sh\n\
            7000-9000 rw-s 00006000 00:01 7 /a-b\nTHPeligible:    1\nVmFlags: rd wr sh\n\
            9000-a000 rw-s 00008000 00:01 7 /a-b\nTHPeligible:    1\nVmFlags: rd wr sh\n";
        let range = ByteRange::from_bounds;
        let found = allowed(&smaps[..], range(0x4000, 0x8000)).unwrap();
        let expected = [range(0, 0x1000), range(0x1000, 0x2000), range(0x3000, 0x4000)];
        assert_eq!(found, expected.map(Option::unwrap));
        assert_eq!(allowed(&smaps[..], None).unwrap(), []);
    }

    #[test]
    fn huge_pages_are_forbidden_for_a_while_and_then_allowed_where_they_were() {
        if !has_huge_pages() {
            return eprintln!("skipped: no transparent huge pages");
        }
        let file = File::from(rustix::fs::memfd_create("huge", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(8 << 20).unwrap();
        let mapping = Arc::new(HostMapping::map(&file, 0, 8 << 20).unwrap());
        let (start, _) = mapping.locate(0, mapping.len());
        // SAFETY: the first half of the mapping; as in `advise`.
        unsafe { madvise(start.cast(), 4 << 20, Advice::LinuxHugepage) }.unwrap();
        let forbidden = NoHugePages::of(Arc::clone(&mapping)).unwrap();
        let meanwhile = flags(&mapping);
        assert!(meanwhile.iter().all(|flags| flags.contains(" nh ")), "{meanwhile:?}");
        drop(forbidden);
        let after = flags(&mapping);
        assert!(after[0].contains(" hg ") && !after[0].contains(" nh "), "{after:?}");
    }
}
