//! The guest-request queue: descriptor chain to request, response to used ring.
//!
//! Everything here is read from a hostile guest. A chain's framing is checked before anything is
//! executed: a request that could not be answered is not executed.

use ram_discard::GpaRange;
use smallvec::SmallVec;
use vhost_user_backend::bitmap::BitmapMmapRegion;
use virtio_mem::controller::MemController;
use virtio_mem::device::{REQUEST_LEN, RESPONSE_LEN, Request, Response};
use virtio_queue::DescriptorChain;
use vm_memory::bitmap::BS;
use vm_memory::guest_memory::{self, GuestMemorySliceIterator};
use vm_memory::{
    Bytes, GuestAddress, GuestMemory, GuestMemoryAtomic, GuestMemoryMmap, Permissions,
    VolatileSlice,
};

/// Guest memory with the front-end's dirty log.
pub type Memory = GuestMemoryMmap<BitmapMmapRegion>;
/// Guest memory that is replaced as a whole.
pub type AtomicMemory = GuestMemoryAtomic<Memory>;

/// Part of a guest buffer, as it is mapped.
type Part<'a> = VolatileSlice<'a, BS<'a, BitmapMmapRegion>>;

/// Guest memory without what is unplugged now: any access to that fails, and the host gets to
/// hold nothing for it.
///
/// A chain may name tables of descriptors anywhere, which are read while it is walked, before
/// it is seen where they are; and a guest may change a descriptor after it was seen. So
/// each access is checked where it is made.
#[derive(Clone, Copy)]
pub struct UsableMemory<'a> {
    memory: &'a Memory,
    controller: &'a MemController,
}

impl<'a> UsableMemory<'a> {
    /// The part of `memory` that the guest may use now, as `controller` has it.
    pub fn new(memory: &'a Memory, controller: &'a MemController) -> Self {
        Self { memory, controller }
    }

    /// What lies behind a range; `None` when any of it may not be used now.
    fn slices(&self, addr: GuestAddress, count: usize) -> Option<SmallVec<[Part<'a>; 1]>> {
        if !self.is_usable(addr, count) {
            return None;
        }
        let slices = GuestMemory::get_slices(self.memory, addr, count, Permissions::Write).ok()?;
        slices.collect::<Result<_, _>>().ok()
    }

    fn is_usable(&self, addr: GuestAddress, count: usize) -> bool {
        // Whether addresses wrap is for the memory to judge.
        let range = GpaRange::new(addr.0, count as u64);
        range.is_none_or(|range| self.controller.is_usable(range))
    }
}

impl GuestMemory for UsableMemory<'_> {
    type PhysicalMemory = Memory;
    type Bitmap = BitmapMmapRegion;

    fn check_range(&self, addr: GuestAddress, count: usize, access: Permissions) -> bool {
        self.is_usable(addr, count) && GuestMemory::check_range(self.memory, addr, count, access)
    }

    fn get_slices<'a>(
        &'a self,
        addr: GuestAddress,
        count: usize,
        access: Permissions,
    ) -> guest_memory::Result<impl GuestMemorySliceIterator<'a, BS<'a, Self::Bitmap>>> {
        if !self.is_usable(addr, count) {
            return Err(guest_memory::Error::InvalidGuestAddress(addr));
        }
        GuestMemory::get_slices(self.memory, addr, count, access)
    }
}

/// A request whose framing was found good.
pub struct Framed<'a> {
    /// What the guest asks for, read once.
    pub request: Request,
    /// Where the room for the response is, guest-physical.
    buffers: SmallVec<[GpaRange; 1]>,
    /// Room for the response. Drivers use one buffer, for which nothing is allocated.
    response: SmallVec<[Part<'a>; 1]>,
}

/// Reads a chain: device-readable parts first, of which 24 bytes are the request; then
/// device-writable ones, of which 10 bytes are the response. More of either is ignored.
///
/// Returns `None` for any chain that breaks the framing, or whose buffers lie in memory the guest
/// may not use now, or would not after the request. A table of descriptors there ends the chain, as
/// one that is not in memory at all does.
pub fn parse<'a>(
    chain: DescriptorChain<&UsableMemory<'a>>,
    controller: &MemController,
) -> Option<Framed<'a>> {
    let memory = *chain.memory();
    let mut bytes = [0; REQUEST_LEN];
    let mut filled = 0;
    let mut room = 0;
    let mut response = SmallVec::new();
    let mut response_buffers = SmallVec::new();
    let mut buffers = SmallVec::<[GpaRange; 2]>::new();
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
        let buffer = GpaRange::new(addr.0, used as u64)?;
        buffers.push(buffer);
        if writable {
            response_buffers.push(buffer);
            response.extend(memory.slices(addr, used)?);
            room += used;
        } else {
            // All of it, or an error.
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
    answerable.then_some(Framed { request, buffers: response_buffers, response })
}

impl Framed<'_> {
    /// Writes the response and returns the length for the used ring, bytes. Nothing is written where a
    /// system reset has taken the memory away since.
    pub fn answer(&self, controller: &MemController, response: Response) -> u32 {
        let bytes = response.to_bytes();
        let written = controller.write_answer(&self.buffers, || {
            let mut written = 0;
            for part in &self.response {
                part.copy_from(&bytes[written..]);
                written += part.len();
            }
            written
        });
        written.and_then(|written| u32::try_from(written).ok()).unwrap_or(0)
    }
}
