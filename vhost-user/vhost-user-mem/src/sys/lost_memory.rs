//! Memory of the front-end that goes away while it is mapped.
//!
//! The front-end may truncate the file behind its memory or its dirty log at any time, and a
//! hugetlb pool may have no page for a hole. An access then raises SIGBUS, which would end the
//! daemon. Seals that would forbid it cannot be demanded: QEMU's files on tmpfs and hugetlbfs have
//! none.
//!
//! So SIGBUS is caught. If the address lies in a shared mapping, empty memory is put in its place,
//! the access goes on, and the loss is told to what waits on [`lost`]: the relay, which ends
//! the connection. The daemon maps no file shared but those of the front-end, so nothing else can
//! be meant. The dirty log is mapped within a crate that does not say where; so the kernel is
//! asked which mapping it is, by `/proc/self/maps`, and nothing has to be registered.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use libc::{BUS_ADRERR, SIG_DFL, SIGBUS, c_int, c_void, siginfo_t};
use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags};
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous};
use vmm_sys_util::signal::register_signal_handler;

struct Guard {
    /// `/proc/self/maps`, opened before there is a need, since the descriptors may be used up then.
    maps: OwnedFd,
    /// Counts losses.
    lost: OwnedFd,
    busy: AtomicBool,
}

static GUARD: OnceLock<Guard> = OnceLock::new();

/// Catches SIGBUS from now on, in the whole process.
///
/// # Errors
///
/// When there is no `/proc`, or the system refuses otherwise.
pub(crate) fn install() -> io::Result<()> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let maps = rustix::fs::open("/proc/self/maps", flags, Mode::empty())?;
    let lost = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    if GUARD.set(Guard { maps, lost, busy: AtomicBool::new(false) }).is_err() {
        return Ok(());
    }
    register_signal_handler(SIGBUS, on_sigbus).map_err(io::Error::from)
}

/// Readable once memory was lost; `None` while SIGBUS is not caught.
pub(crate) fn lost() -> Option<BorrowedFd<'static>> {
    GUARD.get().map(|guard| guard.lost.as_fd())
}

/// Forgets earlier losses. Only while no memory of a front-end is used.
pub(crate) fn forget() {
    if let Some(lost) = lost() {
        // An error means that there is nothing to forget.
        let _ = rustix::io::read(lost, &mut [0; 8]);
    }
}

/// Only makes system calls (rustix's do not touch errno), so it is safe in a signal handler.
extern "C" fn on_sigbus(_: c_int, info: *mut siginfo_t, _: *mut c_void) {
    // SAFETY: the handler is registered with SA_SIGINFO, so the kernel passes a valid structure,
    // and this signal's fills the address when it comes from a fault.
    let (code, addr) = unsafe { ((*info).si_code, (*info).si_addr() as usize) };
    if code == BUS_ADRERR && GUARD.get().is_some_and(|guard| guard.mend(addr)) {
        return;
    }
    // Not ours: what would have happened without a handler, once this one returns.
    // SAFETY: both calls are async-signal-safe and are given valid numbers.
    unsafe {
        libc::signal(SIGBUS, SIG_DFL);
        libc::raise(SIGBUS);
    }
}

impl Guard {
    /// Puts empty memory where `addr` is, if it lies in a shared mapping.
    fn mend(&self, addr: usize) -> bool {
        // One at a time, since the list of mappings is read in pieces. The holder is in this
        // handler too, on another thread, and is done soon.
        while self.busy.swap(true, Ordering::Acquire) {
            std::hint::spin_loop();
        }
        let mended = self.mend_alone(addr);
        self.busy.store(false, Ordering::Release);
        mended
    }

    fn mend_alone(&self, addr: usize) -> bool {
        let Some(mapping) = shared_mapping(self.maps.as_fd(), addr) else { return false };
        let page_size = rustix::param::page_size();
        let page = addr & !(page_size - 1);
        // A mapping of huge pages cannot be replaced in part.
        let mended = replace(page..page + page_size) || replace(mapping);
        if mended {
            // Fails only when the counter is full: then it is readable anyway.
            let _ = rustix::io::write(&self.lost, &1u64.to_le_bytes());
        }
        mended
    }
}

fn replace(range: Range<usize>) -> bool {
    let prot = ProtFlags::READ | ProtFlags::WRITE;
    // Shared again, so that a second thread that failed here at the same time is recognised.
    let flags = MapFlags::SHARED | MapFlags::FIXED | MapFlags::NORESERVE;
    let start = std::ptr::without_provenance_mut(range.start);
    // SAFETY: the range lies in a shared mapping, which is a front-end's memory or log: it is only
    // accessed by volatile and atomic operations that expect any content at any time. It cannot
    // be unmapped meanwhile, since the thread that the signal interrupted is using it.
    unsafe { mmap_anonymous(start, range.len(), prot, flags) }.is_ok()
}

