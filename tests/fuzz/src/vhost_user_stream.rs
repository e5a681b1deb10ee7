//! A byte stream with descriptors from a hostile front-end, served as the daemon serves it: relay,
//! vhost-user crate and device together.
//!
//! What is promised: no panic; the connection ends when the front-end has gone, within a bound; the
//! next front-end is served.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, LazyLock};
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};
use small_vmm::backend_channel::{BackendChannel, Behaviour};
use small_vmm::connection::Connection;
use small_vmm::driver::{MemDriver, ResponseType};
use small_vmm::frontend::{Frontend, USUAL_FEATURES, USUAL_PROTOCOL_FEATURES};
use small_vmm::memory::{GuestRam, Layout, memfd};
use small_vmm::protocol::{self, MemoryRegion, VERSION, words64};
use vhost_user_mem::connection::Connections;
use vhost_user_mem::front_door::Notifier;
use vhost_user_mem::service::Service;
use virtio_mem::controller::{InitialState, MemController};
use virtio_mem::device::{BlockSpan, Geometry, Request, VirtioMem};

use crate::input::Input;

const BLOCK: u64 = 4096;
const ADDR: u64 = 1 << 32;
const REGION: u64 = 1 << 20;
const BOOT: u64 = 0x10000;
/// Where the hostile front-end says that it has mapped guest memory.
const USER: u64 = 0x7000_0000;
const RING: u64 = 0x1000;
const QUEUE: u32 = 128;
const PATIENCE: Duration = Duration::from_secs(20);

/// Bounds the time of one input.
const MESSAGES: usize = 48;

/// The device that serves all inputs, and the memory of a good VMM.
struct Device {
    connections: Arc<Connections>,
    ram: Arc<GuestRam>,
}

static DEVICE: LazyLock<Device> = LazyLock::new(|| {
    // As the daemon does; also in place of libFuzzer's handler.
    vhost_user_mem::survive_lost_memory().unwrap();
    let geometry = Geometry::new(ADDR, REGION, BLOCK, None).unwrap();
    let device = VirtioMem::new(geometry, REGION).unwrap();
    let controller = Arc::new(MemController::new(InitialState::volatile(device)));
    let notifier = Arc::new(Notifier::new().unwrap());
    let service = Service::new(controller, Arc::clone(&notifier)).unwrap();
    let connections = Arc::new(Connections::new(service, notifier));
    let layout = Layout::boot_and_device(2 << 20, ADDR, REGION).unwrap();
    Device { connections, ram: Arc::new(GuestRam::new(layout).unwrap()) }
});

/// What a front-end may send along.
struct Descriptors {
    boot: File,
    region: File,
    event: OwnedFd,
    channel: UnixStream,
    pipe: OwnedFd,
    /// Of a file system that could be the front-end's own.
    other: File,
    _kept: (UnixStream, OwnedFd),
}

impl Descriptors {
    fn new() -> Self {
        let (channel, other) = UnixStream::pair().unwrap();
        let (read, write) = std::io::pipe().unwrap();
        let boot = memfd("boot", BOOT, rustix::fs::MemfdFlags::empty()).unwrap();
        fill_ring(&boot);
        Self {
            boot,
            region: memfd("region", REGION, rustix::fs::MemfdFlags::empty()).unwrap(),
            // Kicked already.
            event: eventfd(1, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).unwrap(),
            channel,
            pipe: write.into(),
            other: File::open("/proc/self/status").unwrap(),
            _kept: (other, read.into()),
        }
    }

    fn pick(&self, choice: u8) -> BorrowedFd<'_> {
        match choice % 6 {
            0 => self.boot.as_fd(),
            1 => self.region.as_fd(),
            2 => self.event.as_fd(),
            3 => self.channel.as_fd(),
            4 => self.pipe.as_fd(),
            _ => self.other.as_fd(),
        }
    }
}

