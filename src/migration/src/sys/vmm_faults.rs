//! userfaultfd(2) of a VMM whose memory is private: pages are copied into it from outside.
//!
//! The VMM maps, registers and hands over the descriptor; addresses are its own. Besides faults there are
//! removals: the VMM discards memory, waits until that was read here, and only then does the memory go. In
//! between, and until it has gone, nothing can be placed.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use ram_discard::memory::HostMapping;
use rustix::io::Errno;

use super::page_faults::{
    EVENT_PAGEFAULT, IOC_COPY, IOC_UNREGISTER, IOC_WAKE, IOC_ZEROPAGE, PAGEFAULT_FLAG_WP,
    UffdioCopy, UffdioZeropage,
};
use super::shared_faults::ClientFaults;
use super::userfaultfd::UffdioRange;

/// Bytes of a message (`struct uffd_msg`).
pub const MESSAGE_LEN: usize = 32;
const EVENT_FORK: u8 = 0x13;
const EVENT_REMOVE: u8 = 0x15;
const PAGEFAULT_FLAG_MINOR: u64 = 1 << 2;

/// What a message tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    /// A thread waits for a page that is not there.
    Missing {
        /// Where, not rounded down to a page on all kernels.
        address: u64,
    },
    /// The VMM discards from `start` to `end`, and waits for this to be read.
    Remove {
        /// The first byte.
        start: u64,
        /// After the last byte.
        end: u64,
    },
    /// What a VMM has to ask for and is not handled here, by its name.
    Other(&'static str),
}

impl Event {
    /// Reads a message. `None` when there is none: its first byte is 0.
    pub fn decode(message: &[u8; MESSAGE_LEN]) -> Option<Self> {
        let (first, second) = (field(message, 8), field(message, 16));
        Some(match message[0] {
            0 => return None,
            EVENT_PAGEFAULT if first & PAGEFAULT_FLAG_WP != 0 => Self::Other("write-protection"),
            EVENT_PAGEFAULT if first & PAGEFAULT_FLAG_MINOR != 0 => Self::Other("minor faults"),
            EVENT_PAGEFAULT => Self::Missing { address: second },
            EVENT_REMOVE => Self::Remove { start: first, end: second },
            _ => Self::Other("fork, mremap or munmap"),
        })
    }
}

#[allow(clippy::host_endian_bytes, reason = "the kernel writes numbers as this host has them")]
fn field(message: &[u8; MESSAGE_LEN], at: usize) -> u64 {
    u64::from_ne_bytes(*message[at..].first_chunk().expect("a message has three fields"))
}

#[allow(clippy::host_endian_bytes, reason = "as above")]
fn fork_fd(message: &[u8; MESSAGE_LEN]) -> u32 {
    u32::from_ne_bytes(*message[8..].first_chunk().expect("a message has three fields"))
}

/// How far pages could be placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Filled {
    /// So many bytes were, and those who waited for them go on.
    pub bytes: u64,
    /// Why not more.
    pub stop: Stop,
}

/// Why no more pages were placed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stop {
    /// All of them were.
    Complete,
    /// The next page is there already. No thread was woken for it.
    Exists,
    /// Events are outstanding: nothing can be placed before they were read and what they tell is done.
    Busy,
}

/// The userfaultfd of a VMM.
#[derive(Debug)]
pub struct VmmFaults(OwnedFd);

impl VmmFaults {
    /// Takes the descriptor that came from the VMM, which may be any.
    ///
    /// # Errors
    ///
    /// `InvalidInput` when it is not a userfaultfd; or when it cannot be set not to block.
    pub fn new(fd: OwnedFd) -> io::Result<Self> {
        ClientFaults::new(fd).map(|faults| Self(faults.into()))
    }

    /// Reads what waits into `to` from `offset`, at most `room` messages, without waiting; how many came. They
    /// are written there by the kernel, so that where `to` is shared with another process none is lost with this one.
    ///
    /// # Errors
    ///
    /// When they cannot be read: the VMM never finished opening it.
    ///
    /// # Panics
    ///
    /// When that leaves the mapping.
    pub fn read(&self, to: &HostMapping, offset: u64, room: usize) -> io::Result<usize> {
        // The VMM shares this flag and may have lifted it.
        rustix::io::ioctl_fionbio(&self.0, true)?;
        let (start, len) = to.locate(offset, (room * MESSAGE_LEN) as u64);
        let read = loop {
            // SAFETY: `locate` checked that `len` bytes are mapped, for reading and writing, and no reference
            // points to them.
            let read = unsafe { libc::read(self.0.as_raw_fd(), start.cast(), len) };
            match usize::try_from(read) {
                // Not of a userfaultfd, which has a message or would block.
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => break read / MESSAGE_LEN,
                Err(_) => match Errno::from_io_error(&io::Error::last_os_error()) {
                    Some(Errno::INTR) => {}
                    Some(Errno::AGAIN) => return Ok(0),
                    _ => return Err(io::Error::last_os_error()),
                },
            }
        };
        for index in 0..read {
            let mut message = [0; MESSAGE_LEN];
            to.read(offset + (index * MESSAGE_LEN) as u64, &mut message);
            if message[0] == EVENT_FORK {
                let fd = fork_fd(&message);
                // SAFETY: the kernel has opened this descriptor for who reads the message, and that is
                // the only place where its number is.
                drop(unsafe { OwnedFd::from_raw_fd(fd.cast_signed()) });
            }
        }
        Ok(read)
    }

