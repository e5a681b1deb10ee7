//! The guest-request queue: descriptor chain to request, response to used ring.
//!
//! Everything here is read from a hostile guest. A chain's framing is checked before anything is
//! executed: a request that could not be answered is not executed.

use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_mem::ByteRange;
use virtio_mem::controller::MemController;
use virtio_mem::device::{REQUEST_LEN, RESPONSE_LEN, Request, Response};
use virtio_queue::DescriptorChain;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};

/// Guest memory with the front-end's dirty log.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;

/// Part of a guest buffer: address and length, bytes; never of length 0.
type Part = (GuestAddress, usize);

/// A request whose framing was found good.
pub struct Framed {
    /// What the guest asks for, read once.
    pub request: Request,
    response: Vec<Part>,
}

/// Reads a chain: device-readable parts first, of which 24 bytes are the request; then
/// device-writable ones, of which 10 bytes are the response. More of either is ignored.
///
/// Returns `None` for any chain that breaks the framing, or whose buffers lie in memory the guest
/// may not use now, or would not after the request.
pub fn parse(
    chain: DescriptorChain<&Memory>,
    memory: &Memory,
    controller: &MemController,
) -> Option<Framed> {
    let mut bytes = [0; REQUEST_LEN];
    let mut filled = 0;
    let mut room = 0;
    let mut response = Vec::new();
    let mut buffers = Vec::new();
    for descriptor in chain {
        let len = usize::try_from(descriptor.len()).ok()?;
        if len == 0 {
            continue;
        }
        let writable = descriptor.is_write_only();
        if !writable && room != 0 {
            return None;
        }
        let used = if writable { RESPONSE_LEN - room } else { REQUEST_LEN - filled }.min(len);
        if used == 0 {
            continue;
        }
        let addr = descriptor.addr();
        let range = ByteRange::new(addr.0, used as u64)?;
        if !GuestMemoryBackend::check_range(memory, addr, used) || !controller.is_usable(range) {
            return None;
        }
        buffers.push(range);
        if writable {
            response.push((addr, used));
            room += used;
        } else {
            memory.read_slice(&mut bytes[filled..filled + used], addr).ok()?;
            filled += used;
        }
    }
    if filled < REQUEST_LEN || room < RESPONSE_LEN {
        return None;
    }
    let request = Request::from_bytes(&bytes);
    // The response could no longer be written where the request itself takes the memory away.
    let taken = controller.unplugged_by(request);
    let answerable = taken.is_none_or(|taken| buffers.iter().all(|range| !range.overlaps(taken)));
    answerable.then_some(Framed { request, response })
}

impl Framed {
    /// Writes the response and returns the length for the used ring, bytes.
    pub fn answer(&self, memory: &Memory, response: Response) -> u32 {
        let bytes = response.to_bytes();
        let mut written = 0;
        for &(addr, len) in &self.response {
            if let Err(error) = memory.write_slice(&bytes[written..written + len], addr) {
                // Checked before; the memory table cannot change while a request is served.
                tracing::error!(%error, "cannot write the response");
                return 0;
            }
            written += len;
        }
        u32::try_from(written).unwrap_or(0)
    }
}
