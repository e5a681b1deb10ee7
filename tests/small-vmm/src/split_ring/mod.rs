//! The driver's side of a split virtqueue, in guest memory.
//!
//! A correct driver adds chains of [`Segment`]s, kicks and waits for them to be used. Since a
//! back-end must also survive a driver that is not correct, every link of a chain and every ring
//! entry can be set to anything.

mod device_writes;
mod event;
mod resume;
mod segment;

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::memory::{self, GuestRam, PAGE_SIZE};
use event::{event, signal, take, wait_readable};

pub use device_writes::DeviceWrites;
pub use segment::{DESC_F_INDIRECT, DESC_F_NEXT, DESC_F_WRITE, DESC_SIZE, Next, Segment};

const AVAIL_F_NO_INTERRUPT: u16 = 1;
const USED_F_NO_NOTIFY: u16 = 1;

/// What can go wrong on a ring.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The ring or a buffer is outside the guest's memory.
    #[error(transparent)]
    Memory(#[from] memory::Error),
    /// An eventfd failed.
    #[error("eventfd: {0}")]
    Event(#[from] Errno),
    /// A chain has more segments than descriptors are free.
    #[error("{needed} descriptors needed, {free} free")]
    Full {
        /// How many the chain has.
        needed: usize,
        /// How many are free.
        free: usize,
    },
    /// Nothing was used in time.
    #[error("no buffer was used within {0:?}")]
    Timeout(Duration),
    /// The indices in memory are not those of an idle ring.
    #[error("the ring in memory stands at {avail} (available) and {used} (used), not at {index}")]
    NotIdle {
        /// Where the driver stands.
        index: u16,
        /// Index of the available ring.
        avail: u16,
        /// Index of the used ring.
        used: u16,
    },
}

type Result<T> = std::result::Result<T, Error>;

/// One element of the used ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Used {
    /// Head of the chain.
    pub id: u32,
    /// Bytes written by the device.
    pub len: u32,
}

/// A split virtqueue and its three eventfds.
#[derive(Debug)]
pub struct SplitRing {
    ram: Arc<GuestRam>,
    base: u64,
    size: u16,
    event_idx: bool,
    next_avail: u16,
    next_used: u16,
    last_kick: u16,
    free: VecDeque<u16>,
    chains: HashMap<u16, Vec<u16>>,
    device_writes: DeviceWrites,
    kick: OwnedFd,
    call: OwnedFd,
    err: OwnedFd,
}

impl SplitRing {
    /// Lays out an empty ring at `base`. `event_idx` says whether `RING_EVENT_IDX` was agreed on.
    pub fn new(ram: Arc<GuestRam>, base: u64, size: u16, event_idx: bool) -> Result<Self> {
        let (kick, call, err) = (event()?, event()?, event()?);
        let used = base + used_offset(size);
        let used_len = Self::footprint(size) - used_offset(size);
        let device_writes = DeviceWrites::of_used_ring(used, used_len);
        let mut ring = Self {
            ram,
            base,
            size,
            event_idx,
            next_avail: 0,
            next_used: 0,
            last_kick: 0,
            free: VecDeque::new(),
            chains: HashMap::new(),
            device_writes,
            kick,
            call,
            err,
        };
        ring.reset()?;
        Ok(ring)
    }

    /// Bytes that a ring of `size` descriptors takes.
    pub fn footprint(size: u16) -> u64 {
        used_offset(size) + 6 + 8 * u64::from(size)
    }

    /// Empties the ring and starts again at index 0, with new eventfds, as a driver does after a
    /// reset.
    pub fn reset(&mut self) -> Result<()> {
        self.ram.write(self.base, &vec![0; Self::footprint(self.size) as usize])?;
        (self.next_avail, self.next_used, self.last_kick) = (0, 0, 0);
        self.free = (0..self.size).collect();
        self.chains.clear();
        self.device_writes.forgotten();
        (self.kick, self.call, self.err) = (event()?, event()?, event()?);
        Ok(())
    }

    /// Starts both rings at `index` instead of 0, for the wrap-around of the indices. The ring has
    /// to be empty.
    pub fn start_at(&mut self, index: u16) -> Result<()> {
        (self.next_avail, self.next_used, self.last_kick) = (index, index, index);
        self.set_avail_idx(index)?;
        self.ram.store(self.used_addr() + 2, index.to_le())?;
        Ok(())
    }