    /// Copies `bytes`, whole pages, to where the VMM misses them.
    ///
    /// # Errors
    ///
    /// `ENOENT` when the range is not registered, `ESRCH` when the VMM has ended, `EINVAL` when these are no whole
    /// pages, `ENOMEM` when there is no memory.
    pub fn copy(&self, address: u64, bytes: &[u8]) -> io::Result<Filled> {
        fill(bytes.len() as u64, |done| {
            let rest = &bytes[done as usize..];
            let src = rest.as_ptr().expose_provenance() as u64;
            let (dst, len) = (address.wrapping_add(done), rest.len() as u64);
            let mut copy = UffdioCopy { dst, src, len, mode: 0, copy: 0 };
            // SAFETY: UFFDIO_COPY takes this structure. The kernel reads `len` bytes at `src`, which `rest` has;
            // it writes only where a process misses a page.
            let result = unsafe { super::ioctl(&self.0, IOC_COPY, &mut copy) };
            (result, copy.copy)
        })
    }

    /// Places pages of zeros. Not possible on hugetlb, where they must be copied.
    ///
    /// # Errors
    ///
    /// As for [`copy`](Self::copy).
    pub fn zero(&self, address: u64, len: u64) -> io::Result<Filled> {
        fill(len, |done| {
            let range = UffdioRange { start: address.wrapping_add(done), len: len - done };
            let mut zeropage = UffdioZeropage { range, mode: 0, zeropage: 0 };
            // SAFETY: UFFDIO_ZEROPAGE takes this structure, and writes only where a process misses a page.
            let result = unsafe { super::ioctl(&self.0, IOC_ZEROPAGE, &mut zeropage) };
            (result, zeropage.zeropage)
        })
    }

    /// Lets those go on who wait in `len` bytes from `address`. They fault again if nothing is there.
    ///
    /// # Errors
    ///
    /// `EINVAL` when these are no whole pages.
    pub fn wake(&self, address: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start: address, len };
        // SAFETY: UFFDIO_WAKE takes this structure.
        unsafe { super::ioctl(&self.0, IOC_WAKE, &mut range) }?;
        Ok(())
    }

    /// Lets the kernel handle what is missing there, which is with zeros, and those go on who wait.
    ///
    /// # Errors
    ///
    /// `EINVAL` when nothing is mapped there, `ESRCH` or `ENOMEM` when the VMM has ended.
    pub fn unregister(&self, address: u64, len: u64) -> io::Result<()> {
        let mut range = UffdioRange { start: address, len };
        // SAFETY: UFFDIO_UNREGISTER takes this structure. What is missing becomes zeros, as it would without us.
        unsafe { super::ioctl(&self.0, IOC_UNREGISTER, &mut range) }?;
        Ok(())
    }
}

impl AsFd for VmmFaults {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// Calls `step` with what was done until no more can be.
fn fill(len: u64, mut step: impl FnMut(u64) -> (io::Result<u32>, i64)) -> io::Result<Filled> {
    let mut bytes = 0;
    while bytes < len {
        let (result, moved) = step(bytes);
        let moved = u64::try_from(moved).unwrap_or(0).min(len - bytes);
        let stop = match result {
            Ok(_) => Stop::Complete,
            Err(error) => match error.raw_os_error() {
                Some(libc::EEXIST) => Stop::Exists,
                // A part was placed; then comes what tells why not the rest.
                Some(libc::EAGAIN) if moved != 0 => {
                    bytes += moved;
                    continue;
                }
                Some(libc::EAGAIN) => Stop::Busy,
                _ => return Err(error),
            },
        };
        let bytes = if stop == Stop::Complete { len } else { bytes };
        return Ok(Filled { bytes, stop });
    }
    Ok(Filled { bytes, stop: Stop::Complete })
}

#[cfg(test)]
mod tests {
    use super::super::private_memory::PrivateMemory;
    use super::super::shared_faults::OfferedFaults;
    use super::*;
    use crate::test_support::wait_until;
    use std::fs::File;
    use std::thread;

    use ram_discard::ByteRange;

