//! The guest's side of the device's one queue: requests as bytes in descriptors of any layout,
//! responses as they come.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::memory::GuestRam;
use crate::split_ring::{Error, Segment, SplitRing, Used};

/// Length of a request.
pub const REQUEST_SIZE: u32 = 24;
/// Length of a response.
pub const RESPONSE_SIZE: u32 = 10;
/// What response buffers hold before the device writes them, to tell what it wrote.
pub const UNTOUCHED: u8 = 0xa5;
/// Memory that the buffers of one queue of `size` descriptors take.
pub const fn buffers_size(size: u16) -> u64 {
    SLOT_SIZE * size as u64
}

// A slot has the request, the response and the indirect table of one chain.
const SLOT_SIZE: u64 = 0x2000;
const RESPONSE_OFFSET: u64 = 0x800;
const TABLE_OFFSET: u64 = 0x1000;

type Result<T> = std::result::Result<T, Error>;

/// What a guest may ask.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub enum RequestType {
    /// Make blocks usable.
    Plug = 0,
    /// Give blocks back.
    Unplug = 1,
    /// Give all blocks back.
    UnplugAll = 2,
    /// Ask which blocks are plugged.
    State = 3,
}

/// One request; `kind` is a number so that there can be unknown ones.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MemRequest {
    /// Request type.
    pub kind: u16,
    /// First address.
    pub addr: u64,
    /// Number of blocks.
    pub nb_blocks: u16,
    /// What the padding is filled with.
    pub padding: u8,
}

impl MemRequest {
    /// A request with clean padding.
    pub fn new(kind: RequestType, addr: u64, nb_blocks: u16) -> Self {
        Self { kind: kind as u16, addr, nb_blocks, padding: 0 }
    }

    /// The same request with both paddings filled.
    pub fn with_padding(self, padding: u8) -> Self {
        Self { padding, ..self }
    }

    /// The 24 bytes.
    pub fn to_bytes(self) -> Vec<u8> {
        let mut bytes = vec![self.padding; REQUEST_SIZE as usize];
        bytes[..2].copy_from_slice(&self.kind.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.addr.to_le_bytes());
        bytes[16..18].copy_from_slice(&self.nb_blocks.to_le_bytes());
        bytes
    }
}

/// What a device may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ResponseType {
    /// Done.
    Ack,
    /// Refused: more than requested.
    Nack,
    /// Not now.
    Busy,
    /// A wrong request.
    Error,
    /// A number that means nothing.
    Other(u16),
}

/// What `STATE` tells of a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockState {
    /// Every block is plugged.
    Plugged,
    /// No block is plugged.
    Unplugged,
    /// Some blocks are plugged.
    Mixed,
    /// A number that means nothing.
    Other(u16),
}

/// A used chain, and what its buffers hold.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Head of the chain.
    pub head: u16,
    /// Bytes written, as the used ring says.
    pub len: u32,
    /// Bytes of the response buffer, [`UNTOUCHED`] where nothing was written.
    pub bytes: Vec<u8>,
    /// Bytes of the request buffer, which the device must not write.
    pub request: Vec<u8>,
}

impl Response {
    /// The response type.
    pub fn kind(&self) -> ResponseType {
        match self.word(0) {
            0 => ResponseType::Ack,
            1 => ResponseType::Nack,
            2 => ResponseType::Busy,
            3 => ResponseType::Error,
            other => ResponseType::Other(other),
        }
    }

    /// The state, which means something in an ACK of a `STATE` request.
    pub fn state(&self) -> BlockState {
        match self.word(8) {
            0 => BlockState::Plugged,
            1 => BlockState::Unplugged,
            2 => BlockState::Mixed,
            other => BlockState::Other(other),
        }
    }

    /// Whether the device wrote nothing at all.
    pub fn is_untouched(&self) -> bool {
        self.len == 0 && self.bytes.iter().all(|byte| *byte == UNTOUCHED)
    }

