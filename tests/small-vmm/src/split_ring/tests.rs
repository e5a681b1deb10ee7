//! The driver's side against a naive device.

use super::*;
use crate::memory::Layout;

const BUFFER: u64 = 0x10_0000;
const TIMEOUT: Duration = Duration::from_secs(1);

fn ring(size: u16, event_idx: bool) -> SplitRing {
    let ram = GuestRam::new(Layout::new().memfd("ram", 0, 0x20_0000).unwrap()).unwrap();
    SplitRing::new(Arc::new(ram), 0x1000, size, event_idx).unwrap()
}

type Descriptor = (u64, u32, u16);

/// The device's side, as simple as it can be: takes the next chain, follows it through the
/// table, uses it.
struct NaiveDevice {
    next: u16,
}

impl NaiveDevice {
    fn chain(&mut self, ring: &SplitRing) -> Option<(u16, Vec<Descriptor>)> {
        let ram = ring.ram();
        let load = |addr| u16::from_le(ram.load::<u16>(addr).unwrap());
        if load(ring.avail_addr() + 2) == self.next {
            return None;
        }
        let head = load(ring.avail_addr() + 4 + 2 * u64::from(self.next % ring.size()));
        self.next = self.next.wrapping_add(1);
        let (mut at, mut chain) = (head, Vec::new());
        loop {
            let bytes = ram.read_vec(ring.desc_addr() + 16 * u64::from(at), 16).unwrap();
            let flags = u16::from_le_bytes([bytes[12], bytes[13]]);
            let addr = crate::protocol::read64(&bytes, 0);
            chain.push((addr, crate::protocol::read32(&bytes, 8), flags));
            if flags & DESC_F_NEXT == 0 || chain.len() == usize::from(ring.size()) {
                return Some((head, chain));
            }
            at = u16::from_le_bytes([bytes[14], bytes[15]]);
        }
    }

    fn finish(&self, ring: &SplitRing, head: u16, len: u32) {
        let index = ring.used_idx().unwrap();
        let addr = ring.used_addr() + 4 + 8 * u64::from(index % ring.size());
        ring.ram().store(addr, u32::from(head).to_le()).unwrap();
        ring.ram().store(addr + 4, len.to_le()).unwrap();
        ring.ram().store(ring.used_addr() + 2, index.wrapping_add(1).to_le()).unwrap();
        signal(ring.call_fd()).unwrap();
    }
}

#[test]
fn chains_come_back_with_their_length_across_the_wrap_of_the_index() {
    let mut ring = ring(4, false);
    ring.start_at(u16::MAX - 1).unwrap();
    let mut device = NaiveDevice { next: u16::MAX - 1 };
    for round in 0..10 {
        let chain = [Segment::readable(BUFFER, 24), Segment::writable(BUFFER + 64, 10)];
        let head = ring.add(&chain).unwrap();
        assert!(ring.kick().unwrap());
        let (taken, descriptors) = device.chain(&ring).unwrap();
        assert_eq!((taken, descriptors.len()), (head, 2));
        assert_eq!(descriptors[1], (BUFFER + 64, 10, DESC_F_WRITE));
        device.finish(&ring, taken, round);
        let used = ring.wait_used(TIMEOUT).unwrap();
        assert_eq!(used, Used { id: u32::from(head), len: round });
    }
}

#[test]
fn full_ring_refuses_and_recovers_when_a_chain_is_used() {
    let mut ring = ring(2, false);
    let chain = [Segment::readable(BUFFER, 1), Segment::writable(BUFFER, 1)];
    let head = ring.add(&chain).unwrap();
    assert!(matches!(ring.add(&chain), Err(Error::Full { needed: 2, free: 0 })));
    NaiveDevice { next: 0 }.finish(&ring, head, 0);
    ring.poll_used(TIMEOUT).unwrap();
    ring.add(&chain).unwrap();
}

#[test]
fn broken_links_are_written_as_asked() {
    let mut ring = ring(8, false);
    let looped = [Segment::readable(BUFFER, 8), Segment::readable(BUFFER, 8).with_next(Next::Head)];
    ring.add(&looped).unwrap();
    let (_, chain) = NaiveDevice { next: 0 }.chain(&ring).unwrap();
    assert_eq!(chain.len(), 8, "the loop has no end");

    let stopped =
        [Segment::readable(BUFFER, 8).with_next(Next::Stop), Segment::readable(BUFFER, 8)];
    ring.add(&stopped).unwrap();
    let (_, chain) = NaiveDevice { next: 1 }.chain(&ring).unwrap();
    assert_eq!(chain.len(), 1);

    let beyond = Segment::readable(BUFFER, 8).with_next(Next::Entry(99));
    let table = ring.write_indirect(BUFFER, &[beyond]).unwrap();
    assert_eq!((table.len, table.flags), (16, DESC_F_INDIRECT));
    assert_eq!(ring.ram().read_vec(BUFFER + 12, 4).unwrap(), [1, 0, 99, 0]);
}

#[test]
fn kick_is_left_out_when_the_device_does_not_want_it() {
    let mut plain = ring(4, false);
    plain.ram().store(plain.used_addr(), USED_F_NO_NOTIFY.to_le()).unwrap();
    plain.add(&[Segment::readable(BUFFER, 1)]).unwrap();
    assert!(!plain.kick().unwrap());

    let mut indexed = ring(4, true);
    let event = indexed.used_addr() + 4 + 8 * 4;
    indexed.ram().store(event, 1u16.to_le()).unwrap();
    indexed.add(&[Segment::readable(BUFFER, 1)]).unwrap();
    assert!(!indexed.kick().unwrap(), "entry 0 is before the event");
    indexed.add(&[Segment::readable(BUFFER, 1)]).unwrap();
    assert!(indexed.kick().unwrap(), "entry 1 is the event");
    indexed.add(&[Segment::readable(BUFFER, 1)]).unwrap();
    assert!(!indexed.kick().unwrap(), "entry 2 is after the event");
}

#[test]
fn waiting_ends_with_the_time() {
    let mut ring = ring(4, true);
    assert!(matches!(ring.wait_used(Duration::from_millis(5)), Err(Error::Timeout(_))));
    assert!(matches!(ring.poll_used(Duration::from_millis(5)), Err(Error::Timeout(_))));
}
