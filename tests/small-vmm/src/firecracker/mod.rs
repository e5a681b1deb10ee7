//! A Firecracker, as a page-fault handler meets it: memory that is registered and offered as the stock one does
//! (1.17-dev at 81b38b9da), which keeps its own copy of the userfaultfd; and [`Trap`]s in how it is offered.
//!
//! Its threads are the vCPUs: what they read waits for the handler. It has no balloon and no virtio-mem, but
//! [discards](Vm::discard) as these do.

mod trap;

pub use trap::Trap;

use std::io::{ErrorKind, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use migration::lazy::OfferedFaults;
use migration::sys::private_memory::PrivateMemory;
use ram_discard::ByteRange;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Bytes of a page.
pub const PAGE: u64 = 4096;
/// Bytes of a huge page.
pub const HUGE: u64 = 2 << 20;
/// How long a handler may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);

/// A VMM.
#[derive(Clone)]
pub struct Vm(Arc<Inner>);

struct Inner {
    regions: Vec<PrivateMemory>,
    page_sizes: Vec<u64>,
    copy: OwnedFd,
    socket: Mutex<Option<UnixStream>>,
}

impl Vm {
    /// With regions of so many pages of 4096 bytes, backed by pages of a size.
    pub fn new(regions: &[(u64, u64)]) -> Self {
        let map = |(pages, size): &(u64, u64)| PrivateMemory::map(pages * PAGE, *size == HUGE);
        let memory: Vec<_> = regions.iter().map(|region| map(region).unwrap()).collect();
        let uffd = OfferedFaults::open_with_removals().unwrap();
        for region in &memory {
            uffd.register(region.addr(), region.mapping().len()).unwrap();
        }
        let page_sizes = regions.iter().map(|(_, size)| *size).collect();
        let copy = uffd.copy().unwrap();
        Self(Arc::new(Inner { regions: memory, page_sizes, copy, socket: Mutex::default() }))
    }

    /// Its message.
    pub fn text(&self) -> String {
        let mut offset = 0;
        let element = |(region, page_size): (&PrivateMemory, &u64)| {
            let (base, size) = (region.addr(), region.mapping().len());
            offset += size;
            format!(
                "{{\"base_host_virt_addr\":{base},\"size\":{size},\"offset\":{},\"page_size\":{page_size},\
                 \"page_size_kib\":{page_size}}}",
                offset - size
            )
        };
        let elements: Vec<_> = self.0.regions.iter().zip(&self.0.page_sizes).map(element).collect();
        format!("[{}]", elements.join(","))
    }

    /// Address of the first region.
    pub fn base(&self) -> u64 {
        self.0.regions[0].addr()
    }

    /// The userfaultfd.
    pub fn uffd(&self) -> &OwnedFd {
        &self.0.copy
    }

    /// Connects and sends the message; the connection stays open.
    pub fn load(&self, path: &Path) {
        use std::os::fd::AsFd;
        let socket = connect(path);
        send(&socket, self.text().as_bytes(), &[self.0.copy.as_fd()]);
        *self.0.socket.lock().unwrap() = Some(socket);
    }

    /// As [`load`](Self::load), with a trap.
    pub fn load_with(&self, path: &Path, trap: Trap) {
        *self.0.socket.lock().unwrap() = trap::load(self, path, trap);
    }

    fn locate(&self, page: u64) -> (&PrivateMemory, u64) {
        let mut at = page * PAGE;
        for region in &self.0.regions {
            if at < region.mapping().len() {
                return (region, at);
            }
            at -= region.mapping().len();
        }
        panic!("page {page} is in no region")
    }

    /// Reads the first byte of a page, as a vCPU does.
    pub fn read(&self, page: u64) -> u8 {
        let (region, at) = self.locate(page);
        let mut byte = [0];
        region.mapping().read(at, &mut byte);
        byte[0]
    }

    /// Writes the first byte of a page.
    pub fn write(&self, page: u64, byte: u8) {
        let (region, at) = self.locate(page);
        region.mapping().write(at, &[byte]);
    }

    /// Discards, as for a balloon or virtio-mem; in one region.
    pub fn discard(&self, range: ByteRange) {
        let (region, at) = self.locate(range.start() / PAGE);
        region.discard(ByteRange::new(at, range.len()).unwrap()).unwrap();
    }

    /// Whether a page is there, without touching it.
    pub fn is_resident(&self, page: u64) -> bool {
        use std::os::unix::fs::FileExt;
        let (region, at) = self.locate(page);
        let entry = (region.addr() + at) / PAGE * 8;
        let mut bytes = [0; 8];
        std::fs::File::open("/proc/self/pagemap")
            .unwrap()
            .read_exact_at(&mut bytes, entry)
            .unwrap();
        bytes[7] & 0x80 != 0
    }
}

/// Connects to a handler, of which there is the socket's file, and which listens soon if it does not yet.
pub fn connect(path: &Path) -> UnixStream {
    let begun = Instant::now();
    loop {
        match UnixStream::connect(path) {
            Err(error) if error.kind() == ErrorKind::ConnectionRefused => {
                assert!(begun.elapsed() < PATIENCE, "{}: {error}", path.display());
                thread::sleep(Duration::from_millis(1));
            }
            connected => return connected.unwrap(),
        }
    }
}

/// Sends bytes with descriptors.
pub fn send(socket: &UnixStream, bytes: &[u8], fds: &[BorrowedFd<'_>]) {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(8))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let sent = sendmsg(socket, &[IoSlice::new(bytes)], &mut control, SendFlags::NOSIGNAL);
    assert_eq!(sent.unwrap(), bytes.len());
}