    fn word(&self, at: usize) -> u16 {
        self.bytes.get(at..at + 2).map_or(u16::MAX, |word| u16::from_le_bytes([word[0], word[1]]))
    }
}

/// Where the descriptors of a chain are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Placement {
    /// In the ring's table.
    #[default]
    Direct,
    /// In an indirect table.
    Indirect,
    /// In an indirect table whose descriptor has the flag WRITE, which means nothing there.
    IndirectWithWriteFlag,
    /// This many in the ring's table, the rest in an indirect one.
    IndirectAfter(usize),
}

/// How request and response are cut into descriptors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shape {
    /// Lengths of the readable descriptors; bytes beyond the request are garbage.
    pub request: Vec<u32>,
    /// Lengths of the writable descriptors.
    pub response: Vec<u32>,
    /// Where they are.
    pub placement: Placement,
}

impl Default for Shape {
    fn default() -> Self {
        Self::new(&[REQUEST_SIZE], &[RESPONSE_SIZE])
    }
}

impl Shape {
    /// Direct descriptors of these lengths.
    pub fn new(request: &[u32], response: &[u32]) -> Self {
        Self {
            request: request.to_vec(),
            response: response.to_vec(),
            placement: Placement::Direct,
        }
    }

    /// The same descriptors elsewhere.
    pub fn placed(self, placement: Placement) -> Self {
        Self { placement, ..self }
    }

    /// Every layout in which a request is whole and a response fits, each with a name.
    pub fn all_valid() -> Vec<(&'static str, Shape)> {
        let plain = Shape::default();
        vec![
            ("24 | 10", plain.clone()),
            ("8 + 16 | 10", Shape::new(&[8, 16], &[10])),
            ("2 + 6 + 16 | 2 + 8", Shape::new(&[2, 6, 16], &[2, 8])),
            ("24 | 2 + 8", Shape::new(&[24], &[2, 8])),
            ("24 x 1 | 10", Shape::new(&[1; 24], &[10])),
            ("24 | 10 x 1", Shape::new(&[24], &[1; 10])),
            ("24 x 1 | 10 x 1", Shape::new(&[1; 24], &[1; 10])),
            ("zero-length between", Shape::new(&[0, 8, 0, 16, 0], &[0, 5, 0, 5, 0])),
            ("64 | 64", Shape::new(&[64], &[64])),
            ("24 + 40 | 10 + 40", Shape::new(&[24, 40], &[10, 40])),
            ("indirect", plain.clone().placed(Placement::Indirect)),
            ("indirect with WRITE", plain.clone().placed(Placement::IndirectWithWriteFlag)),
            ("24 | indirect 10", plain.placed(Placement::IndirectAfter(1))),
            (
                "8 + indirect 16 | 2 + 8",
                Shape::new(&[8, 16], &[2, 8]).placed(Placement::IndirectAfter(1)),
            ),
            (
                "indirect 24 x 1 | 10 x 1",
                Shape::new(&[1; 24], &[1; 10]).placed(Placement::Indirect),
            ),
        ]
    }
}

#[derive(Clone, Copy, Debug)]
struct Pending {
    slot: u64,
    request_len: usize,
    response_len: usize,
}

/// A driver that says what it is told to say.
#[derive(Debug)]
pub struct MemDriver {
    ring: SplitRing,
    buffers: u64,
    next_slot: u64,
    pending: HashMap<u16, Pending>,
    timeout: Duration,
}

impl MemDriver {
    /// A driver on `ring` with its buffers at `buffers` ([`buffers_size`] bytes).
    pub fn new(ring: SplitRing, buffers: u64) -> Self {
        Self {
            ring,
            buffers,
            next_slot: 0,
            pending: HashMap::new(),
            timeout: Duration::from_secs(10),
        }
    }

