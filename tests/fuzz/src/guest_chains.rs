//! Descriptor tables, rings and buffers of a hostile guest, served by the back-end.
//!
//! What is promised: no panic; serving ends; nothing is written but the used ring and buffers
//! that the guest gave for writing; unplugged memory is not touched; the next good request works.

use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::{MemfdFlags, SeekFrom, memfd_create, seek};
use vhost_user_backend::{VhostUserBackend, VringT};
use vhost_user_mem::backend::MemBackend;
use vhost_user_mem::gate::Gate;
use vhost_user_mem::metrics::Metrics;
use vhost_user_mem::queue::{AtomicMemory, Memory};
use vhost_user_mem::vring::Vring;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, VirtioMem};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestAddressSpace};
use vmm_sys_util::epoll::EventSet;

use crate::input::Input;

const BOOT: u64 = 0x4000;
const BLOCK: u64 = 4096;
const PAGE: usize = 4096;
const NR: u64 = 16;
const ADDR: u64 = 1 << 20;
const REGION: u64 = NR * BLOCK;

const QUEUE: u64 = 128;
const DESC: u64 = 0;
const AVAIL: u64 = 0x800;
const USED: u64 = 0xc00;
/// Where well-formed requests have their buffers.
const BUFFERS: u64 = 0x2000;

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// Bounds the time of one input.
const STEPS: usize = 256;

struct Guest {
    size: u64,
    boot: File,
    region: File,
    memory: AtomicMemory,
    controller: Arc<MemController>,
    backend: MemBackend,
    vring: Vring,
}

/// All the guest's memory, as it is at one moment.
struct Image {
    boot: Vec<u8>,
    region: Vec<u8>,
}

fn memfd(size: u64) -> File {
    let file = File::from(memfd_create("fuzz", MemfdFlags::CLOEXEC).unwrap());
    file.set_len(size).unwrap();
    file
}

impl Image {
    fn bytes(&self, addr: u64, len: u64) -> Option<&[u8]> {
        let (memory, start) = match addr.checked_sub(ADDR) {
            Some(offset) => (&self.region, offset),
            None => (&self.boot, addr),
        };
        let end = start.checked_add(len)?;
        memory.get(usize::try_from(start).ok()?..usize::try_from(end).ok()?)
    }

    fn descriptor(&self, at: u64) -> Option<Descriptor> {
        let bytes = self.bytes(at, 16)?;
        let half = |at: usize| u16::from_le_bytes([bytes[at], bytes[at + 1]]);
        let addr = u64::from_le_bytes(bytes[..8].try_into().ok()?);
        let len = u32::from_le_bytes(bytes[8..12].try_into().ok()?);
        let buffer = addr..addr.saturating_add(u64::from(len));
        Some(Descriptor { buffer, flags: half(12), next: u64::from(half(14)) })
    }

    fn number(&self, addr: u64, len: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        bytes[..len].copy_from_slice(self.bytes(addr, len as u64)?);
        Some(u64::from_le_bytes(bytes))
    }
}

struct Descriptor {
    buffer: Range<u64>,
    flags: u16,
    next: u64,
}

/// What descriptors that the device may reach say.
#[derive(Default)]
struct Reach {
    writable: Vec<Range<u64>>,
    tables: Vec<Range<u64>>,
}

impl Reach {
    /// Follows whatever the available ring names, in the table and in tables it refers to; more
    /// than a device would, never less.
    fn of(image: &Image, size: u64) -> Self {
        let mut reach = Self::default();
        reach.tables.push(DESC..DESC + 16 * size);
        let mut seen = vec![false; QUEUE as usize];
        for slot in 0..size {
            let mut at = image.number(AVAIL + 4 + 2 * slot, 2).unwrap();
            while at < size && !std::mem::replace(&mut seen[at as usize], true) {
                match reach.take(image, DESC + 16 * at) {
                    Some(next) => at = next,
                    None => break,
                }
            }
        }
        reach
    }

    /// Notes one descriptor; the link, if it has one.
    fn take(&mut self, image: &Image, desc: u64) -> Option<u64> {
        let Descriptor { buffer, flags, next } = image.descriptor(desc)?;
        if flags & INDIRECT != 0 {
            // No table of the device's memory is longer than that.
            let entries = ((buffer.end - buffer.start) / 16).min((BOOT + REGION) / 16);
            for at in (buffer.start..buffer.end).step_by(16).take(entries as usize) {
                if let Some(Descriptor { buffer, flags, .. }) = image.descriptor(at)
                    && flags & WRITE != 0
                {
                    self.writable.push(buffer);
                }
            }
            self.tables.push(buffer.clone());
        }
        if flags & WRITE != 0 {
            self.writable.push(buffer);
        }
        (flags & NEXT != 0).then_some(next)
    }