    /// Number of descriptors.
    pub fn size(&self) -> u16 {
        self.size
    }

    /// The index of the next available entry.
    pub fn next_avail(&self) -> u16 {
        self.next_avail
    }

    /// The memory that the ring lives in.
    pub fn ram(&self) -> &Arc<GuestRam> {
        &self.ram
    }

    /// Which memory the device writes.
    pub fn device_writes(&self) -> &DeviceWrites {
        &self.device_writes
    }

    /// Guest address of the descriptor table.
    pub fn desc_addr(&self) -> u64 {
        self.base
    }

    /// Guest address of the available ring.
    pub fn avail_addr(&self) -> u64 {
        self.base + DESC_SIZE * u64::from(self.size)
    }

    /// Guest address of the used ring.
    pub fn used_addr(&self) -> u64 {
        self.base + used_offset(self.size)
    }

    /// The eventfd that tells the device of new chains.
    pub fn kick_fd(&self) -> BorrowedFd<'_> {
        self.kick.as_fd()
    }

    /// The eventfd that tells the driver of used chains.
    pub fn call_fd(&self) -> BorrowedFd<'_> {
        self.call.as_fd()
    }

    /// The eventfd that tells the driver of a broken ring.
    pub fn err_fd(&self) -> BorrowedFd<'_> {
        self.err.as_fd()
    }

    /// Makes a chain available and returns its head. The device hears of it with the next
    /// [`SplitRing::kick`].
    pub fn add(&mut self, chain: &[Segment]) -> Result<u16> {
        if chain.len() > self.free.len() {
            return Err(Error::Full { needed: chain.len(), free: self.free.len() });
        }
        let entries: Vec<u16> = self.free.drain(..chain.len()).collect();
        for (at, segment) in chain.iter().enumerate() {
            let addr = self.desc_addr() + DESC_SIZE * u64::from(entries[at]);
            self.ram.write(addr, &segment.to_bytes(at, &entries))?;
        }
        let head = entries[0];
        self.device_writes.add(&self.ram, head, chain);
        self.chains.insert(head, entries);
        self.push_avail(head)?;
        Ok(head)
    }

    /// Writes an indirect table to guest memory at `addr` and returns the segment that refers to
    /// it.
    pub fn write_indirect(&self, addr: u64, chain: &[Segment]) -> Result<Segment> {
        let entries: Vec<u16> = (0..chain.len() as u16).collect();
        for (at, segment) in chain.iter().enumerate() {
            self.ram.write(addr + DESC_SIZE * at as u64, &segment.to_bytes(at, &entries))?;
        }
        Ok(Segment::indirect(addr, chain.len()))
    }

    /// Writes one descriptor of the table, in use or not; the link is written as [`Next::Entry`]
    /// says.
    pub fn write_descriptor(&self, entry: u16, segment: Segment) -> Result<()> {
        let addr = self.desc_addr() + DESC_SIZE * u64::from(entry);
        Ok(self.ram.write(addr, &segment.to_bytes(0, &[entry]))?)
    }

    /// Puts any number into the available ring as the head of a chain.
    pub fn push_avail(&mut self, head: u16) -> Result<()> {
        let slot = u64::from(self.next_avail % self.size);
        self.ram.store(self.avail_addr() + 4 + 2 * slot, head.to_le())?;
        self.next_avail = self.next_avail.wrapping_add(1);
        self.set_avail_idx(self.next_avail)
    }

    /// Writes the index of the available ring, right or wrong.
    pub fn set_avail_idx(&self, index: u16) -> Result<()> {
        Ok(self.ram.store(self.avail_addr() + 2, index.to_le())?)
    }

    /// Tells the device of the chains added since the last time, unless it said that it need not be
    /// told.
    pub fn kick(&mut self) -> Result<bool> {
        let wanted = if self.event_idx {
            let addr = self.used_addr() + 4 + 8 * u64::from(self.size);
            let event = u16::from_le(self.ram.load(addr)?);
            let passed = self.next_avail.wrapping_sub(event).wrapping_sub(1);
            passed < self.next_avail.wrapping_sub(self.last_kick)
        } else {
            u16::from_le(self.ram.load(self.used_addr())?) & USED_F_NO_NOTIFY == 0
        };
        self.last_kick = self.next_avail;
        if wanted {
            self.force_kick()?;
        }
        Ok(wanted)
    }

    /// Tells the device even when there is nothing to tell.
    pub fn force_kick(&self) -> Result<()> {
        signal(self.kick.as_fd())?;
        Ok(())
    }

    /// Asks the device not to signal used chains (which it may do nevertheless); for rings without
    /// `RING_EVENT_IDX`.
    pub fn set_no_interrupt(&self, no_interrupt: bool) -> Result<()> {
        let flags = if no_interrupt { AVAIL_F_NO_INTERRUPT } else { 0 };
        Ok(self.ram.store(self.avail_addr(), flags.to_le())?)
    }

    /// Asks the device to signal when the entry with this index is used; for rings with
    /// `RING_EVENT_IDX`.
    pub fn set_used_event(&self, index: u16) -> Result<()> {
        Ok(self.ram.store(self.avail_addr() + 4 + 2 * u64::from(self.size), index.to_le())?)
    }

    /// The index that the device has published in the used ring.
    pub fn used_idx(&self) -> Result<u16> {
        Ok(u16::from_le(self.ram.load(self.used_addr() + 2)?))
    }

    /// The index of the next used entry that the driver will look at.
    pub fn next_used(&self) -> u16 {
        self.next_used
    }

    /// Takes the next used element, if there is one; the descriptors of its chain are free again.
    pub fn pop_used(&mut self) -> Result<Option<Used>> {
        if self.used_idx()? == self.next_used {
            return Ok(None);
        }
        let addr = self.used_addr() + 4 + 8 * u64::from(self.next_used % self.size);
        let (id, len) =
            (u32::from_le(self.ram.load(addr)?), u32::from_le(self.ram.load(addr + 4)?));
        self.next_used = self.next_used.wrapping_add(1);
        if let Some((head, entries)) =
            u16::try_from(id).ok().and_then(|head| self.chains.remove_entry(&head))
        {
            self.device_writes.used(head);
            self.free.extend(entries);
        }
        Ok(Some(Used { id, len }))
    }

    /// Waits for the next used element as a driver with interrupts does: asleep until the device
    /// signals.
    pub fn wait_used(&mut self, timeout: Duration) -> Result<Used> {
        let start = Instant::now();
        if self.event_idx {
            self.set_used_event(self.next_used)?;
        }
        loop {
            // Looked at again after the event index was set: the device may have been faster.
            if let Some(used) = self.pop_used()? {
                return Ok(used);
            }
            let rest = timeout.checked_sub(start.elapsed()).ok_or(Error::Timeout(timeout))?;
            if wait_readable(&self.call, rest)? {
                self.calls()?;
            }
        }
    }

    /// Waits for the next used element by looking at the ring, as a driver without interrupts does.
    pub fn poll_used(&mut self, timeout: Duration) -> Result<Used> {
        let start = Instant::now();
        loop {
            if let Some(used) = self.pop_used()? {
                return Ok(used);
            }
            if start.elapsed() > timeout {
                return Err(Error::Timeout(timeout));
            }
            std::hint::spin_loop();
            std::thread::yield_now();
        }
    }

    /// How often the device has signalled since the last look.
    pub fn calls(&self) -> Result<u64> {
        take(&self.call)
    }

    /// How often the device has declared the ring broken since the last look.
    pub fn errors(&self) -> Result<u64> {
        take(&self.err)
    }

    /// Whether the device signals within the time; the signal is left pending.
    pub fn wait_call(&self, timeout: Duration) -> Result<bool> {
        wait_readable(&self.call, timeout)
    }
}

/// The used ring comes after the available ring with its event index, in a page that the driver does
/// not write: so only a back-end that logs its writes shows that it was written.
fn used_offset(size: u16) -> u64 {
    (DESC_SIZE * u64::from(size) + 6 + 2 * u64::from(size)).next_multiple_of(PAGE_SIZE)
}

#[cfg(test)]
mod tests;