    /// Ring at `base` and buffers behind it, in the guest's boot memory.
    pub fn at(ram: &Arc<GuestRam>, base: u64, size: u16, event_idx: bool) -> Result<Self> {
        let ring = SplitRing::new(ram.clone(), base, size, event_idx)?;
        let buffers = (base + SplitRing::footprint(size)).next_multiple_of(0x1000);
        Ok(Self::new(ring, buffers))
    }

    /// How long a response may take; 10 s unless set.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// The ring.
    pub fn ring(&self) -> &SplitRing {
        &self.ring
    }

    /// The ring, to do something special with it.
    pub fn ring_mut(&mut self) -> &mut SplitRing {
        &mut self.ring
    }

    /// Whether no request is on its way.
    pub fn is_idle(&self) -> bool {
        self.pending.is_empty() && self.ring.is_idle()
    }

    /// Goes on with a ring that another driver has left idle at `index`.
    pub fn resume_at(&mut self, index: u16) {
        self.ring.resume_at(index);
        self.pending.clear();
    }

    /// Forgets all that is on its way and empties the ring, which keeps its eventfds.
    pub fn clear(&mut self) -> Result<()> {
        self.pending.clear();
        self.ring.clear()
    }

    /// Forgets all that is on its way and empties the ring, as after a reset.
    pub fn reset(&mut self) -> Result<()> {
        self.pending.clear();
        self.ring.reset()
    }

    /// `PLUG`.
    pub fn plug(&mut self, addr: u64, nb_blocks: u16) -> Result<Response> {
        self.execute(MemRequest::new(RequestType::Plug, addr, nb_blocks))
    }

    /// `UNPLUG`.
    pub fn unplug(&mut self, addr: u64, nb_blocks: u16) -> Result<Response> {
        self.execute(MemRequest::new(RequestType::Unplug, addr, nb_blocks))
    }

    /// `UNPLUG_ALL`.
    pub fn unplug_all(&mut self) -> Result<Response> {
        self.execute(MemRequest::new(RequestType::UnplugAll, 0, 0))
    }

    /// `STATE`.
    pub fn state(&mut self, addr: u64, nb_blocks: u16) -> Result<Response> {
        self.execute(MemRequest::new(RequestType::State, addr, nb_blocks))
    }

    /// Sends a request and waits for its response.
    pub fn execute(&mut self, request: MemRequest) -> Result<Response> {
        self.execute_shaped(&request.to_bytes(), &Shape::default())
    }

    /// Sends any bytes in any shape and waits for them to be used.
    pub fn execute_shaped(&mut self, request: &[u8], shape: &Shape) -> Result<Response> {
        self.submit(request, shape)?;
        self.ring.kick()?;
        self.complete()
    }

    /// Sends all requests with one kick; the responses in the order of the requests.
    pub fn execute_batch(&mut self, requests: &[MemRequest]) -> Result<Vec<Response>> {
        let mut heads = Vec::new();
        for request in requests {
            heads.push(self.submit(&request.to_bytes(), &Shape::default())?);
        }
        self.ring.kick()?;
        let mut responses = HashMap::new();
        for _ in requests {
            let response = self.complete()?;
            responses.insert(response.head, response);
        }
        Ok(heads.iter().filter_map(|head| responses.remove(head)).collect())
    }