    /// Whether the device's own writes may change what it reads, so that what was found is not
    /// what it will find.
    fn is_unstable(&self, size: u64) -> bool {
        let rings = [AVAIL..AVAIL + 6 + 2 * size, used(size)];
        self.tables.iter().any(|table| meets(table, &used(size)))
            || self.writable.iter().any(|range| {
                self.tables.iter().chain(&rings).any(|metadata| meets(range, metadata))
            })
    }
}

fn meets(a: &Range<u64>, b: &Range<u64>) -> bool {
    a.start < b.end && b.start < a.end
}

fn used(size: u64) -> Range<u64> {
    USED..USED + 6 + 8 * size
}

impl Guest {
    fn new(size: u64, event_idx: bool) -> Self {
        let geometry = Geometry::new(ADDR, REGION, BLOCK, None).unwrap();
        let device = VirtioMem::new(geometry, REGION / 2).unwrap();
        let controller = Arc::new(MemController::new(InitialState::volatile(device)));
        let (boot, region) = (memfd(BOOT), memfd(REGION));
        let file = |file: &File| Some(FileOffset::new(file.try_clone().unwrap(), 0));
        let mapped = Memory::from_ranges_with_files([
            (GuestAddress(0), BOOT as usize, file(&boot)),
            (GuestAddress(ADDR), REGION as usize, file(&region)),
        ]);
        let memory = AtomicMemory::new(mapped.unwrap());
        let (metrics, gate) = (Arc::new(Metrics::new()), Arc::new(Gate::default()));
        let backend =
            MemBackend::new(Arc::clone(&controller), metrics, gate, memory.clone()).unwrap();
        backend.update_memory(memory.clone()).unwrap();
        for block in [0, 1, 2, 5] {
            let span = BlockSpan { addr: ADDR + block * BLOCK, nb_blocks: 1 };
            controller.execute(Request::Plug(span));
            controller.answered();
        }
        let vring = Vring::new(memory.clone(), QUEUE as u16).unwrap();
        let guest = Self { size, boot, region, memory, controller, backend, vring };
        guest.start(size, event_idx);
        guest
    }

    fn start(&self, size: u64, event_idx: bool) {
        self.vring.set_queue_size(size as u16);
        self.vring.set_queue_info(DESC, AVAIL, USED).unwrap();
        self.vring.set_queue_event_idx(event_idx);
        self.vring.set_queue_next_avail(0);
        self.vring.set_queue_next_used(0);
        self.vring.set_queue_ready(true);
        self.vring.set_enabled(true);
    }

    /// Writes as the guest's CPU would; nowhere, where there is no memory.
    fn write(&self, addr: u64, bytes: &[u8]) {
        let _ = self.memory.memory().write_slice(bytes, GuestAddress(addr));
    }

    fn image(&self) -> Image {
        let read = |file: &File, size: u64| {
            let mut bytes = vec![0; size as usize];
            // Not through the mapping, which would allocate what is a hole.
            file.read_exact_at(&mut bytes, 0).unwrap();
            bytes
        };
        Image { boot: read(&self.boot, BOOT), region: read(&self.region, REGION) }
    }

    fn descriptor(&self, index: u64, addr: u64, len: u32, flags: u16, next: u16) {
        self.write_descriptor(DESC + 16 * (index % QUEUE), addr, len, flags, next);
    }

    fn write_descriptor(&self, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        self.write(at, &bytes);
    }

    fn avail_idx(&self) -> u16 {
        self.memory.memory().read_obj::<u16>(GuestAddress(AVAIL + 2)).map_or(0, u16::from_le)
    }

