//! Which memory the device writes, as its driver knows it: so a VMM that sends this memory away need not have the
//! device log it.

use std::collections::{BTreeSet, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::{DESC_F_INDIRECT, DESC_F_WRITE, DESC_SIZE, Segment};
use crate::memory::{GuestRam, PAGE_SIZE};
use crate::protocol::{read32, read64};

/// The most descriptors of a table that are looked at; no queue of the device allows as many.
const TABLE_MAX: u64 = 1024;

/// Whole pages: first guest-physical address, and the one behind.
type Pages = (u64, u64);

/// The pages that the device of one ring writes. Clones are the same.
///
/// A chain that the device has may be written at any moment, until the driver has seen that it is used; the used
/// ring may as long as the ring runs. So what is taken while the ring runs is taken again, and the last time
/// has to come after the ring was stopped.
#[derive(Clone, Debug, Default)]
pub struct DeviceWrites(Arc<Mutex<Known>>);

#[derive(Debug, Default)]
struct Known {
    used_ring: Option<Pages>,
    /// By head: of the chains that the device has.
    outstanding: HashMap<u16, Vec<Pages>>,
    /// Of chains that were used since the last look. No more than there are buffers.
    done: BTreeSet<Pages>,
}

impl DeviceWrites {
    /// Of a ring whose used ring is at `addr`.
    pub(super) fn of_used_ring(addr: u64, len: u64) -> Self {
        let known = Known { used_ring: pages(addr, len), ..Known::default() };
        Self(Arc::new(Mutex::new(known)))
    }

    /// A chain is about to be made available.
    pub(super) fn add(&self, ram: &GuestRam, head: u16, chain: &[Segment]) {
        let mut written = Vec::new();
        for segment in chain {
            if segment.flags & DESC_F_INDIRECT == 0 {
                written.extend(pages_written(segment));
                continue;
            }
            for at in (0..u64::from(segment.len) / DESC_SIZE).take(TABLE_MAX as usize) {
                let addr = segment.addr.saturating_add(at * DESC_SIZE);
                // The driver has written what names a buffer; to read a hole would bring memory. A table that is not
                // in memory is one that the device cannot read, either.
                match ram.resident_bytes(addr..addr.saturating_add(DESC_SIZE)) {
                    Ok(DESC_SIZE) => {}
                    Ok(_) => continue,
                    Err(_) => break,
                }
                let Ok(entry) = ram.read_vec(addr, DESC_SIZE as usize) else { break };
                let (addr, len) = (read64(&entry, 0), read32(&entry, 8));
                let flags = u16::from_le_bytes([entry[12], entry[13]]);
                written.extend(pages_written(&Segment { addr, len, flags, ..Segment::default() }));
            }
        }
        let mut known = self.lock();
        // One that was never seen to be used may have been written.
        let before = known.outstanding.insert(head, written);
        known.done.extend(before.into_iter().flatten());
    }

    /// The driver has seen that the chain is used.
    pub(super) fn used(&self, head: u16) {
        let mut known = self.lock();
        let written = known.outstanding.remove(&head);
        known.done.extend(written.into_iter().flatten());
    }

    /// The driver has forgotten all chains.
    pub(super) fn forgotten(&self) {
        let mut known = self.lock();
        let written = std::mem::take(&mut known.outstanding);
        known.done.extend(written.into_values().flatten());
    }

    /// What may have been written since the last look, as guest-physical addresses of whole pages; some may not have been.
    pub fn take(&self) -> BTreeSet<(u64, u64)> {
        let mut known = self.lock();
        let mut written = std::mem::take(&mut known.done);
        written.extend(known.outstanding.values().flatten());
        written.extend(known.used_ring);
        written
    }

    fn lock(&self) -> MutexGuard<'_, Known> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn pages_written(segment: &Segment) -> Option<Pages> {
    let writable = segment.flags & DESC_F_WRITE != 0;
    pages(segment.addr, if writable { segment.len.into() } else { 0 })
}

fn pages(addr: u64, len: u64) -> Option<Pages> {
    let end = addr.checked_add(len)?.checked_next_multiple_of(PAGE_SIZE)?;
    (len != 0).then_some((addr / PAGE_SIZE * PAGE_SIZE, end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::driver::{MemDriver, MemRequest, RequestType, Shape, UNTOUCHED};
    use crate::memory::Layout;

    const USED: u64 = 0x2000;
    const RESPONSE: u64 = 0x3000 + 0x800;

    fn driver(size: u16) -> (Arc<GuestRam>, MemDriver) {
        let layout = Layout::new().memfd("ram", 0, 0x100_0000).unwrap();
        let ram = Arc::new(GuestRam::new(layout).unwrap());
        let driver = MemDriver::at(&ram, 0x1000, size, true).unwrap();
        (ram, driver)
    }

    /// As the device does: the response, and then the used ring.
    fn use_chain(ram: &GuestRam, driver: &mut MemDriver, head: u16) {
        let index = driver.ring().used_idx().unwrap();
        let element = USED + 4 + 8 * u64::from(index % 8);
        ram.store(element, u32::from(head).to_le()).unwrap();
        ram.store(element + 4, 10u32.to_le()).unwrap();
        ram.store(USED + 2, index.wrapping_add(1).to_le()).unwrap();
        assert_eq!(u16::try_from(driver.ring_mut().pop_used().unwrap().unwrap().id).unwrap(), head);
    }

    #[test]
    fn a_chain_is_taken_as_long_as_the_device_has_it_and_once_more_after_that() {
        let (ram, mut driver) = driver(8);
        assert_eq!(driver.ring().used_addr(), USED);
        let writes = driver.ring().device_writes().clone();
        let used = BTreeSet::from([(USED, USED + PAGE_SIZE)]);
        assert_eq!(writes.take(), used, "the used ring is always");
        let request = MemRequest::new(RequestType::State, 0, 1).to_bytes();
        let head = driver.submit(&request, &Shape::default()).unwrap();
        let buffer = RESPONSE / PAGE_SIZE * PAGE_SIZE;
        let both = BTreeSet::from([(USED, USED + PAGE_SIZE), (buffer, buffer + PAGE_SIZE)]);
        assert_eq!(ram.read_vec(RESPONSE, 1).unwrap(), [UNTOUCHED]);
        for _ in 0..3 {
            assert_eq!(writes.take(), both);
        }
        use_chain(&ram, &mut driver, head);
        assert_eq!(writes.take(), both, "it may have been written after the last look");
        assert_eq!(writes.take(), used);
    }

    #[test]
    fn chains_of_every_shape_and_those_that_are_forgotten_are_taken() {
        for (name, shape) in Shape::all_valid() {
            let (_, mut driver) = driver(128);
            let writes = driver.ring().device_writes().clone();
            let used = writes.take();
            let request = MemRequest::new(RequestType::State, 0, 1).to_bytes();
            driver.submit(&request, &shape).unwrap();
            let taken = writes.take();
            assert_eq!(taken.difference(&used).count(), 1, "{name}: {taken:?}");
            driver.clear().unwrap();
            assert_eq!(writes.take(), taken, "{name}");
            assert_eq!(writes.take(), used, "{name}");
        }
    }

    #[test]
    fn a_buffer_over_the_edge_of_a_page_is_two_pages_and_an_empty_or_impossible_one_is_none() {
        let pages = |addr, len| pages_written(&Segment::writable(addr, len));
        assert_eq!(pages(0x1ffe, 4), Some((0x1000, 0x3000)));
        assert_eq!(pages(0x1ffe, 2), Some((0x1000, 0x2000)));
        assert_eq!(pages(0x1ffe, 0), None);
        assert_eq!(pages(u64::MAX - 1, 4), None);
        assert_eq!(pages_written(&Segment::readable(0x1ffe, 4)), None);
    }
}