/// A ring with a few requests in it, as a guest leaves it.
fn fill_ring(boot: &File) {
    let write = |at: u64, bytes: &[u8]| boot.write_all_at(bytes, at).unwrap();
    let avail = RING + 16 * u64::from(QUEUE);
    let span = BlockSpan { addr: ADDR, nb_blocks: 2 };
    for (at, request) in
        [Request::Plug(span), Request::State(span), Request::Unplug(span)].into_iter().enumerate()
    {
        let at = at as u64;
        let (head, buffer) = (2 * at, 0x8000 + 0x100 * at);
        write(buffer, &request.to_bytes());
        let link = |flags: u16, next: u16| u32::from(next) << 16 | u32::from(flags);
        let next = u16::try_from(head + 1).unwrap();
        write(RING + 16 * head, &words64(&[buffer, u64::from(link(1, next)) << 32 | 24]));
        write(RING + 16 * head + 16, &words64(&[buffer + 64, u64::from(link(2, 0)) << 32 | 10]));
        write(avail + 4 + 2 * at, &(head as u16).to_le_bytes());
        write(avail + 2, &(at as u16 + 1).to_le_bytes());
    }
}

/// The payload and the descriptors of a request as a good front-end sends it.
fn usual<'a>(request: u32, with: &'a Descriptors) -> (Vec<u8>, Vec<BorrowedFd<'a>>) {
    use protocol::Request as R;
    let is = |known: R| request == u32::from(known);
    let state = |value| protocol::vring_state(0, value);
    let region = |guest_addr: u64, size, user_addr| MemoryRegion {
        guest_addr,
        size,
        user_addr,
        mmap_offset: 0,
    };
    let boot = region(0, BOOT, USER);
    if is(R::SetMemTable) {
        // In no order, as front-ends may have it.
        let table = [region(ADDR, REGION, USER + BOOT), boot];
        return (protocol::mem_table(&table), vec![with.region.as_fd(), with.boot.as_fd()]);
    }
    if is(R::AddMemReg) {
        return (protocol::single_mem_region(boot), vec![with.boot.as_fd()]);
    }
    if is(R::SetLogBase) {
        return (protocol::log_base(REGION, 0), vec![with.region.as_fd()]);
    }
    if is(R::SetVringKick) || is(R::SetVringCall) || is(R::SetVringErr) {
        return (words64(&[0]), vec![with.event.as_fd()]);
    }
    if is(R::SetBackendReqFd) {
        return (Vec::new(), vec![with.channel.as_fd()]);
    }
    if is(R::SetDeviceStateFd) {
        return (words64(&[0]), vec![with.pipe.as_fd()]);
    }
    let body = if is(R::SetFeatures) {
        words64(&[USUAL_FEATURES])
    } else if is(R::SetProtocolFeatures) {
        // All but what is not offered, which would end the connection.
        words64(&[USUAL_PROTOCOL_FEATURES & !protocol::protocol_feature::DEVICE_STATE])
    } else if is(R::SetVringNum) {
        state(QUEUE)
    } else if is(R::SetVringBase) || is(R::GetVringBase) {
        state(0)
    } else if is(R::SetVringEnable) {
        state(1)
    } else if is(R::SetVringAddr) {
        let at = USER + RING;
        let avail = at + 16 * u64::from(QUEUE);
        protocol::vring_addr(0, 0, at, avail + 0x400, avail, 0)
    } else if is(R::GetConfig) || is(R::SetConfig) {
        protocol::config(0, 0, &[0; 56])
    } else if is(R::RemMemReg) {
        protocol::single_mem_region(boot)
    } else if is(R::SetStatus) || is(R::SetLogFd) {
        words64(&[0])
    } else {
        Vec::new()
    };
    (body, Vec::new())
}

/// What a good front-end sends from the beginning to a running ring.
const START: [protocol::Request; 10] = [
    protocol::Request::SetOwner,
    protocol::Request::SetProtocolFeatures,
    protocol::Request::SetFeatures,
    protocol::Request::SetMemTable,
    protocol::Request::SetVringNum,
    protocol::Request::SetVringBase,
    protocol::Request::SetVringAddr,
    protocol::Request::SetVringCall,
    protocol::Request::SetVringKick,
    protocol::Request::SetVringEnable,
];