    /// Makes a request available without a kick; returns the head of its chain.
    pub fn submit(&mut self, request: &[u8], shape: &Shape) -> Result<u16> {
        let slot = self.buffers + SLOT_SIZE * (self.next_slot % u64::from(self.ring.size()));
        self.next_slot += 1;
        let request_len: u32 = shape.request.iter().sum();
        let response_len: u32 = shape.response.iter().sum();
        let mut bytes = request.to_vec();
        bytes.resize(request_len as usize, 0xff);
        self.ring.ram().write(slot, &bytes)?;
        let untouched = vec![UNTOUCHED; response_len as usize];
        self.ring.ram().write(slot + RESPONSE_OFFSET, &untouched)?;

        let mut chain = Vec::new();
        let mut at = slot;
        for len in &shape.request {
            chain.push(Segment::readable(at, *len));
            at += u64::from(*len);
        }
        let mut at = slot + RESPONSE_OFFSET;
        for len in &shape.response {
            chain.push(Segment::writable(at, *len));
            at += u64::from(*len);
        }
        let direct = match shape.placement {
            Placement::Direct => chain.len(),
            Placement::Indirect | Placement::IndirectWithWriteFlag => 0,
            Placement::IndirectAfter(count) => count,
        };
        if direct < chain.len() {
            let mut table = self.ring.write_indirect(slot + TABLE_OFFSET, &chain[direct..])?;
            if shape.placement == Placement::IndirectWithWriteFlag {
                table = table.with_flags(crate::split_ring::DESC_F_WRITE);
            }
            chain.truncate(direct);
            chain.push(table);
        }
        let head = self.ring.add(&chain)?;
        let pending = Pending {
            slot,
            request_len: request_len as usize,
            response_len: response_len as usize,
        };
        self.pending.insert(head, pending);
        Ok(head)
    }

    /// Waits for the next chain to be used and reads its buffers.
    pub fn complete(&mut self) -> Result<Response> {
        let used = self.ring.wait_used(self.timeout)?;
        self.response(used)
    }

    /// Reads the buffers of a used chain; those of a chain that this driver did not make are empty.
    pub fn response(&mut self, used: Used) -> Result<Response> {
        let head = used.id as u16;
        let mut response = Response { head, len: used.len, bytes: Vec::new(), request: Vec::new() };
        if let Some(pending) = self.pending.remove(&head) {
            let ram = self.ring.ram();
            response.bytes = ram.read_vec(pending.slot + RESPONSE_OFFSET, pending.response_len)?;
            response.request = ram.read_vec(pending.slot, pending.request_len)?;
        }
        Ok(response)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Layout;
    use crate::split_ring::DESC_F_INDIRECT;

    #[test]
    fn request_bytes_stand_where_the_specification_has_them() {
        let bytes = MemRequest::new(RequestType::State, 0x1122_3344_5566_7788, 0x99aa)
            .with_padding(0xff)
            .to_bytes();
        assert_eq!(bytes[..8], [3, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
        assert_eq!(bytes[8..16], 0x1122_3344_5566_7788u64.to_le_bytes());
        assert_eq!(bytes[16..], [0xaa, 0x99, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]);
    }

    #[test]
    fn every_valid_shape_fits_into_a_ring_of_128() {
        let ram =
            Arc::new(GuestRam::new(Layout::new().memfd("ram", 0, 0x100_0000).unwrap()).unwrap());
        let request = MemRequest::new(RequestType::Plug, 0x1000, 1).to_bytes();
        for (name, shape) in Shape::all_valid() {
            let mut driver = MemDriver::at(&ram, 0x1000, 128, true).unwrap();
            let head = driver.submit(&request, &shape).unwrap();
            let response = driver.response(Used { id: u32::from(head), len: 0 }).unwrap();
            assert!(response.is_untouched(), "{name}");
            assert_eq!(response.request[..24.min(response.request.len())], request, "{name}");
        }
    }

    #[test]
    fn indirect_after_leaves_the_first_descriptors_in_the_ring() {
        let ram =
            Arc::new(GuestRam::new(Layout::new().memfd("ram", 0, 0x100_0000).unwrap()).unwrap());
        let mut driver = MemDriver::at(&ram, 0x1000, 8, false).unwrap();
        let shape = Shape::default().placed(Placement::IndirectAfter(1));
        driver.submit(&[0; 24], &shape).unwrap();
        let table = ram.read_vec(0x1000, 32).unwrap();
        assert_eq!(table[12..14], [1, 0], "the request goes on");
        assert_eq!(u16::from_le_bytes([table[28], table[29]]), DESC_F_INDIRECT);
        assert_eq!(table[24..28], 16u32.to_le_bytes());
    }
}