/// The shared mapping in which `addr` lies, read from an open `/proc/self/maps`. Takes no memory.
fn shared_mapping(maps: BorrowedFd<'_>, addr: usize) -> Option<Range<usize>> {
    let mut found = None;
    for_each_mapping(maps, |mapping, shared| {
        if !mapping.contains(&addr) {
            return true;
        }
        found = shared.then_some(mapping);
        false
    });
    found
}

/// All shared mappings of this process: those of what a front-end shares, and of the bitmap that
/// clients share.
pub(super) fn shared_mappings() -> io::Result<Vec<Range<usize>>> {
    let opened;
    let maps = match GUARD.get() {
        Some(guard) => guard.maps.as_fd(),
        None => {
            let flags = OFlags::RDONLY | OFlags::CLOEXEC;
            opened = rustix::fs::open("/proc/self/maps", flags, Mode::empty())?;
            opened.as_fd()
        }
    };
    let mut mappings = Vec::new();
    for_each_mapping(maps, |mapping, shared| {
        if shared {
            mappings.push(mapping);
        }
        true
    });
    Ok(mappings)
}

/// Calls `look` with each mapping, and whether it is shared, until it says no. Takes no memory.
fn for_each_mapping(maps: BorrowedFd<'_>, mut look: impl FnMut(Range<usize>, bool) -> bool) {
    let mut line = Line::default();
    let mut chunk = [0; 1024];
    let mut at = 0;
    loop {
        let count = match rustix::io::retry_on_intr(|| rustix::io::pread(maps, &mut chunk, at)) {
            Ok(0) | Err(_) => return,
            Ok(count) => count,
        };
        at += count as u64;
        for &byte in &chunk[..count] {
            if let Some((mapping, shared)) = line.feed(byte)
                && !look(mapping, shared)
            {
                return;
            }
        }
    }
}

/// A line of `/proc/self/maps`, as it is read: `start-end rwxs ...`, addresses in hexadecimal.
#[derive(Default)]
struct Line {
    field: Field,
    start: usize,
    end: usize,
}

#[derive(Default)]
enum Field {
    #[default]
    Start,
    End,
    /// The permissions, of which so many were read.
    Permissions(u8),
    Rest,
}

impl Line {
    /// Takes the next byte. Gives the mapping, and whether it is shared, at the byte that says so.
    fn feed(&mut self, byte: u8) -> Option<(Range<usize>, bool)> {
        let digit = || (byte as char).to_digit(16).unwrap_or(0) as usize;
        match self.field {
            Field::Start if byte == b'-' => self.field = Field::End,
            Field::Start => self.start = self.start << 4 | digit(),
            Field::End if byte == b' ' => self.field = Field::Permissions(0),
            Field::End => self.end = self.end << 4 | digit(),
            Field::Permissions(3) => {
                self.field = Field::Rest;
                return Some((self.start..self.end, byte == b's'));
            }
            Field::Permissions(read) => self.field = Field::Permissions(read + 1),
            Field::Rest if byte == b'\n' => *self = Self::default(),
            Field::Rest => {}
        }
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;
    use vm_memory::{FileOffset, MmapRegion};

    #[test]
    fn shared_mappings_are_told_from_private_ones() {
        let maps = OwnedFd::from(File::open("/proc/self/maps").unwrap());
        let file = rustix::fs::memfd_create("lost", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(file);
        file.set_len(16 << 12).unwrap();
        let region = MmapRegion::<()>::from_file(FileOffset::new(file, 0), 16 << 12).unwrap();
        let start = region.as_ptr() as usize;
        let find = |addr| shared_mapping(maps.as_fd(), addr);
        for addr in [start, start + 5, start + (16 << 12) - 1] {
            assert!(find(addr).is_some_and(|mapping| mapping.contains(&start)), "{addr:#x}");
        }
        let private = vec![0u8; 1 << 20];
        assert_eq!(find(private.as_ptr() as usize), None);
        assert_eq!(find(shared_mapping as *const () as usize), None);
        assert_eq!(find(0), None);
    }

    #[test]
    fn lines_are_read_whatever_they_hold() {
        let text = b"00400000-00452000 r-xp 00000000 08:02 173521 /a-b rw-s\n\
            7f12a-7f12c rw-s 00000000 00:01 5 /memfd:guest (deleted)\n\
            ffffffffff600000-ffffffffff601000 --xp 0 00:00 0 [vsyscall]\n";
        let mut line = Line::default();
        let found: Vec<_> = text.iter().filter_map(|&byte| line.feed(byte)).collect();
        let vsyscall = 0xffff_ffff_ff60_0000..0xffff_ffff_ff60_1000;
        let wanted = [(0x40_0000..0x45_2000, false), (0x7f12a..0x7f12c, true), (vsyscall, false)];
        assert_eq!(found, wanted);
    }
}