/// One message, more or less wrong; whether it could be sent.
fn message(hostile: &Connection, with: &Descriptors, input: &mut Input<'_>) -> bool {
    let (choice, request) = (input.u8(), u32::from(input.u8()) % 48);
    let mut flags = VERSION | if choice & 1 == 1 { protocol::FLAG_NEED_REPLY } else { 0 };
    let (mut body, mut fds) = usual(request, with);
    match choice >> 1 & 7 {
        0 => body = input.bytes(usize::from(choice >> 4) * 8).to_vec(),
        1 | 2 => {
            for _ in 0..1 + (choice >> 4) % 4 {
                let (at, value) = (usize::from(input.u8()), input.u8());
                let at = at % body.len().max(1);
                if let Some(byte) = body.get_mut(at) {
                    *byte = value;
                }
            }
        }
        3 => {
            let count = usize::from(choice >> 4 & 3);
            fds = input.bytes(count).iter().map(|&choice| with.pick(choice)).collect();
        }
        4 => {
            flags = u32::from(input.u8());
        }
        _ => {}
    }
    let header = protocol::header(request, flags, u32::try_from(body.len()).unwrap());
    hostile.send_raw(&[&header[..], &body].concat(), &fds).is_ok()
}

fn attack(hostile: &Connection, input: &mut Input<'_>) {
    let with = Descriptors::new();
    let choice = input.u8();
    let prologue = START.iter().take(usize::from(choice) % (START.len() + 1));
    for &request in prologue {
        let (body, fds) = usual(request.into(), &with);
        if hostile.send(request, 0, &body, &fds).is_err() {
            return;
        }
    }
    for _ in 0..MESSAGES {
        if input.is_empty() {
            return;
        }
        if choice & 0x80 != 0 {
            // What stays a message, or never becomes one.
            let len = usize::from(input.u8());
            if hostile.send_raw(input.bytes(len), &[]).is_err() {
                return;
            }
        } else if !message(hostile, &with, input) {
            return;
        }
    }
}

/// Serves one connection on a thread of its own; what ends with it does so within a bound.
fn serve(front_end: impl FnOnce(UnixStream)) {
    let device = &*DEVICE;
    let (front, back) = UnixStream::pair().unwrap();
    let connections = Arc::clone(&device.connections);
    let (done, ended) = std::sync::mpsc::channel();
    let served = std::thread::spawn(move || {
        // An error is what a wrong message ends with.
        let result = connections.serve(back);
        let _ = done.send(());
        result
    });
    front_end(front);
    if ended.recv_timeout(PATIENCE).is_err() && !served.is_finished() {
        panic!("the connection does not end");
    }
    drop(served.join().unwrap());
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut input = Input::new(data);
    serve(|stream| {
        let mut replies = stream.try_clone().unwrap();
        replies.set_read_timeout(Some(PATIENCE)).unwrap();
        attack(&Connection::from_stream(stream), &mut input);
        // Everything that was sent is served before the end is seen.
        let _ = replies.shutdown(std::net::Shutdown::Write);
        let mut chunk = [0; 4096];
        while let Ok(1..) = replies.read(&mut chunk) {}
    });
    serve(|stream| {
        let ram = &DEVICE.ram;
        let frontend = Frontend::new(Connection::from_stream(stream));
        frontend.negotiate(USUAL_FEATURES, USUAL_PROTOCOL_FEATURES).unwrap();
        let _channel = BackendChannel::open(&frontend, Behaviour::AckAtOnce).unwrap();
        frontend.set_mem_table(ram).unwrap();
        let mut driver = MemDriver::at(ram, RING, 128, true).unwrap();
        frontend.start_ring(0, driver.ring()).unwrap();
        assert_eq!(driver.unplug_all().unwrap().kind(), ResponseType::Ack);
        assert_eq!(driver.plug(ADDR, 1).unwrap().kind(), ResponseType::Ack);
        assert_eq!(frontend.config().unwrap().plugged_size, BLOCK);
        assert_eq!(driver.unplug(ADDR, 1).unwrap().kind(), ResponseType::Ack);
        frontend.disconnect();
    });
}