    fn push(&self, head: u16) {
        let index = self.avail_idx();
        self.write(AVAIL + 4 + 2 * (u64::from(index) % self.size), &head.to_le_bytes());
        self.write(AVAIL + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Lets the device serve the queue, and checks what it did.
    fn kick(&self) {
        let before = self.image();
        let reach = Reach::of(&before, self.size);
        let vrings = std::slice::from_ref(&self.vring);
        self.backend.handle_event(0, EventSet::IN, vrings, 0).unwrap();
        self.assert_unplugged_is_untouched();
        if reach.is_unstable(self.size) {
            return;
        }
        let after = self.image();
        for (start, was, is) in
            [(0, &before.boot, &after.boot), (ADDR, &before.region, &after.region)]
        {
            let pages = was.chunks(PAGE).zip(is.chunks(PAGE)).zip((start..).step_by(PAGE));
            for ((was, is), start) in pages.filter(|((was, is), _)| was != is) {
                for ((was, is), addr) in was.iter().zip(is).zip(start..) {
                    let given = used(self.size).contains(&addr)
                        || reach.writable.iter().any(|range| range.contains(&addr));
                    let discarded = addr >= ADDR && *is == 0;
                    let good = was == is || given || discarded;
                    assert!(good, "{addr:#x} went from {was:#x} to {is:#x}");
                }
            }
        }
    }

    /// Reading a hole through a mapping allocates it, too.
    fn assert_unplugged_is_untouched(&self) {
        for range in self.controller.unplugged_ranges() {
            if let Ok(data) = seek(&self.region, SeekFrom::Data(range.start())) {
                assert!(data >= range.end(), "the host holds unplugged memory at {data:#x}");
            }
        }
    }

    /// A driver that starts again does what it likes with the device.
    fn assert_serves(&self) {
        self.vring.set_queue_ready(false);
        self.write(AVAIL, &[0; 6]);
        self.write(USED, &[0; 12]);
        self.start(QUEUE, false);
        self.write(BUFFERS, &Request::UnplugAll.to_bytes());
        self.write(BUFFERS + 64, &[0xff; 10]);
        self.descriptor(3, BUFFERS, 24, NEXT, 4);
        self.descriptor(4, BUFFERS + 64, 10, WRITE, 0);
        self.write(AVAIL + 4, &3u16.to_le_bytes());
        self.write(AVAIL + 2, &1u16.to_le_bytes());
        let vrings = std::slice::from_ref(&self.vring);
        self.backend.handle_event(0, EventSet::IN, vrings, 0).unwrap();
        let image = self.image();
        assert_eq!(image.bytes(BUFFERS + 64, 10).unwrap(), [0; 10], "no ACK");
        assert_eq!(image.number(USED + 2, 2), Some(1));
        assert_eq!(image.number(USED + 4, 8), Some(10 << 32 | 3));
        assert_eq!(self.controller.config().plugged_size, 0);
        self.assert_unplugged_is_untouched();
    }
}

/// An address that may be good, may be of unplugged memory, or may be anything.
fn address(input: &mut Input<'_>) -> u64 {
    match input.u8() % 8 {
        0 => input.u64(),
        1 | 2 => ADDR + u64::from(input.u16()),
        3 => ADDR - 8 + u64::from(input.u8()),
        4 => BOOT - 8 + u64::from(input.u8() % 16),
        _ => u64::from(input.u16()) % BOOT,
    }
}

fn length(input: &mut Input<'_>) -> u32 {
    match input.u8() % 8 {
        0 => input.u32(),
        1 => u32::from(input.u16()),
        2 => 16 * u32::from(input.u8() % 16),
        3 | 4 => 24,
        5 | 6 => 10,
        _ => u32::from(input.u8() % 32),
    }
}

/// Bytes of a request that names blocks in or near the region.
fn request(input: &mut Input<'_>) -> [u8; 24] {
    let addr = ADDR + u64::from(input.u8()) % (NR + 2) * BLOCK;
    let kind = input.u8();
    let span = BlockSpan { addr, nb_blocks: u16::from(input.u8() % 8) };
    match kind % 5 {
        0 => Request::Plug(span),
        1 => Request::Unplug(span),
        2 => Request::State(span),
        3 => Request::UnplugAll,
        _ => Request::Unsupported(u16::from(kind)),
    }
    .to_bytes()
}

fn step(guest: &Guest, input: &mut Input<'_>) {
    match input.u8() % 8 {
        0 => {
            let (index, addr, len) = (input.u8(), address(input), length(input));
            let (flags, next) = (u16::from(input.u8() % 8), u16::from(input.u8()));
            guest.descriptor(u64::from(index), addr, len, flags, next);
        }
        1 => guest.push(u16::from(input.u8()) % (QUEUE as u16 + 4)),
        2 => guest.write(AVAIL + 2, &input.u16().to_le_bytes()),
        3 => {
            let (addr, len) = (address(input), input.u8());
            // The guest's own writes to unplugged memory are not the device's.
            if addr < BOOT {
                guest.write(addr, input.bytes(usize::from(len)));
            }
        }
        4 => {
            let at = u64::from(input.u8()) * 16;
            let (addr, len) = (address(input), length(input));
            let (flags, next) = (u16::from(input.u8() % 8), u16::from(input.u8() % 8));
            guest.write_descriptor(BUFFERS + 0x800 + at % 0x400, addr, len, flags, next);
        }
        5 => {
            let (head, count) = (u16::from(input.u8()) % QUEUE as u16, input.u8() % 8);
            let len = u32::from(count) * 16;
            guest.descriptor(u64::from(head), BUFFERS + 0x800, len, INDIRECT, 0);
            guest.push(head);
        }
        6 => {
            let index = u16::from(input.u8()) % (QUEUE as u16 - 1);
            let at = BUFFERS + 0x80 * u64::from(index % 8);
            guest.write(at, &request(input));
            let response = if input.u8() & 3 == 0 { address(input) } else { at + 0x40 };
            guest.descriptor(u64::from(index), at, 24, NEXT, index + 1);
            guest.descriptor(u64::from(index) + 1, response, length(input), WRITE, 0);
            guest.push(index);
        }
        _ => guest.kick(),
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    let choice = input.u8();
    let guest = Guest::new(1 << (choice % 8), choice & 0x80 != 0);
    for _ in 0..STEPS {
        if input.is_empty() {
            break;
        }
        step(&guest, &mut input);
    }
    guest.kick();
    guest.assert_serves();
}