    const PAGE: u64 = 4096;

    fn messages() -> HostMapping {
        let fd = rustix::fs::memfd_create("messages", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        let file = File::from(fd);
        file.set_len(PAGE).unwrap();
        HostMapping::map(&file, 0, PAGE).unwrap()
    }

    fn events(faults: &VmmFaults, messages: &HostMapping) -> Vec<Event> {
        let mut count = 0;
        wait_until(|| {
            count = faults.read(messages, 0, 8).unwrap();
            count != 0
        });
        let decode = |index| {
            let mut message = [0; MESSAGE_LEN];
            messages.read((index * MESSAGE_LEN) as u64, &mut message);
            Event::decode(&message).unwrap()
        };
        (0..count).map(decode).collect()
    }

    fn guest(pages: u64) -> (PrivateMemory, OfferedFaults, VmmFaults) {
        let memory = PrivateMemory::map(pages * PAGE, false).unwrap();
        let offered = OfferedFaults::open_with_removals().unwrap();
        offered.register(memory.addr(), pages * PAGE).unwrap();
        let faults = VmmFaults::new(offered.copy().unwrap()).unwrap();
        (memory, offered, faults)
    }

    fn read(memory: &PrivateMemory, page: u64) -> thread::JoinHandle<u8> {
        let memory = memory.clone();
        thread::spawn(move || {
            let mut byte = [0];
            memory.mapping().read(page * PAGE, &mut byte);
            byte[0]
        })
    }

    #[test]
    fn what_is_copied_is_there_for_the_vmm_and_what_is_there_stays() {
        let (memory, _offered, faults) = guest(4);
        let messages = messages();
        let reader = read(&memory, 1);
        let [Event::Missing { address }] = events(&faults, &messages)[..] else { panic!() };
        assert_eq!(address / PAGE * PAGE, memory.addr() + PAGE);
        let complete = |bytes| Filled { bytes, stop: Stop::Complete };
        assert_eq!(faults.copy(memory.addr() + PAGE, &[7; 4096]).unwrap(), complete(PAGE));
        assert_eq!(reader.join().unwrap(), 7);
        // The page before is placed, the page itself is left as it is.
        let filled = faults.copy(memory.addr(), &[9; 8192]).unwrap();
        assert_eq!(filled, Filled { bytes: PAGE, stop: Stop::Exists });
        assert_eq!(read(&memory, 1).join().unwrap(), 7);
        assert_eq!(faults.zero(memory.addr() + 2 * PAGE, PAGE).unwrap(), complete(PAGE));
        assert_eq!(read(&memory, 2).join().unwrap(), 0);
        // What is no longer registered is the kernel's.
        faults.unregister(memory.addr(), 4 * PAGE).unwrap();
        assert_eq!(read(&memory, 3).join().unwrap(), 0);
        let error = faults.copy(memory.addr(), &[9; 4096]).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENOENT));
    }

    #[test]
    fn nothing_is_placed_before_a_removal_was_read() {
        let (memory, _offered, faults) = guest(4);
        let messages = messages();
        faults.copy(memory.addr(), &[7; 4096]).unwrap();
        let vmm = memory.clone();
        let remover = thread::spawn(move || {
            vmm.discard(ByteRange::new(0, 2 * PAGE).unwrap()).unwrap();
        });
        let busy = Filled { bytes: 0, stop: Stop::Busy };
        while faults.zero(memory.addr() + 3 * PAGE, PAGE).unwrap() != busy {
            faults.wake(memory.addr(), PAGE).unwrap();
        }
        assert_eq!(faults.copy(memory.addr() + 2 * PAGE, &[7; 4096]).unwrap(), busy);
        assert!(!remover.is_finished());
        let (start, end) = (memory.addr(), memory.addr() + 2 * PAGE);
        assert_eq!(events(&faults, &messages), [Event::Remove { start, end }]);
        remover.join().unwrap();
        let filled = faults.copy(memory.addr(), &[8; 4096]).unwrap();
        assert_eq!(filled.stop, Stop::Complete);
    }

    #[test]
    fn messages_are_told_apart() {
        let message = |event: u8, flags: u8| {
            let mut bytes = [0; MESSAGE_LEN];
            (bytes[0], bytes[8]) = (event, flags);
            bytes
        };
        assert_eq!(Event::decode(&[0; MESSAGE_LEN]), None);
        assert_eq!(Event::decode(&message(0x12, 1)), Some(Event::Missing { address: 0 }));
        for (event, flags) in [(0x12, 2), (0x12, 4), (0x13, 0), (0x14, 0), (0x16, 0), (0xff, 0)] {
            let decoded = Event::decode(&message(event, flags));
            assert!(matches!(decoded, Some(Event::Other(_))), "{event:#x} {flags}");
        }
    }
}
